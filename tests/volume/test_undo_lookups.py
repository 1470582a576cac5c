"""What is asked of thousands of passes is answered as the plain definition says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from geomirror.environment import SECOND
from geomirror.errors import NotFoundError
from geomirror.volume.undo_columns import columns_of
from geomirror.volume.undo_faults import Stretch, unusable
from geomirror.volume.undo_file import OPEN_EPOCH, PassInfo
from geomirror.volume.undo_history import History
from geomirror.volume.undo_levels import (
    MERGE_PASSES_MAX,
    STEP_NS_MAX,
    Level,
    ages_of,
    expired,
    level_of,
    next_merge,
    steps_of,
)
from geomirror.volume.undo_load import MERGED, merged_over
from tests.volume import full_history

pytestmark = pytest.mark.timeout(300)
GENERATIONS = [bytes(16), bytes(range(16)), bytes(8) + bytes(range(8))]
LEVELS: list[Sequence[Level]] = [
    ((SECOND, 20 * SECOND), (5 * SECOND, 60 * SECOND), (30 * SECOND, 200 * SECOND)),
    ((SECOND, 30 * SECOND), (400 * SECOND, 2000 * SECOND), (900 * SECOND, 9000 * SECOND)),
]


@st.composite
def pass_lists(draw: st.DrawFn) -> list[PassInfo]:
    """Passes with ascending ends; some with a hole before them, some gaps, any clock."""
    found: list[PassInfo] = []
    epoch, wall_ns = draw(st.integers(0, 3)), 10**9 * SECOND
    for number in range(draw(st.integers(0, 25))):
        epoch += draw(st.sampled_from([0, 0, 0, 0, 0, 2]))
        end = epoch + draw(st.integers(1, 3))
        wall_ns += draw(st.sampled_from([0, 1, 1, 2, 7, 40, 700, -3])) * SECOND // 2
        found.append(
            PassInfo(
                draw(st.sampled_from([GENERATIONS[0], *GENERATIONS])),
                *(epoch, end, wall_ns),
                name=f"undo/{number:016x}.und",
                fault=draw(st.sampled_from(["", "", "", "", "", "damaged"])),
                raw_bytes=draw(st.integers(0, 60)),
                stored_bytes=draw(st.integers(0, 99)),
            )
        )
        epoch = end
    return found


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Those passes; sometimes a pass is open, from the end or from an earlier epoch on."""
    passes = draw(pass_lists())
    ends = [each.to_epoch for each in passes] or [5]
    parts = [
        PassInfo(bytes(16), draw(st.sampled_from(ends)), OPEN_EPOCH, name="undo/f.open", start=128)
    ] * draw(st.sampled_from([0, 0, 0, 1, 2]))
    floor = draw(st.sampled_from([0, 0, 0, ends[0]]))
    return History((*passes, *parts), 0, floor=floor)


def naive_kept(passes: Sequence[PassInfo], applied: int) -> list[PassInfo]:
    found: list[PassInfo] = []
    expected = applied
    for each in reversed([each for each in passes if each.to_epoch <= applied]):
        if each.to_epoch != expected or each.fault:
            break
        found.insert(0, each)
        expected = each.from_epoch
    return found


def naive_since(history: History, epoch: int) -> list[PassInfo] | None:
    """The passes from `epoch` to the image in the order in which they count; None: not kept."""
    whole = [each for each in history.passes if not each.is_part]
    parts = [each for each in history.passes if each.is_part]
    whole = [each for each in whole if each.to_epoch > epoch]
    start = parts[0].from_epoch if parts else epoch
    if epoch < history.floor or epoch > start:
        return None
    reached = [epoch]
    for each in whole:
        if each.from_epoch != reached[-1] or each.fault:
            return None
        reached.append(each.to_epoch)
    if start not in reached:
        return None
    before = [each for each in whole if each.to_epoch <= start]
    return [*before, *parts, *(each for each in whole if each.to_epoch > start)]


