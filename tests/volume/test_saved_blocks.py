"""The set of blocks whose before-image is kept, against a plain set."""

from __future__ import annotations

import random

import pytest

from geomirror.volume.epoch_table import Table, empty_table
from geomirror.volume.saved_blocks import PAGE_BLOCKS, SavedBlocks

Runs = list[tuple[int, int, int]]


def table_of(runs: Runs) -> Table:
    table = empty_table(len(runs))
    for name, column in zip(("volume", "block", "count"), zip(*runs, strict=True), strict=True):
        table[name] = column
    return table


def blocks_of(runs: Runs) -> set[tuple[int, int]]:
    return {(volume, block) for volume, first, n in runs for block in range(first, first + n)}


def some_runs(chance: random.Random) -> Runs:
    """Near the edge of a page, in two volumes, in any order and overlapping."""
    return [
        (
            chance.randrange(2),
            PAGE_BLOCKS * chance.randrange(1, 3) - chance.randrange(60),
            chance.choice([1, 1, 2, 7, 8, 9, 70]),
        )
        for _ in range(chance.randrange(1, 9))
    ]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_missing_is_what_was_not_added(seed: int) -> None:
    chance, saved, known = random.Random(seed), SavedBlocks(), set[tuple[int, int]]()
    for _ in range(30):
        asked = some_runs(chance)
        rows = saved.missing(table_of(asked))[["volume", "block", "count"]].tolist()
        assert blocks_of(rows) == blocks_of(asked) - known
        assert sum(count for *_, count in rows) == len(blocks_of(rows))
        assert rows == sorted(rows)
        added = some_runs(chance)
        saved.add(table_of(added))
        known |= blocks_of(added)


def test_a_run_over_whole_pages_is_one_that_is_missing() -> None:
    saved = SavedBlocks()
    saved.add(table_of([(0, PAGE_BLOCKS, 3)]))
    rows = saved.missing(table_of([(0, 5, 2 * PAGE_BLOCKS)]))
    found = rows[["block", "count"]].tolist()
    assert found == [(5, PAGE_BLOCKS - 5), (PAGE_BLOCKS + 3, PAGE_BLOCKS - 3), (2 * PAGE_BLOCKS, 5)]
