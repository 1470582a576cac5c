"""The journal as stories: appending, syncing, pinning, trimming, and failing disks."""

from __future__ import annotations

import errno
import random

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import IntegrityError, JournalFullError, NoSpaceError, StorageError
from geomirror.limits import PRODUCTION, SIMULATION
from geomirror.volume.journal import Journal
from geomirror.volume.journal_jobs import FLUSH_HEAVY_SYNCS
from geomirror.volume.record import HEADER_BYTES, RecordType, record_bytes
from geomirror.volume.segment import (
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    parse_segment_header,
    segment_name,
    segment_number,
    spare_index,
)
from tests.sim.disk import SimStore
from tests.volume.hexdump import VECTORS, dump, load
from tests.volume.journal_kit import (
    JOURNAL_BYTES,
    RESOURCE,
    SEGMENT,
    Disk,
    random_writes,
    write,
)

BLOCK = bytes(range(256)) * 16


def fill_segment(disk: Disk) -> int:
    """Append until a new segment is opened; its number."""
    number = disk.journal.end_lsn // SEGMENT
    while disk.journal.end_lsn // SEGMENT == number:
        disk.append_blocks(BLOCK, BLOCK, BLOCK)
    return number + 1


def fill(disk: Disk) -> None:
    with pytest.raises(JournalFullError):
        while True:
            disk.append_blocks(BLOCK)


def trim(disk: Disk) -> int:
    job = disk.journal.trim_job()
    if job is None:
        return 0
    job.run()
    disk.journal.complete_trim(job)
    return len(job.done)


def make_spare(disk: Disk) -> bool:
    job = disk.journal.spare_job()
    if job is None:
        return False
    job.run()
    disk.journal.complete_spare(job)
    return True


def test_the_first_record_lies_behind_the_header_of_the_first_segment() -> None:
    disk = Disk()
    lsns = disk.append_blocks(b"one", b"two")
    assert lsns == [SEGMENT + SEGMENT_HEADER_BYTES, SEGMENT + SEGMENT_HEADER_BYTES + 80]
    assert disk.journal.read(lsns[1] + HEADER_BYTES, 3) == b"two"
    assert disk.journal.end_lsn == lsns[1] + 80
    assert disk.journal.durable_lsn == lsns[0]


def test_a_batch_is_one_write_and_a_long_one_one_for_each_segment() -> None:
    disk = Disk()
    before = disk.store.counts.get("pwritev", 0)
    disk.append_blocks(*[BLOCK] * 20)
    assert disk.store.counts["pwritev"] - before == 1
    disk.append_blocks(*[BLOCK] * 60)
    assert disk.store.counts["pwritev"] - before == 3
    assert disk.lsns == sorted(disk.lsns)


def test_records_with_and_without_payload_read_back_verified() -> None:
    disk = Disk()
    writes = random_writes(random.Random(3), 200)
    for lsn, one in zip(disk.append(*writes), writes, strict=True):
        info, payload = disk.journal.read_record(lsn)
        assert (info.kind, info.volume, info.offset, info.length) == one[:4]
        assert payload == bytes(one[4] or b"")
        assert info.lsn == lsn
    with pytest.raises(IntegrityError, match="no valid record at offset"):
        disk.journal.read_record(disk.lsns[5] + 8)
    with pytest.raises(IntegrityError, match="no valid record at offset"):
        disk.journal.read_record(disk.journal.end_lsn)


def test_a_damaged_record_is_not_read_back_as_valid() -> None:
    disk = Disk()
    (lsn,) = disk.append_blocks(BLOCK)
    disk.store.flip_bit(segment_name(1), 8 * (lsn - SEGMENT + 500))
    with pytest.raises(IntegrityError):
        disk.journal.read_record(lsn)


def test_one_record_of_many_parts_is_their_concatenation() -> None:
    disk = Disk()
    lsn = disk.journal.append_record(
        RecordType.BLOCKS, [b"abc", memoryview(b"defgh"), bytearray(b"i")], flags=9, wall_ns=5
    )
    info, payload = disk.journal.read_record(lsn)
    assert payload == b"abcdefghi"
    assert (info.kind, info.flags, info.wall_ns) == (RecordType.BLOCKS, 9, 5)
    empty = disk.journal.append_record(RecordType.RESIZE, [], volume=2, length=77, wall_ns=5)
    assert disk.journal.read_record(empty)[0].length == 77
    assert disk.journal.end_lsn == empty + HEADER_BYTES


def test_flags_of_a_batch_are_in_all_of_its_records() -> None:
    disk = Disk()
    lsns = disk.journal.append([write(b"a"), write(b"b")], 1, flags=200)
    assert [disk.journal.read_record(lsn)[0].flags for lsn in lsns] == [200, 200]


