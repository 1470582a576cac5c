"""The secondary's side of a resync: copied blocks go straight into the image.

```
 begun ─▶ superblock says so ─▶ frames ─▶ undo, image + fdatasync ─▶ acknowledged ─▶ end recorded
```
Nothing is written before the superblock says that the image is none by itself. Frames wait in
memory only within the credit that was granted. A frame is acknowledged when its blocks are durable
in the image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from geomirror.errors import LimitExceededError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.epoch_decode import FrameDecoder
from geomirror.wan_protocol.messages import ResyncAcknowledge, ResyncBegin, ResyncEnd
from geomirror.wan_protocol.resync_answer import DigestAnswers, DigestJob
from geomirror.wan_protocol.resync_write import ResyncWriteJob

FRAMES_AHEAD_MAX = 1 << 20
"""Frames that may be here before an earlier one; a hole of a GiB is one frame of 40 bytes."""
JOB_FRAMES_MAX = 128
"""Frames written between two fdatasyncs: at most 8 MiB."""


@dataclass
class ResyncReceiver:
    """State of one resync; `is_begun` once nothing else writes the image."""

    engine: Engine
    limits: Limits
    begin: ResyncBegin
    is_begun: bool = False
    is_recorded: bool = False
    is_finished: bool = False
    end_message: ResyncEnd | None = None
    frames_durable: int = 0
    queued_bytes: int = 0
    answers: DigestAnswers = field(init=False)
    _is_end_recorded: bool = False
    _queue: dict[int, bytes] = field(default_factory=dict)
    _ahead: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        sizes = {each.index: each.size_bytes for each in self.begin.volumes}
        self.answers = DigestAnswers(self.limits, self.begin.key, sizes)

    @property
    def number(self) -> int:
        """Serial number that frames of this resync carry."""
        return self.begin.number

    def add(self, sequence: int, body: bytes) -> bool:
        """Queue a frame; False for one that is here already.

        :raises LimitExceededError: more is queued than was ever granted, or too far ahead.
        """
        if sequence < self.frames_durable or sequence in self._ahead or sequence in self._queue:
            return False
        if sequence >= self.frames_durable + FRAMES_AHEAD_MAX:
            raise LimitExceededError(f"resync frame {sequence} after {self.frames_durable}")
        if self.queued_bytes + len(body) > 2 * self.limits.credit_bytes:
            raise LimitExceededError("resync frames beyond the granted credit")
        self._queue[sequence] = body
        self.queued_bytes += len(body)
        return True

    def next_job(self) -> ResyncWriteJob | None:
        """The next write into the images, once Inconsistent is durable."""
        if not self.is_recorded or not self._queue:
            return None
        numbers = sorted(self._queue)[:JOB_FRAMES_MAX]
        frames = [(n, self._queue[n]) for n in numbers]
        sizes = {index: image.size_bytes for index, image in self.engine.images.items()}
        decoder = FrameDecoder(self.limits, sizes)
        engine = self.engine
        return ResyncWriteJob(engine.images, engine.open_pass, decoder, self.number, frames)

    def next_digests(self) -> DigestJob | None:
        """The next part of an answer, once nothing of an earlier resync changes the images."""
        return self.answers.next_job(self.engine.images) if self.is_recorded else None

    def written(self, job: ResyncWriteJob) -> int:
        """A job's blocks are durable. Returns the bytes of damaged frames: they come again."""
        damaged_bytes = 0
        for sequence, body in job.frames:
            if self._queue.pop(sequence, None) is None:
                continue
            self.queued_bytes -= len(body)
            if sequence in job.damaged:
                damaged_bytes += len(body)
            else:
                self._ahead.add(sequence)
        while self.frames_durable in self._ahead:
            self._ahead.discard(self.frames_durable)
            self.frames_durable += 1
        return damaged_bytes

    def needs_checkpoint(self) -> bool:
        """Whether the superblock has something new to say; sets what it says."""
        if not self.is_begun:
            return False
        if not self.is_recorded:
            return True
        end = self.end_message
        if end is None or self._is_end_recorded or self.frames_durable < end.frames:
            return False
        self.engine.superblock.consistent_from = end.epoch
        self._is_end_recorded = True
        return True

    def checkpointed(self) -> None:
        """A checkpoint that was asked for is durable."""
        self.is_recorded = True
        if self._is_end_recorded:
            self.is_finished = True

    def acknowledgement(self, received_bytes: int, credit_bytes: int) -> ResyncAcknowledge:
        """What the primary may forget and send."""
        return ResyncAcknowledge(
            self.begin.session,
            self.number,
            self.frames_durable,
            received_bytes,
            credit_bytes,
            self.is_finished,
            -1 if self.engine.held is None else self.engine.held.epoch,
        )
