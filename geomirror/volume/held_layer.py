"""The state that a resync held, read while a primary's images go back to it, and passes go on.

```
 block ─▶ applied since the promotion? ─ yes ─▶ the image
                                       └ no ──▶ in the open undo pass? ─ yes ─▶ its before-image
                                                                       └ no ──▶ the image
```
A block that goes back gets what its before-image says, so both answers are the same at every
moment, and readers need no lock. When all of them are back the pass is taken out of the history,
and everything is read from the image (`View.read` looks again).
Invariant: a block is superseded here before the dirty index forgets it, and for ever.
"""

from __future__ import annotations

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.epoch_table import Table, empty_table
from geomirror.volume.image import Image
from geomirror.volume.saved_blocks import SavedBlocks
from geomirror.volume.view import View


class HeldLayer:
    """A `Layer` of an open undo pass.

    :param view: of the epoch that it leads to.
    :param saved: the blocks that it holds; not changed any more.
    :param superseded: the blocks that were applied since; grows.
    """

    def __init__(self, view: View, saved: SavedBlocks, superseded: SavedBlocks) -> None:
        self._view = view
        self._saved = saved
        self._superseded = superseded

    def may_hold(self, volume: int, first: int, count: int) -> bool:
        """See `Layer`."""
        return self._saved.may_hold(volume, first, count)

    def read(self, image: Image, offset: int, length: int) -> bytes:
        """See `Layer`."""
        first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        if not self._superseded.may_hold(image.index, first, end - first):
            return self._view.read(image.index, offset, length)
        held = self._superseded.missing(_run(image.index, first, end - first))
        content = bytearray(image.read(offset, length))
        for block, count in held[["block", "count"]].tolist():
            low = max(block * BLOCK_BYTES, offset)
            high = min((block + count) * BLOCK_BYTES, offset + length)
            content[low - offset : high - offset] = self._view.read(image.index, low, high - low)
        return bytes(content)


def _run(volume: int, first: int, count: int) -> Table:
    table = empty_table(1)
    table["volume"], table["block"], table["count"] = volume, first, count
    return table
