"""Ways to break a verify, each of which the simulator has to find: false alarms, and missed rot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from geomirror.volume.epoch_content import EpochContent
from geomirror.volume.view_index import IMAGE
from geomirror.wan_protocol import verify_answering
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


VERIFY_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    tables_not_looked_at,
    last_region_not_compared,
)
