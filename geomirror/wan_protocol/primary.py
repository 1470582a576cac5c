"""The primary of a resource: seals epochs and sends them to each peer at that peer's speed.

```
 write ──▶ open epoch ──cut──▶ draft ──seal──▶ sealed ──▶ Sender per peer ──▶ durable ──▶ trim
            ≤ 250 ms             job    + sync              Stream / Fold
                                                            Bitmap ──▶ Resync ──▶ Stream
```
Invariants: only sealed epochs are encoded (I3); a peer's epochs stay in the journal until it has
them durable or they are durable in its bitmap (I7, I14); a write waits for the journal and the
local disk, never for a peer. Deliberately not here: how bytes travel, who may be primary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from geomirror.environment import MS, SECOND
from geomirror.errors import (
    GeomirrorError,
    JournalFullError,
    LocalProtocolError,
    NoSpaceError,
    PutBackError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
)
from geomirror.limits import Limits
from geomirror.volume.engine import Engine, Write
from geomirror.volume.engine_growth import GrowJob
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.decisions import Emit, SendMessage
from geomirror.wan_protocol.messages import (
    Acknowledge,
    AnnounceAcknowledge,
    AnyMessage,
    ResyncAcknowledge,
    ResyncDigests,
    SessionAccept,
    SessionOpen,
    SessionRefuse,
    VerifyAnswer,
)
from geomirror.wan_protocol.offering import Offering
from geomirror.wan_protocol.sender import FOLD, STREAM, Sender
from geomirror.wan_protocol.session import check_accept, session_number


class Primary(Offering):
    """Core of the primary role; see `Replica` for the shape."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        *,
        incarnation: bytes,
        peers: Iterable[str],
        now_ns: int,
        wall_ns: int,
    ) -> None:
        super().__init__(engine, limits, incarnation)
        self.now_ns = now_ns
        self.session = session_number(engine.superblock.resource_id)
        self._is_stopping = False
        self._last_wall_ns = wall_ns
        self._wrote_ns = now_ns
        if engine.open_epoch_since_wall_ns is not None:
            # Recovered writes that no epoch holds yet.
            self.open_since_ns = now_ns
        for name in sorted(peers):
            self.add_peer(name)
        self.resume_superseded()

    # Events.

    def write(self, writes: Sequence[Write], now_ns: int, wall_ns: int) -> int:
        """Journal a batch; its writes are *completed* when this returns the end LSN.

        :raises JournalFullError: held back; nothing changed, `RoomAvailable` follows.
        """
        if self.fenced is not None:
            raise self.fenced
        self.now_ns = now_ns
        if self.is_draining:
            raise JournalFullError(f'resource "{self.engine.superblock.name}" is handed over')
        try:
            lsn = self.engine.write(writes, wall_ns)
        except JournalFullError:
            self._room_wanted = True
            self._pump()
            raise
        except NoSpaceError:
            raise
        except StorageError as error:
            self._fence(error)
            raise
        self._last_wall_ns = wall_ns
        self._wrote_ns = now_ns
        if self.open_since_ns is None:
            self.open_since_ns = now_ns
        elif self.engine.open_epoch_bytes >= self.limits.epoch_bytes_max and not self._is_sealing:
            self._pump_role()  # Else the end of the seal will cut, and each batch would come here.
        return lsn

    def prepared(self, job: GrowJob) -> None:
        """What lies under volumes was made large enough."""
        self._grow_done(job)
        self._pump()

    def grow(self, change: VolumeChange, now_ns: int, wall_ns: int) -> int:
        """Journal a checked and prepared change of a volume; returns the epoch that will hold it,
        which is sealed next. The volume has its new size at once.

        :raises RefusedError: a peer cannot follow; nothing changed.
        :raises JournalFullError, NoSpaceError: no room; nothing changed.
        """
        if self.fenced is not None:
            raise self.fenced
        self.now_ns = now_ns
        for sender in self.senders.values():
            if sender.is_open and not sender.knows_growth:
                raise RefusedError(f'"{sender.name}" does not know growing volumes: update it')
        try:
            number = self.engine.grow(change, wall_ns)
        except JournalFullError:
            self._room_wanted = True
            self._pump()
            raise
        except NoSpaceError:
            raise
        except StorageError as error:
            self._fence(error)
            raise
        self._last_wall_ns, self._wrote_ns = wall_ns, now_ns
        if self.open_since_ns is None:
            self.open_since_ns = now_ns
        self._seal_wanted = True
        self._pump()
        return number

    def link_up(self, peer: str, now_ns: int) -> None:
        """A link to the peer is there: offer the session."""
        self.now_ns = max(self.now_ns, now_ns)
        sender = self.senders.get(peer)
        if sender is None or self.is_frozen:
            return
        sender.link_up()
        self._offer(sender)

    def link_down(self, peer: str, now_ns: int) -> None:
        """The link is gone; positions stay, nothing is lost."""
        self.now_ns = max(self.now_ns, now_ns)
        sender = self.senders.get(peer)
        if sender is not None:
            sender.is_link_up = False
            sender.close()
            self._abandon_resync(sender)
            self._give_up_verify(peer)

    def link_room(self, peer: str, room_bytes: int, now_ns: int) -> None:
        """The link's queues take this many bytes now."""
        self.now_ns = max(self.now_ns, now_ns)
        sender = self.senders.get(peer)
        if sender is not None and sender.is_open and not self.is_frozen:
            sender.room_bytes = room_bytes
            self._pump_sender(sender)

    def receive(self, peer: str, message: AnyMessage, now_ns: int) -> None:
        """A control message of this session from an authenticated peer.

        :raises RemoteProtocolError: not legal now; the shell closes the link.
        """
        self.now_ns = max(self.now_ns, now_ns)
        if isinstance(message, SessionOpen):
            self._heard_primary(peer, message)
            return
        sender = self.senders.get(peer)
        if sender is None or self.fenced is not None or self.is_frozen:
            return
        match message:
            case SessionRefuse() if message.chain and self.supersede(
                peer, message.chain, message.starts
            ):
                return
            case SessionAccept():
                self._accepted(sender, message)
            case SessionRefuse():
                self._refused(sender, message)
            case Acknowledge() if sender.is_open:
                self._acknowledged(sender, message)
            case ResyncAcknowledge() if sender.is_open:
                self._resync_acknowledged(sender, message)
            case ResyncDigests() if sender.is_open:
                self._resync_answered(sender, message)
            case AnnounceAcknowledge() if sender.is_open:
                self._standing_acknowledged(sender, message)
            case VerifyAnswer() if sender.is_open:
                self._verify_answered(sender, message)
            case Acknowledge() | ResyncAcknowledge() | ResyncDigests() | AnnounceAcknowledge():
                pass  # Of a session that was closed meanwhile.
            case VerifyAnswer():
                pass  # Of a session that was closed meanwhile.
            case _:
                name = type(message).__name__
                raise RemoteProtocolError(f'peer "{peer}" sent {name} to the primary')
        self._pump()

    def handle_timer(self, now_ns: int) -> None:
        """Do what is due; harmless when early."""
        self.now_ns = max(self.now_ns, now_ns)
        self._pump()

    def get_timer(self) -> int | None:
        """When to call `handle_timer` next, or None for only after another event."""
        if self.fenced is not None or self.is_frozen:
            return None
        if self._retry_at_ns is not None:
            return self._retry_at_ns  # Whatever else is due waits for it.
        times: list[int] = []
        if self.open_since_ns is not None and not self.is_running("seal"):
            times.append(self.open_since_ns + self.limits.epoch_age_ns)
        oldest = self._oldest_unapplied_ns()
        if oldest is not None and not self.is_running("apply"):
            due_ns = oldest + self.limits.destage_age_ns_max
            if self.engine.dirty_bytes >= self.limits.destage_idle_bytes_min:
                due_ns = min(due_ns, self._wrote_ns + self.limits.destage_idle_ns)
            times.append(max(due_ns, self.now_ns + 100 * MS))
        times.extend(self._peer_timers())
        times.extend(self._standing_timers())
        times.extend(self.verify_timers())
        giving_up_ns = self._flush_timer()
        if giving_up_ns is not None:
            times.append(giving_up_ns)
        return min(times, default=None)

    def pause(self, peer: str | None, *, is_paused: bool) -> list[str]:
        """Stop or resume shipping to one or all peers; returns their names."""
        names = [name for name in self.senders if peer in (None, name)]
        for name in names:
            self.senders[name].is_paused = is_paused
        self._pump()
        return names

    @property
    def wall_ns(self) -> int:
        """The wall clock now, going by that of the last write."""
        return max(1, self._last_wall_ns + self.now_ns - self._wrote_ns)

    def stop(self, now_ns: int) -> None:
        """Orderly stop: seal, and destage what is sealed. `is_settled` tells when it is done."""
        self._is_stopping = True
        self.seal_now(now_ns)

    @property
    def is_settled(self) -> bool:
        """Sealed and destaged; nothing of a restart has to be replayed."""
        return self.is_sealed and self.engine.applied_epoch == self.engine.sealed_epoch

    # The machinery.

    def _pump_role(self) -> None:
        self._pump_return()
        self._pump_seal()
        self._pump_modes()
        for sender in self.senders.values():
            if sender.reopen_at_ns is not None and self.now_ns >= sender.reopen_at_ns:
                self._offer(sender)
            self._pump_sender(sender)
        self._pump_flushes()
        self._pump_verifies()

    def _sealed_moved(self) -> None:
        super()._sealed_moved()
        for sender in self.senders.values():
            self._check_backlog(sender)

    def _apply_target(self) -> int | None:
        """Destage when the dirty data, its age or the journal asks for it, or nobody writes."""
        engine, limits = self.engine, self.limits
        if engine.sealed_epoch <= engine.applied_epoch:
            return None
        oldest = self._oldest_unapplied_ns()
        is_idle = self.now_ns >= self._wrote_ns + limits.destage_idle_ns
        is_due = (
            self._is_stopping
            or engine.unapplied_promotion is not None
            or (is_idle and engine.dirty_bytes >= limits.destage_idle_bytes_min)
            or self._room_wanted
            or engine.dirty_bytes >= limits.dirty_bytes_max * limits.destage_fraction
            or engine.dirty_entries >= limits.dirty_entries_max * limits.destage_fraction
            or engine.journal.bytes_used >= engine.journal.bytes_total // 2
            or (oldest is not None and self.now_ns >= oldest + limits.destage_age_ns_max)
        )
        return self._pass_end() if is_due else None

    def _pump_return(self) -> None:
        """Promoted in the middle of a resync: bring the images to where readers see them."""
        busy = any(map(self.is_running, ("return", "apply")))
        if not self.engine.is_returning or busy:
            return
        # A pass that is due comes first: writers may wait for the room that it makes.
        if self._apply_target() is None and self.engine.half_applied_through is None:
            self._run("return", self.engine.return_step_job(), self._returned_some)

    def _returned_some(self, job: Any) -> None:
        if self.engine.complete_return_step(job):
            self._checkpoint_wanted = True
            self._decide(Emit("returned", {"epoch": self.engine.applied_epoch}))

    def _oldest_unapplied_ns(self) -> int | None:
        if self.engine.sealed_epoch <= self.engine.applied_epoch:
            return None
        return self._epoch_began_ns.get(self.engine.applied_epoch + 1, self.now_ns)

    # Peers.

    def _accepted(self, sender: Sender, message: SessionAccept) -> None:
        if not sender.is_link_up:
            return
        check_accept(message)
        problem = self._place_peer(sender, message)
        if problem:
            sender.refusal = problem
            refuse = SessionRefuse(self.session, LocalProtocolError.wire_code, problem)
            self._decide(SendMessage(sender.name, self.session, refuse))
            self._decide(Emit("peer_refused", {"peer": sender.name, "reason": problem}))
            return
        self._session_opened(sender, message)
        self._compare_word(sender, message)
        sender.open(message, self.now_ns)
        self._retain(sender)
        fields: dict[str, object] = {"peer": sender.name, "epoch": sender.durable_epoch}
        self._decide(Emit("peer_connected", fields))

    def _refused(self, sender: Sender, message: SessionRefuse) -> None:
        reason = message.error_text
        is_put_back = message.error_code == PutBackError.wire_code
        if reason != sender.refusal:  # It is tried again and again.
            self._decide(Emit("peer_refused", {"peer": sender.name, "reason": reason}))
            if is_put_back:
                self._decide(Emit("put_back", {"peer": sender.name, "reason": reason}))
        sender.refused(reason, self.now_ns)
        sender.has_what_was_lost = is_put_back
        self._abandon_resync(sender)

    def _acknowledged(self, sender: Sender, message: Acknowledge) -> None:
        before = sender.durable_epoch
        if sender.mode not in (STREAM, FOLD):
            return  # The peer does not know yet; its counts are of what was given up.
        sender.acknowledge(message, self.now_ns)
        if sender.applied_epoch >= self._consistent_from(sender):
            sender.data_state, sender.held_epoch = "consistent", -1
            sender.said_epoch = max(sender.said_epoch, sender.durable_epoch)
        if sender.durable_epoch > before:
            self._retain(sender)
            low = min((s.durable_epoch for s in self.senders.values()), default=0)
            low = min(low, self.engine.applied_epoch)
            while self._epoch_began_ns and next(iter(self._epoch_began_ns)) <= low:
                del self._epoch_began_ns[next(iter(self._epoch_began_ns))]

    def lag_seconds(self, sender: Sender, now_ns: int) -> float:
        """Age of the first write that is not durable at the peer; 0 when there is none."""
        if sender.mode in (STREAM, FOLD) and sender.durable_epoch >= self.engine.sealed_epoch:
            if self.is_sealed:
                return 0.0
            began = self._epoch_began_ns.get(self.engine.sealed_epoch + 1, self.open_since_ns)
        else:
            began = self._epoch_began_ns.get(sender.durable_epoch + 1)
        if began is None:
            began = self._first_known_ns(sender)
        return max(0, now_ns - began) / SECOND if began is not None else 0.0

    def _first_known_ns(self, sender: Sender) -> int | None:
        later = [ns for n, ns in self._epoch_began_ns.items() if n > sender.durable_epoch]
        return min(later, default=self.open_since_ns)

    def _release_everything(self, error: GeomirrorError) -> None:
        super()._release_everything(error)
        for sender in self.senders.values():
            sender.close()
            sender.refusal = str(error)
