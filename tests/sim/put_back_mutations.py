"""Ways to overlook an older disk that was put back, each of which the simulator has to find."""

from __future__ import annotations

from collections.abc import Callable

from geomirror.cluster import history
from geomirror.wan_protocol import session
from geomirror.wan_protocol.in_sync_set import InSyncSet
from tests.sim.sync_mutations import Patch


def older_primary_followed() -> list[Patch]:
    """A copy follows its primary whatever that has lost."""
    return [(session, "_lost_there", lambda *_: None)]


def starts_not_compared() -> list[Patch]:
    """Only numbers and hashes tell that a primary has lost epochs."""
    return [(history, "_compare_starts", lambda mine, theirs: None)]


def older_copy_not_noticed() -> list[Patch]:
    """Nobody compares what a copy has with what it said."""
    return [(InSyncSet, "_compare_word", lambda self, sender, message: None)]


OLDER_PRIMARIES: tuple[Callable[[], list[Patch]], ...] = (
    older_primary_followed,
    starts_not_compared,
)
PUT_BACK_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    *OLDER_PRIMARIES,
    older_copy_not_noticed,
)
