"""The job that loads the next unit of a stream from the journal and encodes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geomirror.volume.engine import Engine
from geomirror.volume.epoch_table import Epoch
from geomirror.wan_protocol.epoch_encode import EncodedEpoch, EncodeJob
from geomirror.wan_protocol.growth import change_infos
from geomirror.wan_protocol.messages import EpochCommit


@dataclass
class EncodeUnitJob:
    """Encode the first of `numbers`, folded with as many of the next as fit in `raw_bytes_max`.

    The bound is on the sum before folding, so that the result surely fits.
    """

    engine: Engine
    numbers: list[int]
    raw_bytes_max: int
    level: int
    base_sizes: Mapping[int, int]
    """Of the volumes before the first epoch."""
    changed: frozenset[int] = frozenset()
    """Volumes that grew before it since the epoch that the peer has durable."""
    encoded: EncodedEpoch | None = None

    def run(self) -> None:
        """Blocking. Raises StorageError, IntegrityError."""
        epochs = self._load()
        changes = [each for epoch in epochs for each in epoch.changes]
        job = EncodeJob(
            epochs,
            self.engine.journal.read,
            self.level,
            volume_bytes={**self.base_sizes, **{c.index: c.size_bytes for c in changes}},
            declared=self.changed | {each.index for each in changes},
            limits=self.engine.limits,
        )
        job.run()
        self.encoded = job.result

    def _load(self) -> list[Epoch]:
        epochs: list[Epoch] = []
        total = 0
        for number in self.numbers:
            if epochs and number <= epochs[-1].number:
                continue  # In a fold, which this node received while it was a secondary.
            epoch = self.engine.load_epoch(number)
            total += epoch.raw_bytes()
            is_of_another = bool(epochs) and epoch.generation != epochs[0].generation
            if epochs and (total > self.raw_bytes_max or is_of_another):
                break
            epochs.append(epoch)
            if epoch.is_mark:
                break  # The peer must have exactly this state, too.
        return epochs


def commit_message(encoded: EncodedEpoch, session: int) -> EpochCommit:
    """The commit of an encoded unit."""
    return EpochCommit(
        session,
        encoded.number,
        encoded.first_number,
        encoded.generation,
        encoded.first_lsn,
        encoded.end_lsn,
        encoded.wall_ns,
        len(encoded.frames),
        encoded.entries,
        encoded.raw_bytes,
        encoded.chain_hash,
        encoded.table_hash,
        encoded.is_mark,
        change_infos(encoded.changes),
    )
