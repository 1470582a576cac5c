"""The dirty index against a plain model: every byte remembers which record wrote it."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.volume.dirty_index import IMAGE, ZERO, DirtyIndex, Piece, overlay, source_lsn
from geomirror.volume.epoch_table import KIND_ZERO, empty_table
from geomirror.volume.merge import merge_tables

BLOCK = 4096
SIZE = 64 * BLOCK + 1536


def table_of(blocks: list[int], runs: list[tuple[int, int]] = ()):
    """A table with DATA entries and ZERO runs."""
    data = empty_table(len(blocks))
    data["count"] = 1
    data["block"] = sorted(blocks)
    zero = empty_table(len(runs))
    zero["kind"] = KIND_ZERO
    zero["block"] = [first for first, _ in runs]
    zero["count"] = [count for _, count in runs]
    return merge_tables([data, zero])


def index_of(size: int = SIZE) -> DirtyIndex:
    return DirtyIndex(size, zero_run_blocks_min=4)


def test_an_empty_index_leaves_everything_to_the_image() -> None:
    assert index_of().lookup(100, 9000) == [Piece(100, 9000, IMAGE)]
    assert index_of().lookup(100, 0) == []


def test_empty_ranges_change_nothing() -> None:
    index = index_of()
    for offset in (0, 100, BLOCK, SIZE):
        index.write(offset, 0, 72_000)
        index.zero(offset, 0, 72_000, punch=True)
    assert index.entry_count == 0
    assert index.touched == {}


def test_a_whole_block_is_one_entry_and_adjacent_addresses_are_one_piece() -> None:
    index = index_of()
    index.write(2 * BLOCK, 2 * BLOCK, 72_000)
    assert index.entries == {2: 72_000, 3: 76_096}
    assert index.lookup(BLOCK, 4 * BLOCK) == [
        Piece(BLOCK, BLOCK, IMAGE),
        Piece(2 * BLOCK, 2 * BLOCK, 72_000),
        Piece(4 * BLOCK, BLOCK, IMAGE),
    ]
    assert index.lookup(3 * BLOCK + 10, 100) == [Piece(3 * BLOCK + 10, 100, 76_106)]


def test_a_part_over_a_whole_block_keeps_the_rest_of_it() -> None:
    index = index_of()
    index.write(BLOCK, BLOCK, 10_000)
    index.write(BLOCK + 100, 50, 20_000)
    assert index.entries[1] == ((0, 100, 10_000), (100, 150, 20_000), (150, 4096, 10_150))
    assert index.entry_count == 4


def test_the_short_last_block_is_whole_when_its_bytes_are_written() -> None:
    index = index_of()
    index.write(64 * BLOCK, 1536, 8_000)
    assert index.entries == {64: 8_000}
    index.write(64 * BLOCK + 1000, 536, 9_600)
    assert index.entries == {64: ((0, 1000, 8_000), (1000, 1536, 9_600))}
    assert index.lookup(64 * BLOCK, 1536) == [
        Piece(64 * BLOCK, 1000, 8_000),
        Piece(64 * BLOCK + 1000, 536, 9_600),
    ]


def test_a_long_zero_run_is_one_extent_and_removes_older_entries() -> None:
    index = index_of()
    index.write(5 * BLOCK, BLOCK, 1_072)
    index.zero(0, 40 * BLOCK, 2_000, punch=True)
    assert index.entries == {}
    assert index.extents == [(0, 40, -2_001)]
    index.write(7 * BLOCK, BLOCK, 3_072)
    index.write(8 * BLOCK + 512, 512, 4_072)
    assert index.entries[8] == ((0, 512, -2_001), (512, 1024, 4_072), (1024, 4096, -2_001))
    assert index.lookup(6 * BLOCK, 3 * BLOCK) == [
        Piece(6 * BLOCK, BLOCK, ZERO),
        Piece(7 * BLOCK, BLOCK, 3_072),
        Piece(8 * BLOCK, 512, ZERO),
        Piece(8 * BLOCK + 512, 512, 4_072),
        Piece(8 * BLOCK + 1024, 3072, ZERO),
    ]


def test_a_newer_extent_splits_an_older_one() -> None:
    index = index_of()
    index.zero(0, 30 * BLOCK, 1_000, punch=False)
    index.zero(10 * BLOCK, 10 * BLOCK, 2_000, punch=True)
    assert index.extents == [(0, 10, -1_000), (10, 20, -2_001), (20, 30, -1_000)]
    index.zero(5 * BLOCK, 25 * BLOCK, 3_000, punch=False)
    assert index.extents == [(0, 5, -1_000), (5, 30, -3_000)]


def test_a_short_zero_run_becomes_entries() -> None:
    index = index_of()
    index.zero(512, 2 * BLOCK, 1_000, punch=True)
    assert index.entries == {
        0: ((512, 4096, -1_001),),
        1: -1_001,
        2: ((0, 512, -1_001),),
    }


def test_a_terabyte_trim_costs_one_entry() -> None:
    index = DirtyIndex(1 << 42, 64)
    index.zero(0, 1 << 42, 8, punch=True)
    assert index.entry_count == 1
    assert index.lookup(1 << 41, BLOCK) == [Piece(1 << 41, BLOCK, ZERO)]


def test_forget_drops_what_is_older_than_the_boundary_and_nothing_else() -> None:
    index = index_of()
    index.write(0, BLOCK, 1_072)
    index.write(BLOCK, BLOCK, 9_072)
    index.write(2 * BLOCK, 512, 1_200)
    index.write(2 * BLOCK + 1024, 512, 9_200)
    index.write(3 * BLOCK, 512, 1_304)
    index.zero(4 * BLOCK, BLOCK, 1_400, punch=False)
    index.zero(8 * BLOCK, 8 * BLOCK, 1_600, punch=False)
    index.zero(20 * BLOCK, 8 * BLOCK, 9_600, punch=False)
    index.write(9 * BLOCK, BLOCK, 1_772)
    index.forget(table_of([0, 1, 2, 3, 9], [(4, 1), (8, 1), (10, 6)]), 8_000)
    assert index.entries == {1: 9_072, 2: ((1024, 1536, 9_200),)}
    assert index.extents == [(20, 28, -9_600)]
    assert index.entry_count == 4
    assert index.partial == {2}


def test_forget_finds_entries_under_a_run_longer_than_the_index() -> None:
    index = index_of()
    index.write(3 * BLOCK, BLOCK, 1_072)
    index.write(40 * BLOCK, BLOCK, 1_272)
    index.forget(table_of([], [(0, 10), (12, 20)]), 8_000)
    assert index.entries == {40: 1_272}


def test_blocks_since_names_only_what_is_newer() -> None:
    index = index_of()
    index.write(0, 2 * BLOCK, 1_072)
    index.write(BLOCK + 8, 8, 9_072)
    index.zero(10 * BLOCK, 6 * BLOCK, 9_200, punch=False)
    assert index.blocks_since(0, 64, 9_000) == [1, 10, 11, 12, 13, 14, 15]
    assert index.blocks_since(0, 64, 1_000) == [0, 1, 10, 11, 12, 13, 14, 15]
    assert index.blocks_since(12, 2, 9_000) == [12, 13]


@pytest.mark.parametrize("seed", range(6))
def test_random_ranges_agree_with_a_byte_model(seed: int) -> None:
    chance = random.Random(seed)
    size = 24 * BLOCK + 512
    index = DirtyIndex(size, 4)
    model: list[int] = [IMAGE] * size  # per byte: address, ZERO or IMAGE
    age = [0] * size  # per byte: LSN
    lsn = 4096
    boundaries = [lsn]
    for _ in range(400):
        offset = chance.randrange(size)
        length = min(chance.choice([1, 512, 700, BLOCK, 3 * BLOCK, 9 * BLOCK]), size - offset)
        if chance.random() < 0.5:
            offset -= offset % BLOCK
            length = min(-(-length // BLOCK) * BLOCK, size - offset)
        kind = chance.random()
        if kind < 0.6:
            index.write(offset, length, lsn + 72)
            model[offset : offset + length] = range(lsn + 72, lsn + 72 + length)
            age[offset : offset + length] = [lsn] * length
        elif kind < 0.9:
            index.zero(offset, length, lsn, punch=chance.random() < 0.5)
            model[offset : offset + length] = [ZERO] * length
            age[offset : offset + length] = [lsn] * length
        else:
            # Everything before some record is in the image now: as an apply pass would.
            boundary = boundaries[chance.randrange(len(boundaries))]
            blocks = {i // BLOCK for i in range(size) if 0 < age[i] < boundary}
            index.forget(table_of([], [(b, 1) for b in sorted(blocks)]), boundary)
            for i in range(size):
                if age[i] < boundary:
                    model[i], age[i] = IMAGE, 0
        lsn += 72 + length + (-length) % 8
        boundaries.append(lsn)
        start = chance.randrange(size)
        pieces = index.lookup(start, min(chance.randrange(6 * BLOCK), size - start))
        assert_pieces(pieces, model)
    assert_pieces(index.lookup(0, size), model)


def assert_pieces(pieces: list[Piece], model: list[int]) -> None:
    for piece in pieces:
        expected = model[piece.offset : piece.offset + piece.length]
        if piece.source > 0:
            assert expected == list(range(piece.source, piece.source + piece.length))
        else:
            assert set(expected) == {piece.source}
    for left, right in itertools.pairwise(pieces):
        assert left.offset + left.length == right.offset


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 63), st.integers(1, 64), st.booleans()), min_size=1, max_size=12
    )
)
def test_overlaid_parts_stay_sorted_and_disjoint(writes: list[tuple[int, int, bool]]) -> None:
    parts = ()
    model = [0] * 128
    for number, (start, length, is_zero) in enumerate(writes):
        source = -(number + 1) * 8 if is_zero else (number + 1) * 1000
        parts = overlay(parts, start, start + length, source)
        for i in range(start, start + length):
            model[i] = source if is_zero else source + i - start
    seen = [0] * 128
    for low, high, source in parts:
        assert low < high
        for i in range(low, high):
            assert seen[i] == 0
            seen[i] = source + i - low if source > 0 else source
    assert seen == model
    assert [p[0] for p in parts] == sorted(p[0] for p in parts)
    assert all(source_lsn(p[2]) > 0 for p in parts)
