"""Ways to break a resync, each of which the simulator has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geomirror.volume.engine import Engine
from geomirror.volume.undo_open import OpenPass
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


def unsealed_copied() -> list[Patch]:
    """A resync copies what is in no sealed epoch yet."""
    return [(Engine, "unsealed_blocks", lambda self, *where: [])]


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


RESYNC_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    saved_after_the_overwrite,
    before_images_not_synced,
    unsealed_copied,
    late_copy_wins,
)
