"""Ways to break what flushes promise and members say of it; see `mutations`."""

from __future__ import annotations

from typing import Any

from geomirror.wan_protocol.in_sync_set import InSyncSet
from geomirror.wan_protocol.messages import AnnounceAcknowledge
from geomirror.wan_protocol.peer_flushes import PeerFlushes
from geomirror.wan_protocol.peer_standings import PeerStandings
from geomirror.wan_protocol.standing_keeper import StandingKeeper

Patch = tuple[type | Any, str, Any]
"""Object, attribute, replacement."""


def flush_without_peers() -> list[Patch]:
    """A synchronous flush is answered when its epoch is sealed here."""

    def is_held(self: PeerFlushes, epoch: int) -> bool:
        return self.engine.sealed_epoch >= epoch

    return [(PeerFlushes, "_is_held", is_held)]


def degraded_before_saved() -> list[Patch]:
    """A flush is answered without a peer before it is durable that the peer is out of sync."""

    def required(self: PeerFlushes) -> set[str]:
        return set(self.policy.acks) & self._in_sync

    return [(PeerFlushes, "_required", required)]


def open_epoch_not_confirmed() -> list[Patch]:
    """A standing counts only sealed epochs as confirmed; a flush may have answered later writes."""
    real = PeerStandings.standing

    def standing(self: PeerStandings) -> Any:
        confirmed_epoch = self.confirmed_epoch
        self.confirmed_epoch = min(confirmed_epoch, self.engine.sealed_epoch)
        try:
            return real(self)
        finally:
            self.confirmed_epoch = confirmed_epoch

    return [(PeerStandings, "standing", standing)]


def rules_given_up_untold() -> list[Patch]:
    """`block` ends at once, though a member that is away relies on it."""
    return [(InSyncSet, "_relied_on", lambda self: set())]


def standing_acknowledged_early() -> list[Patch]:
    """A secondary says that it knows a standing before that is durable there."""
    real = StandingKeeper.take_standing

    def take_standing(self: StandingKeeper, message: Any) -> None:
        real(self, message)
        self._send(AnnounceAcknowledge(self.session, message.standing.version))

    return [(StandingKeeper, "take_standing", take_standing)]


SYNC_MUTATIONS = (
    flush_without_peers,
    degraded_before_saved,
    open_epoch_not_confirmed,
    rules_given_up_untold,
    standing_acknowledged_early,
)
