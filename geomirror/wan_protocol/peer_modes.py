"""Per peer of a primary: which mode it is in, and the way from one mode to the next.

```
            backlog ≥ 25 %            backlog ≥ 90 % of the journal
 Stream ───────────────────▶ Fold ───────────────────────────────▶ Bitmap ◀─┐ overflow again
   ▲  ◀── drained, dwelt ──────┘                                     │ peer is back
   └──────────────────────── finished ◀──────────────────────────  Resync ──┘
```
A peer's epochs are retained in the journal as its *persisted* mode needs them: after a restart the
superblock's word (mode, epoch through which the bitmap counts) and the journal are always exact
together. A slow peer never pins another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from geomirror.environment import MS, SECOND
from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import PeerRecord
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.encode_unit import EncodeUnitJob, commit_message
from geomirror.wan_protocol.messages import ResyncAcknowledge, SessionAccept
from geomirror.wan_protocol.peer_bitmap import BitmapJob, PeerBitmap
from geomirror.wan_protocol.replica import Replica
from geomirror.wan_protocol.resync_sender import ResyncSender
from geomirror.wan_protocol.sender import BITMAP, FOLD, RESYNC, STREAM, Sender

BITMAP_INTERVAL_NS = 1 * SECOND
"""Between two updates of a disconnected peer's bitmap: each costs two fdatasyncs."""


