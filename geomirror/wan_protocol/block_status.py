"""What peers and the backing device lack, range by range, for block status of a primary's volumes.

```
 lacks(peer)    = bitmap's regions ∪ epochs after its position ∪ open epoch
 lacks(backing) =                    epochs after the applied one ∪ open epoch
```
Invariant: a block that a peer does not hold durably with its newest content is among them, at every
moment between asking and answering. More may be: whole regions in bitmap mode, everything for a
peer that is unknown, refused or diverged, or whose epochs are not all here any more.
What was completed before `next_job` is counted. Epochs' tables are read by jobs, at most
`EPOCHS_OF_JOB` each, one job at a time, and kept as `EpochChanges`.
Deliberately not here: names and flags of NBD (`node.status_contexts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.block_runs import BlockRuns, united
from geomirror.volume.epoch_changes import EpochChanges
from geomirror.volume.epoch_directory import EpochInfo

if TYPE_CHECKING:
    from geomirror.volume.engine import Engine
    from geomirror.volume.journal import Pin
    from geomirror.wan_protocol.primary import Primary

BACKING = ""
"""Stands among the holders for the backing device; no peer has an empty name."""
EPOCHS_OF_JOB = 256
"""Tables read by one job; then others have their turn on the worker threads."""
DIVIDED_EPOCHS_MAX = 64
"""So many epochs of a span are read once more to tell exactly what a peer lacks."""


@dataclass
class Lacking:
    """What one holder lacks in a range of blocks, as captured on the event loop."""

    position: int | None
    """It holds everything through this epoch, except `regions`; None: it may lack everything."""
    regions: list[BlockRuns] = field(default_factory=list)


@dataclass
class StatusJob:
    """Reads what is missing of `changes`, then says what holders lack; blocking."""

    engine: Engine
    changes: EpochChanges
    loads: list[list[EpochInfo]]
    ends: list[int]
    volume: int
    first: int
    end: int
    holders: dict[str, Lacking] | None
    """None: there is more to read first, and no answer yet."""
    uncommitted: list[BlockRuns]
    pin: Pin | None
    lacking: dict[str, BlockRuns] | None = None
    """After `run`: blocks of [first, end), by holder."""

    def run(self) -> None:
        """Read and unite. :raises StorageError, IntegrityError: an epoch cannot be read."""
        for infos in self.loads:
            self.changes.load(infos, self.ends, self.engine.table_of)
        if self.holders is None:
            return
        self.lacking = {name: self._lacking(holder) for name, holder in self.holders.items()}

    def _lacking(self, holder: Lacking) -> BlockRuns:
        if holder.position is None:
            return BlockRuns.between(self.first, self.end)
        later = self.changes.after(holder.position, self.volume, self.first, self.end)
        everything = united([*later, *self.uncommitted, *holder.regions])
        return everything.within(self.first, self.end)

    def release(self) -> None:
        """Let the journal be trimmed again."""
        if self.pin is not None:
            self.pin.release()
            self.pin = None


class BlockStatus:
    """The block status of one primary. For the event loop; one job at a time."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self._changes = EpochChanges()
        self._asked: set[str] = set()

    @property
    def peers(self) -> list[str]:
        """Peers that can be asked about now, sorted."""
        return sorted(self._primary.senders)

    def next_job(self, holders: Sequence[str], volume: int, offset: int, length: int) -> StatusJob:
        """A job towards saying what holders lack in a range of bytes. Release it when it has run;
        while it has no answer (`lacking`), ask for the next one.

        :param holders: names of peers, known or not, and `BACKING`.
        """
        engine, changes = self._primary.engine, self._changes
        first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        self._asked.update(holders)
        self._asked.intersection_update([*self._primary.senders, BACKING])
        standing = {name: self._stand(name, volume, first, end) for name in sorted(self._asked)}
        positions = [s.position for s in standing.values() if s.position is not None]
        if not positions:
            answer = {name: Lacking(None) for name in holders}
            return StatusJob(engine, changes, [], [], volume, first, end, answer, [], None)
        changes.follow(min(positions))
        infos = engine.epochs_after(changes.through, EPOCHS_OF_JOB)
        is_last = not infos or infos[-1].number == engine.committed_epoch
        loads = [self._to_divide(positions) if is_last else [], infos]
        lowest = min((info.record_lsn for load in loads for info in load), default=None)
        pin = None if lowest is None else engine.journal.pin(lowest, "block status")
        answers = {name: standing.get(name, Lacking(None)) for name in holders}
        return StatusJob(
            engine,
            changes,
            loads,
            positions,
            volume,
            first,
            end,
            answers if is_last else None,
            engine.uncommitted_changes(volume) if is_last else [],
            pin,
        )

    def _stand(self, name: str, volume: int, first: int, end: int) -> Lacking:
        """Where a holder stands; everything is lacking unless it is known to be there."""
        primary = self._primary
        engine = primary.engine
        if name == BACKING:
            # While it goes back to a state from before a resync, anything may still have to.
            return Lacking(None if engine.is_returning else engine.applied_epoch)
        sender, kept = primary.senders[name], primary.bitmaps.get(name)
        if sender.refusal:
            return Lacking(None)  # Of another history, or not able to say what it holds.
        position = sender.durable_epoch if kept is None else kept.through_epoch
        if position < engine.committed_epoch:
            oldest = engine.epochs_after(position, 1)
            if not oldest or oldest[0].first_number > position + 1:
                return Lacking(None)
        if kept is None:
            return Lacking(position)
        return Lacking(position, [kept.bitmap.blocks_within(volume, first, end)])

    def _to_divide(self, positions: Sequence[int]) -> list[EpochInfo]:
        """Epochs to read once more, because a position has moved into their span."""
        for position in sorted(positions, reverse=True):
            span = self._changes.inside(position)
            if span is None:
                continue
            infos = self._primary.engine.epochs_after(position, DIVIDED_EPOCHS_MAX + 1)
            infos = [info for info in infos if info.number <= span.last]
            if infos and len(infos) <= DIVIDED_EPOCHS_MAX and infos[-1].number == span.last:
                return infos
        return []
