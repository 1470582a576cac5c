"""What a primary keeps about its peers: positions, dirty bitmaps, and which epochs they pin.

```
 memory      Stream ──overflow──▶ Bitmap ───────────────▶ Resync ──end──▶ Stream
 superblock  Stream ─────────────────────▶ Bitmap ──────────────────────────────▶ Stream
 file                          bits durable ▲      cleared bits, now and then       ▲ deleted after
```
Invariants: the superblock says Bitmap only once the bits are durable, and epochs are released only
once it says so; bits are cleared on disk only once the base that they hold for is in the
superblock. So after any crash superblock, file and journal are exact together (I7, I14), and a
resync goes on where it was (I12). Deliberately not here: choosing modes (`peer_modes`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError
from geomirror.limits import Limits
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import PeerRecord
from geomirror.wan_protocol.peer_bitmap import BitmapJob, PeerBitmap
from geomirror.wan_protocol.replica import Replica
from geomirror.wan_protocol.resync_sender import ResyncSender
from geomirror.wan_protocol.sender import BITMAP, FOLD, RESYNC, STREAM, Sender

BITMAP_INTERVAL_NS = 1 * SECOND
"""Between two updates of a peer's bitmap: each costs two fdatasyncs."""


class PeerRecords(Replica):
    """The part of the primary that outlives it."""

    session: int

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.senders: dict[str, Sender] = {}
        self.bitmaps: dict[str, PeerBitmap] = {}
        self.resyncs: dict[str, ResyncSender] = {}
        self._persisted: dict[str, tuple[str, int, int]] = {}
        """(mode, epoch through which the bitmap counts, its base) as the superblock has them."""
        self._obsolete: dict[str, DirtyBitmap] = {}

    # Membership.

    def add_peer(self, name: str) -> Sender:
        """Take up the peer where the superblock left it; a peer it does not know is blank."""
        record = self.engine.superblock.peers.get(name)
        is_new = record is None
        if record is None:
            record = PeerRecord(mode=BITMAP, is_initial=True)
            self.engine.superblock.peers[name] = record
        sender = Sender(name, self.session, self.limits)
        sender.durable_epoch = sender.applied_epoch = record.durable_epoch
        sender.durable_hash = bytes.fromhex(record.durable_hash) or bytes(32)
        sender.next_number = record.durable_epoch + 1
        sender.said_epoch = record.said_epoch
        sender.counters.resyncs = record.resyncs
        sender.mode = FOLD if record.mode == FOLD else STREAM
        sender.mode_since_ns = self.now_ns
        self.senders[name] = sender
        if record.mode in (BITMAP, RESYNC):
            sender.mode = BITMAP
            # A file that is there belongs to an earlier member of this name.
            full = self._full_bitmap(name, is_initial=True)
            self.bitmaps[name] = full if is_new else self._load_bitmap(name, record)
        self._persisted[name] = (sender.mode, record.bitmap_through, record.bitmap_base)
        self._retain(sender)
        self._keep_history()
        return sender

    def remove_peer(self, name: str) -> None:
        """Forget the peer; its epochs and its bitmap are no longer kept."""
        self.senders.pop(name)
        self.resyncs.pop(name, None)
        self._persisted.pop(name, None)
        kept = self.bitmaps.pop(name, None)
        if kept is not None:
            self._obsolete[name] = kept.bitmap
        self.engine.superblock.peers.pop(name, None)
        self.engine.release(name)
        self._keep_history()
        self._checkpoint_wanted = True
        self._pump()

    # Bitmaps.

    def _volume_sizes(self) -> dict[int, int]:
        """As of the last sealed epoch: later ones grow a bitmap when they are entered."""
        return self.engine.sizes.at(self.engine.sealed_epoch)

    def _load_bitmap(self, name: str, record: PeerRecord) -> PeerBitmap:
        store = self.engine.store
        if record.bitmap_is_full:
            return self._full_bitmap(name, is_initial=record.is_initial)
        try:
            bitmap = DirtyBitmap.load(store, name)
        except GeomirrorError:
            # Lost or damaged: everything may differ. Never less.
            return self._full_bitmap(name, is_initial=record.is_initial)
        base_hash = bytes.fromhex(record.bitmap_base_hash)
        _, epoch, chain_hash = bitmap.base
        if not base_hash and epoch == record.bitmap_base:
            base_hash = chain_hash
        return PeerBitmap(
            bitmap,
            record.bitmap_base,
            record.bitmap_through,
            record.is_initial,
            covers_all=bitmap.is_full,
            base_hash=base_hash,
            later={number: bytes.fromhex(h) for number, h in record.bitmap_later.items()},
        )

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
        return PeerBitmap(bitmap, 0, self.engine.applied_epoch, is_initial, covers_all=True)

    def _pump_bitmap(self, name: str, kept: PeerBitmap, *, is_urgent: bool) -> None:
        """Add the newest epochs; in a resync only make durable what was cleared."""
        is_resync = self.senders[name].mode == RESYNC
        is_due = self.now_ns >= kept.updated_ns + BITMAP_INTERVAL_NS or is_urgent
        if not is_due:
            return
        mode, _, base = self._persisted[name]
        if mode == BITMAP and base != kept.base_epoch:
            self._checkpoint_wanted = True
            return
        kept.updated_ns = self.now_ns
        if is_resync:
            job = kept.bitmap.write_job()
            if job is not None:
                self._run(f"bitmap:{name}", job, partial(self._bits_saved, name))
            return
        sealed = self.engine.sealed_epoch
        numbers = [n for n in self.engine.epoch_numbers() if kept.through_epoch < n <= sealed]
        update = BitmapJob(self.engine, kept.bitmap, numbers, sealed, self._volume_sizes())
        self._run(f"bitmap:{name}", update, partial(self._bitmap_done, name))

    def _bitmap_done(self, name: str, job: BitmapJob) -> None:
        kept = self.bitmaps.get(name)
        if kept is None or kept.bitmap is not job.bitmap:
            return
        kept.through_epoch = job.through_epoch
        self._checkpoint_wanted = True

    def _bits_saved(self, name: str, job: Any) -> None:
        if self._persisted.get(name, (BITMAP,))[0] != BITMAP:
            self._checkpoint_wanted = True

    def _drop_obsolete(self) -> None:
        """Delete files that no superblock speaks of any more."""
        for name in list(self._obsolete):
            is_spoken_of = self._persisted.get(name, ("",))[0] == BITMAP
            if is_spoken_of or self.is_running(f"bitmap:{name}"):
                continue
            bitmap = self._obsolete.pop(name)
            if name not in self.bitmaps:
                bitmap.delete()

    # What is known of epochs.

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

    # Persistence: retention follows what the superblock says, not what memory says.

    def _checkpoint_records(self) -> None:
        for name, sender in self.senders.items():
            record = self.engine.superblock.peers[name]
            kept = self.bitmaps.get(name)
            record.durable_epoch = sender.durable_epoch
            record.durable_hash = sender.durable_hash.hex()
            record.said_epoch = sender.said_epoch
            record.resyncs = sender.counters.resyncs
            if kept is not None and (kept.covers_all or kept.bitmap.is_on_disk):
                record.mode = BITMAP
                record.bitmap_base = kept.base_epoch
                record.bitmap_base_hash = kept.base_hash.hex()
                record.bitmap_later = kept.saved_later()
                record.bitmap_through = kept.through_epoch
                record.bitmap_is_full = not kept.bitmap.is_on_disk
                record.is_initial = kept.is_initial
                continue
            # Until the bits are durable the journal keeps what they stand for.
            record.mode = sender.mode if kept is None else FOLD
            record.bitmap_base = record.bitmap_through = 0
            record.bitmap_base_hash, record.bitmap_later = "", {}
            record.bitmap_is_full = record.is_initial = False

    def _pump_checkpoint(self) -> None:
        if self._checkpoint_wanted and not self.is_running("checkpoint"):
            self._checkpoint_records()
        super()._pump_checkpoint()

    def _checkpoint_done(self, job: Any) -> None:
        for name, record in job.superblock.peers.items():
            if name in self.senders:
                self._persisted[name] = (record.mode, record.bitmap_through, record.bitmap_base)
                self._retain(self.senders[name])
        self._keep_history()
        super()._checkpoint_done(job)

    def _pump_upkeep(self) -> None:
        self._drop_obsolete()
        super()._pump_upkeep()

    def _keep_history(self) -> None:
        """Undo leads back to whatever one of them may be promoted with."""
        initial = {name for name, kept in self.bitmaps.items() if kept.is_initial}
        had = [each.had_epoch for name, each in self.senders.items() if name not in initial]
        self._history.keep_for_peers(min(had, default=None))

    def _retain(self, sender: Sender) -> None:
        mode, through, _ = self._persisted[sender.name]
        kept_epoch = through if mode == BITMAP else sender.durable_epoch
        if sender.name not in self.bitmaps:
            kept_epoch = min(kept_epoch, sender.durable_epoch)
        self.engine.retain(sender.name, kept_epoch)
