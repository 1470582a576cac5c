"""The primary's side of a resync: what differs in dirty regions, in frames.

```
 bitmap   ▓▓░▓▓▓░░▓   asked, compared, read (`resync_plan`)
 frames      [0][1][2]… each chunk remembers its last frame; a chunk that is durable at the
                        peer has its bits cleared, so an interrupted resync never starts again (I12)
```
Content compared and copied is that of the base epoch or newer; every epoch after the base is
streamed next, and the peer is consistent once it has applied the end epoch. Until then its image
says Inconsistent. Regions that are equal are chunks without frames.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, REGION_BYTES, Limits
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.dirty_index import IMAGE, Piece
from geomirror.volume.engine import Engine
from geomirror.volume.sealed_content import SPARSE_INDEX_ENTRIES, SealedContent, pieces_of
from geomirror.volume.tree_digest import REGION_BLOCKS
from geomirror.wan_protocol.decisions import Decision, SendFrame, SendMessage
from geomirror.wan_protocol.messages import (
    ResyncAcknowledge,
    ResyncAsk,
    ResyncBegin,
    ResyncDigests,
    ResyncEnd,
    VolumeInfo,
)
from geomirror.wan_protocol.resync_job import CompareJob, Item, ResyncReadJob
from geomirror.wan_protocol.resync_plan import Part, ResyncPlan
from geomirror.wan_protocol.sender import Sender

_NOTHING: frozenset[int] = frozenset()
SHORT_BLOCKS = 16 * REGION_BLOCKS
"""Of a part that is looked up block by block."""
DENSE_RUN_BYTES = 16 << 20
"""Range looked at by one step while many blocks wait for destage; with few, a whole GiB."""
LOST_AFTER_NS = 3 * SECOND
"""Nothing of what is on its way was received for so long: it is sent again. At 1 Mbit/s a frame
takes half a second."""
SLOW_AFTER_NS = 60 * SECOND
"""The same for frames that were all received, and are not durable: the peer's disk is slow, and to
send 32 MiB again every three seconds would only take the link."""


@dataclass
class ResyncSender:
    """One resync of one peer."""

    sender: Sender
    engine: Engine
    bitmap: DirtyBitmap
    limits: Limits
    number: int
    base_epoch: int
    base_hash: bytes
    volumes: list[VolumeInfo]
    """As of the base epoch: what has grown since comes with its epoch."""
    key: int
    """Of digests, 64 bits; new for each resync."""
    end_epoch: int = 0
    total_bytes: int = 0
    """Of dirty regions, at its begin."""
    compared_bytes: int = 0
    """Of these, found equal or read."""
    copied_bytes: int = 0
    """Contents that differed, or of which nothing was known."""
    sent_bytes: int = 0
    """Frames handed to the link."""
    has_cleared: bool = False
    """Bits of the bitmap are cleared: it is right only for a peer that kept what was copied."""
    is_reading: bool = False
    is_read_to_end: bool = False
    is_end_sent: bool = False
    next_sequence: int = 0
    progress_ns: int = 0
    _durable: int = 0
    _frames: dict[int, bytes] = field(default_factory=dict)
    _to_send: deque[int] = field(default_factory=deque)
    _chunks: deque[tuple[int, list[tuple[int, int, int]]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._sizes = {each.index: each.size_bytes for each in self.volumes}
        has_digests = self.sender.gives_digests
        self.plan = ResyncPlan(
            self.bitmap, self._sizes, self.limits, has_digests=has_digests, key=self.key
        )

    def begin(self) -> Decision:
        """The message that opens the resync."""
        self.total_bytes = self.bitmap.count() * REGION_BYTES
        message = ResyncBegin(
            self.sender.session,
            self.engine.generation,
            self.base_epoch,
            self.base_hash,
            self.total_bytes,
            self.number,
            self.volumes,
            self.key if self.plan.has_digests else 0,
        )
        return SendMessage(self.sender.name, self.sender.session, message)

    # Comparing and reading.

    def next_asks(self) -> list[Decision]:
        """Messages that ask for digests, as far as there is room for what comes of them."""
        name, session = self.sender.name, self.sender.session
        if not self.sender.is_open or self.sender.is_paused or self.is_read_to_end:
            return []
        return [
            SendMessage(name, session, ResyncAsk(session, self.number, request, units, runs))
            for request, units, runs in self.plan.next_asks()
        ]

    def answer(self, message: ResyncDigests) -> None:
        """Digests that were asked for. :raises RemoteProtocolError: they were not."""
        assert message.number == self.number
        self.plan.answer(message)
        self._take_equal()

    def next_read(self) -> ResyncReadJob | CompareJob | None:
        """The next step of reading, when frames held leave room for it."""
        if self.is_reading or self.is_read_to_end or not self.sender.is_open:
            return None
        if self.sender.is_paused:
            return None
        job = self._next_job()
        if job is not None:
            self.is_reading = True
        else:
            self.is_read_to_end = self.plan.is_done
        return job

    def _next_job(self) -> ResyncReadJob | CompareJob | None:
        read_bytes = self.limits.resync_read_bytes_max
        held = sum(map(len, self._frames.values()))
        if held <= self.limits.resync_held_bytes_max:
            parts = self.plan.next_copies(4 * read_bytes // BLOCK_BYTES)
            if parts:
                items = [self._item(part) for part in parts]
                unsealed = any(item.unsealed for item in items)
                if unsealed:
                    # They travel with their epoch, so the peer is not consistent before it has it.
                    self.end_epoch = max(self.end_epoch, self.engine.last_changed_epoch)
                return ResyncReadJob(items, self.plan.key, read_bytes, 1)
        nodes = self.plan.next_nodes()
        if nodes is None:
            return None
        return CompareJob(self._item(nodes), self.plan.key, 4 * read_bytes)

    def _item(self, part: Part) -> Item:
        """A snapshot of what is sealed of a part, or of as much of it as is looked at at once."""
        engine, volume = self.engine, part.volume
        entries, bound = engine.indexes[volume].entry_count, self.limits.resync_run_bytes_max
        if entries >= SPARSE_INDEX_ENTRIES:
            bound = min(bound, DENSE_RUN_BYTES)
        unit = max(part.unit_blocks, REGION_BLOCKS)
        most = max(bound // BLOCK_BYTES // unit * unit, unit)
        # Of a volume that is all image, no range is too long to be looked up.
        blocks = min(part.blocks, most) if entries else part.blocks
        offset = part.first * BLOCK_BYTES
        stop = min(offset + blocks * BLOCK_BYTES, self._sizes[volume])
        if blocks <= SHORT_BLOCKS and engine.indexes[volume].is_all_image(part.first, blocks):
            # As nearly all of thousands of scattered regions.
            pieces, unsealed = [Piece(offset, stop - offset, IMAGE)], _NOTHING
        else:
            pieces = pieces_of(engine.indexes[volume], offset, stop - offset)
            unsealed = frozenset(engine.unsealed_blocks(volume, part.first, blocks))
        content = SealedContent(engine.images[volume], engine.journal, pieces)
        return Item(part, blocks, content, stop, unsealed)

    def read_done(self, job: ResyncReadJob | CompareJob) -> None:
        """Queue the frames of a finished step, and note which regions are done with."""
        self.is_reading = False
        if isinstance(job, CompareJob):
            part = job.item.part
            for first, end in job.equal:
                region = first // REGION_BLOCKS
                self.plan.equal.append((part.volume, region, -(-end // REGION_BLOCKS)))
            self.plan.compared(part, job.done, job.zeros, job.differing)
            self._take_equal()
            return
        for body in job.frames:
            self._frames[self.next_sequence] = body
            self._to_send.append(self.next_sequence)
            self.next_sequence += 1
        regions: list[tuple[int, int, int]] = []
        for item, done in zip(reversed(job.items), reversed(job.done), strict=True):
            self.plan.copied(item.part, done)
            regions += self._whole_regions(item.part, done)
        self._add_chunk(regions)
        self.copied_bytes += job.data_bytes
        self.sender.counters.logical_bytes += job.data_bytes

    def _whole_regions(self, part: Part, done: int) -> list[tuple[int, int, int]]:
        """Regions of which the last block is read now: the others, of this part or of one before
        it, are read already."""
        end = part.first + done
        is_last = end * BLOCK_BYTES >= self._sizes[part.volume]
        first = part.first // REGION_BLOCKS
        stop = -(-end // REGION_BLOCKS) if is_last else end // REGION_BLOCKS
        return [(part.volume, first, stop)] if stop > first else []

    def _take_equal(self) -> None:
        found, self.plan.equal = self.plan.equal, []
        self._add_chunk(found)

    def _add_chunk(self, regions: list[tuple[int, int, int]]) -> None:
        if regions:
            self.compared_bytes += sum(end - first for _, first, end in regions) * REGION_BYTES
            self._chunks.append((self.next_sequence, regions))
            self._clear_durable()

    def _clear_durable(self) -> None:
        runs: list[tuple[int, int, int]] = []
        while self._chunks and self._chunks[0][0] <= self._durable:
            runs += self._chunks.popleft()[1]
        if runs:
            self.bitmap.clear_runs(runs)
            self.has_cleared = True

    # Frames.

    def stuck_at(self) -> int | None:
        """When frames on the way count as lost with their connection, None when none are."""
        if not self._frames or not self.sender.is_open or self._goes_on():
            return None
        after_ns = SLOW_AFTER_NS if self.sender.is_all_received else LOST_AFTER_NS
        return max(self.progress_ns, self.sender.progress_ns) + after_ns

    def _goes_on(self) -> bool:
        """The next frame waits for room in the link only: lost ones may fill the window."""
        body = self._frames.get(self._to_send[0]) if self._to_send else None
        return bool(self._to_send) and (body is None or self.sender.fits(len(body)))

    def send_again(self, now_ns: int) -> None:
        """Nothing was heard for long: send everything on the way once more."""
        self.progress_ns = now_ns
        waiting = set(self._to_send)
        sent = (len(body) for number, body in self._frames.items() if number not in waiting)
        self.sender.uncount_sent(sum(sent))
        self._to_send = deque(sorted(self._frames))

    def next_sends(self, sealed_epoch: int, now_ns: int) -> list[Decision]:
        """Frames that may go out now, and the end once all is durable at the peer."""
        decisions: list[Decision] = []
        name, session = self.sender.name, self.sender.session
        while self._to_send:
            sequence = self._to_send[0]
            body = self._frames.get(sequence)
            if body is None:
                self._to_send.popleft()  # Durable at the peer meanwhile.
                continue
            if not self.sender.may_send(len(body)):
                return decisions
            self._to_send.popleft()
            if self.sender.is_all_received:
                self.progress_ns = now_ns  # Nothing was on its way that could have been lost.
            self.sender.count_sent(len(body))
            self.sent_bytes += len(body)
            decisions.append(SendFrame(name, session, self.number, sequence, body, is_resync=True))
        is_copied = self.is_read_to_end and not self._frames
        if is_copied and not self.is_end_sent and sealed_epoch >= self.end_epoch:
            self.is_end_sent = True
            self.end_epoch = sealed_epoch
            end = ResyncEnd(session, self.number, self.end_epoch, self.next_sequence)
            decisions.append(SendMessage(name, session, end))
        return decisions

    def acknowledge(self, message: ResyncAcknowledge, now_ns: int) -> bool:
        """Take what is durable in the peer's image; True once the peer needs no more copying."""
        assert message.number == self.number
        received_bytes, credit_bytes = message.received_bytes, message.credit_bytes
        self.sender.grant(received_bytes, credit_bytes, now_ns, may_fall=True)
        for sequence in [s for s in self._frames if s < message.frames]:
            del self._frames[sequence]
            self.progress_ns = now_ns
        self._durable = max(self._durable, message.frames)
        self._clear_durable()
        return message.is_finished and self.is_end_sent