@given(history=histories(), data=st.data())
def test_every_lookup_is_the_plain_definition(history: History, data: st.DataObject) -> None:
    whole = [each for each in history.passes if not each.is_part]
    assert list(history.whole) == whole
    assert history.stored_bytes == sum(each.stored_bytes for each in whole)
    epochs = range((whole[-1].to_epoch if whole else 5) + 3)
    for epoch in epochs:
        kept = naive_kept(whole, epoch)
        assert list(history.kept(epoch)) == kept
        assert history.horizon(epoch) == (kept[0].from_epoch if kept else epoch)
        boundaries = [*(each.from_epoch for each in kept), epoch]
        assert history.boundaries(epoch) == boundaries
        lowest = data.draw(st.sampled_from(epochs))
        expected = [e for e in boundaries[:-1] if e >= lowest] + [epoch]
        assert history.boundaries(epoch, lowest) == expected
        assert [e for e in epochs if history.reaches(e, epoch)] == sorted(set(boundaries))
        ages = ages_of([each.wall_ns for each in kept], LEVELS[1])
        assert history.reach_ns(epoch, LEVELS[1]) == (ages[0] if kept else 0)
        expected_since = naive_since(history, epoch)
        if expected_since is None:
            with pytest.raises(NotFoundError):
                history.since(epoch)
        else:
            assert list(history.since(epoch)) == expected_since
        ending = [each for each in whole if each.to_epoch == epoch]
        assert [history.ending_at(epoch)] == (ending or [None])
        assert history.unusable(epoch, 7) == naive_unusable(whole, epoch)
    for each in whole:
        assert history.find(each.from_epoch, each.to_epoch) is each
        assert history.find(each.from_epoch + 1, each.to_epoch) is None
        position = history.position_of(each)
        assert position is not None
        assert whole[position] is each
        assert history.position_of(replace(each, name="other")) is None


def naive_unusable(whole: Sequence[PassInfo], epoch: int) -> list[Stretch]:
    return unusable(whole, (), epoch, 7)


@given(history=histories(), data=st.data())
def test_what_is_carried_over_is_what_would_be_made_anew(
    history: History, data: st.DataObject
) -> None:
    """Columns and totals of a history that was changed in places, and of one made of its passes."""
    for _ in range(3):
        assert (history.columns == columns_of(history.whole)).all()
        at = data.draw(st.integers(0, len(history.whole)))
        count = data.draw(st.integers(0, len(history.whole) - at))
        added = list(history.whole[at : at + count][:1])
        history = history.spliced(at, count, added)
        fresh = History(history.passes, 0)
        assert history.columns.tolist() == fresh.columns.tolist()
        assert history.stored_bytes == fresh.stored_bytes
        history = history.with_parts(history.parts[:1])
        assert history.columns.tolist() == fresh.columns.tolist()


def naive_ages(walls: Sequence[int], levels: Sequence[Level]) -> list[int]:
    ages = [0] * len(walls)
    for at in range(len(walls) - 2, -1, -1):
        longest = max(STEP_NS_MAX, levels[level_of(ages[at + 1], levels)][0])
        ages[at] = ages[at + 1] + min(max(walls[at + 1] - walls[at], 0), longest)
    return ages


