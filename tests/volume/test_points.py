"""Which points in time there are, and which one is meant."""

from __future__ import annotations

import pytest

from geomirror.errors import NotFoundError
from geomirror.volume.marks import Mark, MarkTable
from geomirror.volume.points import At, Point, find_point, points_of
from geomirror.volume.undo_file import PassInfo
from geomirror.volume.undo_history import History

GENERATION = bytes(16)


def history(*steps: tuple[int, int, int], gap: int = -1) -> History:
    return History(
        tuple(
            PassInfo(GENERATION, first, last, wall_ns, name=str(last), is_gap=last == gap)
            for first, last, wall_ns in steps
        ),
        0,
    )


def marks(*named: tuple[str, int, bool]) -> MarkTable:
    table = MarkTable((), [epoch for _, epoch, is_held in named if is_held])
    for name, epoch, _ in named:
        table.put(Mark(name, GENERATION, epoch, epoch * 100))
    return table


STEPS = history((0, 4, 400), (4, 6, 600), (6, 9, 900))
TABLE = marks(("start", 0, True), ("mid", 6, True), ("merged", 5, True), ("missed", 7, False))


def test_points_are_the_ends_of_passes_with_their_marks() -> None:
    assert points_of(STEPS, 9, 900, TABLE) == [
        Point(0, 0, ("start",)),
        Point(4, 400),
        Point(6, 600, ("mid",)),
        Point(9, 900),
    ]
    assert points_of(STEPS, 6, 600, TABLE)[-1].epoch == 6, "a pass that is half applied is none"
    assert points_of(History((), 0), 5, 500, MarkTable()) == [Point(5, 500)]
    assert points_of(History((), 0), 0, 0, MarkTable()) == []


def test_a_gap_or_a_hole_ends_the_points() -> None:
    steps = history((0, 4, 400), (4, 6, 600), (6, 9, 900), gap=4)
    assert [p.epoch for p in points_of(steps, 9, 900, MarkTable())] == [6, 9]
    steps = history((0, 4, 400), (6, 9, 900))
    assert [p.epoch for p in points_of(steps, 9, 900, MarkTable())] == [9]


@pytest.mark.parametrize(
    ("at", "epoch"),
    [
        (At(), 9),
        (At(epoch=9), 9),
        (At(epoch=8), 6),
        (At(epoch=100), 9),
        (At(wall_ns=899), 6),
        (At(wall_ns=900), 9),
        (At(wall_ns=10**18), 9),
        (At(mark="mid"), 6),
        (At(mark="start"), 0),
    ],
)
def test_the_nearest_point_at_or_before_it_is_meant(at: At, epoch: int) -> None:
    assert find_point(points_of(STEPS, 9, 900, TABLE), at, TABLE).epoch == epoch


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (At(epoch=3), "before the oldest point kept here, epoch 4"),
        (At(wall_ns=399), "before the oldest point kept here, epoch 4"),
        (At(mark="nosuch"), 'no mark "nosuch"'),
        (At(mark="missed"), 'cannot show mark "missed" (epoch 7): it never had that state'),
        (At(mark="merged"), "undo does not reach back to it"),
    ],
)
def test_what_is_not_kept_is_said(at: At, message: str) -> None:
    points = points_of(STEPS, 9, 900, TABLE)[1:]
    with pytest.raises(NotFoundError) as caught:
        find_point(points, at, TABLE)
    assert message in str(caught.value)


def test_a_clock_that_stepped_back_takes_the_latest_point_before_the_moment() -> None:
    steps = history((0, 4, 400), (4, 6, 900), (6, 9, 500))
    points = points_of(steps, 9, 500, MarkTable())
    assert find_point(points, At(wall_ns=600), MarkTable()).epoch == 9
    assert find_point(points, At(wall_ns=450), MarkTable()).epoch == 4


def test_without_any_point_it_is_said() -> None:
    with pytest.raises(NotFoundError, match="no point in time"):
        find_point([], At(), MarkTable())
