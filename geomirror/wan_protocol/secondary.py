"""The secondary of a resource: takes epochs in, in order, and applies them.

```
 frames ─▶ spool ─┐
 commit ──────────┴─▶ table = H? ─▶ EPOCH record ─▶ sync = durable ─▶ apply ─▶ applied
```
Invariants: durable is said only after the journal is synced through the EPOCH record (I5); the
image holds exactly the epoch it reports, except during a plain resync, when it says Inconsistent;
an epoch is applied only when the one before it is durable and hashes agree (I9).
Deliberately not here: who reads the image; `hold_apply` is how readers keep it still.
"""

from __future__ import annotations

from geomirror.errors import GeomirrorError, IntegrityError, RefusedError, RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.engine_base import NO_GENERATION
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.epoch_intake import MISSING_AFTER_NS
from geomirror.wan_protocol.growth import volumes_at
from geomirror.wan_protocol.incoming import Incoming, number_bitmap
from geomirror.wan_protocol.messages import (
    Acknowledge,
    Announce,
    AnyMessage,
    EpochCommit,
    Marks,
    ResyncBegin,
    ResyncEnd,
    SessionAccept,
    SessionOpen,
    SessionRefuse,
)
from geomirror.wan_protocol.resync_intake import BLANK, CONSISTENT, INCONSISTENT, ResyncIntake
from geomirror.wan_protocol.session import session_number, session_problem

__all__ = ["BLANK", "CONSISTENT", "INCONSISTENT", "Secondary"]

SPOOLED_REPORTED_MAX = 64
"""Epochs under way that are reported when a session opens; the rest is sent again."""


