"""The views that checks look through: a file of undo is parsed once while nothing has changed it.

Checks open views of many epochs, each of which reads the tables of all later passes: of the same
bytes the same tables are made. What a file holds is still what counts: a change of any byte of it,
by whomever, makes it read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomirror.volume.epoch_table import KIND_DATA, Table
from geomirror.volume.undo_file import PLACE_BITS, PassInfo
from geomirror.volume.view import View
from geomirror.volume.view_index import PassReader
from tests.sim.disk_file import Inode

if TYPE_CHECKING:
    from tests.sim.node import SimNode

FORGET_AT = 1024
"""Passes remembered for a node; its undo has fewer, but for those that were merged meanwhile."""


@dataclass
class _Remembered:
    """A pass as it was read: shaped like the reader that read it."""

    inode: Inode
    changes: int
    reader: PassReader

    def __post_init__(self) -> None:
        self.chunks = self.reader.chunks
        self._table = self.reader.located(0)
        self._data = (self._table["kind"] == KIND_DATA).nonzero()[0]
        self._sizes = self.reader.old_sizes()
        self.reader.close()

    def located(self, number: int) -> Table:
        """See `UndoReader.located`."""
        table = self._table.copy()
        table["address"][self._data] += np.uint64(number << PLACE_BITS)
        return table

    def old_sizes(self) -> dict[int, int]:
        """See `UndoReader.old_sizes`."""
        return self._sizes

    def close(self) -> None:
        """It is closed."""


class UndoMemory:
    """What was read of a node's undo in one life."""

    def __init__(self) -> None:
        self._passes: dict[tuple[str, int], _Remembered] = {}

    def find(self, info: PassInfo, inode: Inode | None) -> PassReader | None:
        """The pass, if its file is what it was."""
        found = self._passes.get((info.name, info.start))
        is_same = found is not None and found.inode is inode and found.changes == inode.changes
        return found if is_same else None

    def keep(self, info: PassInfo, inode: Inode, reader: PassReader) -> PassReader:
        """Remember a pass that was just opened."""
        if len(self._passes) >= FORGET_AT:
            self._passes.clear()
        kept = _Remembered(inode, inode.changes, reader)
        self._passes[info.name, info.start] = kept
        return kept


class CheckedView(View):
    """A node's volumes as its undo gives them at an epoch."""

    def __init__(self, node: SimNode, epoch: int) -> None:
        engine = node.engine
        images, undo = engine.physical_images, engine.undo
        self._store, self._memory = node.store, node.undo_memory
        entries_max = engine.limits.view_entries_max
        super().__init__(epoch, images, lambda: undo.history, engine.store.open, entries_max)

    def _open_reader(self, info: PassInfo) -> PassReader:
        found = self._memory.find(info, self._store.inode(info.name))
        if found is not None:
            return found
        reader = super()._open_reader(info)
        inode = self._store.inode(info.name)
        assert inode is not None
        return self._memory.keep(info, inode, reader)