class PeerModes(Replica):
    """The part of the primary that is about peers."""

    session: int

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.senders: dict[str, Sender] = {}
        self.bitmaps: dict[str, PeerBitmap] = {}
        self.resyncs: dict[str, ResyncSender] = {}
        self._resync_number = 0
        self._persisted: dict[str, tuple[str, int]] = {}

    # Membership.

    def add_peer(self, name: str) -> Sender:
        """Take up the peer where the superblock left it; a peer it does not know is blank."""
        record = self.engine.superblock.peers.get(name)
        if record is None:
            record = PeerRecord(mode=BITMAP, is_initial=True)
            self.engine.superblock.peers[name] = record
        sender = Sender(name, self.session, self.limits)
        sender.durable_epoch = sender.applied_epoch = record.durable_epoch
        sender.durable_hash = bytes.fromhex(record.durable_hash) or bytes(32)
        sender.next_number = record.durable_epoch + 1
        sender.counters.resyncs = record.resyncs
        sender.mode = FOLD if record.mode == FOLD else STREAM
        sender.mode_since_ns = self.now_ns
        self.senders[name] = sender
        needs_bitmap = record.mode in (BITMAP, RESYNC)
        if needs_bitmap:
            sender.mode = BITMAP
            self.bitmaps[name] = self._load_bitmap(name, record)
        self._persisted[name] = (sender.mode, record.bitmap_through)
        self._retain(sender)
        return sender

    def remove_peer(self, name: str) -> None:
        """Forget the peer; its epochs and its bitmap are no longer kept."""
        self.senders.pop(name)
        self.resyncs.pop(name, None)
        self._persisted.pop(name, None)
        kept = self.bitmaps.pop(name, None)
        if kept is not None:
            kept.bitmap.delete()
        self.engine.superblock.peers.pop(name, None)
        self.engine.release(name)
        self._checkpoint_wanted = True
        self._pump()

    def _volume_sizes(self) -> dict[int, int]:
        return {index: image.size_bytes for index, image in self.engine.images.items()}

    def _load_bitmap(self, name: str, record: PeerRecord) -> PeerBitmap:
        store = self.engine.store
        try:
            bitmap = DirtyBitmap.load(store, name)
            return PeerBitmap(bitmap, record.bitmap_base, record.bitmap_through, record.is_initial)
        except GeomirrorError:
            # Lost or damaged: everything may differ. Never less.
            return self._full_bitmap(name, is_initial=record.is_initial)

    def _new_bitmap(self, name: str, base_epoch: int, base_hash: bytes) -> DirtyBitmap:
        return DirtyBitmap.create(
            self.engine.store,
            name,
            self._volume_sizes(),
            generation=self.engine.generation,
            epoch=base_epoch,
            chain_hash=base_hash,
        )

    def _full_bitmap(self, name: str, *, is_initial: bool) -> PeerBitmap:
        bitmap = self._new_bitmap(name, 0, bytes(32))
        bitmap.set_all()
        return PeerBitmap(bitmap, 0, self.engine.applied_epoch, is_initial)

    # Where a connecting peer stands.

    def _has_epochs_after(self, epoch: int) -> bool:
        if epoch >= self.engine.sealed_epoch:
            return True
        numbers = self.engine.epoch_numbers()
        return bool(numbers) and numbers[0] <= epoch + 1

    def _known_hash(self, sender: Sender, epoch: int) -> bytes | None:
        engine = self.engine
        if epoch == 0:
            return bytes(32)
        if epoch == engine.sealed_epoch:
            return engine.sealed_hash
        if epoch == engine.applied_epoch:
            return engine.applied_hash
        if epoch == sender.durable_epoch:
            return sender.durable_hash
        if epoch in engine.epoch_numbers():
            return engine.epoch_info(epoch).chain_hash
        return None

    def _place_peer(self, sender: Sender, message: SessionAccept) -> str:
        """Choose stream or resync for the reported position; returns why it can be neither."""
        epoch = message.durable_epoch
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
        if sender.mode in (STREAM, FOLD):
            # What was copied to it is not known any more: it is an older disk.
            is_half_copied = message.data_state == "inconsistent" and message.consistent_from < 0
            if is_half_copied or not self._has_epochs_after(epoch):
                self._start_over(sender, is_initial=False)
            return ""
        resync = self.resyncs.pop(sender.name, None)
        kept = self.bitmaps[sender.name]
        if resync is not None and self._has_finished(resync, message):
            self._finish_resync(sender, resync)
            return ""
        sender.mode = BITMAP
        if epoch < kept.base_epoch:
            self._start_over(sender, is_initial=False)
        return ""

    def _has_finished(self, resync: ResyncSender, message: SessionAccept) -> bool:
        """The peer got to the end of the resync before the link went away."""
        is_past_end = resync.is_end_sent and message.durable_epoch >= resync.end_epoch
        is_consistent = message.data_state == "consistent"
        return is_past_end and is_consistent and self._has_epochs_after(message.durable_epoch)

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
        total = self.engine.journal.bytes_total
        limits = self.limits
        if sender.mode == BITMAP:
            return
        since = sender.durable_epoch
        if sender.mode == RESYNC:
            since = max(since, self.resyncs[sender.name].base_epoch)
        backlog = self.engine.bytes_backlog(since)
        # Segments are freed whole and the last is kept back: in a small journal writers would wait
        # before the fraction is reached.
        spare_bytes = 2 * (limits.segment_bytes + limits.record_payload_bytes_max)
        if backlog >= min(total * limits.bitmap_backlog_fraction, total - spare_bytes):
            self._overflow(sender)
        elif sender.mode == STREAM and backlog >= total * limits.fold_backlog_fraction:
            self._set_mode(sender, FOLD)
        elif sender.mode == FOLD and backlog < total * limits.fold_backlog_fraction / 4:
            self._leave_fold(sender)

    def _leave_fold(self, sender: Sender) -> None:
        if self.now_ns - sender.mode_since_ns >= self.limits.mode_dwell_ns_min:
            self._set_mode(sender, STREAM)

    def _overflow(self, sender: Sender) -> None:
        """The journal cannot hold this peer's backlog: go to (or back to) the bitmap."""
        resync = self.resyncs.pop(sender.name, None)
        if resync is None:
            base = sender.durable_epoch
            bitmap = self._new_bitmap(sender.name, base, sender.durable_hash)
            self.bitmaps[sender.name] = PeerBitmap(bitmap, base, base)
            sender.counters.resyncs += 1
        sender.forget_units(sender.durable_epoch + 1)
        self._set_mode(sender, BITMAP)
        fields: dict[str, object] = {"peer": sender.name, "epoch": sender.durable_epoch}
        self._decide(Emit("journal_overflow", fields))

    def _abandon_resync(self, sender: Sender) -> None:
        """The link went away: what was copied and is durable stays copied."""
        if self.resyncs.pop(sender.name, None) is not None:
            self._set_mode(sender, BITMAP)

    def _pump_modes(self) -> None:
        for name, kept in self.bitmaps.items():
            sender = self.senders[name]
            if sender.mode != BITMAP or self.is_running(f"bitmap:{name}"):
                continue
            sealed = self.engine.sealed_epoch
            wants_resync = sender.is_open and not sender.is_paused
            is_due = self.now_ns - kept.updated_ns >= BITMAP_INTERVAL_NS or wants_resync
            is_due = is_due or self._room_wanted
            if kept.through_epoch < sealed and is_due:
                kept.updated_ns = self.now_ns
                numbers = [n for n in self.engine.epoch_numbers() if n > kept.through_epoch]
                numbers = [n for n in numbers if n <= sealed]
                job = BitmapJob(self.engine, kept.bitmap, numbers, sealed)
                self._run(f"bitmap:{name}", job, partial(self._bitmap_done, name))
            elif kept.through_epoch >= sealed and wants_resync:
                self._start_resync(sender, kept)

    def _bitmap_done(self, name: str, job: BitmapJob) -> None:
        kept = self.bitmaps.get(name)
        if kept is None or kept.bitmap is not job.bitmap:
            return
        kept.through_epoch = job.through_epoch
        self._checkpoint_wanted = True

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
            progress_ns=self.now_ns,
        )
        self.resyncs[sender.name] = resync
        self._set_mode(sender, RESYNC)
        self._decide(resync.begin())
        self._pump_sender(sender)

    def _resync_acknowledged(self, sender: Sender, message: ResyncAcknowledge) -> None:
        resync = self.resyncs.get(sender.name)
        if resync is None:
            return
        if message.frames > resync.next_sequence:
            raise RemoteProtocolError(f'peer "{sender.name}" acknowledges frames never sent')
        is_finished = resync.acknowledge(message, self.now_ns)
        if message.frames:
            # From here on the bitmap is only right for a peer that kept what was copied.
            self.bitmaps[sender.name].base_epoch = resync.base_epoch
        if is_finished:
            self._finish_resync(sender, resync)

    def _finish_resync(self, sender: Sender, resync: ResyncSender) -> None:
        self.resyncs.pop(sender.name, None)
        kept = self.bitmaps.pop(sender.name)
        kept.bitmap.delete()
        record = self.engine.superblock.peers[sender.name]
        record.consistent_from = resync.end_epoch
        sender.durable_epoch = max(sender.durable_epoch, resync.base_epoch)
        if sender.durable_epoch == resync.base_epoch:
            sender.durable_hash = resync.base_hash
        sender.forget_units(sender.durable_epoch + 1)
        self._set_mode(sender, STREAM)

    def _consistent_from(self, sender: Sender) -> int:
        return self.engine.superblock.peers[sender.name].consistent_from

    # Persistence: retention follows what the superblock says, not what memory says.

    def _checkpoint_records(self) -> None:
        for name, sender in self.senders.items():
            record = self.engine.superblock.peers[name]
            kept = self.bitmaps.get(name)
            record.durable_epoch = sender.durable_epoch
            record.durable_hash = sender.durable_hash.hex()
            record.mode = BITMAP if kept is not None else sender.mode
            record.bitmap_base = kept.base_epoch if kept else 0
            record.bitmap_through = kept.through_epoch if kept else 0
            record.is_initial = kept.is_initial if kept else False
            record.resyncs = sender.counters.resyncs

    def _pump_checkpoint(self) -> None:
        if self._checkpoint_wanted and not self.is_running("checkpoint"):
            self._checkpoint_records()
        super()._pump_checkpoint()

    def _checkpoint_done(self, job: Any) -> None:
        for name, record in job.superblock.peers.items():
            if name in self.senders:
                self._persisted[name] = (record.mode, record.bitmap_through)
                self._retain(self.senders[name])
        super()._checkpoint_done(job)

    def _retain(self, sender: Sender) -> None:
        mode, through = self._persisted[sender.name]
        kept_epoch = through if mode == BITMAP else sender.durable_epoch
        if sender.name not in self.bitmaps:
            kept_epoch = min(kept_epoch, sender.durable_epoch)
        self.engine.retain(sender.name, kept_epoch)

    # Sending.

    def _pump_sender(self, sender: Sender) -> None:
        resync = self.resyncs.get(sender.name)
        if resync is not None:
            self._pump_resync(sender, resync)
            return
        if sender.may_encode(self.engine.sealed_epoch):
            self._start_encode(sender)
        for decision in sender.next_sends(self.now_ns):
            self._decide(decision)

    def _pump_resync(self, sender: Sender, resync: ResyncSender) -> None:
        kind = f"read:{sender.name}"
        if not self.is_running(kind):
            job = resync.next_read()
            if job is not None:
                pin = self.engine.journal.pin(self.engine.scan_lsn, kind)
                self._run(kind, job, partial(self._read_done, sender.name, resync, pin))
        stuck_at = resync.stuck_at()
        if stuck_at is not None and self.now_ns >= stuck_at:
            resync.send_again(self.now_ns)
        for decision in resync.next_sends(self.engine.sealed_epoch):
            self._decide(decision)

    def _read_done(self, name: str, resync: ResyncSender, pin: Any, job: Any) -> None:
        pin.release()
        resync.read_done(job)

    def _start_encode(self, sender: Sender) -> None:
        kind = f"encode:{sender.name}"
        if self.is_running(kind):
            return
        first, last = sender.next_number, self.engine.sealed_epoch
        numbers = [first]
        if sender.mode == FOLD:
            numbers = list(range(first, min(last, first + self.limits.fold_epochs_max - 1) + 1))
        sender.is_encoding = True
        job = EncodeUnitJob(self.engine, numbers, self.limits.fold_bytes_max, level=1)
        self._run(kind, job, partial(self._encoded_unit, sender))

    def _encoded_unit(self, sender: Sender, job: EncodeUnitJob) -> None:
        sender.is_encoding = False
        assert job.encoded is not None
        if job.encoded.first_number != sender.next_number or sender.mode not in (STREAM, FOLD):
            return  # The peer was placed elsewhere meanwhile.
        sender.counters.logical_bytes += job.encoded.raw_bytes
        sender.add_unit(job.encoded, commit_message(job.encoded, self.session))

    def _peer_timers(self) -> list[int]:
        stuck = [resync.stuck_at() for resync in self.resyncs.values()]
        stuck += [sender.hung_at() for sender in self.senders.values()]
        times = [at_ns for at_ns in stuck if at_ns is not None]
        for name, kept in self.bitmaps.items():
            is_waiting = self.senders[name].mode == BITMAP and not self.is_running(f"bitmap:{name}")
            if is_waiting and kept.through_epoch < self.engine.sealed_epoch:
                times.append(max(kept.updated_ns + BITMAP_INTERVAL_NS, self.now_ns + 10 * MS))
        return times
