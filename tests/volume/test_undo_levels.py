"""History gets coarser with age: which passes are merged, which are dropped."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import SECOND
from geomirror.limits import MIB, PRODUCTION
from geomirror.volume.undo_file import PassInfo
from geomirror.volume.undo_levels import STEP_NS_MAX, ages_of, expired, next_merge, squeezed

GENERATION = bytes(16)
HOUR = 3600 * SECOND
NOW = 1_000_000 * HOUR
ROOM = 64 * MIB
LEVELS = PRODUCTION.undo_levels


def history(*ages_s: float, raw: int = 4096) -> list[PassInfo]:
    """Adjacent passes that ended so long before the newest, which has age 0; in between others that
    are far enough apart, since only time in which there are passes counts."""
    newest = min(ages_s, default=0)
    between = [n * STEP_NS_MAX / SECOND for n in range(int(newest * SECOND) // STEP_NS_MAX, 0, -1)]
    ages = [*ages_s, *(age for age in between if age < newest), 0]
    return walls(*(NOW - int(age * SECOND) for age in ages), raw=raw)


def walls(*walls_ns: int, raw: int = 4096) -> list[PassInfo]:
    """Adjacent passes that ended at these times."""
    return [
        PassInfo(GENERATION, number, number + 1, wall_ns, name=str(number), raw_bytes=raw)
        for number, wall_ns in enumerate(walls_ns)
    ]


def merge_of(passes: list[PassInfo], pinned: list[int], room: int) -> list[PassInfo]:
    return next_merge(passes, pinned, room, LEVELS, PRODUCTION.undo_settled_ns)


def ends(passes: list[PassInfo]) -> list[int]:
    return [each.to_epoch for each in passes]


def test_passes_of_one_second_become_one() -> None:
    passes = history(20.9, 20.8, 20.6, 20.3, 19.9, 19.5)
    assert ends(merge_of(passes, [], ROOM)) == [1, 2, 3, 4]


def test_the_newest_are_left_alone() -> None:
    assert merge_of(history(9.9, 9.8, 9.7, 0.5), [], ROOM) == []


def test_after_an_hour_half_a_minute_is_one_point() -> None:
    passes = history(*[3600 + 60 + 29 - n for n in range(60)])
    first = merge_of(passes, [], ROOM)
    assert 25 <= len(first) <= 30
    assert first[0].to_epoch == 1


def half_minute(age_s: float, count: int = 29) -> list[PassInfo]:
    """One a second, the oldest at the start of a half minute and so old."""
    passes = history(*[age_s - n for n in range(count)])
    shift_ns = -passes[0].wall_ns % (30 * SECOND)
    return [replace(each, wall_ns=each.wall_ns + shift_ns) for each in passes]


def test_passes_wait_for_those_that_will_become_one_with_them() -> None:
    # Half of the passes of this half minute are not an hour old yet.
    assert merge_of(half_minute(3614.5), [], ROOM) == []
    whole = half_minute(3629.5)
    assert merge_of(whole, [], ROOM)[:29] == whole[:29]


def test_what_waits_for_others_does_not_wait_for_a_boundary_or_room() -> None:
    passes = half_minute(3614.5)
    assert ends(merge_of(passes, [6], ROOM)) == [1, 2, 3, 4, 5, 6]
    assert merge_of(passes[6:], [6], ROOM) == []
    assert ends(merge_of(passes, [], 5 * 4096)) == [1, 2, 3, 4, 5]
    passes[4] = replace(passes[4], fault="damaged")
    assert ends(merge_of(passes, [], ROOM)) == [1, 2, 3, 4]


def test_each_pass_is_written_once_a_level() -> None:
    """Four a second for five minutes, thinned every ten seconds; a minute is kept by the second."""
    levels = ((SECOND, 60 * SECOND), (30 * SECOND, 600 * SECOND))
    passes: list[PassInfo] = []
    written = {"seconds": 0, "half minutes": 0}
    for number in range(4 * 300):
        wall_ns = NOW + number * SECOND // 4
        passes.append(PassInfo(GENERATION, number, number + 1, wall_ns, name="p", raw_bytes=1))
        if number % 40:
            continue
        while group := next_merge(passes, [], ROOM, levels, 10 * SECOND):
            raw_bytes = sum(each.raw_bytes for each in group)
            is_old = wall_ns - group[-1].wall_ns >= 60 * SECOND
            written["half minutes" if is_old else "seconds"] += raw_bytes
            at = passes.index(group[0])
            label = (group[0].from_epoch, group[-1].to_epoch, group[-1].wall_ns)
            merged = PassInfo(GENERATION, *label, name="m", raw_bytes=raw_bytes)
            passes[at : at + len(group)] = [merged]
    assert 1000 < written["seconds"] <= 1200
    assert 800 < written["half minutes"] <= 960
    assert len(passes) < 60 + 2 * 30 + 4 * 20 + 8


def test_a_pinned_epoch_stays_a_boundary() -> None:
    passes = history(*[7200 + 29.9 - n / 2 for n in range(50)])
    group = merge_of(passes, [7], ROOM)
    assert ends(group) == [1, 2, 3, 4, 5, 6, 7]
    merged = [
        PassInfo(GENERATION, 0, 7, group[-1].wall_ns, name="m", raw_bytes=4096),
        *passes[7:],
    ]
    assert merge_of(merged, [7], ROOM)[0].from_epoch == 7


def test_a_merge_is_bounded_in_bytes() -> None:
    passes = history(*[7200 + 29.9 - n / 2 for n in range(50)], raw=20 * MIB)
    assert len(merge_of(passes, [], ROOM)) == 3


def test_a_gap_is_never_merged() -> None:
    passes = history(*[7200 + 29.9 - n / 2 for n in range(6)])
    passes[1] = PassInfo(GENERATION, 1, 2, passes[1].wall_ns, name="1", fault="damaged")
    assert ends(merge_of(passes, [], ROOM)) == [3, 4, 5, 6]


def test_the_oldest_expire_but_never_what_is_pinned_nor_the_newest() -> None:
    month = LEVELS[-1][1] / SECOND
    passes = history(month + 30, month + 20, month + 10, month - 10)
    assert expired(passes, [], LEVELS) == 3
    assert expired(passes, [1], LEVELS) == 1, "what ends at the pinned epoch is not needed"
    assert expired(passes, [0], LEVELS) == 0
    assert expired(history(), [], LEVELS) == 0


def test_while_replication_is_down_nothing_gets_older() -> None:
    """Age is measured against the newest pass: a clock that goes on alone changes nothing."""
    passes = history(30, 20)
    assert merge_of(passes, [], ROOM) == []
    assert expired(passes, [], LEVELS) == 0


def test_a_clock_that_jumps_makes_nothing_old() -> None:
    month, second = 31 * 24 * HOUR, SECOND
    steady = [NOW + n * second for n in range(20)]
    forward = walls(*steady, *(each + month for each in steady))
    assert expired(forward, [], LEVELS) == 0
    assert merge_of(forward, [], ROOM) == []
    back = walls(*(each + month for each in steady), *steady)
    assert expired(back, [], LEVELS) == 0
    assert merge_of(back, [], ROOM) == []
    # There and back: what comes later is no older than it is.
    there_and_back = walls(*steady, *(each + month for each in steady), *(e + HOUR for e in steady))
    assert merge_of(there_and_back, [], ROOM) == []
    assert max(ages_of([each.wall_ns for each in there_and_back])) < HOUR
    assert expired(walls(NOW, NOW + month, NOW), [], LEVELS) == 0


def test_time_without_writes_counts_a_little() -> None:
    assert ages_of([0, SECOND, 10 * HOUR, 10 * HOUR + SECOND]) == [
        STEP_NS_MAX + 2 * SECOND,
        STEP_NS_MAX + SECOND,
        SECOND,
        0,
    ]
    assert ages_of([]) == []


def test_under_pressure_the_oldest_of_the_finest_level_goes_first() -> None:
    fine, coarse = [1800 - n for n in range(900)], [7200 - 30 * n for n in range(100)]
    passes = history(*coarse, *fine)
    assert merge_of(passes, [], ROOM) == []
    groups = [
        next_merge(passes, [], ROOM, levels, PRODUCTION.undo_settled_ns)
        for levels in squeezed(LEVELS)
    ]
    first = next(group for group in groups if group)
    assert NOW - first[0].wall_ns == 1800 * SECOND, "not one of the coarse ones"
    levels = list(squeezed(LEVELS))
    assert list(levels[0]) == [(LEVELS[0][0], LEVELS[0][1] // 4), *LEVELS[1:]]
    assert all(each[-1] == LEVELS[-1] for each in levels), "nothing expires by it"


@given(
    ages=st.lists(st.floats(0, 40 * 24 * 3600), max_size=60),
    pinned=st.lists(st.integers(0, 61), max_size=4),
)
def test_merging_ends_and_keeps_pinned_boundaries(ages: list[float], pinned: list[int]) -> None:
    passes = walls(*(NOW - int(age * SECOND) for age in [*sorted(ages, reverse=True), 0]))
    boundaries = {0, *(each.to_epoch for each in passes)}
    for _ in range(len(passes) + 1):
        group = merge_of(passes, pinned, ROOM)
        if not group:
            break
        assert len(group) >= 2
        at = passes.index(group[0])
        assert passes[at : at + len(group)] == group
        merged = PassInfo(
            GENERATION, group[0].from_epoch, group[-1].to_epoch, group[-1].wall_ns, name="m"
        )
        passes[at : at + len(group)] = [merged]
    else:
        raise AssertionError("merging does not end")
    kept = {0, *(each.to_epoch for each in passes)}
    assert boundaries & set(pinned) <= kept
