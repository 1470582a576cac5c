"""Ways to break a resync, each of which the simulator has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geomirror.volume.engine import Engine
from geomirror.volume.image import Image
from geomirror.volume.tree_digest import TreeDigest
from geomirror.volume.undo_open import OpenPass
from geomirror.wan_protocol.resync_job import CompareJob
from geomirror.wan_protocol.resync_receiver import ResyncReceiver
from geomirror.wan_protocol.resync_write import ResyncWriteJob
from tests.sim.sync_mutations import Patch


def saved_after_the_overwrite() -> list[Patch]:
    """The before-image of a copied block is saved when the block is overwritten already."""
    real = ResyncWriteJob.run

    def run(self: ResyncWriteJob) -> None:
        open_pass, later = self.open_pass, []
        self._save = lambda *what: later.append(what)  # type: ignore[method-assign]
        real(self)
        del self._save
        if open_pass is not None:
            for what in later:
                self._save(*what)

    return [(ResyncWriteJob, "run", run)]


def before_images_not_synced() -> list[Patch]:
    """Before-images count as durable when they are written."""
    real = OpenPass._opened

    class Unsynced:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def fdatasync(self) -> None:
            pass

    def opened(self: OpenPass) -> Any:
        return Unsynced(real(self))

    return [(OpenPass, "_opened", opened)]


def late_copy_wins() -> list[Patch]:
    """A copied frame that comes once more overwrites what newer epochs brought."""
    real_written, real_complete = ResyncReceiver.written, Engine.complete_apply

    def written(self: ResyncReceiver, job: ResyncWriteJob) -> int:
        self.engine._late = job  # type: ignore[attr-defined]
        return real_written(self, job)

    def complete_apply(self: Engine, job: Any) -> None:
        real_complete(self, job)
        late = getattr(self, "_late", None)
        if late is not None and self.superblock.data_state == "consistent":
            del self._late  # type: ignore[attr-defined]
            late.open_pass = None
            late.run()

    return [(ResyncReceiver, "written", written), (Engine, "complete_apply", complete_apply)]


def answered_from_memory() -> list[Patch]:
    """A copy says what it held when it was asked first; a newer block counts as equal to that."""
    real = TreeDigest.leaves
    remembered: dict[tuple[int, ...], Any] = {}

    class Remembered:
        def __init__(self, image: Image, offset: int, stop: int) -> None:
            self._offset = offset
            self._data = bytes(image.read(offset, stop - offset))

        def data_ranges(self, offset: int, length: int, *_: Any) -> list[tuple[int, int]]:
            return [(offset, length)]

        def read(self, offset: int, length: int) -> bytes:
            return self._data[offset - self._offset : offset - self._offset + length]

    def leaves(self: TreeDigest, content: Any, offset: int, stop: int, unit: int) -> list[bytes]:
        if isinstance(content, Image):
            where = (id(content.file._store), content.index, offset, stop, unit)  # type: ignore[attr-defined]
            content = remembered.setdefault(where, Remembered(content, offset, stop))
        return real(self, content, offset, stop, unit)

    return [(TreeDigest, "leaves", leaves)]


def zeros_there_are_equal() -> list[Patch]:
    """A node that is zeros at the peer counts as equal."""
    real = CompareJob.run

    def run(self: CompareJob) -> None:
        real(self)
        self.equal += [(part.first, part.first + part.blocks) for part in self.zeros]
        self.zeros = []

    return [(CompareJob, "run", run)]


def unsealed_copied() -> list[Patch]:
    """A resync copies writes of the epoch that is open, and the copy is consistent without it."""

    def unsealed_blocks(self: Engine, volume: int, first_block: int, count: int) -> list[int]:
        return []

    return [(Engine, "unsealed_blocks", unsealed_blocks)]


RESYNC_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    saved_after_the_overwrite,
    before_images_not_synced,
    late_copy_wins,
    answered_from_memory,
    zeros_there_are_equal,
    unsealed_copied,
)
