"""How a table is divided into frames, against the table itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX
from geomirror.volume.epoch_table import KIND_DATA, KIND_ZERO, Table, empty_table
from geomirror.wan_protocol.frame_layout import ENTRIES_MAX, FRAME_ENTRY_TYPE, WindowLayout

SIZES = {0: 1 << 40, 3: 100 * BLOCK_BYTES + 1024}
ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(1, 5)), max_size=120)


def make_table(rows: list[tuple[bool, int, int]], volume: int = 0, first: int = 0) -> Table:
    """Ascending rows: (is it zeros, blocks left out before it, blocks of zeros)."""
    table = empty_table(len(rows))
    block = first
    for row, (is_zero, gap, count) in zip(table, rows, strict=True):
        block += gap
        row["volume"], row["block"], row["address"] = volume, block, 0 if is_zero else 72 + block
        row["kind"], row["count"] = (KIND_ZERO, count) if is_zero else (KIND_DATA, 1)
        block += count if is_zero else 1
    return table


def expanded(layout: WindowLayout) -> list[tuple[int, int, int, int]]:
    """(volume, kind, block, count) of all frames, data block by block; bounds are checked."""
    found: list[tuple[int, int, int, int]] = []
    position = 0
    for frame in layout.frames():
        assert frame.start == position
        assert frame.stop - frame.start <= FRAME_RAW_BYTES_MAX
        assert 0 < frame.entry_count <= ENTRIES_MAX
        position = frame.stop
        entries = np.frombuffer(frame.entries, dtype=FRAME_ENTRY_TYPE)
        assert len(entries) == frame.entry_count
        for volume, kind, _, count, block in entries.tolist():
            if kind == KIND_DATA:
                found += [(volume, kind, block + n, 1) for n in range(count)]
            else:
                found.append((volume, kind, block, count))
    assert position == layout.data_bytes
    return found


def rows_of(table: Table) -> list[tuple[int, int, int, int]]:
    return [tuple(row) for row in table[["volume", "kind", "block", "count"]].tolist()]


@given(ROWS, ROWS)
def test_frames_hold_what_the_table_holds(
    rows: list[tuple[bool, int, int]], others: list[tuple[bool, int, int]]
) -> None:
    table = np.concatenate([make_table(rows), make_table(others, volume=7)])
    layout = WindowLayout(table, SIZES)
    assert expanded(layout) == rows_of(table)
    addresses, lengths, places = layout.data_places()
    assert addresses.tolist() == table["address"][table["kind"] == KIND_DATA].tolist()
    assert lengths.tolist() == [BLOCK_BYTES] * len(addresses)
    assert places.tolist() == [BLOCK_BYTES * n for n in range(len(addresses))]


def test_a_run_fills_frames_as_one_entry_each() -> None:
    layout = WindowLayout(make_table([(False, 0, 1)] * 40), SIZES)
    frames = list(layout.frames())
    assert [frame.entry_count for frame in frames] == [1, 1, 1]
    sizes = [frame.stop - frame.start for frame in frames]
    assert sizes == [65536, 65536, 8 * BLOCK_BYTES]


def test_thousands_of_zero_runs_are_divided_too() -> None:
    table = make_table([(True, 1, 1)] * 2500 + [(False, 0, 1)] * 20)
    layout = WindowLayout(table, SIZES)
    assert expanded(layout) == rows_of(table)
    assert [frame.entry_count for frame in layout.frames()][:2] == [ENTRIES_MAX, ENTRIES_MAX]


def test_the_last_block_of_a_volume_may_be_short() -> None:
    table = make_table([(False, 0, 1)] * 3, volume=3, first=98)
    layout = WindowLayout(table, SIZES)
    assert layout.data_bytes == 2 * BLOCK_BYTES + 1024
    assert layout.data_places()[1].tolist() == [BLOCK_BYTES, BLOCK_BYTES, 1024]
    assert expanded(layout) == rows_of(table)
