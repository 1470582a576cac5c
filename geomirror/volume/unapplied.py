"""What sealed epochs that no image holds yet say about blocks, for readers.

```
 block ─▶ in a table of (applied, promoted]? ─ DATA ─▶ the journal, at its address
                                             ├ ZERO ─▶ zeros
                                             └ no ───▶ the image
```
A secondary that becomes the primary has such epochs: applying them takes as long as its disk needs,
and writers do not wait for that. Passes apply them as always, behind the readers: a block that a
pass is writing is in these tables, so nobody reads it from the image meanwhile.
The tables are read when somebody first reads. Whoever reads holds a pin on the journal.
Deliberately not here: which epochs these are (`engine_layers`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.arrays import run_heads, run_lengths
from geomirror.volume.epoch_table import Table
from geomirror.volume.image import Image
from geomirror.volume.view_index import IMAGE, ZERO
from geomirror.volume.view_index import Layer as TableIndex


class UnappliedLayer:
    """A `Layer` of epochs in the journal.

    :param load: their merged table; called on the thread of whoever reads first.
    :param read: journal contents by (address, length).
    """

    def __init__(self, load: Callable[[], Table], read: Callable[[int, int], bytes]) -> None:
        self._load = load
        self._read = read
        self._index: TableIndex | None = None

    def may_hold(self, volume: int, first: int, count: int) -> bool:
        """See `Layer`."""
        index = self._index
        if index is None:
            return True
        places = np.full(count, IMAGE, dtype=np.int64)
        index.enter(places, volume, first)
        return bool((places != IMAGE).any())

    def read(self, image: Image, offset: int, length: int) -> bytes:
        """See `Layer`. Two threads may load the same tables: either's will do."""
        index = self._index
        if index is None:
            self._index = index = TableIndex.of([self._load()])
        first = offset // BLOCK_BYTES
        count = -(-(offset + length) // BLOCK_BYTES) - first
        places = np.full(count, IMAGE, dtype=np.int64)
        index.enter(places, image.index, first)
        if not bool((places != IMAGE).any()):
            return image.read(offset, length)
        content = bytearray(count * BLOCK_BYTES)
        is_next = places[1:] - places[:-1] == np.where(places[:-1] < 0, 0, BLOCK_BYTES)
        is_next &= (places[1:] < 0) == (places[:-1] < 0)
        heads = run_heads(~is_next)
        lengths = run_lengths(heads, count).tolist()
        for at, blocks in zip(heads.tolist(), lengths, strict=True):
            place = int(places[at])
            if place == ZERO:
                continue
            start = (first + at) * BLOCK_BYTES
            size = min(blocks * BLOCK_BYTES, image.size_bytes - start)
            part = image.read(start, size) if place == IMAGE else self._read(place, size)
            content[at * BLOCK_BYTES : at * BLOCK_BYTES + size] = part
        begin = offset - first * BLOCK_BYTES
        return bytes(memoryview(content)[begin : begin + length])
