"""The undo files that a resource keeps: written whole, dropped oldest first, checked when in doubt.

Invariants: the history that others look at is replaced, never changed; what is given up for want of
room is noted (`take_losses`); a damaged file stays where it is and counts as a gap.
Deliberately not here: what passes mean together (`undo`), the format of a file (`undo_file`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from geomirror.errors import IntegrityError, NotFoundError, StorageError
from geomirror.limits import Limits
from geomirror.volume.store import Store
from geomirror.volume.undo_faults import DAMAGED, MISSING
from geomirror.volume.undo_file import UndoReader, UndoWriter
from geomirror.volume.undo_header import mark_damaged
from geomirror.volume.undo_history import History
from geomirror.volume.undo_label import PassInfo, PassLabel
from geomirror.volume.undo_load import DIRECTORY, inspect, number_of

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
        self._unseen: list[str] = []
        """Files whose tables were not looked at since the start, ascending."""
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
        parts = self._history.parts
        # One file's: they follow each other in it.
        open_bytes = parts[-1].start + parts[-1].stored_bytes - parts[0].start if parts else 0
        return self._history.stored_bytes + open_bytes

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
        at = self._history.position_of(info)
        if at is not None:
            self._history = self._history.spliced(at, 1, [replace(info, fault=fault)])

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
        wanted = dict.fromkeys(self._suspects)
        found = [each for each in self._history.whole if each.name in wanted]
        for each in found:
            self.check(each, pause)
            self._suspects.pop(each.name, None)
        for name in wanted:
            self._suspects.pop(name, None)

    @property
    def has_unseen(self) -> bool:
        """Whether `look_at_tables` has something to do."""
        return bool(self._unseen)

    def look_at_tables(self, count: int, pause: Callable[[], None] = _go_on) -> None:
        """Read the tables of some files that the start left out, the newest first. Blocking.

        :param pause: called before each; what it raises ends this.
        """
        names = set(self._unseen[-count:])
        if not names:
            return
        for each in [each for each in reversed(self._history.whole) if each.name in names]:
            pause()
            try:
                with closing(self._store.open(each.name)) as file:
                    is_whole = not inspect(file, each.name).is_gap
            except (IntegrityError, NotFoundError, StorageError):
                is_whole = False
            if not is_whole:
                self.check(each, pause)
        del self._unseen[-count:]

    def scrub(self, bytes_max: int, pause: Callable[[], None] = _go_on) -> bool:
        """Read through some passes, the oldest first, that were not since the last round began;
        whether that ends the round. Blocking.

        :param pause: as of `check`; what was read through counts.
        """
        done, whole = 0, self._history.whole
        first = bisect_right(whole, self._scrubbed, key=lambda each: number_of(each.name))
        for each in whole[first:]:
            if each.is_gap:
                continue
            if done and done + each.stored_bytes > bytes_max:
                return False
            self.check(each, pause)
            self._scrubbed = number_of(each.name)
            done += each.stored_bytes
        self._scrubbed = 0
        return True

    def take_losses(self) -> list[Loss]:
        """What was given up for want of room since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def _give_up(self, count: int, why: str) -> None:
        """Drop the oldest passes for want of room."""
        dropped = self._history.whole[:count]
        self._lost(why, dropped[-1].to_epoch, dropped[0].from_epoch)
        self._drop([each.name for each in dropped])

    def _lost(self, why: str, to_epoch: int, oldest: int) -> None:
        """:param oldest: the oldest point, if there are no passes."""
        if self._history.whole:
            # Counted from what could be had: a hole in between had cut off the rest already.
            oldest = self._history.horizon(self._history.whole[-1].to_epoch)
        if oldest < to_epoch:
            self._losses.append(Loss(why, oldest, to_epoch))

    def _droppable(self) -> tuple[PassInfo, ...]:
        """Passes that may make room for others: the oldest ones, in their order."""
        whole, kept = self._history.whole, self.kept_after
        if kept is None:
            return whole
        return whole[: bisect_right(whole, kept, key=lambda each: each.to_epoch)]

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
        whole, stored = self._history.whole, self._history.stored_bytes + added_bytes
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
        self._drop(sorted({*stale, *sorted(self._damaged)[:-_DAMAGED_MAX]}))

    def _drop(self, names: Collection[str]) -> None:
        """Forget files, in this order: nobody looks at one from now on, then they go.

        :raises StorageError: those that are still there are kept as before.
        """
        if not names:
            return
        passes, damaged = self._passes, dict(self._damaged)
        self._forget(set(names))
        left = dict.fromkeys(names)
        try:
            for name in names:
                self._store.unlink(name)
                del left[name]
        finally:
            if left:
                gone = set(names) - left.keys()
                self._damaged = {each: why for each, why in damaged.items() if each not in gone}
                self._keep([each for each in passes if each.name not in gone])

    def _forget(self, names: set[str]) -> None:
        self._damaged = {each: why for each, why in self._damaged.items() if each not in names}
        oldest = {each.name for each in self._history.whole[: len(names)]}
        if oldest == names and not self._history.parts:  # As ever when room is short.
            self._history = self._history.spliced(0, len(oldest), ())
        else:
            self._keep([each for each in self._passes if each.name not in names])
