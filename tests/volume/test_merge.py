"""Merging tables against a model that knows every single block."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.volume.epoch_table import (
    ENTRY,
    FLAG_PUNCH,
    KIND_DATA,
    KIND_ZERO,
    Table,
    empty_table,
    is_canonical,
)
from geomirror.volume.merge import RUN_BLOCKS_MAX, merge_tables

Row = tuple[int, int, int, int, int]  # volume, kind, flags, block, count


def table_of(rows: list[Row], first_address: int = 1000) -> Table:
    table = np.zeros(len(rows), dtype=ENTRY)
    for index, (volume, kind, flags, block, count) in enumerate(rows):
        address = first_address + index if kind == KIND_DATA else 0
        table[index] = (volume, kind, flags, count, block, address, address * 7, address * 11)
    return table


def rows_of(table: Table) -> list[tuple[int, ...]]:
    return [
        (int(e["volume"]), int(e["kind"]), int(e["flags"]), int(e["block"]), int(e["count"]))
        for e in table
    ]


@st.composite
def canonical_rows(draw: st.DrawFn) -> list[Row]:
    rows: list[Row] = []
    for volume in (0, 1, 65535):
        block = 0
        for _ in range(draw(st.integers(0, 8))):
            block += draw(st.integers(0, 5))
            if draw(st.booleans()):
                rows.append((volume, KIND_DATA, 0, block, 1))
                block += 1
            else:
                count = draw(st.integers(1, 12))
                rows.append((volume, KIND_ZERO, draw(st.integers(0, 1)), block, count))
                block += count
    return rows


def expand(table: Table) -> dict[tuple[int, int], tuple[int, ...]]:
    model = {}
    for entry in table:
        for block in range(int(entry["block"]), int(entry["block"]) + int(entry["count"])):
            names = ("kind", "flags", "address", "digest_low", "digest_high")
            model[int(entry["volume"]), block] = tuple(int(entry[name]) for name in names)
    return model


def assert_joined(table: Table) -> None:
    for one, two in itertools.pairwise(table):
        touches = one["volume"] == two["volume"] and one["block"] + one["count"] == two["block"]
        zero = one["kind"] == KIND_ZERO == two["kind"] and one["flags"] == two["flags"]
        assert not (touches and zero), "adjacent zero runs were not joined"


@settings(max_examples=200, deadline=None)
@given(st.lists(canonical_rows(), min_size=2, max_size=6))
def test_merging_equals_applying_block_by_block(layers: list[list[Row]]) -> None:
    tables = [table_of(rows, 1000 * (i + 1)) for i, rows in enumerate(layers)]
    model: dict[tuple[int, int], tuple[int, ...]] = {}
    for table in tables:
        model.update(expand(table))
    merged = merge_tables(tables)
    assert is_canonical(merged)
    assert expand(merged) == model
    if sum(bool(len(table)) for table in tables) > 1:
        assert_joined(merged)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.booleans()), max_size=30),
        min_size=2,
        max_size=5,
    )
)
def test_single_blocks_take_the_fast_path_to_the_same_result(
    layers: list[list[tuple[int, int, bool]]],
) -> None:
    tables = []
    for index, layer in enumerate(layers):
        unique = {(volume, block): kind for volume, block, kind in layer}
        rows = [(v, int(k), 0, b, 1) for (v, b), k in sorted(unique.items())]
        tables.append(table_of(rows, 1000 * (index + 1)))
    model: dict[tuple[int, int], tuple[int, ...]] = {}
    for table in tables:
        model.update(expand(table))
    merged = merge_tables(tables)
    assert is_canonical(merged)
    assert expand(merged) == model


def test_a_single_table_is_returned_unchanged() -> None:
    # Two zero runs that could be joined: joining would change the epoch's hash.
    table = table_of([(0, KIND_ZERO, 0, 0, 4), (0, KIND_ZERO, 0, 4, 4)])
    assert merge_tables([empty_table(), table]) is table
    assert len(merge_tables([])) == 0


def test_a_huge_zero_run_is_split_and_never_expanded() -> None:
    blocks = 1 << 31  # 8 TiB
    older = table_of([(3, KIND_DATA, 0, 5, 1), (3, KIND_DATA, 0, blocks + 9, 1)])
    run = table_of([(3, KIND_ZERO, FLAG_PUNCH, 0, blocks)])
    newer = table_of([(3, KIND_DATA, 0, 100, 1), (3, KIND_ZERO, 0, 200, 8)])
    merged = merge_tables([older, run, newer])
    assert rows_of(merged) == [
        (3, KIND_ZERO, FLAG_PUNCH, 0, 100),
        (3, KIND_DATA, 0, 100, 1),
        (3, KIND_ZERO, FLAG_PUNCH, 101, 99),
        (3, KIND_ZERO, 0, 200, 8),
        (3, KIND_ZERO, FLAG_PUNCH, 208, blocks - 208),
        (3, KIND_DATA, 0, blocks + 9, 1),
    ]


def test_runs_that_join_beyond_a_u32_stay_several_entries() -> None:
    half = 1 << 31
    merged = merge_tables(
        [table_of([(0, KIND_ZERO, 1, 0, half)]), table_of([(0, KIND_ZERO, 1, half, half + 5)])]
    )
    assert rows_of(merged) == [
        (0, KIND_ZERO, 1, 0, RUN_BLOCKS_MAX),
        (0, KIND_ZERO, 1, RUN_BLOCKS_MAX, 6),
    ]
