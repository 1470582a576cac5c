"""The primary's side of a plain resync: dirty regions, copied in ascending order.

```
 bitmap   ▓▓░▓▓▓░░▓   copied ──▶ cursor ──▶
 frames      [0][1][2]… each chunk remembers its last frame; a chunk that is durable at the
                        peer has its bits cleared, so an interrupted resync never starts again (I12)
```
Content copied is that of the base epoch or newer; every epoch after the base is streamed next, and
the peer is consistent once it has applied the end epoch. Until then it says Inconsistent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, REGION_BYTES, Limits
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import Decision, SendFrame, SendMessage
from geomirror.wan_protocol.messages import (
    ResyncAcknowledge,
    ResyncBegin,
    ResyncEnd,
    VolumeInfo,
)
from geomirror.wan_protocol.resync_job import ResyncReadJob, Run
from geomirror.wan_protocol.sender import Sender

SPARSE_INDEX_ENTRIES = 1024
"""With fewer undestaged entries a whole GiB is looked at in one step, else 16 MiB."""
DENSE_RUN_BYTES = 16 << 20
LOST_AFTER_NS = 3 * SECOND
"""No frame of a resync became durable for so long: those on the way are sent again. At 1 Mbit/s a
frame takes half a second."""


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
    end_epoch: int = 0
    total_bytes: int = 0
    copied_bytes: int = 0
    is_reading: bool = False
    is_read_to_end: bool = False
    is_end_sent: bool = False
    next_sequence: int = 0
    progress_ns: int = 0
    _frames: dict[int, bytes] = field(default_factory=dict)
    _to_send: deque[int] = field(default_factory=deque)
    _chunks: deque[tuple[int, list[tuple[int, int, int]]]] = field(default_factory=deque)
    _cursor: tuple[int, int] = (0, 0)
    _reading: list[Run] = field(default_factory=list)
    _reading_end: int = 0

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
        )
        return SendMessage(self.sender.name, self.sender.session, message)

    def next_read(self) -> ResyncReadJob | None:
        """The next step of reading, when frames held leave room for it."""
        held = sum(map(len, self._frames.values()))
        if self.is_reading or self.is_read_to_end or not self.sender.is_open:
            return None
        if self.sender.is_paused or held > self.limits.window_bytes_min // 2:
            return None
        runs = self._next_runs()
        if not runs:
            self.is_read_to_end = True
            return None
        self.is_reading = True
        self._reading = runs
        return ResyncReadJob(self.engine, runs, self.limits.resync_read_bytes_max, 1)

    def _next_runs(self) -> list[Run]:
        """Dirty regions from the cursor on, as sealed pieces; at most one run of regions."""
        volumes = self.bitmap.volumes
        for volume in volumes[self._cursor[0] :]:
            position = volumes.index(volume)
            first = self._cursor[1] if position == self._cursor[0] else 0
            for start, count in self.bitmap.runs(volume, first):
                self._cursor = (position, start)
                return self._runs_of(volume, start, count)
        return []

    def _size_of(self, volume: int) -> int:
        return next(each.size_bytes for each in self.volumes if each.index == volume)

    def _runs_of(self, volume: int, start: int, count: int) -> list[Run]:
        size = self._size_of(volume)
        sparse = self.engine.indexes[volume].entry_count < SPARSE_INDEX_ENTRIES
        bound = self.limits.resync_run_bytes_max if sparse else DENSE_RUN_BYTES
        bound = max(min(bound, self.limits.resync_run_bytes_max), REGION_BYTES)
        offset = start * REGION_BYTES
        length = min(count * REGION_BYTES, bound, size - offset)
        pieces = self.engine.read_pieces(volume, offset, length)
        blocks = -(-length // BLOCK_BYTES)
        skipped = self.engine.unsealed_blocks(volume, offset // BLOCK_BYTES, blocks)
        self._reading_end = offset + length
        if skipped:
            # They travel with their epoch, so the peer is not consistent before it has that one.
            self.end_epoch = max(self.end_epoch, self.engine.last_changed_epoch)
        if not skipped:
            return [Run(volume, offset, length, pieces)]
        runs: list[Run] = []
        position, end = offset, offset + length
        for block in [*sorted(skipped), -1]:
            stop = end if block < 0 else block * BLOCK_BYTES
            if stop > position:
                inside = [p for p in pieces if p.offset < stop and p.offset + p.length > position]
                runs.append(Run(volume, position, stop - position, inside))
            position = min(end, (block + 1) * BLOCK_BYTES) if block >= 0 else end
        # All of it unsealed: nothing to read, but the cursor still has to move past it.
        return runs or [Run(volume, offset, 0, [])]

    def read_done(self, job: ResyncReadJob) -> None:
        """Queue the frames of a finished step and move the cursor."""
        self.is_reading = False
        left = job.consumed
        reached = self._reading[0].offset
        for item in self._reading:
            taken = min(left, item.length)
            left -= taken
            reached = item.offset + taken
            if taken < item.length:
                break
        else:
            reached = self._reading_end
        volume = self._reading[0].volume
        first = self._cursor[1]
        is_at_end = reached >= self._size_of(volume)
        stop = -(-reached // REGION_BYTES) if is_at_end else reached // REGION_BYTES
        stop = max(stop, first)
        for body in job.frames:
            self._frames[self.next_sequence] = body
            self._to_send.append(self.next_sequence)
            self.next_sequence += 1
        if stop > first:
            self._chunks.append((self.next_sequence, [(volume, first, stop)]))
            self.copied_bytes += (stop - first) * REGION_BYTES
        self._cursor = (self._cursor[0], stop)
        self._reading = []
        self.sender.counters.logical_bytes += job.data_bytes

    def stuck_at(self) -> int | None:
        """When frames on the way count as lost with their connection, None when none are."""
        is_waiting = self._frames and not self._to_send and self.sender.is_open
        return self.progress_ns + LOST_AFTER_NS if is_waiting else None

    def send_again(self, now_ns: int) -> None:
        """Nothing was heard for long: send everything on the way once more."""
        self.progress_ns = now_ns
        self._to_send.extend(sorted(self._frames))
        self.sender.uncount_sent(sum(map(len, self._frames.values())))

    def next_sends(self, sealed_epoch: int) -> list[Decision]:
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
            self.sender.count_sent(len(body))
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
        self.sender.grant(message.received_bytes, message.credit_bytes, now_ns)
        for sequence in [s for s in self._frames if s < message.frames]:
            del self._frames[sequence]
            self.progress_ns = now_ns
        while self._chunks and self._chunks[0][0] <= message.frames:
            for volume, first, stop in self._chunks.popleft()[1]:
                self.bitmap.clear_range(volume, first, stop - first)
        return message.is_finished and self.is_end_sent