class Secondary(ResyncIntake):
    """Core of the secondary role; see `Replica` for the shape."""

    def __init__(self, engine: Engine, limits: Limits, *, primary: str) -> None:
        super().__init__(engine, limits, primary=primary)
        self.session = session_number(engine.superblock.resource_id)
        self.is_open = False
        self._is_accepting = False
        self.is_link_up = False
        self.hold_apply = False
        self.refusal = ""
        self.primary_epoch = 0
        self.received_total = 0
        self._incarnation = b""
        self._acknowledge_at_ns: int | None = None
        self._state_reported = self.data_state

    # Events.

    def link_up(self, peer: str, now_ns: int) -> None:
        """A link to the primary is there; the session is the primary's to open."""
        self.now_ns = max(self.now_ns, now_ns)
        self.is_link_up = self.is_link_up or peer == self.primary

    def link_down(self, peer: str, now_ns: int) -> None:
        """The link is gone; what is spooled stays for the next connection."""
        self.now_ns = max(self.now_ns, now_ns)
        if peer == self.primary:
            self.is_link_up = self.is_open = self._is_accepting = False
            self.resync = None
            self.keep_standing_now()

    def receive(self, peer: str, message: AnyMessage, now_ns: int) -> None:
        """A control message of this session from an authenticated peer.

        :raises RemoteProtocolError: not legal now; the shell closes the link.
        """
        self.now_ns = max(self.now_ns, now_ns)
        if peer != self.primary or self.fenced is not None:
            refuse = SessionRefuse(self.session, RefusedError.wire_code, self._why_not(peer))
            self._send_to(peer, refuse)
            return
        match message:
            case SessionOpen():
                self._opened(message)
            case SessionRefuse():
                self.is_open = self._is_accepting = False
                self.refusal = message.error_text
                self._decide(Emit("primary_refused", {"reason": message.error_text}))
            case EpochCommit() if self.is_open and self.resync is None:
                self.primary_epoch = max(self.primary_epoch, message.epoch)
                self.take_commit(message)
            case ResyncBegin() if self.is_open:
                self._resync_began(message)
            case ResyncEnd() if self.is_open:
                if self.resync is not None and self.resync.number == message.number:
                    self.resync.end_message = message
            case Announce() if self.is_open:
                self.take_standing(message)
            case Marks() if self.is_open:
                self.take_marks(message)
            case EpochCommit() | ResyncBegin() | ResyncEnd() | Announce() | Marks():
                pass  # Of a session that was closed meanwhile.
            case _:
                name = type(message).__name__
                raise RemoteProtocolError(f'primary "{peer}" sent {name} to a secondary')
        self._pump()

    def receive_frame(
        self, peer: str, epoch: int, sequence: int, body: bytes, *, is_resync: bool, now_ns: int
    ) -> None:
        """A data frame; spooled at once, or queued for the image during a resync.

        :raises RemoteProtocolError: hostile content; the shell closes the link.
        """
        self.now_ns = max(self.now_ns, now_ns)
        if peer != self.primary or not self.is_open or self.fenced is not None:
            return
        self.received_total += len(body)
        self._unreported_bytes += len(body)
        if is_resync:
            if self.resync is not None and self.resync.number == epoch:
                self.taken_bytes += len(body) if self.resync.add(sequence, body) else 0
        elif self.resync is None and epoch > self.engine.committed_epoch:
            self.take_frame(epoch, sequence, body)
        self._acknowledge_soon()
        if is_resync or self._sync_wanted:  # Else nothing is due, and looking is not free.
            self._pump()

    def handle_timer(self, now_ns: int) -> None:
        """Do what is due; harmless when early."""
        self.now_ns = max(self.now_ns, now_ns)
        if self._acknowledge_at_ns is not None and self.now_ns >= self._acknowledge_at_ns:
            self._acknowledge()
        awaited = self.awaited
        is_late = awaited and self.now_ns >= awaited.progress_ns + MISSING_AFTER_NS
        if awaited is not None and is_late and self.is_open:
            awaited.progress_ns = self.now_ns
            self._acknowledge(awaited)
        self._pump()

    def get_timer(self) -> int | None:
        """When to call `handle_timer` next."""
        if self.fenced is not None:
            return None
        times = [self._retry_at_ns, self._acknowledge_at_ns]
        awaited = self.awaited
        if awaited is not None and self.is_open:
            times.append(awaited.progress_ns + MISSING_AFTER_NS)
        return min((t for t in times if t is not None), default=None)

    def set_hold(self, is_held: bool, now_ns: int) -> None:
        """Keep the image as it is (readers are pinned to it), or let applying go on."""
        self.now_ns = max(self.now_ns, now_ns)
        self.hold_apply = is_held
        self._pump()

    def stop(self, now_ns: int) -> None:
        """Orderly stop: durable epochs are applied. `is_settled` tells when it is done."""
        self.now_ns = max(self.now_ns, now_ns)
        self.is_open = self._is_accepting = False
        self.hold_apply = False
        self.keep_standing_now()

    @property
    def is_settled(self) -> bool:
        """Nothing of a restart has to be replayed."""
        is_applied = self.engine.applied_epoch == self.engine.sealed_epoch
        return is_applied or self._apply_target() is None

    # The session.

    def _why_not(self, peer: str) -> str:
        name = self.engine.superblock.name
        if self.fenced is not None:
            return str(self.fenced)
        return f'"{peer}" is not the primary of "{name}" here, "{self.primary}" is'

    def _opened(self, message: SessionOpen) -> None:
        engine = self.engine
        problem = session_problem(engine.superblock, engine.sizes.now, message)
        if problem:
            self._refuse_session(RefusedError(problem))
            return
        if message.incarnation != self._incarnation:
            # Another start of the primary may cut the same epoch into other frames.
            self.forget_incoming()
            self._incarnation = message.incarnation
        self.marks.forget()
        if engine.generation == NO_GENERATION and message.chain:
            engine.adopt_chain(message.chain)
            self._checkpoint_wanted = True
        self.refusal = ""
        self.resync = None
        self.primary_epoch = message.epoch
        self._is_accepting = True
        if engine.committed_epoch > engine.sealed_epoch:
            self._sync_wanted = True  # The position is told when it stands.
        else:
            self._accept()

    def _accept(self) -> None:
        engine = self.engine
        self._is_accepting = False
        self.is_open = True
        self.taken_bytes = self._unreported_bytes = 0
        spooled = [i for i in self.incoming.values() if i.parts]
        for incoming in spooled[SPOOLED_REPORTED_MAX:]:
            incoming.drop_parts()
        self._send(
            SessionAccept(
                self.session,
                engine.generation,
                engine.sealed_epoch,
                engine.sealed_hash,
                self._applied_reported,
                self.data_state,
                [(i.number, number_bitmap(set(i.parts))) for i in spooled[:SPOOLED_REPORTED_MAX]],
                self._credit(),
                engine.superblock.consistent_from,
                self.standing_version,
                takes_marks=True,
                volumes=volumes_at(engine, engine.sealed_epoch),
            )
        )
        for incoming in self.incoming.values():
            incoming.commit = None
        fields: dict[str, object] = {"peer": self.primary, "epoch": self.primary_epoch}
        self._decide(Emit("primary_connected", fields))

    def _credit(self) -> int:
        return self.credit_bytes(None if self.resync is None else self.resync.queued_bytes)

    # Refusals.

    def _diverged(self, error: IntegrityError) -> None:
        """What arrived is not what the primary sealed: take nothing, say so, ask again anew."""
        self.forget_incoming()
        self._refuse_session(error)

    def _refuse_session(self, error: GeomirrorError) -> None:
        self.is_open = self._is_accepting = False
        self.resync = None
        if str(error) != self.refusal:  # It is tried again and again.
            self._decide(Emit("session_refused", {"reason": str(error)}))
        self.refusal = str(error)
        self._send(SessionRefuse(self.session, error.wire_code, str(error)))

    # Acknowledgements.

    def _acknowledge_soon(self) -> None:
        if self._unreported_bytes >= self.limits.acknowledge_bytes:
            self._acknowledge()
        elif self._acknowledge_at_ns is None:
            self._acknowledge_at_ns = self.now_ns + self.limits.acknowledge_delay_ns

    def _acknowledge(self, stuck: Incoming | None = None) -> None:
        self._acknowledge_at_ns = None
        self._unreported_bytes = 0
        if not self.is_open:
            return
        engine = self.engine
        if self.resync is not None:
            self._send(self.resync.acknowledgement(self.taken_bytes, self._credit()))
            return
        self._send(
            Acknowledge(
                self.session,
                engine.committed_epoch,
                engine.sealed_epoch,
                engine.sealed_hash,
                self._applied_reported,
                stuck.number if stuck else 0,
                number_bitmap(stuck.missing()) if stuck else b"",
                self.taken_bytes,
                self._credit(),
            )
        )

    def _sealed_moved(self) -> None:
        if self._is_accepting and self.engine.sealed_epoch == self.engine.committed_epoch:
            self._accept()
        self._acknowledge()

    def _room_moved(self) -> None:
        # The primary may have used up what was granted, and then nothing else would tell it.
        self._acknowledge()

    def _apply_target(self) -> int | None:
        is_resyncing = self.resync is not None and self.resync.is_begun
        if self.hold_apply or is_resyncing or self.data_state == BLANK:
            return None
        return self._pass_end()

    def _applied_moved(self) -> None:
        # Also when only the state moved: the end of a resync that streams no epoch after it.
        is_news = self.engine.applied_epoch != self._applied_reported
        if is_news or self.data_state != self._state_reported:
            self._applied_reported = self.engine.applied_epoch
            self._state_reported = self.data_state
            self._acknowledge()
        if self.resync is not None and self.resync.is_begun:
            self._resync_checkpointed(self.resync)

    def _release_everything(self, error: GeomirrorError) -> None:
        self.is_open = False
        self.refusal = str(error)
        if self.is_link_up:
            self._send(SessionRefuse(self.session, error.wire_code, str(error)))
