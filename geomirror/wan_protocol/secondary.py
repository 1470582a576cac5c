"""The secondary of a resource: takes epochs in, in order, and applies them.

```
 frames ─▶ spool ─┐
 commit ──────────┴─▶ table = H? ─▶ EPOCH record ─▶ sync = durable ─▶ apply ─▶ applied
```
Invariants: durable is said only after the journal is synced through the EPOCH record (I5); the
image holds exactly the epoch it reports, except during a resync, when undo leads from it to the
epoch that was applied before (`resync_intake`), and during a first sync, when it says Inconsistent;
an epoch is applied only when the one before it is durable and hashes agree (I9).
Deliberately not here: who reads the image; `hold_apply` is how readers keep it still.
"""

from __future__ import annotations

from collections.abc import Iterable

from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.epoch_intake import MISSING_AFTER_NS
from geomirror.wan_protocol.incoming import Incoming, number_bitmap
from geomirror.wan_protocol.messages import (
    Acknowledge,
    Announce,
    AnyMessage,
    EpochCommit,
    Marks,
    ResyncAsk,
    ResyncBegin,
    ResyncEnd,
    SessionOpen,
    SessionRefuse,
    VerifyAsk,
    VerifyPin,
)
from geomirror.wan_protocol.resync_intake import BLANK, CONSISTENT, INCONSISTENT
from geomirror.wan_protocol.session import session_number
from geomirror.wan_protocol.verify_answering import VerifyAnswering

__all__ = ["BLANK", "CONSISTENT", "INCONSISTENT", "Secondary"]


class Secondary(VerifyAnswering):
    """Core of the secondary role; see `Replica` for the shape."""

    def __init__(
        self, engine: Engine, limits: Limits, *, primary: str, members: Iterable[str] = ()
    ) -> None:
        """A secondary whose last known primary is `primary`.

        :param members: the other members: what they may need from a later primary is kept.
        """
        super().__init__(engine, limits, primary=primary)
        self.members = sorted(members)
        self.session = session_number(engine.superblock.resource_id)
        self.hold_apply = False
        self.received_total = 0
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
            self.is_link_up = False
            self.close_session()
            self.resync = None
            self.keep_standing_now()

    def receive(self, peer: str, message: AnyMessage, now_ns: int) -> None:
        """A control message of this session from an authenticated peer.

        :raises RemoteProtocolError: not legal now; the shell closes the link.
        """
        self.now_ns = max(self.now_ns, now_ns)
        if isinstance(message, SessionOpen):
            if not self.is_frozen:
                self.opened(peer, message)
                self._pump()
            return
        if self.is_frozen or peer != self.primary or self.fenced is not None:
            return  # Of a session that is over: no other answer than to an offer is waited for.
        match message:
            case SessionRefuse() if message.chain:
                pass  # Of an offer that this node made as a primary: its own session goes on.
            case SessionRefuse():
                self.close_session()
                self.refusal = message.error_text
                self._decide(Emit("primary_refused", {"reason": message.error_text}))
            case EpochCommit() if self.is_open and self.resync is None:
                self.primary_epoch = max(self.primary_epoch, message.epoch)
                self.take_commit(message)
            case ResyncBegin() if self.is_open:
                self._resync_began(message)
            case ResyncAsk() if self.is_open:
                if self.resync is not None and self.resync.number == message.number:
                    self.resync.answers.add(message)
            case ResyncEnd() if self.is_open:
                if self.resync is not None and self.resync.number == message.number:
                    self.resync.end_message = message
            case Announce() if self.is_open:
                self.take_standing(message)
            case Marks() if self.is_open:
                self.take_marks(message)
            case VerifyPin() | VerifyAsk() if self.is_open:
                self.take_verify(message)
            case EpochCommit() | ResyncBegin() | ResyncAsk() | ResyncEnd() | Announce() | Marks():
                pass  # Of a session that was closed meanwhile.
            case VerifyPin() | VerifyAsk():
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
        is_taken = peer == self.primary and self.is_open and not self.is_frozen
        if not is_taken or self.fenced is not None:
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
        if self.fenced is not None or self.is_frozen:
            return None
        times = [self._retry_at_ns, self._acknowledge_at_ns, self.verify_timer()]
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
        self.close_session()
        self.hold_apply = False
        self.keep_standing_now()

    @property
    def is_settled(self) -> bool:
        """Nothing of a restart has to be replayed."""
        is_applied = self.engine.applied_epoch == self.engine.sealed_epoch
        return is_applied or self._apply_target() is None

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
        self._try_accept()
        self._acknowledge()

    def _room_moved(self) -> None:
        # The primary may have used up what was granted, and then nothing else would tell it.
        self._acknowledge()

    def leave(self, error: GeomirrorError, now_ns: int) -> None:
        """This copy is about to be opened again: end the session, so that one is offered then."""
        self.now_ns = max(self.now_ns, now_ns)
        if self.is_open and self.is_link_up:
            self.is_open = False
            self._send(SessionRefuse(self.session, error.wire_code, str(error)))

    def _apply_target(self) -> int | None:
        is_resyncing = self.resync is not None and self.resync.is_begun
        if self.hold_apply or is_resyncing or self.data_state == BLANK:
            return None
        # What a resync that was interrupted is still writing, or the end of one, comes first.
        return None if self.is_running("resync") else self._pass_end()

    def _applied_moved(self) -> None:
        # Also when only the state moved: the end of a resync that streams no epoch after it.
        is_news = self.engine.applied_epoch != self._applied_reported
        if is_news or self.data_state != self._state_reported:
            self._applied_reported = self.engine.applied_epoch
            self._state_reported = self.data_state
            self._acknowledge()
        super()._applied_moved()

    def _release_everything(self, error: GeomirrorError) -> None:
        super()._release_everything(error)
        self.is_open = False
        self.refusal = str(error)
        if self.is_link_up:
            self._send(SessionRefuse(self.session, error.wire_code, str(error)))