def naive_merge(
    passes: Sequence[PassInfo],
    pinned: Collection[int],
    raw_bytes_max: int,
    levels: Sequence[Level],
    settled_ns: int,
) -> list[PassInfo]:
    """One pass after the other."""
    group: list[PassInfo] = []
    bucket, raw_bytes = (1, -1), 0
    ages = naive_ages([each.wall_ns for each in passes], levels)
    for each, age_ns in zip(passes, ages, strict=True):
        step_ns, _ = levels[level_of(age_ns, levels)]
        here = (step_ns, each.wall_ns // step_ns)
        follows = (
            bool(group)
            and not each.fault
            and group[-1].to_epoch == each.from_epoch
            and group[-1].to_epoch not in pinned
            and group[-1].generation == each.generation
        )
        fits = raw_bytes + each.raw_bytes <= raw_bytes_max and len(group) < MERGE_PASSES_MAX
        belongs = follows and fits and each.wall_ns // bucket[0] == bucket[1]
        if not belongs or here != bucket or age_ns < settled_ns:
            if len(group) > 1 and not belongs:
                return group
            group, raw_bytes = [], 0
        if age_ns < settled_ns:
            break
        bucket = here
        if not each.fault:
            group.append(each)
            raw_bytes += each.raw_bytes
    return group if len(group) > 1 else []


def naive_expired(passes: Sequence[PassInfo], pinned: Collection[int], levels: list[Level]) -> int:
    count = 0
    ages = naive_ages([each.wall_ns for each in passes], levels)
    for each, age_ns in zip(passes[:-1], ages, strict=False):
        if age_ns < levels[-1][1] or (pinned and each.to_epoch > min(pinned)):
            break
        count += 1
    return count


@given(
    passes=pass_lists(),
    pinned=st.sets(st.integers(0, 30), max_size=3),
    room=st.sampled_from([40, 100, 1000]),
    levels=st.sampled_from(LEVELS),
    settled_s=st.sampled_from([0, 2, 10]),
)
def test_what_is_merged_and_dropped_next_is_the_plain_definition(
    passes: list[PassInfo],
    pinned: set[int],
    room: int,
    levels: Sequence[Level],
    settled_s: int,
) -> None:
    walls = [each.wall_ns for each in passes]
    ages = ages_of(walls, levels)
    assert ages == naive_ages(walls, levels)
    if passes:
        steps = steps_of(columns_of(passes)[2] * 0 + ages, levels)
        assert steps.tolist() == [levels[level_of(age, levels)][0] for age in ages]
    settled_ns = settled_s * SECOND
    expected = naive_merge(passes, pinned, room, levels, settled_ns)
    assert next_merge(passes, pinned, room, levels, settled_ns) == expected
    assert expired(passes, pinned, levels) == naive_expired(passes, pinned, list(levels))


def test_merging_to_the_end_takes_the_same_steps() -> None:
    """A thousand passes at the edges of levels: the very same merges, one after the other."""
    passes = [
        PassInfo(bytes(16), n, n + 1, 10**18 + n * SECOND // 3, name=str(n), raw_bytes=n % 40)
        for n in range(1000)
    ]
    count = 0
    while group := next_merge(passes, [500], 200, LEVELS[0], 5 * SECOND):
        assert group == naive_merge(passes, [500], 200, LEVELS[0], 5 * SECOND)
        at, ends = passes.index(group[0]), (group[0].from_epoch, group[-1].to_epoch)
        raw_bytes = sum(each.raw_bytes for each in group)
        merged = PassInfo(bytes(16), *ends, group[-1].wall_ns, name="m", raw_bytes=raw_bytes)
        passes[at : at + len(group)] = [merged]
        count += 1
    assert naive_merge(passes, [500], 200, LEVELS[0], 5 * SECOND) == []
    assert count > 50


def test_a_full_history_has_nothing_to_merge_or_to_drop_and_fits_its_bounds() -> None:
    passes = full_history.passes()
    limits = full_history.PRODUCTION
    assert len(passes) == 3600 + 2760 + 1728 + 552 - 10 + 40
    assert next_merge(passes, [], 1 << 26, limits.undo_levels, limits.undo_settled_ns) == []
    assert expired(passes, [], limits.undo_levels) == 0
    assert len(passes) < limits.undo_points < limits.undo_pressure_fraction * limits.undo_passes_max
    history = History(tuple(passes), 0)
    reach_s = history.reach_ns(passes[-1].to_epoch, limits.undo_levels) / SECOND
    assert 29.9 * 86_400 < reach_s <= 30 * 86_400, "hours between points count as hours"
    # The next hour expires the oldest, and no more.
    later = [*passes, replace(passes[-1], from_epoch=passes[-1].to_epoch, to_epoch=1 << 40)]
    later[-1] = replace(later[-1], wall_ns=passes[-1].wall_ns + 300 * SECOND)
    assert expired(later, [], limits.undo_levels) <= 1


@st.composite
def files(draw: st.DrawFn) -> list[PassInfo]:
    """Any intervals, some of them merged, some damaged; no two merged ones of the same epochs."""
    found: dict[tuple[int, int, bool], PassInfo] = {}
    for number in range(draw(st.integers(0, 20))):
        first = draw(st.integers(0, 12))
        last = first + draw(st.integers(1, 8))
        is_merged = draw(st.booleans())
        name = f"undo/{number:016x}{MERGED + '1' if is_merged else ''}.und"
        fault = draw(st.sampled_from(["", "", "", "damaged"]))
        info = PassInfo(bytes(16), first, last, name=name, fault=fault)
        found.setdefault((first, last, is_merged), info)
    return list(found.values())


@given(files())
def test_files_that_a_merged_one_holds_are_the_plain_definition(found: list[PassInfo]) -> None:
    merged = [each for each in found if MERGED in each.name and not each.fault]

    def covers(big: PassInfo, small: PassInfo) -> bool:
        is_within = big.from_epoch <= small.from_epoch and small.to_epoch <= big.to_epoch
        return is_within and big.name != small.name

    covered = merged_over(found)
    assert set(covered) == {each.name for each in found if any(covers(m, each) for m in merged)}
    by_name = {each.name: each for each in found}
    assert all(covers(by_name[big], by_name[small]) for small, big in covered.items())


def test_of_two_merged_files_of_the_same_epochs_one_stays() -> None:
    twins = [PassInfo(bytes(16), 0, 9, name=f"undo/{n:016x}.m1.und") for n in (1, 2)]
    assert merged_over(twins) == {twins[0].name: twins[1].name}
