"""Both sides of a resync at the ends of a far link, on a clock that only events move.

```
 primary ── asks; frames at the link's rate ─▶ 100 ms ─▶ copy
         ◀─────── digests, acknowledgements ── 100 ms ──
```
Sender, plan, jobs, receiver and answers are the product's, with the limits of production; in place
of the engines are two images. A job does its work at once and takes the time that a disk would.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from geomirror.environment import MS, SECOND
from geomirror.limits import BLOCK_BYTES, MIB, PRODUCTION, REGION_BYTES
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.image import Image
from geomirror.volume.tree_digest import REGION_BLOCKS
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.epoch_intake import EpochIntake
from geomirror.wan_protocol.messages import (
    ResyncAcknowledge,
    ResyncAsk,
    ResyncDigests,
    ResyncEnd,
    VolumeInfo,
    encode_message,
)
from geomirror.wan_protocol.resync_job import CompareJob
from geomirror.wan_protocol.resync_receiver import ResyncReceiver
from geomirror.wan_protocol.resync_sender import ResyncSender
from geomirror.wan_protocol.sender import RESYNC, Sender
from tests.sim.disk import SimStore

RATE = 12_500_000
"""Bytes per second: 100 Mbit/s."""
WAY_NS = 100 * MS
QUEUE_BYTES = 4 * PRODUCTION.queue_bytes_max
"""Of four data connections."""
CHECKPOINT_NS = 20 * MS


@dataclass(frozen=True)
class Disk:
    """What jobs take."""

    region_ns: int = 500_000
    """A scattered read of a region, when nobody said that it would come: one at a time."""
    depth: int = 8
    """So many at a time, of those that were said."""
    bytes_per_second: int = 1 << 30
    """From end to end."""
    write_ns: int = 300 * MS
    """One write of copied blocks: before-images, blocks, two fdatasyncs."""


@dataclass
class FarResync:
    """One resync. `blocks` of the copy are not what the primary has there."""

    size: int
    blocks: list[int]
    disk: Disk = field(default_factory=Disk)
    rate: int = RATE
    is_lost: Callable[[int], bool] = lambda sequence: False
    """Whether a frame that is sent now for the first time arrives."""
    is_known: bool = True
    """The bitmap says which regions differ."""
    now_ns: int = 0
    sent: list[tuple[int, int]] = field(default_factory=list)
    """Of each frame: when its first byte left, and its length."""
    sent_again: int = 0
    asked: int = 0
    wire_bytes: int = 0
    done_ns: int = 0

    def __post_init__(self) -> None:
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._busy_until_ns = self._back_until_ns = 0
        self._taken = self._unreported = 0
        self._is_acknowledging = self._is_writing = self._is_digesting = False
        self._sequences: set[int] = set()
        self._expected = 0
        self._store, sizes = SimStore("far"), {0: self.size}
        self._ours, self._theirs = (self._image(name) for name in ("ours", "theirs"))
        noise = random.Random(len(self.blocks))
        for block in self.blocks:
            for image in (self._ours, self._theirs):
                image.file.pwritev([noise.randbytes(BLOCK_BYTES)], block * BLOCK_BYTES)
        bitmap = DirtyBitmap.create(
            self._store, "west", sizes, generation=bytes(16), epoch=0, chain_hash=bytes(32)
        )
        for block in self.blocks:
            bitmap.set_range(0, block * BLOCK_BYTES, BLOCK_BYTES)
        if not self.is_known:
            bitmap.set_all()
        self.sender = Sender("west", 1, PRODUCTION, is_open=True, gives_digests=True, mode=RESYNC)
        index = DirtyIndex(self.size, PRODUCTION.zero_run_blocks_min)
        engine = SimpleNamespace(
            indexes={0: index},
            images={0: self._ours},
            journal=None,
            generation=bytes(16),
            unsealed_blocks=lambda *where: (),
        )
        self.resync = ResyncSender(
            self.sender,
            cast(Any, engine),
            bitmap,
            PRODUCTION,
            *(1, 1, bytes(32), [VolumeInfo(0, "0", self.size)], 77),
        )
        begin = self.resync.begin()
        assert isinstance(begin, SendMessage)
        superblock = SimpleNamespace(consistent_from=-1)
        copy = SimpleNamespace(
            images={0: self._theirs}, open_pass=None, superblock=superblock, held=None
        )
        self.receiver = ResyncReceiver(cast(Any, copy), PRODUCTION, cast(Any, begin.message))

    def _image(self, name: str) -> Image:
        file = self._store.create(name, self.size)
        file.expect_reads = self._expect  # type: ignore[method-assign]
        return Image(0, name, self.size, file)

    def _expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._expected += sum(-(-length // REGION_BYTES) for _, length in ranges)

    # The clock.

    def _at(self, at_ns: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ns, next(self._count), action))

    def run(self) -> None:
        """Until the copy has everything."""
        self._at(WAY_NS, self._acknowledge)
        self._at(WAY_NS + CHECKPOINT_NS, self._begun)
        self._tick()
        while not self.done_ns:
            self.now_ns, _, action = heapq.heappop(self._events)
            action()
        for block in self.blocks:
            assert self._theirs.read_block(block) == self._ours.read_block(block)

    def _regions_ns(self, regions: int) -> int:
        """What the job that was just run takes for its scattered reads."""
        expected, self._expected = min(self._expected, regions), 0
        disk = self.disk
        return (regions - expected) * disk.region_ns + expected * disk.region_ns // disk.depth

    def _bytes_ns(self, byte_count: int) -> int:
        return byte_count * SECOND // self.disk.bytes_per_second

    # The primary.

    def _tick(self) -> None:
        self._primary()
        self._at(self.now_ns + SECOND // 2, self._tick)

    def _primary(self) -> None:
        resync = self.resync
        job = resync.next_read()
        if job is not None:
            job.run()
            if isinstance(job, CompareJob):
                cost_ns = self._bytes_ns(max(job.done * BLOCK_BYTES, MIB))
            else:
                cost_ns = self._regions_ns(sum(job.done) // REGION_BLOCKS)
            self._at(self.now_ns + cost_ns, lambda: self._was_read(job))
        for decision in resync.next_asks():
            assert isinstance(decision, SendMessage)
            ask = decision.message
            assert isinstance(ask, ResyncAsk)
            self.asked += 1
            self.wire_bytes += len(encode_message(ask))
            self._at(self.now_ns + WAY_NS, lambda ask=ask: self._is_asked(ask))
        stuck_at = resync.stuck_at()
        if stuck_at is not None and self.now_ns >= stuck_at:
            resync.send_again(self.now_ns)
        waiting_bytes = max(0, self._busy_until_ns - self.now_ns) * self.rate // SECOND
        self.sender.room_bytes = max(0, QUEUE_BYTES - waiting_bytes)
        for decision in resync.next_sends(1, self.now_ns):
            if isinstance(decision, SendFrame):
                self._send(decision)
            else:
                assert isinstance(decision, SendMessage)
                end = decision.message
                assert isinstance(end, ResyncEnd)
                self.done_ns = self.now_ns

    def _was_read(self, job: Any) -> None:
        self.resync.read_done(job)
        self._primary()

    def _send(self, frame: SendFrame) -> None:
        began_ns, length = max(self.now_ns, self._busy_until_ns), len(frame.body)
        self._busy_until_ns = began_ns + length * SECOND // self.rate
        self.sent.append((began_ns, length))
        self.wire_bytes += length
        self.sent_again += frame.sequence in self._sequences
        is_lost = frame.sequence not in self._sequences and self.is_lost(frame.sequence)
        self._sequences.add(frame.sequence)
        if is_lost:
            return
        self._at(self._busy_until_ns + WAY_NS, lambda: self._arrived(frame))

    # The copy.

    def _begun(self) -> None:
        self.receiver.is_begun = self.receiver.is_recorded = True
        self._copy()

    def _is_asked(self, ask: ResyncAsk) -> None:
        self.receiver.answers.add(ask)
        self._copy()

    def _arrived(self, frame: SendFrame) -> None:
        length = len(frame.body)
        self._unreported += length
        self._taken += length if self.receiver.add(frame.sequence, frame.body) else 0
        if self._unreported >= PRODUCTION.acknowledge_bytes:
            self._acknowledge()
        elif not self._is_acknowledging:
            self._is_acknowledging = True
            self._at(self.now_ns + PRODUCTION.acknowledge_delay_ns, self._acknowledge)
        self._copy()

    def _acknowledge(self) -> None:
        self._is_acknowledging, self._unreported = False, 0
        intake = SimpleNamespace(limits=PRODUCTION, taken_bytes=self._taken)
        credit = EpochIntake.credit_bytes(cast(Any, intake), self.receiver.queued_bytes)
        message = self.receiver.acknowledgement(self._taken, credit)
        self._at(self.now_ns + WAY_NS, lambda: self._acknowledged(message))

    def _acknowledged(self, message: ResyncAcknowledge) -> None:
        self.resync.acknowledge(message, self.now_ns)
        self._primary()

    def _copy(self) -> None:
        receiver = self.receiver
        digests = None if self._is_digesting else receiver.next_digests()
        if digests is not None:
            self._is_digesting = True
            before = digests.key.read_bytes
            digests.run()
            found = receiver.answers.done(digests)
            blocks = len(digests.digests) * digests.unit_blocks
            if digests.key.read_bytes == before:
                cost_ns = 0  # Holes, or what an earlier answer has told.
            elif digests.unit_blocks > REGION_BLOCKS:
                cost_ns = self._bytes_ns(blocks * BLOCK_BYTES)
            else:
                cost_ns = self._regions_ns(-(-blocks // REGION_BLOCKS))
            self._at(self.now_ns + cost_ns, lambda: self._digested(found))
        write = None if self._is_writing else receiver.next_job()
        if write is not None:
            self._is_writing = True
            write.run()
            self._at(self.now_ns + self.disk.write_ns, lambda: self._written(write))

    def _digested(self, found: ResyncDigests) -> None:
        self._is_digesting = False
        length = len(encode_message(found))
        self.wire_bytes += length
        self._back_until_ns = max(self.now_ns, self._back_until_ns) + length * SECOND // self.rate
        self._at(self._back_until_ns + WAY_NS, lambda: self._answered(found))
        self._copy()

    def _answered(self, found: ResyncDigests) -> None:
        self.resync.answer(found)
        self._primary()

    def _written(self, job: Any) -> None:
        self._is_writing = False
        self._taken -= self.receiver.written(job)
        self._acknowledge()
        self._copy()

    # What came of it.

    @property
    def first_ns(self) -> int:
        """When the first byte of content left."""
        return self.sent[0][0]

    @property
    def use(self) -> float:
        """Part of the link that frames took, from the first to the last of them."""
        last_ns, length = self.sent[-1]
        end_ns = last_ns + length * SECOND // self.rate
        return (
            sum(length for _, length in self.sent) * SECOND / self.rate / (end_ns - self.first_ns)
        )

    @property
    def copied_bytes(self) -> int:
        """What had to cross."""
        return len(self.blocks) * BLOCK_BYTES


def scattered(size: int, part: float) -> list[int]:
    """Single blocks all over a volume."""
    count = size // BLOCK_BYTES
    return sorted(random.Random(size).sample(range(count), int(count * part)))
