"""Which states the undo of a resource leads back to, at one moment.

```
 image at 40 ◀─undo (30,40]─ 30 ◀─undo (28,30]─ 28 ◀─gap (20,28]─ ✗
```
Thousands of passes are kept, and this is asked at every turn: what is wanted of one is found by
halving, what is wanted of all is summed up once for each history, on columns.
Deliberately not here: files (`undo`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from geomirror.errors import NotFoundError
from geomirror.volume.undo_columns import (
    FROM,
    GAP,
    STORED,
    TO,
    WALL,
    Columns,
    Numbers,
    columns_of,
    follows,
    spliced,
)
from geomirror.volume.undo_faults import Stretch, unusable
from geomirror.volume.undo_label import OPEN_EPOCH, PassInfo
from geomirror.volume.undo_levels import Level, ages_in


@dataclass(frozen=True)
class History:
    """What undo is kept, at one moment. Never changed: another one takes its place."""

    passes: tuple[PassInfo, ...]
    """Oldest first, ends ascending; those of a pass that is open come last."""
    incarnation: int
    """One more each time that images were made anew: no state from before can be restored."""
    newest_epoch: int | None = None
    """While the images are rolled back: no state after this epoch can be restored."""
    floor: int = 0
    """No state before this epoch can be restored: the pass that led to it is lost."""
    damaged: tuple[str, ...] = ()
    """Files whose header does not even tell what they are of."""

    @cached_property
    def whole(self) -> tuple[PassInfo, ...]:
        """The passes that have ended."""
        return self.passes[: bisect_left(self.passes, OPEN_EPOCH, key=_end)]

    @property
    def parts(self) -> tuple[PassInfo, ...]:
        """The groups of the one that is open."""
        return self.passes[len(self.whole) :]

    @cached_property
    def columns(self) -> Columns:
        """Of the passes that have ended."""
        return columns_of(self.whole)

    @cached_property
    def stored_bytes(self) -> int:
        """Size of their files."""
        return int(self.columns[STORED].sum())

    @cached_property
    def _heads(self) -> Numbers:
        """Where passes do not go on from the one before: it ends elsewhere, or is a gap."""
        starts = np.ones(len(self.whole), dtype=bool)
        starts[1:] = ~follows(self.columns)
        return starts.nonzero()[0]

    def spliced(self, at: int, count: int, added: Sequence[PassInfo]) -> History:
        """The same with `added` in the place of `count` whole passes from `at` on."""
        assert at + count <= len(self.whole)
        passes = (*self.passes[:at], *added, *self.passes[at + count :])
        found = replace(self, passes=passes)
        if "columns" in self.__dict__:
            found.__dict__["columns"] = spliced(self.columns, at, count, added)
        return found

    def with_parts(self, parts: Sequence[PassInfo]) -> History:
        """The same with these groups of an open pass."""
        found = replace(self, passes=(*self.whole, *parts))
        if "columns" in self.__dict__:
            found.__dict__["columns"] = self.columns
        return found

    def position_of(self, info: PassInfo) -> int | None:
        """Where a whole pass is, by its end and its file; None: it is not kept."""
        at = bisect_left(self.whole, info.to_epoch, key=_end)
        is_there = at < len(self.whole) and self.whole[at].name == info.name
        return at if is_there else None

    def find(self, from_epoch: int, to_epoch: int) -> PassInfo | None:
        """Exactly this pass."""
        at = bisect_left(self.whole, to_epoch, key=_end)
        found = self.whole[at] if at < len(self.whole) else None
        is_it = found is not None and (found.from_epoch, found.to_epoch) == (from_epoch, to_epoch)
        return found if is_it else None

    def ending_at(self, epoch: int) -> PassInfo | None:
        """The whole pass that ends there."""
        at = bisect_left(self.whole, epoch, key=_end)
        is_there = at < len(self.whole) and self.whole[at].to_epoch == epoch
        return self.whole[at] if is_there else None

    def reaching(self, epoch: int) -> History:
        """The same for images at `epoch`, as they were found: the newest file may be missing.

        What ends before `epoch` would be taken for the way back from a later state.
        """
        is_reached = bool(self.whole) and self.whole[-1].to_epoch >= epoch
        return self if is_reached else replace(self, floor=epoch)

    def since(self, epoch: int) -> tuple[PassInfo, ...]:
        """The passes that lead from `epoch` to the image, which has to be one's boundary.

        :raises NotFoundError: undo does not reach back to it, or it lies within a pass.
        """
        if self.newest_epoch is not None and epoch > self.newest_epoch:
            raise NotFoundError(f"the state at epoch {epoch} is being rolled back")
        if epoch < self.floor:
            raise self._not_kept(epoch)
        whole, parts = self.whole, self.parts
        at = bisect_right(whole, epoch, key=_end)
        start = parts[0].from_epoch if parts else epoch
        if epoch > start:
            raise NotFoundError(
                f"the state at epoch {epoch} cannot be looked at while the volumes go back to "
                f"epoch {start}"
            )
        split = bisect_right(whole, start, key=_end)
        is_boundary = start == epoch or (split > at and whole[split - 1].to_epoch == start)
        if not is_boundary or not self._leads_on(at, epoch):
            raise self._not_kept(epoch)
        # Of a block that several hold the first one counts: the pass that is open comes after
        # those before its epoch, and is worth as much as those after it.
        return (*whole[at:split], *parts, *whole[split:])

    def _leads_on(self, at: int, epoch: int) -> bool:
        """Whether the passes from `at` on begin at `epoch` and have no hole and no gap."""
        last = len(self.whole) - 1
        if at > last:
            return True
        is_whole = self._head_of(last) <= at and not self.whole[last].is_gap
        return is_whole and self.whole[at].from_epoch == epoch

    def _head_of(self, at: int) -> int:
        """The first of the passes that lead to the one at `at` without a hole."""
        heads = self._heads
        return int(heads[heads.searchsorted(at, "right") - 1])

    def unusable(self, state_epoch: int, state_wall_ns: int = 0) -> list[Stretch]:
        """Every stretch that undo does not lead back across, oldest first, and why."""
        is_odd = self.columns[GAP] != 0
        is_odd[1:] |= self.columns[FROM, 1:] > self.columns[TO, :-1]
        is_odd[:1] = True
        places = is_odd.nonzero()[0].tolist()
        return unusable(self.whole, self.damaged, state_epoch, state_wall_ns, places)

    def _not_kept(self, epoch: int) -> NotFoundError:
        # Those of a pass that is open come last, but may be of an epoch before others.
        parts = self.parts
        ends = [each.to_epoch for each in self.whole[-1:]]
        state = max([self.floor, *ends, *(each.from_epoch for each in parts[:1])])
        across = [each for each in self.unusable(state) if each.to_epoch > epoch]
        why = ""
        if across:
            first = f"{across[-1].from_epoch}-" if across[-1].from_epoch is not None else "…-"
            why = f": epochs {first}{across[-1].to_epoch}: {across[-1].reason}"
        return NotFoundError(
            f"the state at epoch {epoch} is not kept{why}",
            hint='"geomirror timeline" shows what is kept',
        )

    def kept_range(self, applied_epoch: int) -> tuple[int, int]:
        """From where to where in `whole` the passes of `kept` are."""
        end = bisect_right(self.whole, applied_epoch, key=_end)
        if not end or self.whole[end - 1].to_epoch != applied_epoch or self.whole[end - 1].is_gap:
            return end, end
        return self._head_of(end - 1), end

    def kept(self, applied_epoch: int) -> tuple[PassInfo, ...]:
        """The passes that lead to `applied_epoch` without a hole, oldest first.

        The state at the start of the first and at the end of each of them can be restored.
        """
        start, end = self.kept_range(applied_epoch)
        return self.whole[start:end]

    def horizon(self, applied_epoch: int) -> int:
        """The oldest epoch whose state can be restored from an image at `applied_epoch`."""
        start, end = self.kept_range(applied_epoch)
        return self.whole[start].from_epoch if start < end else applied_epoch

    def reaches(self, epoch: int, applied_epoch: int) -> bool:
        """Whether the state at `epoch` can be restored from an image at `applied_epoch`."""
        start, end = self.kept_range(applied_epoch)
        if epoch == applied_epoch or start == end:
            return epoch == applied_epoch
        at = bisect_left(self.whole, epoch, start, end, key=_end)
        is_end = at < end and self.whole[at].to_epoch == epoch
        return is_end or self.whole[start].from_epoch == epoch

    def boundaries(self, applied_epoch: int, lowest: int = 0) -> list[int]:
        """The states that can be restored from an image at `applied_epoch`, ascending, and that of
        the image; none before `lowest`."""
        start, end = self.kept_range(applied_epoch)
        starts = self.columns[FROM, start:end]
        return [*starts[starts.searchsorted(lowest) :].tolist(), applied_epoch]

    def reach_ns(self, applied_epoch: int, levels: Sequence[Level]) -> int:
        """Age of the oldest point that ends a pass; see `ages_in`."""
        start, end = self.kept_range(applied_epoch)
        return int(ages_in(self.columns[WALL, start:end], levels)[0]) if start < end else 0


def _end(info: PassInfo) -> int:
    return info.to_epoch
