"""The undo files that a resource keeps: written whole, dropped oldest first, checked when in doubt.

Invariants: the history that others look at is replaced, never changed; what is given up for want of
room is noted (`take_losses`); a damaged file stays where it is and counts as a gap.
Deliberately not here: what passes mean together (`undo`), the format of a file (`undo_file`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from geomirror.errors import IntegrityError, NotFoundError, StorageError
from geomirror.limits import Limits
from geomirror.volume.store import Store
from geomirror.volume.undo_faults import DAMAGED, MISSING
from geomirror.volume.undo_file import UndoReader, UndoWriter, mark_damaged
from geomirror.volume.undo_history import History
from geomirror.volume.undo_label import PassInfo, PassLabel
from geomirror.volume.undo_load import DIRECTORY, number_of

BUDGET = "budget"
"""Why history was given up, besides the faults of passes: more than what it may take."""
TEMPORARY = f"{DIRECTORY}/pass.new"
_DAMAGED_MAX = 16
"""Damaged files that are left where they are, for whoever wants to look at them."""


def _go_on() -> None:
    """Nobody waits."""


@dataclass(frozen=True)
class Loss:
    """Points that were given up for want of room."""

    why: str
    from_epoch: int
    """The oldest point before."""
    to_epoch: int
    """The oldest one now."""


class KeptUndo:
    """The part of `UndoStore` that is about files."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._history = History((), 0)
        self._pins: dict[str, int] = {}
        self._floors: dict[str, int] = {}
        self.kept_after: int | None = None
        """Passes after this epoch tell what must not go back to it: none is dropped, nor is one
        left out for its size."""
        self._damaged: dict[str, IntegrityError] = {}
        self._suspects: dict[str, None] = {}
        self._losses: list[Loss] = []
        self._scrubbed = 0
        """Number of the newest file that this round of `scrub` has read through."""
        self.hopeless: set[int] = set()
        """Ends of passes that would not take less room merged with the next."""

    @property
    def history(self) -> History:
        """What is kept now; the same object until that changes. On any thread."""
        return self._history

    def passes(self) -> list[PassInfo]:
        """The passes kept, oldest first."""
        return list(self._passes)

    def pin(self, owner: str, epoch: int) -> None:
        """Keep what is needed to restore the state at `epoch`, for as long as there is room."""
        self._pins = {**self._pins, owner: epoch}

    def unpin(self, owner: str) -> None:
        """`owner` needs nothing any more."""
        self._pins = {name: epoch for name, epoch in self._pins.items() if name != owner}

    def keep_since(self, owner: str, epoch: int | None) -> None:
        """Keep what leads back to `epoch` or to a point before it, for as long as there is room;
        None: nothing. Unlike a pinned one the epoch itself may be merged away."""
        floors = {name: kept for name, kept in self._floors.items() if name != owner}
        self._floors = floors if epoch is None else {**floors, owner: epoch}

    def needed_epochs(self) -> list[int]:
        """The epochs that passes are needed for that lead back to them, or across them."""
        return [*self._pins.values(), *self._floors.values()]

    def pinned_epochs(self) -> list[int]:
        """The epochs that owners of pins look at."""
        return sorted(set(self._pins.values()))

    def stored_bytes(self) -> int:
        """Bytes of all files."""
        return sum(each.stored_bytes for each in self._passes)

    def free_bytes(self) -> int:
        """Left of the disk that the files lie on. Blocking."""
        return self._store.free_bytes()

    def check(self, info: PassInfo, pause: Callable[[], None] = _go_on) -> None:
        """Read a whole pass through; one that cannot be is a gap from now on. Blocking.

        :param pause: called now and then; what it raises ends this, and nothing changed.
        """
        assert not info.is_part
        try:
            file = self._store.open(info.name)
        except (NotFoundError, StorageError):
            is_there = self._store.exists(info.name)
            self._set_fault(info, DAMAGED if is_there else MISSING)
            return
        try:
            UndoReader(file, info.name).verify(pause)
        except (IntegrityError, StorageError):
            self._set_fault(info, DAMAGED)
            # What is in it stays, for whoever wants to look; its header tells the next start. A
            # disk that cannot even do that is found out again then.
            with suppress(StorageError):
                mark_damaged(file, info.name)
        finally:
            file.close()

    def _set_fault(self, info: PassInfo, fault: str) -> None:
        self._keep([replace(each, fault=fault) if each == info else each for each in self._passes])

    def suspect(self, name: str) -> None:
        """Somebody could not read a file: it is looked at with the next `check_suspects`. On any
        thread."""
        self._suspects[name] = None

    @property
    def has_suspects(self) -> bool:
        """Whether `check_suspects` has something to do."""
        return bool(self._suspects)

    def check_suspects(self, pause: Callable[[], None] = _go_on) -> None:
        """Read the whole passes through that somebody could not read. Blocking.

        :param pause: as of `check`; what is left stays suspect.
        """
        for name in list(self._suspects):
            for each in self._passes:
                if each.name == name and not each.is_part:
                    self.check(each, pause)
            self._suspects.pop(name, None)

    def scrub(self, bytes_max: int, pause: Callable[[], None] = _go_on) -> bool:
        """Read through some passes, the oldest first, that were not since the last round began;
        whether that ends the round. Blocking.

        :param pause: as of `check`; what was read through counts.
        """
        done = 0
        for each in self._passes:
            number = number_of(each.name)
            if number <= self._scrubbed or each.is_part or each.is_gap:
                continue
            if done and done + each.stored_bytes > bytes_max:
                return False
            self.check(each, pause)
            self._scrubbed = number
            done += each.stored_bytes
        self._scrubbed = 0
        return True

    def take_losses(self) -> list[Loss]:
        """What was given up for want of room since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def _give_up(self, count: int, why: str) -> None:
        """Drop the oldest passes for want of room."""
        dropped = self._passes[:count]
        assert not any(each.is_part for each in dropped), "what a resync holds is never given up"
        self._lost(why, dropped[-1].to_epoch, dropped[0].from_epoch)
        for each in dropped:
            self._drop(each.name)

    def _lost(self, why: str, to_epoch: int, oldest: int) -> None:
        """:param oldest: the oldest point, if there are no passes."""
        ends = [each.to_epoch for each in self._passes if not each.is_part]
        if ends:
            # Counted from what could be had: a hole in between had cut off the rest already.
            oldest = self._history.horizon(ends[-1])
        if oldest < to_epoch:
            self._losses.append(Loss(why, oldest, to_epoch))

    def _droppable(self) -> list[PassInfo]:
        """Passes that may make room for others: the oldest ones, in their order."""
        whole = [each for each in self._passes if not each.is_part]
        kept = self.kept_after
        return whole if kept is None else [each for each in whole if each.to_epoch <= kept]

    def _keep(self, passes: Sequence[PassInfo]) -> None:
        # Replaced, never changed: views on other threads look at it without a lock.
        damaged = tuple(self._damaged)
        self._history = replace(self._history, passes=tuple(passes), damaged=damaged)

    @property
    def _passes(self) -> tuple[PassInfo, ...]:
        return self._history.passes

    def _write_file(
        self,
        name: str,
        label: PassLabel,
        fill: Callable[[UndoWriter], None],
        fault: str = "",
        *,
        is_resync: bool = False,
    ) -> PassInfo:
        """Write a file and give it its name, which is not durable yet."""
        self._store.unlink(TEMPORARY)
        file = self._store.create(TEMPORARY, 0)
        try:
            writer = UndoWriter(file)
            fill(writer)
            stored_bytes = writer.finish(label, fault=fault, is_resync=is_resync)
        finally:
            file.close()
        self._store.rename(TEMPORARY, name)
        return PassInfo(
            **vars(label),
            name=name,
            fault=fault,
            is_resync=is_resync,
            raw_bytes=writer.raw_bytes,
            stored_bytes=stored_bytes,
        )

    def _enforce_budget(self, added_bytes: int) -> None:
        """Drop the oldest passes so that one more of `added_bytes` fits; it itself always does."""
        bytes_max, passes_max = self._limits.undo_bytes_max, self._limits.undo_passes_max
        whole = [each for each in self._passes if not each.is_part]
        stored = sum(each.stored_bytes for each in whole) + added_bytes
        needed = min(self.needed_epochs(), default=None)
        count = 0
        for oldest in self._droppable():
            # What a view looks at, or what a peer lacks, may take as much again: neither ends the
            # other soon.
            factor = 1 if needed is None or oldest.to_epoch <= needed else 2
            if stored <= factor * bytes_max and len(whole) - count < factor * passes_max:
                break
            stored -= oldest.stored_bytes
            count += 1
        if count:
            self._give_up(count, BUDGET)
        self._drop_damaged()

    def _drop_damaged(self) -> None:
        """Damaged files go when nothing older is kept beside them, or when there are many."""
        oldest = self._passes[0].name if self._passes else "~"
        stale = sorted(name for name in self._damaged if name < oldest)[:-1]
        for name in {*stale, *sorted(self._damaged)[:-_DAMAGED_MAX]}:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._damaged.pop(name, None)
        self._keep([each for each in self._passes if each.name != name])
        self._store.unlink(name)
