"""Ways to break a resync, each of which the simulator has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geomirror.volume.undo_open import OpenPass
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


RESYNC_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    saved_after_the_overwrite,
    before_images_not_synced,
)
