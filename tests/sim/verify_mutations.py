"""Ways to break a verify, each of which the simulator has to find: false alarms, and missed rot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from geomirror.volume.engine import Engine
from geomirror.volume.epoch_content import EpochContent
from geomirror.volume.image import Image
from geomirror.volume.view_index import IMAGE
from geomirror.wan_protocol import verify_answering
from geomirror.wan_protocol.verify_answering import Pinned, VerifyAnswering
from geomirror.wan_protocol.verify_healing import HealJob
from geomirror.wan_protocol.verify_run import Position, VerifyRun
from tests.sim.sync_mutations import Patch


def tables_not_looked_at() -> list[Patch]:
    """What is sealed and not applied yet is not part of the content that is compared."""

    def places(_self: EpochContent, _volume: int, _first: int, count: int) -> Any:
        return np.full(count, IMAGE, dtype=np.int64)

    return [(EpochContent, "_places", places)]


def last_region_not_compared() -> list[Patch]:
    """The last region of what is asked about is never different."""
    real = verify_answering.different_regions

    def different(ask: Any, job: Any) -> Any:
        last = (ask.block_count - 1) // ask.region_blocks
        found, count = real(ask, job)
        return [each for each in found if each[0] != last], count

    return [(verify_answering, "different_regions", different)]


def newest_epoch_compared() -> list[Patch]:
    """The secondary compares what it has, at whatever epoch that is."""
    real = VerifyAnswering._keep

    def keep(self: VerifyAnswering, pinned: Pinned) -> None:
        if self.engine.sealed_epoch >= pinned.epoch and pinned.asks:
            pinned.epoch = self.engine.sealed_epoch
            real(self, pinned)

    return [(VerifyAnswering, "_keep", keep)]


def healed_with_what_the_image_holds() -> list[Patch]:
    """Blocks are written again as the primary's image has them, whatever waits in the journal."""
    real = HealJob.__init__

    def init(self: HealJob, engine: Engine, blocks: list[tuple[int, int]]) -> None:
        real(self, engine, blocks)
        for each in self.blocks:
            image = engine.images[each.volume]
            each.reading.run = partial(_read_image, each, image)  # type: ignore[method-assign]

    return [(HealJob, "__init__", init)]


def _read_image(each: Any, image: Image) -> None:
    each.reading.buffers = [image.read_existing(each.block).ljust(each.length, b"\0")]


def goes_on_behind_what_was_asked() -> list[Patch]:
    """An interrupted verify goes on where nothing was asked yet, whatever was not answered."""

    def position(self: VerifyRun) -> Position:
        self.found.volume, self.found.block = self.cursor
        return self.found

    return [(VerifyRun, "position", position)]


VERIFY_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    tables_not_looked_at,
    last_region_not_compared,
    newest_epoch_compared,
    healed_with_what_the_image_holds,
    goes_on_behind_what_was_asked,
)
