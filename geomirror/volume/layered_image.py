"""An image that is not in the state that is meant yet, read as if it were.

```
 read ─▶ may the layer hold a block of it? ─ no ──▶ the file, at once
                                           └ yes ─▶ the layer: journal, undo, or the file
```
A fresh primary serves such images while what belongs into them is written behind its readers.
Whoever writes to an image, or looks at it through undo, takes the one below: `physical`.
Deliberately not here: what a layer holds (`unapplied`, `held_layer`), its end (`engine_layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.volume.image import Image
from geomirror.volume.store import Buffer

_STEP_BYTES = 16 * MIB
"""A part of a range that is asked for as a whole: one that may be in the layer counts as data."""


class Layer(Protocol):
    """The newer (or older) contents of some blocks. On any thread."""

    def may_hold(self, volume: int, first: int, count: int) -> bool:
        """Whether blocks of the range may be in it; does not wait for a disk."""

    def read(self, image: Image, offset: int, length: int) -> bytes:
        """The bytes of a range, from the layer or the physical image. Blocking."""


class LayeredImage(Image):
    """A volume's image below a layer. Nothing is written through it."""

    def __init__(self, physical: Image, layer: Layer) -> None:
        super().__init__(physical.index, physical.name, physical.size_bytes, physical.file)
        self._physical = physical
        self._layer = layer

    @property
    def physical(self) -> Image:
        """The image below the layer."""
        return self._physical

    def grown(self, size_bytes: int) -> Image:
        """See `Image`."""
        return LayeredImage(self._physical.grown(size_bytes), self._layer)

    def read(self, offset: int, length: int) -> bytes:
        """See `Image`."""
        assert 0 <= offset <= offset + length <= self.size_bytes
        if not self._may_hold(offset, length):
            return super().read(offset, length)
        return self._layer.read(self._physical, offset, length)

    def try_read(self, offset: int, length: int) -> bytes | bytearray | None:
        """See `Image`: what may be in the layer has to be waited for."""
        return None if self._may_hold(offset, length) else super().try_read(offset, length)

    def read_block(self, block: int) -> bytes:
        """See `Image`."""
        return self.read(block * BLOCK_BYTES, self.block_bytes(block))

    def read_existing(self, block: int) -> bytes:
        """See `Image`."""
        length = min(BLOCK_BYTES, self.size_bytes - block * BLOCK_BYTES)
        return self.read(block * BLOCK_BYTES, length) if length > 0 else b""

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Image`."""
        return [self.read(offset, length) for offset, length in ranges]

    def data_ranges(
        self, offset: int, length: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """See `Image`; what is near to something in the layer counts as data."""
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // _STEP_BYTES + 1) * _STEP_BYTES)
            part = [(offset, stop - offset)]
            if not self._may_hold(*part[0]):
                part = super().data_ranges(*part[0])
            for start, size in part:
                if found and (sum(found[-1]) == start or len(found) - 1 == count_max):
                    found[-1] = (found[-1][0], start + size - found[-1][0])
                else:
                    found.append((start, size))
            offset = stop
        return found

    def write_runs(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """Never."""
        raise AssertionError("nothing is written through a layer")

    def zero(self, first_block: int, count: int, *, punch: bool) -> None:
        """Never."""
        raise AssertionError("nothing is written through a layer")

    def _may_hold(self, offset: int, length: int) -> bool:
        first = offset // BLOCK_BYTES
        count = -(-(offset + length) // BLOCK_BYTES) - first
        return self._layer.may_hold(self.index, first, count)
