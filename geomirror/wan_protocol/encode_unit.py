"""The job that loads the next unit of a stream from the journal and encodes it."""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.volume.engine import Engine
from geomirror.volume.epoch_table import Epoch
from geomirror.wan_protocol.epoch_encode import EncodedEpoch, EncodeJob
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
    encoded: EncodedEpoch | None = None

    def run(self) -> None:
        """Blocking. Raises StorageError, IntegrityError."""
        job = EncodeJob(
            self._load,
            self.engine.journal.read,
            self.level,
            volume_bytes={index: i.size_bytes for index, i in self.engine.images.items()},
            limits=self.engine.limits,
        )
        job.run()
        self.encoded = job.result

    def _load(self) -> list[Epoch]:
        epochs: list[Epoch] = []
        total = 0
        for number in self.numbers:
            epoch = self.engine.load_epoch(number)
            total += epoch.raw_bytes()
            if epochs and total > self.raw_bytes_max:
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
    )
