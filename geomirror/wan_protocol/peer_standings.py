"""Tells the members where the primary is and who is in sync, and knows who knows.

```
 version durable here ─▶ Announce ─▶ at each peer with a session ─▶ durable there ─▶ acknowledged
                            ├ again a second after anything moved
                            └ again after 10 s
```
Invariants: nothing is said that is not durable here, so that no version ever means two things; what
is said counts every write that a flush had answered by then (I15). After somebody was left out, or
the rules became weaker, a flush waits until every member that can be told knows (`is_told`), two
seconds at most, since a member that hangs must not stop writers.
Deliberately not here: what changes the set (`in_sync_set`).
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.cluster.standing import Standing
from geomirror.environment import SECOND
from geomirror.errors import RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import SendMessage
from geomirror.wan_protocol.in_sync_set import InSyncSet
from geomirror.wan_protocol.messages import Announce, AnnounceAcknowledge, SessionAccept
from geomirror.wan_protocol.sender import Sender

ANNOUNCE_NS_MIN = 1 * SECOND
"""Between two standings without a change of the set: what survivors know of the primary's position
is this old at most, and an idle link carries one packet of 200 bytes less often than hellos."""
ANNOUNCE_NS_MAX = 10 * SECOND
"""The same when nothing happens: how old "everything until ..." may be on an idle resource."""
TOLD_NS_MAX = 2 * SECOND
"""A flush waits no longer for a member with a session that does not acknowledge."""
VERSION_MAX = 1 << 62


@dataclass(slots=True)
class Told:
    """What was said to a peer in its present session, and when."""

    version: int
    at_ns: int
    since_ns: int
    """When this version was first said."""
    position: tuple[int, int, int]
    """Completed LSN, sealed and confirmed epoch."""


class PeerStandings(InSyncSet):
    """The part of the primary that keeps the members informed."""

    session: int

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self._known: dict[str, int] = {}
        """Peer → version durable there; absent when it does not know announcements, or is not
        known yet."""
        self._told: dict[str, Told] = {}
        self._said_wall_ns = 0
        self._first_version = self._version

    def lag_seconds(self, sender: Sender, now_ns: int) -> float:
        """Age of the first write that is not durable at the peer."""
        raise NotImplementedError

    def standing(self) -> Standing:
        """What is true and durable now."""
        engine, saved = self.engine, self._saved
        superblock = engine.superblock
        sealed = engine.sealed_epoch
        end_lsn = superblock.applied_end_lsn
        if sealed != superblock.applied_epoch:
            end_lsn = engine.epoch_info(sealed).end_lsn
        is_open = self.confirmed_epoch > sealed or engine.last_changed_epoch > sealed
        self._said_wall_ns = max(self._said_wall_ns, self.wall_ns)
        return Standing(
            generation=engine.generation.hex(),
            token=superblock.chain[-1].token if superblock.chain else 0,
            version=saved.version,
            wall_ns=self._said_wall_ns,
            epoch=sealed,
            end_lsn=end_lsn,
            open_bytes=engine.bytes_recorded(sealed) + engine.open_epoch_bytes if is_open else 0,
            confirmed_epoch=self.confirmed_epoch,
            acks=dict(saved.acks),
            copies=saved.copies,
            degrade_after_ns=saved.degrade_after_ns,
            is_binding=saved.is_binding,
            in_sync=sorted(self._in_sync_saved & set(saved.acks)),
            left_out={n: left for n, left in self._left_saved.items() if n in saved.acks},
            behind_ns={
                name: round(self.lag_seconds(sender, self.now_ns) * SECOND)
                for name, sender in self.senders.items()
            },
        )

    # What members know.

    def _session_opened(self, sender: Sender, message: SessionAccept) -> None:
        self._told.pop(sender.name, None)
        self._known.pop(sender.name, None)
        version = message.standing_version
        if version >= VERSION_MAX:
            raise RemoteProtocolError(f'peer "{sender.name}" knows version {version} of nothing')
        if version < 0:
            return  # Of the previous version: it is never told.
        if version > self._version:
            # An older state of this node's disk was put back: say nothing that was said before.
            self._version = version
            self._set_changed(is_weaker=True)
        self._known[sender.name] = version

    def _standing_acknowledged(self, sender: Sender, message: AnnounceAcknowledge) -> None:
        known = self._known.get(sender.name)
        if known is None or not 0 <= message.version <= self._saved.version:
            raise RemoteProtocolError(
                f'peer "{sender.name}" acknowledges version {message.version}, never said'
            )
        self._known[sender.name] = max(known, message.version)

    def _all_know(self, version: int) -> bool:
        return all(self._known.get(name, -1) >= version for name in self._relied_on())

    @property
    def unaware(self) -> list[str]:
        """In-sync members that changed settings wait for."""
        if self.pending_policy is None:
            return []
        version = self._weakened_version
        return sorted(n for n in self._relied_on() if self._known.get(n, -1) < version)

    def _told_until(self) -> int | None:
        """Until when flushes wait for members to know; None: all that can be told do."""
        waiting = [
            name
            for name, known in self._known.items()
            if known < self._weakened_version
            and name in self.senders
            and self.senders[name].is_open
        ]
        untold = [name for name in waiting if not self._is_said(name)]
        if untold:
            return self.now_ns + TOLD_NS_MAX
        return max((self._told[n].since_ns + TOLD_NS_MAX for n in waiting), default=None)

    def _is_said(self, name: str) -> bool:
        told = self._told.get(name)
        return told is not None and told.version >= self._weakened_version

    @property
    def is_told(self) -> bool:
        """Every member that can be told knows who was left out last, or takes too long."""
        until_ns = self._told_until()
        return until_ns is None or self.now_ns >= until_ns

    # Telling.

    def _announce_at(self, sender: Sender) -> int | None:
        """When this peer is to be told again; None: not while this lasts."""
        version = self._saved.version
        if not sender.is_open or sender.name not in self._known or version < self._first_version:
            return None
        told = self._told.get(sender.name)
        if told is None or told.version != version:
            return self.now_ns
        is_moved = told.position != self._position
        return told.at_ns + (ANNOUNCE_NS_MIN if is_moved else ANNOUNCE_NS_MAX)

    @property
    def _position(self) -> tuple[int, int, int]:
        return (self.engine.completed_lsn, self.engine.sealed_epoch, self.confirmed_epoch)

    def _pump_standings(self) -> None:
        standing: Standing | None = None
        for sender in self.senders.values():
            at_ns = self._announce_at(sender)
            if at_ns is None or at_ns > self.now_ns:
                continue
            standing = standing or self.standing()
            self._decide(SendMessage(sender.name, self.session, Announce(self.session, standing)))
            told, since_ns = self._told.get(sender.name), self.now_ns
            if told is not None and told.version == standing.version:
                since_ns = told.since_ns
            self._told[sender.name] = Told(standing.version, self.now_ns, since_ns, self._position)

    def _standing_timers(self) -> list[int]:
        times = [
            at_ns for s in self.senders.values() if (at_ns := self._announce_at(s)) is not None
        ]
        return [max(at_ns, self.now_ns + 1) for at_ns in times]

    def remove_peer(self, name: str) -> None:
        """Forget the peer and what it knows."""
        self._known.pop(name, None)
        self._told.pop(name, None)
        super().remove_peer(name)
