"""The volumes as they were at the end of a branch: its base, overlaid by what it holds.

```
 block ─▶ in the branch? ─ yes ─▶ the branch's file
                         └ no ──▶ view of its base: undo, image
```
Deliberately not here: who may look at it, and for how long (the node).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.branches import BranchRecord, BranchStore
from geomirror.volume.epoch_table import KIND_ZERO, Table
from geomirror.volume.image import Image
from geomirror.volume.merge import keys_of
from geomirror.volume.store import Store
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import UndoReader
from geomirror.volume.view import View


class BranchOwner(Protocol):
    """What viewing a branch needs of an engine."""

    store: Store
    images: dict[int, Image]
    undo: UndoStore
    branches: BranchStore


class BranchView:
    """All volumes at the end of a branch. Reads block and may run on several threads at once."""

    def __init__(
        self, record: BranchRecord, base: View, volumes: Collection[int], reader: UndoReader
    ) -> None:
        self.record = record
        self._base = base
        self._volumes = volumes
        """Those that are there now."""
        self._reader = reader
        self._table: Table = reader.located(0)
        self._keys = keys_of(self._table)
        self._sizes = {each.index: each.size_bytes for each in record.volumes}

    @classmethod
    def open(cls, owner: BranchOwner, name: str, entries_max: int) -> BranchView:
        """Blocking.

        :raises NotFoundError: no such branch, or what it lies on is not kept any more.
        :raises IntegrityError: it is damaged.
        """
        record = owner.branches.get(name)
        undo = owner.undo
        images = {index: image.physical for index, image in owner.images.items()}
        base = View(
            record.base_epoch,
            images,
            lambda: undo.history,
            owner.store.open,
            entries_max,
            undo.suspect,
        )
        return cls(record, base, images, owner.branches.reader(name))

    def prepare(self) -> None:
        """Index what was changed since the base, which the first read would do otherwise."""
        self._base.prepare()

    def size_of(self, volume: int) -> int:
        """Bytes of a volume then, 0 if it was not there."""
        found = self._sizes.get(volume)
        return self._base_size_of(volume) if found is None else found

    def _base_size_of(self, volume: int) -> int:
        """Bytes at the base; 0 of a volume that the tail added, which is nowhere else now."""
        return self._base.size_of(volume) if volume in self._volumes else 0

    def read(self, volume: int, offset: int, length: int) -> bytes:
        """The bytes of a range, at most some MiB. As `View.read`."""
        if not length:
            return b""
        first = offset // BLOCK_BYTES
        count = -(-(offset + length) // BLOCK_BYTES) - first
        start = offset - first * BLOCK_BYTES
        held = self._held(volume, first, count)
        if len(held) == count:
            content = bytearray(count * BLOCK_BYTES)
        else:
            content = bytearray(start)
            inside = min(length, self._base_size_of(volume) - offset)
            if inside > 0:
                content += self._base.read(volume, offset, inside)
            content += bytes(count * BLOCK_BYTES - len(content))
        for block in held:
            data = self._reader.read_block(volume, block)
            assert data is not None
            at = (block - first) * BLOCK_BYTES
            content[at : at + BLOCK_BYTES] = data
        return bytes(memoryview(content)[start : start + length])

    def runs(self) -> list[tuple[int, int, int, bool]]:
        """(volume, first block, count, is zero) of what the branch holds, ascending."""
        return [
            (volume, block, count, kind == KIND_ZERO)
            for volume, kind, block, count in self._reader.entries()
        ]

    def close(self) -> None:
        """Release the file."""
        self._reader.close()

    def _held(self, volume: int, first: int, count: int) -> list[int]:
        """Blocks of a range that the branch holds, ascending."""
        base = keys_of(_entry(volume, first))[0]
        low = max(int(np.searchsorted(self._keys, base, side="right")) - 1, 0)
        high = int(np.searchsorted(self._keys, base + count, side="left"))
        found: list[int] = []
        part = self._table[low:high]
        starts = self._keys[low:high] - base
        for start, length in zip(starts.tolist(), part["count"].tolist(), strict=True):
            found.extend(range(first + max(start, 0), first + min(start + length, count)))
        return found


def _entry(volume: int, block: int) -> Table:
    wanted: Table = np.zeros(1, dtype=[("volume", "<u2"), ("block", "<u8")])
    wanted["volume"], wanted["block"] = volume, block
    return wanted
