"""A secondary's storage in this process, with a clock of its own: what does a copy cost?

Epochs come from the caller, and are spooled, committed, made durable, applied and thinned by the
jobs that a daemon runs, in the same order; only network, threads and waiting are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.counted_store import UNDO, CountedStore
from geomirror.environment import SECOND, SeededEntropy
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.apply import ApplyJob
from geomirror.volume.digest import digest_of
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.epoch_table import Epoch, Table, chain_hash, empty_table
from geomirror.volume.superblock import GenerationRecord
from geomirror.volume.undo_merge import ThinJob

GENERATION = bytes(range(16))
SPOOL_BLOCKS = 16
"""A frame's 64 KiB."""


class CopyEngine:
    """One resource with one volume, at the epoch that was applied last."""

    def __init__(
        self,
        directory: Path,
        volume_bytes: int,
        journal_bytes: int,
        limits: Limits,
        *,
        is_durable: bool,
    ) -> None:
        self.store = CountedStore(directory, is_durable=is_durable)
        self.wall_ns = 1_000_000 * SECOND
        self.logical_bytes = 0
        """Contents of all epochs."""
        self.marked: list[int] = []
        """Epochs that thinning leaves as they are."""
        self._limits = limits
        self._hash = bytes(32)
        self.engine = Engine.create(
            self.store,
            limits,
            SeededEntropy("copy"),
            name="disk",
            resource_id=bytes(16),
            volumes=[VolumeSpec(0, "0", volume_bytes)],
            journal_bytes=journal_bytes,
            role="secondary",
            chain=[],
            wall_ns=self.wall_ns,
        )
        self.engine.superblock.chain = [GenerationRecord(GENERATION.hex())]
        self.engine.superblock.data_state = "consistent"
        self.checkpoint()

    def receive(self, blocks: Mapping[int, bytes], seconds: float) -> None:
        """One epoch that was cut so many seconds after the last one; durable at return."""
        engine = self.engine
        self.wall_ns += round(seconds * SECOND)
        number = engine.committed_epoch + 1
        numbers, contents = list(blocks), list(blocks.values())
        addresses: list[int] = []
        for at in range(0, len(contents), SPOOL_BLOCKS):
            part = contents[at : at + SPOOL_BLOCKS]
            first = engine.spool(part, self.wall_ns)
            addresses += range(first, first + len(part) * BLOCK_BYTES, BLOCK_BYTES)
        table = _table(numbers, contents, addresses)
        lsns = (number * 1000, number * 1000 + 1000)
        self._hash = chain_hash(self._hash, GENERATION, number, *lsns, table)
        engine.commit(
            Epoch(number, number, GENERATION, *lsns, self.wall_ns, self._hash, table), self.wall_ns
        )
        engine.keep_spooled(0)
        sync = engine.sync_job()
        sync.run()
        engine.complete_sync(sync)
        self.logical_bytes += sum(map(len, contents))

    def next_pass(self) -> ApplyJob | None:
        """The next apply pass, as a daemon bounds it; None when all is applied."""
        target = self.engine.pass_end(self.engine.sealed_epoch)
        return self.engine.apply_job(target) if target > self.engine.applied_epoch else None

    def applied(self, job: ApplyJob) -> None:
        """A pass has run: checkpoint it, and let the journal go."""
        self.engine.complete_apply(job)
        self.checkpoint()
        journal = self.engine.journal
        trim = journal.trim_job()
        if trim is not None:
            trim.run()
            journal.complete_trim(trim)

    def checkpoint(self) -> None:
        """Make the superblock durable."""
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)

    def thin(self) -> int:
        """Merge and drop what is due; bytes that this wrote."""
        before = self.store.written[UNDO]
        while True:
            job = ThinJob(self.store, self.engine.undo, self._limits, self.marked)
            job.run()
            if not job.has_changed:
                return self.store.written[UNDO] - before

    def written(self) -> dict[str, int]:
        """Bytes written until now, by kind of file."""
        return dict(self.store.written)

    def close(self) -> None:
        """Release everything; the directory is its owner's."""
        self.engine.close()
        self.store.close()


def _table(numbers: list[int], contents: list[bytes], addresses: list[int]) -> Table:
    table = empty_table(len(numbers))
    table["count"], table["block"], table["address"] = 1, numbers, addresses
    digests = np.array([digest_of(content) for content in contents], dtype=np.uint64)
    table["digest_low"], table["digest_high"] = digests[:, 0], digests[:, 1]
    return table
