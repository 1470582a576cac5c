"""The views that checks look through: a file of undo is parsed once while nothing has changed it.

Checks open views of many epochs, each of which reads the tables of all later passes: of the same
bytes the same tables are made. What a file holds is still what counts: a change of any byte of it,
by whomever, makes it read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomirror.volume.undo_file import PassInfo
from geomirror.volume.view import View
from geomirror.volume.view_index import PassRuns
from tests.sim.disk_file import Inode

if TYPE_CHECKING:
    from tests.sim.node import SimNode

FORGET_AT = 1024
"""Passes remembered for a node; its undo has fewer, but for those that were merged meanwhile."""


@dataclass
class _Remembered:
    """A pass as it was read: shaped like what read it."""

    inode: Inode
    changes: int
    tables: PassRuns

    def __post_init__(self) -> None:
        self.chunks, self.runs = self.tables.chunks, self.tables.runs


class UndoMemory:
    """What was read of a node's undo in one life."""

    def __init__(self) -> None:
        self._passes: dict[tuple[str, int], _Remembered] = {}

    def find(self, info: PassInfo, inode: Inode | None) -> PassRuns | None:
        """The pass, if its file is what it was."""
        found = self._passes.get((info.name, info.start))
        is_same = found is not None and found.inode is inode and found.changes == inode.changes
        return found if is_same else None

    def keep(self, info: PassInfo, inode: Inode, tables: PassRuns) -> PassRuns:
        """Remember a pass that was just read."""
        if len(self._passes) >= FORGET_AT:
            self._passes.clear()
        kept = _Remembered(inode, inode.changes, tables)
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

    def _read_tables(self, info: PassInfo) -> PassRuns:
        found = self._memory.find(info, self._store.inode(info.name))
        if found is not None:
            return found
        tables = super()._read_tables(info)
        inode = self._store.inode(info.name)
        assert inode is not None
        return self._memory.keep(info, inode, tables)
