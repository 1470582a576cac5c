"""Different blocks are written again at the primary with what they hold: an epoch brings them.

```
 blocks ─▶ where their content lies now ─▶ read (job) ─▶ nothing moved? ─▶ WRITE, ZERO ─▶ stream
                                                  └ rewritten or applied meanwhile: read again
```
Invariant: what is written is what a reader of the primary would get at that very moment, so no
write of a client is ever undone by it. At the secondary the content before is saved in the undo, as
by any epoch. Healing goes from the primary to its peers, never the other way.
Deliberately not here: which blocks differ (`verifying`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geomirror.environment import MS
from geomirror.errors import GeomirrorError, JournalFullError, NoSpaceError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.dirty_index import Piece
from geomirror.volume.engine import Engine, Write
from geomirror.volume.engine_jobs import ReadJob
from geomirror.volume.record import RecordType
from geomirror.wan_protocol.decisions import RunJob
from geomirror.wan_protocol.supersession import Supersession
from geomirror.wan_protocol.verify_run import VerifyRun

HEAL_BLOCKS_MAX = 64
"""Blocks written again at once: a batch like those of a busy client."""
HEAL_RETRY_NS = 200 * MS
"""The journal had no room to spare: writers come first."""
HEAL_KIND = "heal"


@dataclass(frozen=True)
class _Block:
    volume: int
    block: int
    length: int
    pieces: list[Piece]
    reading: ReadJob


class HealJob:
    """Reads blocks of the primary where their newest content lies."""

    def __init__(self, engine: Engine, blocks: list[tuple[int, int]]) -> None:
        self.applied_epoch = engine.applied_epoch
        self.blocks: list[_Block] = []
        for volume, block in blocks:
            offset = block * BLOCK_BYTES
            length = min(BLOCK_BYTES, engine.sizes.now[volume] - offset)
            pieces = engine.read_pieces(volume, offset, length)
            reading = engine.read_job(volume, offset, length)
            self.blocks.append(_Block(volume, block, length, pieces, reading))

    def run(self) -> None:
        """Blocking. :raises StorageError: a device failed."""
        for each in self.blocks:
            each.reading.run()

    def release(self) -> None:
        """Let the journal be trimmed again."""
        for each in self.blocks:
            each.reading.release()

    def writes(self, engine: Engine) -> tuple[list[Write], list[tuple[int, int]]]:
        """What writes the blocks again, and those whose content may be another one by now."""
        writes: list[Write] = []
        again: list[tuple[int, int]] = []
        # A pass may have brought something to the image, and taken it out of the index.
        is_same = engine.applied_epoch == self.applied_epoch
        for each in self.blocks:
            offset = each.block * BLOCK_BYTES
            length = min(BLOCK_BYTES, engine.sizes.now[each.volume] - offset)
            pieces = engine.read_pieces(each.volume, offset, length)
            if not is_same or length != each.length or pieces != each.pieces:
                again.append((each.volume, each.block))
                continue
            content = b"".join(each.reading.buffers)
            if content.count(0) == length:
                writes.append((int(RecordType.ZERO), each.volume, offset, length, None))
            else:
                writes.append((int(RecordType.WRITE), each.volume, offset, length, content))
        return writes, again


class Healing(Supersession):
    """The part of the primary that writes blocks again."""

    _healing: VerifyRun | None = None

    def write(self, writes: Sequence[Write], now_ns: int, wall_ns: int) -> int:
        """See `Primary.write`."""
        raise NotImplementedError

    def _pump_heal(self, run: VerifyRun) -> None:
        """Begin to write the next blocks again, when the journal has room to spare."""
        if self._healing is not None or self.now_ns < run.not_before_ns:
            return
        needed = 4 * HEAL_BLOCKS_MAX * BLOCK_BYTES
        engine = self.engine
        if not engine.has_room(min(needed, self.limits.record_payload_bytes_max)):
            self._heal_later(run, "the journal has no room to spare")
            return
        blocks: list[tuple[int, int]] = []
        while run.to_heal and len(blocks) < HEAL_BLOCKS_MAX:
            blocks.append(run.to_heal.popleft())
        self._healing = run
        self._run(HEAL_KIND, HealJob(engine, blocks), self._heal_read)

    def _heal_read(self, job: HealJob) -> None:
        job.release()
        run = self._healing
        assert run is not None
        try:
            self._heal_write(run, job)
        finally:
            # Not before: a write may cut an epoch, and what follows from that looks here.
            self._healing = None

    def _heal_write(self, run: VerifyRun, job: HealJob) -> None:
        writes, again = job.writes(self.engine)
        run.to_heal.extendleft(reversed(again))
        if not writes:
            return
        places = [(volume, offset // BLOCK_BYTES) for _, volume, offset, _, _ in writes]
        try:
            if self.is_frozen:
                raise JournalFullError("the role changes")
            self.write(writes, self.now_ns, self.wall_ns)
        except (JournalFullError, NoSpaceError) as error:
            run.to_heal.extendleft(reversed(places))
            self._heal_later(run, error.message)
            return
        run.found.healed_blocks += len(writes)
        run.heal_epoch = self.engine.last_changed_epoch

    def _heal_later(self, run: VerifyRun, reason: str) -> None:
        run.reason = reason
        run.not_before_ns = self.now_ns + HEAL_RETRY_NS

    def _job_failed(self, run: RunJob, error: GeomirrorError) -> None:
        job, healing = run.job, self._healing
        if not isinstance(job, HealJob) or healing is None:
            super()._job_failed(run, error)
            return
        # Blocks could not be read here: a verify is no reason to stop serving.
        job.release()
        self._healing = None
        healing.to_heal.extendleft((each.volume, each.block) for each in reversed(job.blocks))
        self._heal_later(healing, error.message)
