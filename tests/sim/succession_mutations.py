"""Ways to break promotions and returns, each of which the simulator has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geomirror.cluster.history import Comparison
from geomirror.volume.engine import Engine
from geomirror.volume.engine_held import HeldCopy
from geomirror.volume.generations import chain_records
from geomirror.volume.undo import UndoStore
from geomirror.wan_protocol import session
from tests.sim.sync_mutations import Patch


def stale_token_accepted() -> list[Patch]:
    """A member follows a primary whose token is lower than one that it has seen."""
    return [(session, "outranks", lambda theirs, mine: True)]


def claim_not_durable() -> list[Patch]:
    """A primary stops for a higher token, and has forgotten that after a crash."""

    def supersede(self: Engine, chain: Any, *starts: Any) -> None:
        self.superblock.superseded_by = chain_records(chain)

    return [(Engine, "supersede", supersede)]


def orphan_tail_dropped() -> list[Patch]:
    """A rollback keeps no branch of what it cuts off."""
    return [(Engine, "_tail", lambda self, *position: None)]


def diverged_follows() -> list[Patch]:
    """Who has a tail of its own follows another history as it is."""
    return [(Comparison, "may_follow", property(lambda self: True))]


def undo_of_the_tail_stays() -> list[Patch]:
    """The undo of epochs that were cut off counts as that of others with their numbers."""

    def roll_back(self: UndoStore, to_epoch: int) -> None:
        self.drop_joint()

    return [(UndoStore, "roll_back", roll_back)]


def resync_not_counted() -> list[Patch]:
    """Whoever has all of a resync, and applied not all of it yet, counts as in the middle of it:
    promoted, it goes back to the state from before."""
    return [(HeldCopy, "has_all_of_resync", property(lambda self: False))]


SUCCESSION_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    stale_token_accepted,
    claim_not_durable,
    orphan_tail_dropped,
    diverged_follows,
    undo_of_the_tail_stays,
    resync_not_counted,
)
