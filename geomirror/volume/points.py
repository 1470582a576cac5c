"""The points in time that a copy can be looked at, and the one that somebody means.

```
 ──•──•──•────────────•──•──•──    between two: the earlier one, and why there is nothing nearer
            resync                 before the first, after now: refused, and the nearest is named
 12:00 … 13:00 │ 12:00 … 12:30     12:15 was twice: refused, and both are named
```
A point is a boundary: an epoch that this copy held exactly, and across which no undo was merged.
Times are the primary's clock, which may step: a time that was twice means neither state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import overload

import numpy as np

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, NotFoundError, UsageError
from geomirror.volume.arrays import run_heads, run_tails
from geomirror.volume.marks import MarkTable
from geomirror.volume.undo_columns import TO, WALL, WALL_NS_MAX, Numbers
from geomirror.volume.undo_history import History
from geomirror.volume.undo_label import PassInfo

CLOCK_SLACK_NS = 2 * SECOND
"""Clocks of two nodes may differ so much, and one may be slewed so far back, without a word."""
CLOCK_JUMP_NS = 300 * SECOND
"""Forward, a step of the clock and a time without writes look alike from here on."""
_NAMED_MAX = 8
"""Epochs that a message names, of more that are meant."""
_NUMBER_MAX = (1 << 63) - 1
_HINT = '"geomirror timeline" shows what is kept'


@dataclass(frozen=True)
class Point:
    """One epoch whose state can be had."""

    epoch: int
    wall_ns: int
    """When it was cut at the primary, Unix ns."""
    marks: tuple[str, ...] = ()
    since: str = ""
    """What lies between the point before and this one, when that is more than one epoch."""


@dataclass(frozen=True)
class At:
    """What was asked for: exactly one of these, or nothing for the newest point."""

    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None


@dataclass(frozen=True)
class Located:
    """The point that is meant, and what lies around the moment that was asked for."""

    point: Point
    later: Point | None = None
    """The next one, when the moment lies between two."""
    why: str = ""
    """Why nothing nearer is there; "" when the point is the moment itself."""


class Points(Sequence[Point]):
    """Points, oldest first. There are thousands, and few are asked for: their numbers are arrays,
    and the rest is made of the one that is."""

    def __init__(
        self,
        epochs: Numbers,
        walls_ns: Numbers,
        make: Callable[[int], Point],
        marked_epochs: Collection[int] = (),
    ) -> None:
        self.epochs = epochs
        self.walls_ns = walls_ns
        self._make = make
        wanted = np.fromiter(sorted(marked_epochs), np.int64, len(marked_epochs))
        places = epochs.searchsorted(wanted)
        is_there = places < len(epochs)
        is_there[is_there] = epochs[places[is_there]] == wanted[is_there]
        self.marked: list[int] = places[is_there].tolist()
        """Those that have marks, by their place."""

    @classmethod
    def of(cls, points: Sequence[Point]) -> Points:
        """The same points."""
        if isinstance(points, cls):
            return points
        epochs = np.array([each.epoch for each in points], dtype=np.int64)
        walls = np.array([min(each.wall_ns, WALL_NS_MAX) for each in points], dtype=np.int64)
        marked = [each.epoch for each in points if each.marks]
        return cls(epochs, walls, points.__getitem__, marked)

    def __len__(self) -> int:
        return len(self.epochs)

    @overload
    def __getitem__(self, at: int) -> Point: ...
    @overload
    def __getitem__(self, at: slice) -> list[Point]: ...
    def __getitem__(self, at: int | slice) -> Point | list[Point]:
        places = range(len(self))[at]
        return self._make(places) if isinstance(places, int) else [self._make(i) for i in places]


def points_of(
    history: History, applied_epoch: int, applied_wall_ns: int, marks: MarkTable
) -> Points:
    """Every point of a copy whose image is at `applied_epoch`, oldest first."""
    names: dict[int, list[str]] = {}
    walls: dict[int, int] = {}
    for mark in marks.marks():
        if marks.is_held(mark):
            names.setdefault(mark.epoch, []).append(mark.name)
            walls[mark.epoch] = mark.wall_ns
    start, end = history.kept_range(applied_epoch)
    if start == end:
        only = Point(applied_epoch, applied_wall_ns, tuple(names.get(applied_epoch, ())))
        return Points.of([only] if applied_epoch else [])
    epochs, walls_ns = history.columns[TO, start:end], history.columns[WALL, start:end]
    oldest = history.whole[start].from_epoch
    # When the start of the oldest pass was cut is known of a mark only.
    has_oldest = oldest in walls
    if has_oldest:
        epochs = np.concatenate([[oldest], epochs])
        walls_ns = np.concatenate([[min(walls[oldest], WALL_NS_MAX)], walls_ns])

    def make(at: int) -> Point:
        if has_oldest and not at:
            return Point(oldest, walls[oldest], tuple(names[oldest]))
        each = history.whole[start + at - has_oldest]
        return Point(each.to_epoch, each.wall_ns, tuple(names.get(each.to_epoch, ())), _since(each))

    return Points(epochs, walls_ns, make, names)


def _since(each: PassInfo) -> str:
    if each.is_resync:
        return "a resync brought this copy from one to the other"
    if each.to_epoch - each.from_epoch > 1:
        return "what was between was applied at once, or merged as history got older"
    return ""


def find_point(points: Sequence[Point], at: At, marks: MarkTable, now_ns: int) -> Point:
    """The point meant by `at`; see `locate`."""
    return locate(points, at, marks, now_ns).point


def locate(points: Sequence[Point], at: At, marks: MarkTable, now_ns: int) -> Located:
    """The point meant by `at`: the nearest at or before it; of a mark, exactly that.

    :param now_ns: wall clock; nothing after it can be asked for.
    :raises NotFoundError: there is none; names the nearest ones.
    :raises UsageError: the moment is yet to come, or was twice.
    """
    points = Points.of(points)
    if not len(points):
        raise NotFoundError("this copy has no point in time to look at yet")
    if at.mark is not None:
        return Located(_marked(points, at.mark, marks))
    if at.epoch is not None:
        return _at_epoch(points, at.epoch)
    if at.wall_ns is not None:
        return _at_wall(points, at.wall_ns, now_ns)
    return Located(points[-1])


def _at_epoch(points: Points, epoch: int) -> Located:
    count = int(points.epochs.searchsorted(min(epoch, _NUMBER_MAX), "right"))
    if not count:
        raise _too_early(f"epoch {epoch}", points[0])
    if count == len(points) and points[-1].epoch < epoch:
        raise NotFoundError(
            f"epoch {epoch} is not here (yet): the newest point is {named(points[-1])}",
            hint=_HINT,
        )
    return _between(points, count - 1, is_exact=points[count - 1].epoch == epoch)


def _at_wall(points: Points, wall_ns: int, now_ns: int) -> Located:
    walls = points.walls_ns
    if wall_ns > max(now_ns, int(walls.max())) + CLOCK_SLACK_NS:
        raise UsageError(
            f"{_time(wall_ns)} is yet to come: it is {_time(now_ns)} here; "
            f"the newest point is {named(points[-1])}",
            hint="a time without a date is one of today; write the date for another day",
        )
    wall_ns = min(wall_ns, WALL_NS_MAX)
    spanning = _spanning(points, wall_ns)
    if len(spanning) > 1:
        either = " or ".join(f"epoch:{points[at].epoch}" for at in spanning[:_NAMED_MAX])
        raise UsageError(
            f"{_time(wall_ns)} was more than once: the primary's clock was set back in between",
            hint=f"say which one is meant: {either}",
        )
    at = spanning[0] if spanning else _last_until(walls, wall_ns)
    if at < 0:
        raise _too_early(_time(wall_ns), points[0])
    return _between(points, at, is_exact=points[at].wall_ns == wall_ns)


def _spanning(points: Points, wall_ns: int) -> list[int]:
    """Of each stretch without a step of the clock that has that time: the last point until then."""
    walls, runs = points.walls_ns, clock_runs(points)
    firsts = np.array([first for first, _ in runs])
    has_it = np.minimum.reduceat(walls, firsts) <= wall_ns
    has_it &= np.maximum.reduceat(walls, firsts) >= wall_ns
    found = []
    for first, last in (runs[at] for at in has_it.nonzero()[0].tolist()):
        found.append(first + _last_until(walls[first : last + 1], wall_ns))
    return found


def clock_runs(points: Sequence[Point]) -> list[tuple[int, int]]:
    """(first, last) of the points between which the clock made no step, oldest first."""
    walls = Points.of(points).walls_ns
    if not len(walls):
        return []
    steps = walls[1:] - walls[:-1]
    heads = run_heads((steps < -CLOCK_SLACK_NS) | (steps > CLOCK_JUMP_NS))
    tails = run_tails(heads, len(walls))
    return list(zip(heads.tolist(), tails.tolist(), strict=True))


def _last_until(walls_ns: Numbers, wall_ns: int) -> int:
    found = (walls_ns <= wall_ns).nonzero()[0]
    return int(found[-1]) if len(found) else -1


def _between(points: Points, at: int, *, is_exact: bool) -> Located:
    later = points[at + 1] if at + 1 < len(points) else None
    if is_exact:
        return Located(points[at])
    if later is None:
        return Located(points[at], None, "nothing newer is here")
    return Located(points[at], later, later.since or "nothing was sealed in between")


def _marked(points: Points, name: str, marks: MarkTable) -> Point:
    mark = marks.get(name)
    at = int(points.epochs.searchsorted(mark.epoch))
    found = points[at : at + 1]
    if found and name in found[0].marks:
        return found[0]
    reason = "undo does not reach back to it" if marks.is_held(mark) else "it never had that state"
    if mark.epoch > points[-1].epoch:
        reason = "it is not applied here yet"
    after = int(points.epochs.searchsorted(mark.epoch, "right"))
    earlier, later = points[max(at - 1, 0) : at], points[after : after + 1]
    around = " and ".join(named(point) for point in (*earlier, *later))
    raise NotFoundError(
        f'this copy cannot show mark "{name}" (epoch {mark.epoch}): {reason}; '
        f"the nearest {'points are' if earlier and later else 'point is'} {around}",
        hint=_HINT,
    )


def _too_early(what: str, oldest: Point) -> GeomirrorError:
    return NotFoundError(
        f"{what} is before the oldest point kept here, {named(oldest)}",
        hint=f"the nearest one is epoch:{oldest.epoch}; {_HINT}",
    )


def named(point: Point) -> str:
    """A point in words."""
    return f"epoch {point.epoch}" + (f" ({_time(point.wall_ns)})" if point.wall_ns else "")


def _time(wall_ns: int) -> str:
    """RFC 3339, UTC; a number for what no calendar has."""
    try:
        moment = datetime.fromtimestamp(wall_ns // SECOND, UTC)
    except (ValueError, OverflowError, OSError):
        return f"Unix time {wall_ns // SECOND}"
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
