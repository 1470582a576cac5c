"""Sets of blocks as runs, against sets of Python; and ranges of epochs that stay bounded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import IntegrityError
from geomirror.limits import BLOCK_BYTES, REGION_BYTES
from geomirror.volume import epoch_changes
from geomirror.volume.block_runs import (
    EMPTY,
    BlockRuns,
    indices,
    overlaps,
    runs_of_table,
    united,
)
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.epoch_changes import EpochChanges
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.epoch_table import KIND_ZERO, Table, empty_table
from tests.volume.memory_store import MemoryStore

LAST = 200
RANGES = st.tuples(st.integers(0, LAST), st.integers(0, LAST)).map(lambda pair: sorted(pair))
PAIRS = st.lists(RANGES.filter(lambda pair: pair[0] < pair[1]), max_size=12)


def raw(pairs: Sequence[Sequence[int]]) -> BlockRuns:
    return BlockRuns(indices([a for a, _ in pairs]), indices([b for _, b in pairs]))


def members(pairs: Sequence[Sequence[int]]) -> set[int]:
    return {block for first, end in pairs for block in range(first, end)}


def blocks(runs: BlockRuns) -> set[int]:
    return members(list(zip(runs.starts.tolist(), runs.ends.tolist(), strict=True)))


def is_canonical(runs: BlockRuns) -> bool:
    starts, ends = runs.starts, runs.ends
    return bool((starts < ends).all() and (starts[1:] > ends[:-1]).all())


@given(st.lists(PAIRS, max_size=5), RANGES)
def test_union_and_cut_are_those_of_sets(lists: list[list[list[int]]], window: list[int]) -> None:
    found = united([raw(pairs) for pairs in lists])
    expected = set().union(*map(members, lists)) if lists else set()
    assert blocks(found) == expected
    assert is_canonical(found)
    part = found.within(*window)
    assert blocks(part) == expected & set(range(*window))
    assert is_canonical(part)


@given(PAIRS, st.integers(0, 6))
def test_a_widened_set_holds_whole_groups(pairs: list[list[int]], shift: int) -> None:
    found = united([raw(pairs)]).widened(shift)
    groups = {block >> shift for block in members(pairs)}
    assert blocks(found) == {g << shift | i for g in groups for i in range(1 << shift)}
    assert is_canonical(found)


@given(st.lists(PAIRS, max_size=4), RANGES.filter(lambda pair: pair[0] < pair[1]))
def test_overlaps_count_sets_block_by_block(
    lists: list[list[list[int]]], window: list[int]
) -> None:
    first, end = window
    starts, counts = overlaps([united([raw(pairs)]) for pairs in lists], first, end)
    edges = [*starts.tolist(), end]
    assert edges[0] == first
    assert edges == sorted(set(edges))
    told = [
        count for at, count in enumerate(counts.tolist()) for _ in range(edges[at], edges[at + 1])
    ]
    assert told == [sum(b in members(pairs) for pairs in lists) for b in range(first, end)]
    assert all(counts[1:] != counts[:-1])


def table(*entries: tuple[int, int, int]) -> Table:
    """Of (volume, block, count)."""
    made = empty_table(len(entries))
    for at, (volume, block, count) in enumerate(sorted(entries)):
        made[at]["volume"], made[at]["block"], made[at]["count"] = volume, block, count
        made[at]["kind"] = KIND_ZERO if count > 1 else 0
    return made


def test_a_table_is_told_apart_by_volume() -> None:
    found = runs_of_table(table((0, 1, 1), (0, 2, 1), (0, 9, 5), (3, 2, 1)))
    assert {volume: blocks(runs) for volume, runs in found.items()} == {
        0: {1, 2, 9, 10, 11, 12, 13},
        3: {2},
    }
    assert len(found[0]) == 2
    assert runs_of_table(empty_table()) == {}


def info(number: int, first: int | None = None) -> EpochInfo:
    values = dict.fromkeys(EpochInfo._fields, 0) | {"number": number, "chain_hash": b""}
    values["first_number"] = first or number
    return EpochInfo(**values)  # type: ignore[arg-type]


class Tables:
    """Epoch n writes blocks 10 n … 10 n + 2 of volume 0, and block n of volume 1."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self, which: EpochInfo) -> Table:
        self.read.append(which.number)
        at = which.number
        return table((0, 10 * at, 3), (1, at, 1))


def ask(changes: EpochChanges, position: int, volume: int = 0) -> set[int]:
    return blocks(united(changes.after(position, volume, 0, 1 << 20)))


def tens(first: int, last: int) -> set[int]:
    return {10 * at + i for at in range(first, last + 1) for i in range(3)}