def test_durable_moves_only_when_a_sync_is_completed_and_only_to_where_it_began() -> None:
    disk = Disk()
    disk.append_blocks(BLOCK)
    end = disk.journal.end_lsn
    job = disk.journal.begin_sync()
    disk.append_blocks(BLOCK)
    job.run()
    assert disk.journal.durable_lsn < end
    disk.journal.complete_sync(job)
    assert disk.journal.durable_lsn == end == job.lsn


def test_a_second_sync_that_overtakes_the_first_vouches_for_its_files_too() -> None:
    disk = Disk()
    fill_segment(disk)
    first = disk.journal.begin_sync()
    disk.append_blocks(BLOCK)
    second = disk.journal.begin_sync()
    disk.durable_count = len(disk.log)
    second.run()
    disk.journal.complete_sync(second)
    assert disk.journal.durable_lsn == disk.journal.end_lsn
    disk.crash_and_recover()
    assert first.lsn < second.lsn


def test_a_new_segment_is_synced_with_its_directory_entry() -> None:
    disk = Disk()
    fill_segment(disk)
    before = disk.store.counts.get("sync_directory", 0)
    disk.sync()
    assert disk.store.counts["sync_directory"] == before + 1
    disk.append_blocks(BLOCK)
    disk.sync()
    assert disk.store.counts["sync_directory"] == before + 1
    disk.crash_and_recover()


def test_after_a_failed_fdatasync_the_journal_refuses_everything() -> None:
    disk = Disk()
    disk.append_blocks(BLOCK)
    disk.store.fail("fdatasync", "journal/*")
    job = disk.journal.begin_sync()
    with pytest.raises(StorageError):
        job.run()
    for use in (
        lambda: disk.append_blocks(BLOCK),
        lambda: disk.journal.append_record(RecordType.MARK, [b"x"], wall_ns=1),
        disk.journal.begin_sync,
        disk.journal.trim_job,
        disk.journal.spare_job,
        lambda: disk.journal.complete_sync(job),
        job.run,
    ):
        with pytest.raises(StorageError, match="journal stopped after a failed sync"):
            use()
    assert disk.journal.failure
    assert disk.journal.durable_lsn == SEGMENT + SEGMENT_HEADER_BYTES
    disk.crash_and_recover()


def test_a_full_journal_refuses_a_batch_whole_and_goes_on_after_a_trim() -> None:
    disk = Disk(journal_bytes=4 * SEGMENT)
    fill(disk)
    end, used = disk.journal.end_lsn, disk.journal.bytes_used
    assert disk.journal.room_bytes() == 0
    with pytest.raises(JournalFullError, match=r"journal of resource 000102.* is full"):
        disk.append_blocks(*[BLOCK] * 10)
    assert (disk.journal.end_lsn, disk.journal.bytes_used) == (end, used)
    disk.sync()
    pin = disk.journal.pin(SEGMENT * 2, "checkpoint")
    assert trim(disk) == 1
    disk.append_blocks(*[BLOCK] * 10)
    assert disk.journal.first_segment == 2
    pin.release()


def test_room_bytes_is_a_promise() -> None:
    for seed in range(30):
        source = random.Random(seed)
        disk = Disk(seed, journal_bytes=5 * SEGMENT)
        while True:
            room = disk.journal.room_bytes()
            writes, size = [], 0
            while size < room:
                length = min(source.choice((1, 300, 4096, 32768)), room - size - HEADER_BYTES - 7)
                if length <= 0:
                    break
                writes.append(write(bytes(length)))
                size += record_bytes(length)
            if not writes:
                break
            disk.append(*writes[: source.randint(1, len(writes))])
        assert disk.journal.bytes_used > 3 * SEGMENT


