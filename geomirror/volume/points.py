"""The points in time that a copy can be looked at, and the one that somebody means.

A point is a boundary: an epoch that this copy held exactly, and across which no undo was merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from geomirror.errors import NotFoundError
from geomirror.volume.marks import MarkTable
from geomirror.volume.undo_history import History


@dataclass(frozen=True)
class Point:
    """One epoch whose state can be had."""

    epoch: int
    wall_ns: int
    """When it was cut at the primary, Unix ns."""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class At:
    """What was asked for: exactly one of these, or nothing for the newest point."""

    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None


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
    found: list[tuple[int, int]] = [(each.to_epoch, each.wall_ns) for each in kept]
    if kept and kept[0].from_epoch in walls:
        # When the start of the oldest pass was cut is known of a mark only.
        found.insert(0, (kept[0].from_epoch, walls[kept[0].from_epoch]))
    if not kept and applied_epoch:
        found.append((applied_epoch, applied_wall_ns))
    return [Point(epoch, wall_ns, tuple(names.get(epoch, ()))) for epoch, wall_ns in found]


def find_point(points: Sequence[Point], at: At, marks: MarkTable) -> Point:
    """The point meant by `at`: the nearest at or before it; of a mark, exactly that.

    :raises NotFoundError: there is none; names the nearest ones.
    """
    if not points:
        raise NotFoundError("this copy has no point in time to look at yet")
    if at.mark is not None:
        return _marked(points, at.mark, marks)
    if at.epoch is not None:
        earlier = [point for point in points if point.epoch <= at.epoch]
    elif at.wall_ns is not None:
        earlier = _until(points, at.wall_ns)
    else:
        return points[-1]
    if not earlier:
        raise NotFoundError(
            f"that is before the oldest point kept here, epoch {points[0].epoch}",
            hint='"geomirror timeline" shows what is kept',
        )
    return earlier[-1]


def _marked(points: Sequence[Point], name: str, marks: MarkTable) -> Point:
    mark = marks.get(name)
    for point in points:
        if name in point.marks:
            return point
    reason = "undo does not reach back to it" if marks.is_held(mark) else "it never had that state"
    raise NotFoundError(
        f'this copy cannot show mark "{name}" (epoch {mark.epoch}): {reason}',
        hint='"geomirror timeline" shows what is kept',
    )


def _until(points: Iterable[Point], wall_ns: int) -> list[Point]:
    """The points up to the last that was cut by `wall_ns`; clocks may have stepped back between."""
    found: list[Point] = []
    last = 0
    for point in points:
        found.append(point)
        if point.wall_ns <= wall_ns:
            last = len(found)
    return found[:last]
