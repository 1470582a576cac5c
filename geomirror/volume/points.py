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

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, NotFoundError, UsageError
from geomirror.volume.marks import MarkTable
from geomirror.volume.undo_history import History
from geomirror.volume.undo_label import PassInfo

CLOCK_SLACK_NS = 2 * SECOND
"""Clocks of two nodes may differ so much, and one may be slewed so far back, without a word."""
CLOCK_JUMP_NS = 300 * SECOND
"""Forward, a step of the clock and a time without writes look alike from here on."""
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


def points_of(
    history: History, applied_epoch: int, applied_wall_ns: int, marks: MarkTable
) -> list[Point]:
    """Every point of a copy whose image is at `applied_epoch`, oldest first."""
    names: dict[int, list[str]] = {}
    walls: dict[int, int] = {}
    for mark in marks.marks():
        if marks.is_held(mark):
            names.setdefault(mark.epoch, []).append(mark.name)
            walls[mark.epoch] = mark.wall_ns
    kept = history.kept(applied_epoch)
    found = [(each.to_epoch, each.wall_ns, _since(each)) for each in kept]
    if kept and kept[0].from_epoch in walls:
        # When the start of the oldest pass was cut is known of a mark only.
        found.insert(0, (kept[0].from_epoch, walls[kept[0].from_epoch], ""))
    if not kept and applied_epoch:
        found.append((applied_epoch, applied_wall_ns, ""))
    return [
        Point(epoch, wall_ns, tuple(names.get(epoch, ())), since) for epoch, wall_ns, since in found
    ]


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
    if not points:
        raise NotFoundError("this copy has no point in time to look at yet")
    if at.mark is not None:
        return Located(_marked(points, at.mark, marks))
    if at.epoch is not None:
        return _at_epoch(points, at.epoch)
    if at.wall_ns is not None:
        return _at_wall(points, at.wall_ns, now_ns)
    return Located(points[-1])


def _at_epoch(points: Sequence[Point], epoch: int) -> Located:
    count = sum(point.epoch <= epoch for point in points)
    if not count:
        raise _too_early(f"epoch {epoch}", points[0])
    if count == len(points) and points[-1].epoch < epoch:
        raise NotFoundError(
            f"epoch {epoch} is not here (yet): the newest point is {named(points[-1])}",
            hint=_HINT,
        )
    return _between(points, count - 1, is_exact=points[count - 1].epoch == epoch)


def _at_wall(points: Sequence[Point], wall_ns: int, now_ns: int) -> Located:
    newest_ns = max(point.wall_ns for point in points)
    if wall_ns > max(now_ns, newest_ns) + CLOCK_SLACK_NS:
        raise UsageError(
            f"{_time(wall_ns)} is yet to come: it is {_time(now_ns)} here; "
            f"the newest point is {named(points[-1])}",
            hint="a time without a date is one of today; write the date for another day",
        )
    spanning = []
    for first, last in clock_runs(points):
        times = [point.wall_ns for point in points[first : last + 1]]
        if min(times) <= wall_ns <= max(times):
            inside = max(i for i, each in enumerate(times) if each <= wall_ns)
            spanning.append(first + inside)
    if len(spanning) > 1:
        either = " or ".join(f"epoch:{points[at].epoch}" for at in spanning)
        raise UsageError(
            f"{_time(wall_ns)} was more than once: the primary's clock was set back in between",
            hint=f"say which one is meant: {either}",
        )
    at = spanning[0] if spanning else _last_until(points, wall_ns)
    if at < 0:
        raise _too_early(_time(wall_ns), points[0])
    return _between(points, at, is_exact=points[at].wall_ns == wall_ns)


def clock_runs(points: Sequence[Point]) -> list[tuple[int, int]]:
    """(first, last) of the points between which the clock made no step, oldest first."""
    runs: list[tuple[int, int]] = []
    first = 0
    for at in range(1, len(points) + 1):
        if at < len(points):
            step_ns = points[at].wall_ns - points[at - 1].wall_ns
            if -CLOCK_SLACK_NS <= step_ns <= CLOCK_JUMP_NS:
                continue
        runs.append((first, at - 1))
        first = at
    return runs


def _last_until(points: Sequence[Point], wall_ns: int) -> int:
    return max((i for i, point in enumerate(points) if point.wall_ns <= wall_ns), default=-1)


def _between(points: Sequence[Point], at: int, *, is_exact: bool) -> Located:
    later = points[at + 1] if at + 1 < len(points) else None
    if is_exact:
        return Located(points[at])
    if later is None:
        return Located(points[at], None, "nothing newer is here")
    return Located(points[at], later, later.since or "nothing was sealed in between")


def _marked(points: Sequence[Point], name: str, marks: MarkTable) -> Point:
    mark = marks.get(name)
    for point in points:
        if name in point.marks:
            return point
    reason = "undo does not reach back to it" if marks.is_held(mark) else "it never had that state"
    if mark.epoch > points[-1].epoch:
        reason = "it is not applied here yet"
    earlier = [point for point in points if point.epoch < mark.epoch][-1:]
    later = [point for point in points if point.epoch > mark.epoch][:1]
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