def test_an_epoch_can_be_sealed_when_the_journal_is_full_of_data() -> None:
    disk = Disk(journal_bytes=4 * SEGMENT)
    fill(disk)
    with pytest.raises(JournalFullError):
        disk.journal.append_record(RecordType.BLOCKS, [BLOCK], wall_ns=1)
    fills = disk.journal.append_record(RecordType.FILL, [bytes(SEGMENT // 2)], wall_ns=1)
    epoch = disk.journal.append_record(RecordType.EPOCH, [bytes(SEGMENT // 2)], wall_ns=1)
    assert epoch > fills
    with pytest.raises(JournalFullError):
        for _ in range(10):
            disk.journal.append_record(RecordType.FILL, [bytes(SEGMENT // 2)], wall_ns=1)


def test_nothing_at_or_above_a_pin_is_trimmed() -> None:
    disk = Disk()
    for _ in range(4):
        fill_segment(disk)
    disk.sync()
    assert disk.journal.trim_job() is None  # no pin at all: nobody said what is not needed
    peer = disk.journal.pin(2 * SEGMENT + 5000, "west-1")
    checkpoint = disk.journal.pin(4 * SEGMENT, "checkpoint")
    assert trim(disk) == 1
    assert disk.journal.first_segment == 2
    disk.journal.read(2 * SEGMENT + 5000, 10)
    with pytest.raises(AssertionError, match="not pinned"):
        disk.journal.read(SEGMENT + 5000, 10)
    peer.move(3 * SEGMENT)
    assert trim(disk) == 1
    peer.release()
    peer.release()
    assert trim(disk) == 1
    checkpoint.move(100 * SEGMENT)
    assert trim(disk) == 1
    assert disk.journal.first_segment == disk.journal.end_lsn // SEGMENT
    assert trim(disk) == 0


def test_a_segment_that_is_being_synced_is_not_trimmed() -> None:
    disk = Disk()
    fill_segment(disk)
    disk.journal.pin(100 * SEGMENT, "checkpoint")
    assert disk.journal.trim_job() is None
    job = disk.journal.begin_sync()
    assert disk.journal.trim_job() is None
    job.run()
    disk.journal.complete_sync(job)
    assert trim(disk) == 1


def test_recycled_segments_become_spares_up_to_the_bound() -> None:
    disk = Disk()
    for _ in range(5):
        fill_segment(disk)
    disk.sync()
    disk.journal.pin(disk.journal.end_lsn, "checkpoint")
    assert trim(disk) == 5
    spares = [name for name in disk.store.list("journal") if spare_index(name)]
    assert len(spares) == SIMULATION.spare_segments_max == 2
    assert disk.journal.spare_job() is None
    created = disk.store.counts["create"]
    fill_segment(disk)
    fill_segment(disk)
    assert disk.store.counts["create"] == created  # both were ready
    fill_segment(disk)
    assert disk.store.counts["create"] == created + 1


def test_spares_are_made_until_enough_are_ready_and_count_as_journal() -> None:
    disk = Disk(journal_bytes=4 * SEGMENT)
    job = disk.journal.spare_job()
    assert job is not None
    assert disk.journal.spare_job() is None  # one at a time
    job.run()
    disk.journal.complete_spare(job)
    assert make_spare(disk)
    assert not make_spare(disk)
    for _ in range(FLUSH_HEAVY_SYNCS):
        disk.sync()
    fill_segment(disk)
    assert make_spare(disk)
    assert not make_spare(disk)
    assert len(disk.store.list("journal")) <= 4


def test_a_journal_that_hardly_anybody_flushes_makes_no_spares() -> None:
    disk = Disk()
    disk.sync()
    fill_segment(disk)
    fill_segment(disk)
    assert not make_spare(disk)
    for _ in range(FLUSH_HEAVY_SYNCS):
        disk.sync()
    fill_segment(disk)
    assert make_spare(disk)


def test_a_spare_that_could_not_be_made_leaves_nothing_and_is_tried_again() -> None:
    disk = Disk()
    disk.store.fail("create", error=errno.ENOSPC)
    job = disk.journal.spare_job()
    assert job is not None
    with pytest.raises(NoSpaceError):
        job.run()
    disk.journal.complete_spare(job)
    assert make_spare(disk)


def test_a_trim_that_fails_half_way_is_taken_as_far_as_it_came() -> None:
    disk = Disk()
    for _ in range(3):
        fill_segment(disk)
    disk.sync()
    disk.journal.pin(disk.journal.end_lsn, "checkpoint")
    disk.store.fail("rename", skip=1)
    job = disk.journal.trim_job()
    assert job is not None
    with pytest.raises(StorageError):
        job.run()
    disk.journal.complete_trim(job)
    assert disk.journal.first_segment == 2
    assert trim(disk) == 2


@pytest.mark.parametrize("operation", ["pwritev", "create"])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_batch_that_fails_leaves_no_trace(operation: str, skip: int) -> None:
    disk = Disk()
    disk.append_blocks(BLOCK)
    end, names = disk.journal.end_lsn, disk.store.names()
    disk.store.fail(operation, "journal/*", error=errno.ENOSPC, skip=skip)
    with pytest.raises(NoSpaceError):
        disk.journal.append([write(BLOCK)] * 150, 1)
    disk.store.faults.clear()
    assert disk.journal.end_lsn == end
    if operation == "pwritev" or skip == 0:
        assert disk.store.names() == names
    disk.append_blocks(b"the batch after it", BLOCK)
    fill_segment(disk)
    disk.sync()
    disk.crash_and_recover()


def test_a_failed_batch_does_not_come_back_behind_a_later_one() -> None:
    # Both batches start at the same LSN, and would be told apart by the chain alone.
    for seed in range(20):
        disk = Disk(seed)
        disk.append_blocks(BLOCK)
        position = disk.journal.end_lsn
        disk.store.fail("create")
        with pytest.raises(StorageError):
            disk.journal.append([write(BLOCK, i) for i in range(70)], 1)
        assert disk.append_blocks(BLOCK) == [position]
        disk.sync()
        recovered = disk.crash_and_recover(lose_nothing=True)
        assert len(recovered.records) == 2


def test_a_batch_that_a_full_disk_refused_does_not_come_back_after_a_kill() -> None:
    disk = Disk()
    disk.append_blocks(BLOCK)
    disk.store.fail("create", "journal/*", error=errno.ENOSPC)
    with pytest.raises(NoSpaceError):
        disk.journal.append([write(BLOCK, i) for i in range(70)], 1)
    recovered = disk.crash_and_recover(lose_nothing=True)
    assert len(recovered.records) == 1


def test_reading_goes_on_while_segments_are_trimmed() -> None:
    disk = Disk()
    lsns = disk.append_blocks(BLOCK)
    fill_segment(disk)
    disk.sync()
    disk.journal.pin(disk.journal.end_lsn, "checkpoint")
    job = disk.journal.trim_job()
    assert job is not None
    job.run()
    # Renamed but not yet forgotten: an open file is still the same file.
    assert disk.journal.read(lsns[0] + HEADER_BYTES, 4096) == BLOCK
    disk.journal.complete_trim(job)


def test_production_limits_hold_an_epoch_record_of_the_largest_size() -> None:
    store = SimStore(0)
    journal = Journal.create(
        store,
        PRODUCTION,
        SeededEntropy(1),
        resource_id=RESOURCE,
        journal_bytes=PRODUCTION.journal_bytes_min,
    )
    size = 112 + 40 * PRODUCTION.epoch_entries_max
    lsn = journal.append_record(RecordType.EPOCH, [bytes(size)], wall_ns=0)
    assert journal.read_record(lsn)[0].payload_length == size
    journal.close()


def test_creating_a_journal_over_another_is_refused() -> None:
    disk = Disk()
    with pytest.raises(StorageError, match="exists"):
        Journal.create(
            disk.store,
            SIMULATION,
            disk.entropy,
            resource_id=RESOURCE,
            journal_bytes=JOURNAL_BYTES,
        )


HEADER = SegmentHeader(
    number=0x1F,
    segment_bytes=SEGMENT,
    salt=0x8877665544332211,
    resource_id=RESOURCE,
    previous_check=0xAABBCCDDEEFF0011,
    durable_lsn=0x1E * SEGMENT + 8192,
    previous_end=0x1E * SEGMENT + 12288,
)


def test_segment_header_golden_vector() -> None:
    vector = (VECTORS / "segment_header_v1.hex").read_text()
    assert dump(HEADER.pack()) == vector
    assert parse_segment_header(load(vector), 0x1F, SEGMENT, RESOURCE) == HEADER


def test_a_segment_header_survives_any_damage_to_one_of_its_copies() -> None:
    data = HEADER.pack()
    for bit in range(8 * 88):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert parse_segment_header(damaged, 0x1F, SEGMENT, RESOURCE) == HEADER
        damaged[2048 + bit // 8] ^= 1 << bit % 8
        assert parse_segment_header(damaged, 0x1F, SEGMENT, RESOURCE) is None


def test_a_header_of_another_number_size_or_resource_is_not_this_one() -> None:
    data = HEADER.pack()
    assert parse_segment_header(data, 0x20, SEGMENT, RESOURCE) is None
    assert parse_segment_header(data, 0x1F, 2 * SEGMENT, RESOURCE) is None
    assert parse_segment_header(data, 0x1F, SEGMENT, bytes(16)) is None
    for size in range(88):
        assert parse_segment_header(data[:size], 0x1F, SEGMENT, RESOURCE) is None


def test_only_names_that_we_make_are_taken_for_ours() -> None:
    assert segment_number("000000000000001f.seg") == 0x1F
    assert spare_index("spare-12.seg") == 12
    for name in ("1f.seg", "000000000000001F.seg", "000000000000001f.new", "00000000000000 f.seg"):
        assert segment_number(name) is None
    for name in ("spare-.seg", "spare-1.tmp", "spare--1.seg", "spare-²seg", "spare-².seg"):
        assert spare_index(name) is None
