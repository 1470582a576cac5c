"""Ways to break the growth of volumes, for `mutations`."""

from __future__ import annotations

from typing import Any

from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.engine import Engine
from geomirror.volume.undo_file import UndoWriter

Patch = tuple[type | Any, str, Any]


def sizes_not_applied() -> list[Patch]:
    """A secondary's image keeps its size when it applies an epoch with another one."""
    real = Engine._grow_images

    def grow_images(self: Engine, changes: Any) -> None:
        if self.superblock.role == "primary":
            real(self, changes)

    return [(Engine, "_grow_images", grow_images)]


def sizes_before_their_epoch() -> list[Patch]:
    """A secondary's image has its new size when the epoch is committed, not when it is applied."""
    real = Engine.commit

    def commit(self: Engine, epoch: Any, *rest: Any) -> None:
        real(self, epoch, *rest)
        for change in epoch.changes:
            if change.index in self.images:
                self.images[change.index] = self.images[change.index].grown(change.size_bytes)

    return [(Engine, "commit", commit)]


def grown_bytes_not_zeroed() -> list[Patch]:
    """What a backing holds beyond a volume's old end is in the volume when it grows."""

    def grow(self: DirtyIndex, size_bytes: int, lsn: int) -> None:
        self.size_bytes = size_bytes

    return [(DirtyIndex, "grow", grow)]


def old_sizes_not_kept() -> list[Patch]:
    """The undo of a pass does not say how large volumes were before."""
    return [(UndoWriter, "add_size", lambda self, volume, size_bytes: None)]


GROWTH_MUTATIONS = (
    sizes_not_applied,
    sizes_before_their_epoch,
    grown_bytes_not_zeroed,
    old_sizes_not_kept,
)
