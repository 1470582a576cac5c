"""What a small database under pgbench writes, epoch by epoch, made from a seed.

```
 WAL      sequential, in a ring of 16 MiB segments that are used again; half of it compresses
 heap     pages of rows; half of the updates go to a tenth of the pages, each changes three rows
 hot      the last page of the history, tellers, branches: a few blocks, in every epoch
```
Pages keep their content between updates, as a database's do, so that what undo keeps of them is
what it would keep of one.
"""

from __future__ import annotations

import random

from geomirror.limits import BLOCK_BYTES, MIB

EPOCHS_PER_SECOND = 4
WAL_BLOCKS, HEAP_BLOCKS, HOT_BLOCKS = 24, 12, 4
"""Of one epoch: 640 KiB/s together, about 100 transactions a second."""
WAL_BYTES = 64 * MIB
_ROW_BYTES = 96
_ROWS = BLOCK_BYTES // _ROW_BYTES
_NOISE_BYTES = 4 * MIB


class DatabaseTrace:
    """Epochs of {block: content} of one volume.

    :param volume_bytes: WAL at its beginning, then hot blocks, then the heap.
    """

    def __init__(self, volume_bytes: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._noise = self._random.randbytes(_NOISE_BYTES)
        self._wal_blocks = min(WAL_BYTES, volume_bytes // 4) // BLOCK_BYTES
        self._heap_first = self._wal_blocks + HOT_BLOCKS
        self._heap_count = volume_bytes // BLOCK_BYTES - self._heap_first
        self._wal_next = 0
        self._pages: dict[int, bytearray] = {}

    def epoch(self) -> dict[int, bytes]:
        """The next one, in order of block."""
        blocks: dict[int, bytes] = {}
        for _ in range(WAL_BLOCKS):
            blocks[self._wal_next] = self._wal_block()
            self._wal_next = (self._wal_next + 1) % self._wal_blocks
        for block in range(self._wal_blocks, self._heap_first):
            blocks[block] = self._update(block)
        for _ in range(HEAP_BLOCKS):
            span = self._heap_count if self._random.random() < 0.5 else self._heap_count // 10
            block = self._heap_first + self._random.randrange(max(1, span))
            blocks[block] = self._update(block)
        return dict(sorted(blocks.items()))

    def fill(self) -> dict[int, bytes]:
        """The volume at the beginning; to be applied before the first epoch."""
        blocks = {block: self._wal_block() for block in range(self._wal_blocks)}
        last = self._heap_first + self._heap_count
        return blocks | {block: self._update(block) for block in range(self._wal_blocks, last)}

    def _noise_of(self, length: int) -> bytes:
        start = self._random.randrange(_NOISE_BYTES - length)
        return self._noise[start : start + length]

    def _wal_block(self) -> bytes:
        return self._noise_of(BLOCK_BYTES // 2) + b"heap update ".ljust(16) * (BLOCK_BYTES // 32)

    def _update(self, block: int) -> bytes:
        page = self._pages.get(block)
        if page is None:
            row = b"%-12d" % block + b" " * (_ROW_BYTES - 12)
            page = self._pages[block] = bytearray((row * (_ROWS + 1))[:BLOCK_BYTES])
        for _ in range(3):
            at = self._random.randrange(_ROWS) * _ROW_BYTES
            page[at : at + 12] = self._noise_of(12)
        return bytes(page)
