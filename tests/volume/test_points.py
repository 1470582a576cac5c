"""Which points in time there are, and which one is meant."""

from __future__ import annotations

import pytest

from geomirror.environment import SECOND
from geomirror.errors import NotFoundError, UsageError
from geomirror.volume.marks import Mark, MarkTable
from geomirror.volume.points import At, Point, clock_runs, find_point, locate, points_of
from geomirror.volume.undo_file import PassInfo
from geomirror.volume.undo_history import History

GENERATION = bytes(16)


def history(*steps: tuple[int, int, int], gap: int = -1) -> History:
    return History(
        tuple(
            PassInfo(
                GENERATION, first, last, wall_ns, name=str(last), fault="damaged" * (last == gap)
            )
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
AT_ONCE = "what was between was applied at once, or merged as history got older"
NOW = 10**12
TABLE = marks(("start", 0, True), ("mid", 6, True), ("merged", 5, True), ("missed", 7, False))


def test_points_are_the_ends_of_passes_with_their_marks() -> None:
    assert list(points_of(STEPS, 9, 900, TABLE)) == [
        Point(0, 0, ("start",)),
        Point(4, 400, (), AT_ONCE),
        Point(6, 600, ("mid",), AT_ONCE),
        Point(9, 900, (), AT_ONCE),
    ]
    assert points_of(STEPS, 6, 600, TABLE)[-1].epoch == 6, "a pass that is half applied is none"
    assert list(points_of(History((), 0), 5, 500, MarkTable())) == [Point(5, 500)]
    assert list(points_of(History((), 0), 0, 0, MarkTable())) == []


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
        (At(wall_ns=899), 6),
        (At(wall_ns=900), 9),
        (At(wall_ns=NOW), 9),
        (At(mark="mid"), 6),
        (At(mark="start"), 0),
    ],
)
def test_the_nearest_point_at_or_before_it_is_meant(at: At, epoch: int) -> None:
    assert find_point(points_of(STEPS, 9, 900, TABLE), at, TABLE, NOW).epoch == epoch


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (At(epoch=3), "before the oldest point kept here, epoch 4"),
        (At(epoch=10), "epoch 10 is not here (yet): the newest point is epoch 9"),
        (At(wall_ns=399), "before the oldest point kept here, epoch 4"),
        (At(mark="nosuch"), 'no mark "nosuch"'),
        (At(mark="missed"), 'cannot show mark "missed" (epoch 7): it never had that state'),
        (At(mark="missed"), "the nearest points are epoch 6 (1970-01-01T00:00:00Z) and epoch 9"),
        (At(mark="merged"), "undo does not reach back to it"),
        (At(mark="start"), "the nearest point is epoch 4"),
    ],
)
def test_what_is_not_kept_is_said_with_what_is_nearest(at: At, message: str) -> None:
    points = points_of(STEPS, 9, 900, TABLE)[1:]
    with pytest.raises(NotFoundError) as caught:
        find_point(points, at, TABLE, NOW)
    assert message in str(caught.value)
    assert "epoch:4" in str(caught.value) or "timeline" in str(caught.value) or "mark" in message


def test_what_lies_around_a_moment_is_told_with_the_reason() -> None:
    steps = (PassInfo(GENERATION, 0, 4, 400, name="1"),)
    steps += (PassInfo(GENERATION, 4, 5, 500, name="2"),)
    steps += (PassInfo(GENERATION, 5, 90, 900, name="3", is_resync=True),)
    steps += (PassInfo(GENERATION, 90, 95, 950, name="4"),)
    points = points_of(History(steps, 0), 95, 950, MarkTable())

    def around(at: At) -> tuple[int, int | None, str]:
        found = locate(points, at, MarkTable(), NOW)
        return found.point.epoch, found.later and found.later.epoch, found.why

    assert around(At(wall_ns=500)) == (5, None, "")
    assert around(At(epoch=90)) == (90, None, "")
    assert around(At(wall_ns=450)) == (4, 5, "nothing was sealed in between")
    assert around(At(epoch=40)) == (5, 90, "a resync brought this copy from one to the other")
    assert around(At(wall_ns=899))[:2] == (5, 90)
    assert around(At(epoch=92)) == (90, 95, AT_ONCE)
    assert around(At(wall_ns=960)) == (95, None, "nothing newer is here")
    assert around(At())[1:] == (None, "")


def clock(*seconds: float) -> list[Point]:
    """A point for each of these times, epochs 10, 11, …"""
    return [Point(10 + n, int(each * SECOND)) for n, each in enumerate(seconds)]


def at_second(points: list[Point], seconds: float, now: float = 10_000) -> int:
    at = At(wall_ns=int(seconds * SECOND))
    return find_point(points, at, MarkTable(), int(now * SECOND)).epoch


def test_a_time_that_is_yet_to_come_is_refused_but_for_what_clocks_differ() -> None:
    points = clock(100, 101, 102)
    assert at_second(points, 103.5, now=102) == 12
    with pytest.raises(UsageError, match=r"is yet to come.*the newest point is epoch 12"):
        at_second(points, 105, now=102)
    # A primary whose clock is ahead of the one here.
    assert at_second(clock(100, 200), 200, now=90) == 11


def test_a_time_that_was_twice_is_refused_and_both_are_named() -> None:
    points = clock(1000, 1010, 1020, 1005, 1015, 1030)
    assert clock_runs(points) == [(0, 2), (3, 5)]
    assert at_second(points, 1001) == 10
    assert at_second(points, 1025) == 14
    for seconds, named in ((1007, "epoch:10 or epoch:13"), (1016, "epoch:11 or epoch:14")):
        with pytest.raises(UsageError, match=named):
            at_second(points, seconds)


def test_a_clock_that_jumps_forward_for_a_while_leaves_the_times_around_it_usable() -> None:
    day = 86_400
    points = clock(1000, 1010, 1020 + day, 1030 + day, 1040, 1050)
    assert at_second(points, 1005) == 10
    assert at_second(points, 1035) == 11
    assert at_second(points, 1045) == 14
    assert at_second(points, 1025 + day, now=1060) == 12


def test_a_clock_that_is_slewed_back_a_little_is_no_step() -> None:
    steps = history((0, 4, 400), (4, 6, 900), (6, 9, 500))
    points = points_of(steps, 9, 500, MarkTable())
    assert find_point(points, At(wall_ns=600), MarkTable(), NOW).epoch == 9
    assert find_point(points, At(wall_ns=450), MarkTable(), NOW).epoch == 4


def test_without_any_point_it_is_said() -> None:
    with pytest.raises(NotFoundError, match="no point in time"):
        find_point([], At(), MarkTable(), NOW)


def test_times_that_no_calendar_has_are_told_as_numbers() -> None:
    with pytest.raises(UsageError, match="Unix time"):
        find_point(clock(5), At(wall_ns=(1 << 63) * 1000), MarkTable(), NOW)