def test_epochs_are_read_once_and_divided_where_somebody_stands() -> None:
    changes, tables = EpochChanges(), Tables()
    changes.follow(4)
    changes.load([info(at) for at in range(5, 13)], [8], tables)
    assert [(span.first, span.last) for span in changes.spans] == [(5, 8), (9, 12)]
    assert (changes.base, changes.through) == (4, 12)
    assert ask(changes, 4) == tens(5, 12)
    assert ask(changes, 8) == tens(9, 12)
    assert ask(changes, 10) == tens(9, 12), "more than is true, while it is within a span"
    assert ask(changes, 4, volume=1) == set(range(5, 13))
    assert ask(changes, 4, volume=7) == set()
    inside = changes.inside(10)
    assert inside is not None
    assert (inside.first, inside.last) == (9, 12)
    assert changes.inside(8) is None
    assert changes.inside(12) is None
    changes.load([info(11), info(12)], [10], tables)
    assert [(span.first, span.last) for span in changes.spans] == [(5, 8), (9, 10), (11, 12)]
    assert ask(changes, 10) == tens(11, 12)
    assert ask(changes, 8) == tens(9, 12)
    assert tables.read == [*range(5, 13), 11, 12]


def test_a_base_that_moves_forgets_and_one_that_falls_begins_anew() -> None:
    changes, tables = EpochChanges(), Tables()
    changes.load([info(at) for at in range(1, 7)], [2, 4], tables)
    changes.follow(3)
    assert [(span.first, span.last) for span in changes.spans] == [(3, 4), (5, 6)]
    assert changes.base == 2
    changes.follow(4)
    assert (changes.base, changes.through) == (4, 6)
    changes.follow(6)
    assert (changes.base, changes.through, changes.spans) == (6, 6, [])
    changes.load([info(7)], [], tables)
    changes.follow(5)
    assert (changes.base, changes.through, changes.spans) == (5, 5, [])
    changes.follow(99)
    assert (changes.base, changes.through) == (99, 99)


def test_a_fold_counts_as_all_of_its_epochs() -> None:
    changes = EpochChanges()
    changes.load([info(1), info(5, first=2), info(6)], [], Tables())
    assert changes.through == 6
    assert ask(changes, 5) == tens(1, 1) | tens(5, 6)


def test_a_table_that_cannot_be_read_changes_nothing() -> None:
    changes, tables = EpochChanges(), Tables()
    changes.load([info(1)], [], tables)

    def damaged(which: EpochInfo) -> Table:
        if which.number == 3:
            raise IntegrityError("a damaged record")
        return tables(which)

    with pytest.raises(IntegrityError):
        changes.load([info(2), info(3)], [2], damaged)
    assert changes.through == 1
    changes.load([info(2), info(3)], [2], tables)
    assert ask(changes, 0) == tens(1, 3)


def test_many_spans_are_joined_the_old_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_changes, "SPANS_MAX", 8)
    changes, tables = EpochChanges(), Tables()
    for number in range(1, 200):
        changes.load([info(number)], [number], tables)
        assert len(changes.spans) <= 8
        assert [span.first for span in changes.spans] == [
            1,
            *(span.last + 1 for span in changes.spans[:-1]),
        ]
    assert ask(changes, 0) == tens(1, 199)
    assert ask(changes, 198) == tens(199, 199), "the newest stay exact"


@given(st.integers(0, 60))
def test_too_many_runs_are_widened_and_never_lost(position: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_changes, "RUNS_MAX", 12)
        patch.setattr(epoch_changes, "RUNS_GATHERED_MAX", 5)
        changes = EpochChanges()
        changes.load([info(at) for at in range(1, 31)], [7, 20], Tables())
        changes.load([info(at) for at in range(31, 61)], [40], Tables())
        assert sum(span.run_count for span in changes.spans) <= 12
        assert ask(changes, position) >= tens(position + 1, 60)
        assert ask(changes, position, 1) >= set(range(position + 1, 61))


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), max_size=12),
    st.integers(0, 99 * 16),
    st.integers(1, 800),
)
def test_a_bitmaps_blocks_are_those_of_its_regions(
    runs: list[tuple[int, int]], first: int, count: int
) -> None:
    regions, per_region = 100, REGION_BYTES // BLOCK_BYTES
    bitmap = DirtyBitmap.create(
        MemoryStore(),
        "west",
        {0: regions * REGION_BYTES},
        generation=bytes(16),
        epoch=0,
        chain_hash=bytes(32),
    )
    dirty: set[int] = set()
    for region, length in runs:
        length = min(length, regions - region)
        bitmap.set_range(0, region * REGION_BYTES, length * REGION_BYTES)
        dirty |= set(range(region, region + length))
    end = first + count
    found = blocks(bitmap.blocks_within(0, first, end)) & set(range(first, end))
    # What the bitmap does not know of counts as dirty: a volume that has grown, or a new one.
    assert found == {
        b for b in range(first, end) if b // per_region in dirty or b // per_region >= regions
    }
    assert blocks(bitmap.blocks_within(5, first, end)) >= set(range(first, end))


def test_nothing_is_cheap() -> None:
    assert len(united([])) == len(united([EMPTY, EMPTY])) == 0
    assert len(EMPTY.within(0, 10)) == 0
    assert len(BlockRuns.between(5, 5)) == 0
    assert blocks(BlockRuns.between(5, 7)) == {5, 6}
    starts, counts = overlaps([], 3, 9)
    assert (starts.tolist(), counts.tolist()) == ([3], [0])
    assert np.all(EMPTY.widened(4).starts == EMPTY.starts)
