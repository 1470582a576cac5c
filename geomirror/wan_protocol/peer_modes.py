"""Per peer of a primary: which mode it is in, and the way from one mode to the next.

```
            backlog ≥ 25 %            backlog ≥ 90 % of the journal
 Stream ───────────────────▶ Fold ───────────────────────────────▶ Bitmap ◀─┐ overflow again
   ▲  ◀── drained, dwelt ──────┘                                     │ peer is back, dwelt
   └──────────────────────── finished ◀──────────────────────────  Resync ──┘
```
A peer's epochs are retained in the journal as its *persisted* mode needs them: after a restart the
superblock's word (mode, epoch through which the bitmap counts) and the journal are always exact
together. A slow peer never pins another.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

from geomirror.environment import MS
from geomirror.errors import RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import Emit, SendMessage
from geomirror.wan_protocol.encode_unit import EncodeUnitJob, commit_message
from geomirror.wan_protocol.growth import volumes_at
from geomirror.wan_protocol.mark_intake import marks_message
from geomirror.wan_protocol.messages import ResyncAcknowledge, ResyncDigests, SessionAccept
from geomirror.wan_protocol.peer_bitmap import PeerBitmap
from geomirror.wan_protocol.peer_records import BITMAP_INTERVAL_NS, PeerRecords
from geomirror.wan_protocol.resync_sender import ResyncSender
from geomirror.wan_protocol.sender import BITMAP, FOLD, RESYNC, STREAM, Sender

FOREVER = 1 << 62
"""Behind every epoch."""


class PeerModes(PeerRecords):
    """The part of the primary that is about peers."""

    incarnation: bytes

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self._resync_number = 0
        self._overflowed_ns: dict[str, int] = {}

    # Where a connecting peer stands.

    def _place_peer(self, sender: Sender, message: SessionAccept) -> str:
        """Choose stream or resync for the reported position; returns why it can be neither."""
        epoch = message.durable_epoch
        if not message.volumes and self.engine.sizes.between(epoch, FOREVER):
            return f'"{sender.name}" runs a version that does not know growing volumes: update it'
        sender.knows_growth = bool(message.volumes)
        if message.data_state == "blank":
            kept = self.bitmaps.get(sender.name)
            # A blank peer has nothing of what was copied: its disk is another one.
            if kept is None or not kept.is_initial or not kept.bitmap.is_full:
                self._start_over(sender, is_initial=True)
            return ""
        if message.generation != self.engine.generation:
            return (
                f'"{sender.name}" holds another history '
                f"(generation {message.generation.hex()[:8]}, epoch {epoch}): diverged"
            )
        known = self._known_hash(sender, epoch)
        if epoch > self.engine.sealed_epoch or known not in (None, message.durable_hash):
            return f'"{sender.name}" holds another history at epoch {epoch}: diverged'
        if message.volumes and self._has_epochs_after(epoch):
            theirs = {each.index: each.size_bytes for each in message.volumes}
            ours = self.engine.sizes.at(epoch)
            if theirs != ours:
                return f"volumes differ: {ours} here, {theirs} at {sender.name}"
        if sender.mode in (STREAM, FOLD):
            # What was copied to it is not known any more: it is an older disk.
            is_half_copied = message.data_state == "inconsistent" and message.consistent_from < 0
            if is_half_copied or not self._has_epochs_after(epoch):
                self._start_over(sender, is_initial=False)
            return ""
        self.resyncs.pop(sender.name, None)
        sender.mode = BITMAP
        if message.data_state == "consistent" and known is not None and self._may_stream(epoch):
            # It came to the end of a resync, or back in time: the journal has all it lacks.
            self._leave_bitmap(sender, epoch)
        elif not self.bitmaps[sender.name].serves(epoch, message.durable_hash, known):
            # Older than it, or of a history that cannot be compared any more.
            self._start_over(sender, is_initial=False)
        return ""

    def _may_stream(self, epoch: int) -> bool:
        """Whether what follows an epoch is in the journal, and far from overflowing it."""
        is_small = self.engine.bytes_backlog(epoch) < self._overflow_bytes() / 2
        return is_small and self._has_epochs_after(epoch)

    def _leave_bitmap(self, sender: Sender, epoch: int) -> None:
        self._obsolete[sender.name] = self.bitmaps.pop(sender.name).bitmap
        sender.forget_units(epoch + 1)
        self._set_mode(sender, STREAM)

    def _start_over(self, sender: Sender, *, is_initial: bool) -> None:
        """Everything may differ: set all bits and copy."""
        self.resyncs.pop(sender.name, None)
        self.bitmaps[sender.name] = self._full_bitmap(sender.name, is_initial=is_initial)
        sender.forget_units(self.engine.sealed_epoch + 1)
        self._set_mode(sender, BITMAP)
        if not is_initial:
            sender.counters.resyncs += 1

    # Modes.

    def _set_mode(self, sender: Sender, mode: str) -> None:
        if sender.mode != mode:
            sender.mode = mode
            sender.mode_since_ns = self.now_ns
            self._decide(Emit("peer_mode", {"peer": sender.name, "mode": mode}))
            self._checkpoint_wanted = True

    def _check_backlog(self, sender: Sender) -> None:
        """Fold or overflow this peer when its backlog says so."""
        if sender.mode == BITMAP:
            return
        since = sender.durable_epoch
        if sender.mode == RESYNC:
            since = max(since, self.resyncs[sender.name].base_epoch)
        backlog = self.engine.bytes_backlog(since)
        if backlog >= self._overflow_bytes():
            self._overflow(sender)
        elif sender.mode == STREAM and self.engine.bytes_recorded(since) >= self._fold_bytes():
            self._set_mode(sender, FOLD)

    def _fold_bytes(self) -> float:
        return self.engine.journal.bytes_total * self.limits.fold_backlog_fraction

    def _overflow_bytes(self) -> float:
        limits, total = self.limits, self.engine.journal.bytes_total
        # Segments are freed whole and the last is kept back: in a small journal writers would wait
        # before the fraction is reached.
        spare_bytes = 2 * (limits.segment_bytes + limits.record_payload_bytes_max)
        return min(total * limits.bitmap_backlog_fraction, total - spare_bytes)

    def _leave_fold(self, sender: Sender) -> None:
        """Stream again once the backlog is drained and the peer has dwelt in Fold.

        What is left has to fit in half of the free journal, too, which other peers may have filled.
        """
        if self.now_ns < sender.mode_since_ns + self.limits.mode_dwell_ns_min:
            return
        backlog = self.engine.bytes_recorded(sender.durable_epoch)
        if backlog < self._fold_bytes() / 4 and backlog <= self.engine.journal.room_bytes() / 2:
            self._set_mode(sender, STREAM)

    def _overflow(self, sender: Sender) -> None:
        """The journal cannot hold this peer's backlog: go to (or back to) the bitmap."""
        resync = self.resyncs.pop(sender.name, None)
        if resync is None:
            base = sender.durable_epoch
            bitmap = self._new_bitmap(sender.name, base, sender.durable_hash)
            sent = {unit.encoded.number: unit.commit.chain_hash for unit in sender.units}
            self.bitmaps[sender.name] = PeerBitmap(
                bitmap, base, base, base_hash=sender.durable_hash, later=sent
            )
            sender.counters.resyncs += 1
        sender.forget_units(sender.durable_epoch + 1)
        self._set_mode(sender, BITMAP)
        self._overflowed_ns[sender.name] = self.now_ns
        fields: dict[str, object] = {"peer": sender.name, "epoch": sender.durable_epoch}
        self._decide(Emit("journal_overflow", fields))

    def _dwelt_at(self, name: str) -> int:
        """When a peer may leave Bitmap: a link too slow for the load must not flip it for ever."""
        overflowed_ns = self._overflowed_ns.get(name)
        return 0 if overflowed_ns is None else overflowed_ns + self.limits.mode_dwell_ns_min

    def _abandon_resync(self, sender: Sender) -> None:
        """The link went away: what was copied and is durable stays copied."""
        if self.resyncs.pop(sender.name, None) is not None:
            self._set_mode(sender, BITMAP)

    def _pump_modes(self) -> None:
        for sender in self.senders.values():
            if sender.mode == FOLD:
                self._leave_fold(sender)
        for name, kept in self.bitmaps.items():
            sender = self.senders[name]
            if self.is_running(f"bitmap:{name}"):
                continue
            if sender.mode == RESYNC:
                self._pump_bitmap(name, kept, is_urgent=False)
                continue
            sealed = self.engine.sealed_epoch
            wants_resync = sender.is_open and not sender.is_paused
            wants_resync = wants_resync and self.now_ns >= self._dwelt_at(name)
            if kept.through_epoch < sealed:
                self._pump_bitmap(name, kept, is_urgent=wants_resync or self._room_wanted)
            elif wants_resync:
                self._start_resync(sender, kept)

    def _start_resync(self, sender: Sender, kept: PeerBitmap) -> None:
        self._resync_number += 1
        base_epoch, base_hash = self.engine.sealed_epoch, self.engine.sealed_hash
        resync = ResyncSender(
            sender,
            self.engine,
            kept.bitmap,
            self.limits,
            self._resync_number,
            base_epoch,
            base_hash,
            volumes_at(self.engine, base_epoch),
            self._digest_key(sender.name),
            progress_ns=self.now_ns,
        )
        self.resyncs[sender.name] = resync
        kept.later[base_epoch] = base_hash
        self._set_mode(sender, RESYNC)
        if sender.data_state == "consistent":
            sender.held_epoch = sender.applied_epoch  # Until the peer says what it can go back to.
        sender.data_state = "inconsistent"  # From the moment that it begins there.
        sender.restart_flow(self.now_ns)
        self._decide(resync.begin())
        self._pump_sender(sender)

    def _digest_key(self, name: str) -> int:
        """For the next resync: nobody who writes to a volume knows an incarnation."""
        what = f"{self._resync_number} {name}".encode()
        digest = hashlib.sha256(self.incarnation + what).digest()
        return int.from_bytes(digest[:8], "little")

    def _resync_answered(self, sender: Sender, message: ResyncDigests) -> None:
        resync = self.resyncs.get(sender.name)
        if resync is None or message.number != resync.number:
            return  # Of one that was given up.
        resync.answer(message)
        self._move_base(sender, resync)

    def _move_base(self, sender: Sender, resync: ResyncSender) -> None:
        kept = self.bitmaps[sender.name]
        if resync.has_cleared and kept.base_epoch != resync.base_epoch:
            kept.move_base(resync.base_epoch, resync.base_hash)
            self._checkpoint_wanted = True

    def _resync_acknowledged(self, sender: Sender, message: ResyncAcknowledge) -> None:
        resync = self.resyncs.get(sender.name)
        if resync is None or message.number != resync.number:
            return  # Of one that was given up.
        if message.frames > resync.next_sequence:
            raise RemoteProtocolError(f'peer "{sender.name}" acknowledges frames never sent')
        sender.held_epoch = message.held_epoch
        is_finished = resync.acknowledge(message, self.now_ns)
        self._move_base(sender, resync)
        if is_finished:
            self._finish_resync(sender, resync)

    def _finish_resync(self, sender: Sender, resync: ResyncSender) -> None:
        self.resyncs.pop(sender.name, None)
        record = self.engine.superblock.peers[sender.name]
        record.consistent_from = resync.end_epoch
        sender.durable_epoch = max(sender.durable_epoch, resync.base_epoch)
        if sender.durable_epoch == resync.base_epoch:
            sender.durable_hash = resync.base_hash
        self._leave_bitmap(sender, sender.durable_epoch)

    def _consistent_from(self, sender: Sender) -> int:
        return self.engine.superblock.peers[sender.name].consistent_from

    # Sending.

    def _pump_sender(self, sender: Sender) -> None:
        self._tell_marks(sender)
        resync = self.resyncs.get(sender.name)
        if resync is not None:
            self._pump_resync(sender, resync)
            return
        if sender.may_encode(self.engine.sealed_epoch):
            self._start_encode(sender)
        for decision in sender.next_sends(self.now_ns):
            self._decide(decision)

    def _tell_marks(self, sender: Sender) -> None:
        """Before anything else is sent: a mark comes before the commit of its epoch."""
        version = self.engine.marks.table.version
        if sender.is_open and sender.takes_marks and sender.marks_told != version:
            sender.marks_told = version
            message = marks_message(self.engine, self.session)
            self._decide(SendMessage(sender.name, self.session, message))

    def _pump_resync(self, sender: Sender, resync: ResyncSender) -> None:
        kind = f"read:{sender.name}"
        if not self.is_running(kind):
            job = resync.next_read()
            if job is not None:
                pin = self.engine.journal.pin(self.engine.scan_lsn, kind)
                self._run(kind, job, partial(self._read_done, sender, resync, pin))
        stuck_at = resync.stuck_at()
        if stuck_at is not None and self.now_ns >= stuck_at:
            resync.send_again(self.now_ns)
        for decision in resync.next_asks():
            self._decide(decision)
        for decision in resync.next_sends(self.engine.sealed_epoch, self.now_ns):
            self._decide(decision)

    def _read_done(self, sender: Sender, resync: ResyncSender, pin: Any, job: Any) -> None:
        pin.release()
        if self.resyncs.get(sender.name) is resync:
            resync.read_done(job)
            self._move_base(sender, resync)

    def _start_encode(self, sender: Sender) -> None:
        kind = f"encode:{sender.name}"
        if self.is_running(kind):
            return
        first, last = sender.next_number, self.engine.sealed_epoch
        numbers = [first]
        if sender.mode == FOLD:
            numbers = list(range(first, min(last, first + self.limits.fold_epochs_max - 1) + 1))
        sender.is_encoding = True
        sizes = self.engine.sizes
        job = EncodeUnitJob(
            self.engine,
            numbers,
            self.limits.fold_bytes_max,
            level=sender.level(last),
            base_sizes=sizes.at(first - 1),
            changed=frozenset(c.index for c in sizes.between(sender.durable_epoch, first - 1)),
        )
        self._run(kind, job, partial(self._encoded_unit, sender))

    def _encoded_unit(self, sender: Sender, job: EncodeUnitJob) -> None:
        sender.is_encoding = False
        assert job.encoded is not None
        if job.encoded.first_number != sender.next_number or sender.mode not in (STREAM, FOLD):
            return  # The peer was placed elsewhere meanwhile.
        sender.counters.logical_bytes += job.encoded.raw_bytes
        sender.add_unit(job.encoded, commit_message(job.encoded, self.session))

    def _peer_timers(self) -> list[int]:
        looks: list[int | None] = []
        dwelt: list[int] = []
        for sender in self.senders.values():
            looks += (sender.hung_at(), sender.reopen_at_ns)
            if sender.mode == FOLD:
                dwelt.append(sender.mode_since_ns + self.limits.mode_dwell_ns_min)
        for resync in self.resyncs.values():
            looks.append(resync.stuck_at())
        times = [at_ns for at_ns in looks if at_ns is not None]
        for name, kept in self.bitmaps.items():
            dwelt.append(self._dwelt_at(name))
            mode = self.senders[name].mode
            is_behind = mode == BITMAP and kept.through_epoch < self.engine.sealed_epoch
            is_waiting = is_behind or (mode == RESYNC and kept.bitmap.is_changed)
            if is_waiting and not self.is_running(f"bitmap:{name}"):
                times.append(max(kept.updated_ns + BITMAP_INTERVAL_NS, self.now_ns + 10 * MS))
        times += [at_ns for at_ns in dwelt if at_ns > self.now_ns]
        return times
