"""A resync over 100 Mbit/s and 200 ms uses the link, whatever it has to ask first."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from geomirror.environment import MS, SECOND
from geomirror.limits import BLOCK_BYTES, GIB, MIB, PRODUCTION, REGION_BYTES
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.dirty_index import IMAGE, DirtyIndex, Piece
from geomirror.volume.image import Image
from geomirror.volume.region_bits import RegionBits
from geomirror.volume.sealed_content import SealedContent
from geomirror.volume.tree_digest import DIGEST_BYTES, REGION_BLOCKS, TreeDigest
from geomirror.wan_protocol.resync_job import Item, ResyncReadJob
from geomirror.wan_protocol.resync_plan import Part
from tests.wan_protocol.far_resync import (
    CHECKPOINT_NS,
    RATE,
    WAY_NS,
    Disk,
    FarResync,
    scattered,
)

ROUND_TRIP_NS = 2 * WAY_NS


def test_the_digests_of_scattered_regions_are_on_their_way_while_others_are_copied() -> None:
    far = FarResync(GIB, scattered(GIB, 0.01))
    far.run()
    # Asked, answered, read: the first content leaves within a round trip and two short jobs.
    assert far.first_ns < ROUND_TRIP_NS + CHECKPOINT_NS + 100 * MS
    assert far.use > 0.95
    # Thousands of regions in a handful of round trips: everything else is the link's own time.
    link_ns = far.copied_bytes * SECOND // RATE
    assert far.done_ns < link_ns * 1.05 + 4 * ROUND_TRIP_NS
    assert far.asked > 10
    assert far.sent_again == 0
    assert far.wire_bytes < far.copied_bytes * 1.1


def test_regions_that_are_read_one_at_a_time_would_leave_a_third_of_the_link_idle() -> None:
    """Half a millisecond each: both sides say first which ones they are going to read."""
    far = FarResync(GIB, scattered(GIB, 0.01), Disk(depth=1))
    far.run()
    assert 0.6 < far.use < 0.8


def test_a_copy_that_syncs_for_longer_than_a_second_does_not_leave_the_link_idle() -> None:
    far = FarResync(GIB, scattered(GIB, 0.01), Disk(write_ns=1200 * MS))
    far.run()
    assert far.use > 0.95
    assert far.sent_again == 0


def test_half_a_gigabit_is_used_too() -> None:
    """12.5 MB are on their way, which window and credit allow."""
    disk = Disk(depth=32, write_ns=150 * MS)
    far = FarResync(GIB // 2, scattered(GIB // 2, 0.05), disk, rate=5 * RATE)
    far.run()
    assert far.use > 0.85
    assert far.sent_again == 0


def test_frames_that_were_received_are_not_sent_again_however_slow_the_disk_is() -> None:
    far = FarResync(256 * MIB, scattered(256 * MIB, 0.03), Disk(write_ns=7 * SECOND))
    far.run()
    assert far.sent_again == 0


def test_the_first_difference_after_a_long_comparison_is_sent_once() -> None:
    """Nothing was on its way meanwhile, so nothing can have been lost."""
    size = GIB
    last = size // 4096 - 10
    far = FarResync(size, [last], Disk(bytes_per_second=200 << 20), is_known=False)
    far.run()
    assert far.first_ns > 4 * SECOND
    assert len(far.sent) == 1


def test_where_nothing_is_known_comparing_and_copying_go_on_side_by_side() -> None:
    far = FarResync(GIB, scattered(GIB, 0.01), is_known=False)
    far.run()
    # Everything is read once at both ends, and what differs once more, region by region.
    reading_ns = GIB * SECOND // far.disk.bytes_per_second
    link_ns = far.copied_bytes * SECOND // RATE
    assert far.done_ns < reading_ns + link_ns + 5 * ROUND_TRIP_NS
    assert far.sent_again == 0


def test_a_window_full_of_lost_frames_is_sent_again() -> None:
    """More is held for the copy than the window takes: what was lost must not block the rest."""
    far = FarResync(GIB // 2, scattered(GIB // 2, 0.08))
    far.is_lost = lambda sequence: sequence >= 100 and not far.sent_again
    far.run()
    assert PRODUCTION.resync_held_bytes_max > PRODUCTION.window_bytes_min
    assert far.sent_again > 0
    link_ns = far.copied_bytes * SECOND // RATE
    assert far.done_ns < 2 * link_ns + 10 * SECOND


def test_thousands_of_scattered_regions_cost_the_loop_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that a primary does for a region that is not in a job is done by the one thread that also
    sends: bits were looked for and cleared region by region, and that took more than the link."""
    calls: Counter[str] = Counter()
    for owner, name in (
        (RegionBits, "next_run"),
        (RegionBits, "clear_run"),
        (RegionBits, "clear_each"),
        (DirtyBitmap, "runs_within"),
        (DirtyIndex, "lookup"),
        (DirtyIndex, "blocks_since"),
    ):
        real = getattr(owner, name)

        def counted(*values: Any, real: Any = real, name: str = name) -> Any:
            calls[name] += 1
            return real(*values)

        monkeypatch.setattr(owner, name, counted)
    far = FarResync(GIB, scattered(GIB, 0.01))
    far.run()
    regions = len({block // REGION_BLOCKS for block in far.blocks})
    assert regions > 2000
    assert far.resync.bitmap.count() == 0
    assert sum(calls.values()) < regions / 10, calls


def test_a_step_keeps_what_differs_in_memory_not_all_that_it_compared() -> None:
    """Each read of 64 KiB would need new pages, which the kernel has to clear first."""
    regions, key, chance = 256, TreeDigest(5), random.Random(3)
    content = chance.randbytes(REGION_BYTES)
    file = SimpleNamespace(pread=lambda length, offset: bytes(bytearray(content[:length])))
    image = Image(0, "0", regions * REGION_BYTES, cast(Any, file))
    theirs = bytearray(b"".join(key.leaves(image, 0, REGION_BYTES, BLOCK_BYTES)))
    theirs[7 * DIGEST_BYTES] ^= 1
    items = [
        Item(
            Part(0, at * REGION_BLOCKS, REGION_BLOCKS, bytes(theirs)),
            REGION_BLOCKS,
            SealedContent(image, cast(Any, None), [Piece(at << 16, REGION_BYTES, IMAGE)]),
            (at + 1) * REGION_BYTES,
            frozenset(),
        )
        for at in range(regions)
    ]
    for item in items:
        item.content.expect_reads = lambda *where: None  # type: ignore[method-assign]
    job = ResyncReadJob(items, key, PRODUCTION.resync_read_bytes_max, 1)
    tracemalloc.start()
    try:
        job.run()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert job.data_bytes == regions * BLOCK_BYTES
    assert peak_bytes < 5 * job.data_bytes < regions * REGION_BYTES / 2
