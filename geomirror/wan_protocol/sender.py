"""One peer of a primary: its position, its mode, and the units of the stream on their way to it.

```
      durable                      next_number                 sealed
 ───────┼──────────────────────────────┼──────────────────────────┼──▶ epochs
        │  units: [e+1] [e+2…e+5 fold] │  not encoded yet         │
        │   encoded, kept until durable│                          │
```
A unit is one epoch, or several folded into one. Its frames are kept, unchanged, until the peer has
it durable, so a reconnect resumes at the next missing frame. Bytes in flight are bounded by the
window, by the credit that the peer grants and by the room in the link's own queues; nothing here
grows with the backlog, which stays in the journal.
Deliberately not here: encoding (a job), bitmaps and resync (`resync_sender`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomirror.environment import SECOND
from geomirror.errors import RemoteProtocolError
from geomirror.limits import Limits
from geomirror.wan_protocol.decisions import Decision, SendFrame, SendMessage
from geomirror.wan_protocol.messages import Acknowledge, EpochCommit, SessionAccept

if TYPE_CHECKING:
    from geomirror.wan_protocol.epoch_encode import EncodedEpoch

STREAM = "Stream"
FOLD = "Fold"
BITMAP = "Bitmap"
RESYNC = "Resync"

UNITS_MAX = 512
"""Units kept for a peer at once, however small: it takes a bounded number of epochs under way."""
REOPEN_NS, REOPEN_NS_MAX = 1 * SECOND, 60 * SECOND
"""A session that the peer refused is offered again after this time, twice as long each time."""
UNANSWERED_NS = 5 * SECOND
"""An offer of a session that was not answered at all is repeated after this time."""
LEVEL, LEVEL_BEHIND = 1, -2
"""Of zstd. A database's pages take about two thirds of the time at the second, and an eighth more
bytes (`bench costs`)."""
BEHIND_EPOCHS_MIN = 8
"""Sealed and not encoded: two seconds of writing."""
LOST_AFTER_NS = 3 * SECOND
"""Nothing on its way was received for so long: it counts as lost with its connection."""


def bitmap_numbers(bitmap: bytes, count: int) -> list[int]:
    """Numbers below `count` whose bit is set; bit 0 of byte 0 is number 0."""
    return [i for i in range(min(count, len(bitmap) * 8)) if bitmap[i >> 3] >> (i & 7) & 1]


@dataclass(slots=True)
class Unit:
    """One epoch or fold in the stream; `to_send` are the numbers of frames not handed over yet."""

    encoded: EncodedEpoch
    commit: EpochCommit
    to_send: deque[int]
    is_commit_sent: bool = False
    held_bytes: int = 0


@dataclass(slots=True)
class SenderCounters:
    """Totals since the daemon started."""

    logical_bytes: int = 0
    wire_bytes: int = 0
    resyncs: int = 0
    epochs_durable: int = 0


@dataclass
class Sender:
    """The stream to one peer. `is_open` while a session is accepted on a live link."""

    name: str
    session: int
    limits: Limits
    durable_epoch: int = 0
    durable_hash: bytes = bytes(32)
    applied_epoch: int = 0
    received_epoch: int = 0
    """Complete at the peer, perhaps in memory only; of this session."""
    mode: str = STREAM
    is_open: bool = False
    is_link_up: bool = False
    is_paused: bool = False
    data_state: str = "unknown"
    held_epoch: int = -1
    """While inconsistent because of a resync: the state that the peer can go back to."""
    takes_marks: bool = False
    """The peer knows the message; of this session."""
    marks_told: int = -1
    """Version of the table that the peer was told in this session."""
    knows_growth: bool = False
    """Its version knows volumes that grow; of the last session."""
    gives_digests: bool = False
    """In a resync it says what it holds; of this session."""
    said_epoch: int = 0
    """The highest that it ever said to be durable, outside of resyncs."""
    gone_back_from: int = 0
    """What it had said, when it came back with less; until it has as much again."""
    refusal: str = ""
    has_what_was_lost: bool = False
    """It refuses because it has epochs that the disk here has lost."""
    room_bytes: int = 0
    mode_since_ns: int = 0
    counters: SenderCounters = field(default_factory=SenderCounters)
    units: deque[Unit] = field(default_factory=deque)
    next_number: int = 1
    is_encoding: bool = False
    progress_ns: int = 0
    """When the peer last received something."""
    reopen_at_ns: int | None = None
    """When a session that the peer refused is offered again."""
    _reopen_after_ns: int = REOPEN_NS
    _has_link_waited: bool = False
    """Everything was handed over when the newest unit was ready."""
    _sent_bytes: int = 0
    _received_bytes: int = 0
    _credit_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Encoded bytes kept for this peer."""
        return sum(unit.held_bytes for unit in self.units)

    @property
    def had_epoch(self) -> int:
        """The state that the peer would be promoted with, as far as it is known here."""
        is_held = self.data_state != "consistent" and self.held_epoch >= 0
        return self.held_epoch if is_held else self.durable_epoch

    def may_encode(self, sealed_epoch: int) -> bool:
        """Whether the next unit should be encoded now."""
        return (
            self.is_open
            and not self.is_paused
            and not self.is_encoding
            and self.mode in (STREAM, FOLD)
            and self.next_number <= sealed_epoch
            and len(self.units) < UNITS_MAX
            and (not self.units or self.held_bytes < self.limits.window_bytes_min)
        )

    def level(self, sealed_epoch: int) -> int:
        """How to compress the next unit.

        Bytes are dearer than CPU, so only a copy that is behind while its link waits for us is
        sent more of them.
        """
        is_behind = sealed_epoch - self.next_number >= BEHIND_EPOCHS_MIN
        return LEVEL_BEHIND if is_behind and self._has_link_waited else LEVEL

    def add_unit(self, encoded: EncodedEpoch, commit: EpochCommit) -> None:
        """Queue an encoded unit, the one that follows the last."""
        assert encoded.first_number == self.next_number
        self._has_link_waited = not any(unit.to_send for unit in self.units)
        frames = encoded.frames
        self.units.append(
            Unit(encoded, commit, deque(range(len(frames))), held_bytes=sum(map(len, frames)))
        )
        self.next_number = encoded.number + 1

    def link_up(self) -> None:
        """A link to the peer is there."""
        self.is_link_up = True
        self._reopen_after_ns = REOPEN_NS

    def open(self, accept: SessionAccept, now_ns: int) -> None:
        """The peer accepted the session at this position: go on right after it."""
        self.is_open = True
        self.reopen_at_ns = None
        self.progress_ns = now_ns
        self.refusal, self.has_what_was_lost = "", False
        self._sent_bytes = self._received_bytes = 0
        self._credit_bytes = accept.credit_bytes
        self.data_state = accept.data_state
        self.held_epoch = accept.held_epoch
        self.takes_marks, self.marks_told = accept.takes_marks, -1
        self.gives_digests = accept.gives_digests
        self._set_durable(accept.durable_epoch, accept.durable_hash)
        self.applied_epoch = accept.applied_epoch
        self.received_epoch = accept.durable_epoch
        if not self.units or self.units[0].encoded.first_number != self.durable_epoch + 1:
            # Of another cut into folds, or the peer lost what it had: encoded anew from there.
            self.forget_units(self.durable_epoch + 1)
        spooled = dict(accept.spooled)
        for unit in self.units:
            count = len(unit.encoded.frames)
            have = set(bitmap_numbers(spooled.get(unit.encoded.number, b""), count))
            unit.to_send = deque(i for i in range(count) if i not in have)
            unit.is_commit_sent = False

    def restart_flow(self, now_ns: int) -> None:
        """What is on the way is given up, and may be lost: both sides count from zero again."""
        self._sent_bytes = self._received_bytes = self._credit_bytes = 0
        self.progress_ns = now_ns

    def close(self) -> None:
        """The link is gone, or the session; positions and encoded units stay."""
        self.is_open = False
        self.room_bytes = 0
        self.reopen_at_ns = None

    def refused(self, reason: str, now_ns: int) -> None:
        """The peer ended the session or did not take it; it may for as long as it likes."""
        self.close()
        self.refusal = reason
        self.reopen_at_ns = now_ns + self._reopen_after_ns
        self._reopen_after_ns = min(2 * self._reopen_after_ns, REOPEN_NS_MAX)

    def forget_units(self, next_number: int) -> None:
        """Drop encoded units; the stream goes on at `next_number`."""
        self.units.clear()
        self.next_number = next_number

    def acknowledge(self, message: Acknowledge, now_ns: int) -> None:
        """Take the peer's word for what it has.

        :raises RemoteProtocolError: a position beyond what was sent, or one that went back.
        """
        self._check_position(message.durable_epoch, message.durable_hash)
        if message.applied_epoch > message.durable_epoch:
            raise RemoteProtocolError(f'peer "{self.name}" reports more applied than durable')
        if message.durable_epoch >= self.durable_epoch:
            self._set_durable(message.durable_epoch, message.durable_hash)
        self.applied_epoch = max(self.applied_epoch, message.applied_epoch)
        if message.received_epoch < self.next_number:
            self.received_epoch = max(self.durable_epoch, message.received_epoch)
        self.grant(message.received_bytes, message.credit_bytes, now_ns)
        if message.missing_epoch:
            self._resend(message.missing_epoch, message.missing_frames)

    def _check_position(self, epoch: int, chain_hash: bytes) -> None:
        """Only ends of units that were sent, with their hash, or what is known already."""
        if epoch < self.durable_epoch:
            return
        known = {unit.encoded.number: unit.commit.chain_hash for unit in self.units}
        known[self.durable_epoch] = self.durable_hash
        if epoch not in known:
            raise RemoteProtocolError(
                f'peer "{self.name}" reports epoch {epoch} durable, which it was not sent'
            )
        if known[epoch] != chain_hash:
            raise RemoteProtocolError(
                f'peer "{self.name}" has another history at epoch {epoch}: chain hashes differ'
            )

    def _set_durable(self, epoch: int, chain_hash: bytes) -> None:
        while self.units and self.units[0].encoded.number <= epoch:
            self._reopen_after_ns = REOPEN_NS  # It is taken again.
            self.units.popleft()
            self.counters.epochs_durable += 1
        self.durable_epoch = epoch
        self.durable_hash = chain_hash
        if self.data_state == "consistent":
            self.said_epoch = max(self.said_epoch, epoch)
        if epoch >= self.gone_back_from:
            self.gone_back_from = 0

    def _resend(self, epoch: int, bitmap: bytes) -> None:
        for unit in self.units:
            if unit.encoded.number != epoch:
                continue
            waiting = set(unit.to_send)
            for number in bitmap_numbers(bitmap, len(unit.encoded.frames)):
                if number not in waiting:
                    unit.to_send.append(number)
                    # It will never be counted as received for its first sending.
                    self._sent_bytes -= len(unit.encoded.frames[number])
            unit.is_commit_sent = unit.is_commit_sent and not unit.to_send
            return

    def may_send(self, length: int) -> bool:
        """Whether window, credit and link take a frame of this length now."""
        return length <= self.room_bytes and self.fits(length)

    def fits(self, length: int) -> bool:
        """Whether window and credit take a frame of this length now."""
        sent_bytes = self._sent_bytes + length
        is_in_window = sent_bytes - self._received_bytes <= self.limits.window_bytes_min
        return is_in_window and sent_bytes <= self._credit_bytes

    @property
    def is_all_received(self) -> bool:
        """Nothing that was sent is on its way, as far as the peer has said."""
        return self._received_bytes >= self._sent_bytes

    def count_sent(self, length: int) -> None:
        """Account for a frame handed to the link."""
        self._sent_bytes += length
        self.room_bytes -= length
        self.counters.wire_bytes += length

    def uncount_sent(self, length: int) -> None:
        """So many bytes count as lost: they will be sent again."""
        self._sent_bytes -= length

    def grant(
        self, received_bytes: int, credit_bytes: int, now_ns: int, *, may_fall: bool = False
    ) -> None:
        """Positions of flow control, from an acknowledgement of any kind.

        :param may_fall: what turned out to be damaged does not count as received any more.
        """
        if received_bytes > self._received_bytes:
            self.progress_ns = now_ns
        if may_fall or received_bytes > self._received_bytes:
            self._received_bytes = received_bytes
        self._credit_bytes = max(self._credit_bytes, credit_bytes)

    def _is_hung(self, unit: Unit) -> bool:
        """Part of the unit is on its way, and the window or the credit is used up."""
        frames = unit.encoded.frames
        is_begun = len(unit.to_send) < len(frames) and not unit.is_commit_sent
        return is_begun and not self.fits(len(frames[unit.to_send[0]]))

    def hung_at(self) -> int | None:
        """When `next_sends` has to look whether frames were lost, None for not at all."""
        if not self.units or not self.is_open or self.mode not in (STREAM, FOLD):
            return None
        waiting = next((unit for unit in self.units if unit.to_send), None)
        is_hung = waiting is not None and self._is_hung(waiting)
        return self.progress_ns + LOST_AFTER_NS if is_hung else None

    def next_sends(self, now_ns: int) -> list[Decision]:
        """Frames and commits that may go out now, in order."""
        decisions: list[Decision] = []
        if not self.is_open or self.mode not in (STREAM, FOLD):
            return decisions
        for unit in self.units:
            frames = unit.encoded.frames
            while unit.to_send:
                body = frames[unit.to_send[0]]
                if not self.may_send(len(body)):
                    if self._is_hung(unit) and now_ns >= self.progress_ns + LOST_AFTER_NS:
                        # What fills the window may be lost; the commit lets the peer ask for it.
                        decisions.append(self._commit_of(unit))
                    return decisions
                number = unit.to_send.popleft()
                self.count_sent(len(body))
                epoch = unit.encoded.number
                decisions.append(SendFrame(self.name, self.session, epoch, number, body))
            if not unit.is_commit_sent:
                decisions.append(self._commit_of(unit))
        return decisions

    def _commit_of(self, unit: Unit) -> Decision:
        unit.is_commit_sent = True
        return SendMessage(self.name, self.session, unit.commit)
