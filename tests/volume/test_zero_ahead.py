"""Zeros ahead of the log's end: written where they pay, and nothing depends on them."""

from __future__ import annotations

import errno

from geomirror.volume.segment import Segment, segment_name
from geomirror.volume.zero_ahead import SYNC_BYTES_MAX, ZERO_BYTES, ZeroAhead
from tests.sim.disk import SimStore
from tests.volume.journal_kit import SEGMENT, Disk

MIB = 1 << 20
BIG = 64 * MIB


def sparse(number: int) -> tuple[SimStore, Segment, ZeroAhead]:
    store = SimStore(1)
    segment = Segment(number, store.create(segment_name(number), BIG))
    return store, segment, ZeroAhead(BIG, number)


def written(store: SimStore) -> int:
    return store.counts.get("pwritev", 0)


def test_small_syncs_are_preceded_by_zeros_once_for_many_of_them() -> None:
    store, segment, ahead = sparse(3)
    end_lsn = 3 * BIG + 10 * MIB
    ahead.before_sync(segment, end_lsn)  # What came before this one was a bulk load.
    assert written(store) == 0
    for _ in range(256):
        end_lsn += 4160
        ahead.before_sync(segment, end_lsn)
    assert written(store) == 256 * 4160 // ZERO_BYTES + 1


def test_large_syncs_and_written_segments_are_left_alone() -> None:
    store, segment, ahead = sparse(3)
    for step in range(10):
        ahead.before_sync(segment, 3 * BIG + step * (SYNC_BYTES_MAX + 1))
    ahead.sparse = 2
    for step in range(10):
        ahead.before_sync(segment, 3 * BIG + 10 * MIB + step)
    assert written(store) == 0


def test_zeros_end_with_the_segment_and_are_not_written_behind_it() -> None:
    store, segment, ahead = sparse(3)
    ahead.before_sync(segment, 4 * BIG - 8)
    ahead.before_sync(segment, 4 * BIG - 4)
    ahead.before_sync(segment, 4 * BIG)
    assert (written(store), segment.file.size()) == (1, BIG)


def test_a_full_disk_is_left_to_the_records() -> None:
    store, segment, ahead = sparse(3)
    ahead.before_sync(segment, 3 * BIG + 1)
    store.fail("pwritev", error=errno.ENOSPC)
    ahead.before_sync(segment, 3 * BIG + 2)
    before = written(store)
    ahead.before_sync(segment, 3 * BIG + 3)
    assert written(store) == before


def test_a_log_with_zeros_ahead_is_the_same_log_after_a_crash() -> None:
    for seed in range(20):
        disk = Disk(seed)
        for _ in range(SEGMENT // 600):
            disk.append_blocks(b"x" * 400)
            disk.sync()
        disk.append_blocks(b"y" * 400)
        disk.crash_and_recover()
        for _ in range(20):
            disk.append_blocks(b"z" * 400)
            disk.sync()
        disk.crash_and_recover()
