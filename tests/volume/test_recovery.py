"""Recovery: the promised survives, the rest is cut, and damage is told from a torn tail."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from geomirror.errors import FencedError, JournalFullError, StorageError
from geomirror.limits import SIMULATION
from geomirror.volume.epoch_record import decode_epoch, encode_epoch
from geomirror.volume.epoch_table import KIND_ZERO, Epoch, empty_table
from geomirror.volume.record import HEADER_BYTES, RecordType
from geomirror.volume.recovery import Recovered
from geomirror.volume.segment import segment_name
from tests.sim.disk import CrashStyle
from tests.volume.journal_kit import SEGMENT, Disk, entries, random_writes

BLOCK = bytes(range(256)) * 16
LOST, KEPT = CrashStyle(0.0), CrashStyle(1.0)


def flip(disk: Disk, lsn: int) -> None:
    number, offset = divmod(lsn, SEGMENT)
    disk.store.flip_bit(segment_name(number), 8 * offset + 3)


def recover_after(disk: Disk, style: CrashStyle) -> Recovered:
    disk.store.crash(style=style)
    return disk.adopt(disk.recover())


def next_segment(disk: Disk) -> None:
    number = disk.journal.end_lsn // SEGMENT
    while disk.journal.end_lsn // SEGMENT == number:
        disk.append_blocks(BLOCK)


def test_an_empty_journal_recovers_empty_any_number_of_times() -> None:
    disk = Disk()
    for _ in range(20):
        recovered = disk.crash_and_recover()
        assert recovered.records == []
        assert recovered.moved == []
    assert len(disk.store.list("journal")) <= 2
    disk.append_blocks(BLOCK)
    disk.sync()
    assert len(disk.crash_and_recover().records) == 1


def test_synced_records_survive_and_unsynced_ones_may_not() -> None:
    disk = Disk()
    disk.append_blocks(b"one")
    disk.sync()
    disk.append_blocks(b"two")
    assert len(recover_after(disk, LOST).records) == 1
    disk.append_blocks(b"three")
    assert len(recover_after(disk, KEPT).records) == 2


def test_what_is_proven_stays_and_what_is_not_is_written_again_with_a_new_lsn() -> None:
    disk = Disk()
    first, second = disk.append_blocks(b"one", b"two")
    disk.sync()
    (third,) = disk.append_blocks(b"three")  # proves the first two durable
    recovered = recover_after(disk, KEPT)
    assert [one.lsn for one in recovered.records[:2]] == [first, second]
    assert [old for old, _ in recovered.moved] == [third]
    assert recovered.records[2].lsn == recovered.moved[0][1] >= 2 * SEGMENT
    # The superblock may prove more than the records do.
    disk.note_durable()
    assert recover_after(disk, KEPT).moved == []


def test_records_after_a_lost_one_are_void_even_when_they_are_valid() -> None:
    disk = Disk()
    lsns = disk.append_blocks(BLOCK, BLOCK, BLOCK)
    disk.store.crash(style=KEPT)
    flip(disk, lsns[1] + 100)
    recovered = disk.adopt(disk.recover())
    assert len(recovered.records) == 1
    # They do not come back later either, when the log has grown past their place.
    disk.append_blocks(b"x")
    assert len(disk.crash_and_recover(lose_nothing=True).records) == 2


@pytest.mark.parametrize("in_payload", [True, False])
def test_damage_below_what_a_later_record_proves_fences(in_payload: bool) -> None:
    disk = Disk()
    lsns = disk.append_blocks(BLOCK, BLOCK)
    disk.sync()
    disk.append_blocks(b"the proof")
    disk.store.crash(style=KEPT)
    flip(disk, lsns[0] + (HEADER_BYTES + 9 if in_payload else 9))
    with pytest.raises(FencedError) as caught:
        disk.recover()
    message = str(caught.value)
    assert "journal of resource 000102030405060708090a0b0c0d0e0f is damaged" in message
    assert f"{segment_name(1)} has no valid record at offset 4096 (LSN {lsns[0]})" in message
    assert 'see "geomirror status"' in message


def test_damage_below_what_only_the_superblock_proves_fences() -> None:
    disk = Disk()
    lsns = disk.append_blocks(BLOCK, BLOCK)
    disk.sync()
    disk.note_durable()
    disk.store.crash()
    flip(disk, lsns[1])
    with pytest.raises(FencedError, match=r"journal/0000000000000001\.seg"):
        disk.recover()


def test_damage_below_what_only_a_segment_header_proves_fences() -> None:
    disk = Disk()
    lsns = disk.append_blocks(BLOCK)
    disk.sync()
    disk.append_blocks(*[BLOCK] * 60)
    next_segment(disk)
    disk.store.crash(style=KEPT)
    for lsn in range(lsns[0], 3 * SEGMENT, 4168):
        if lsn // SEGMENT == 1:
            flip(disk, lsn)
    with pytest.raises(FencedError):
        disk.recover()


def test_a_fenced_journal_is_not_touched() -> None:
    disk = Disk()
    disk.append_blocks(*[BLOCK] * 70)
    disk.sync()
    disk.note_durable()
    disk.store.crash()
    flip(disk, disk.lsns[20])
    before = {name: disk.store.content(name) for name in disk.store.names()}
    with pytest.raises(FencedError):
        disk.recover()
    assert {name: disk.store.content(name) for name in disk.store.names()} == before


def test_a_missing_segment_fences_when_it_was_durable() -> None:
    for missing in (1, 2, 3):
        disk = Disk()
        for _ in range(2):
            next_segment(disk)
        disk.sync()
        disk.note_durable()
        disk.store.unlink(segment_name(missing))
        disk.store.sync_directory("journal")
        disk.store.crash()
        said = f"{segment_name(3)} is missing" if missing == 3 else "no valid record"
        with pytest.raises(FencedError, match=said):
            disk.recover()


def test_a_journal_whose_every_segment_is_gone_is_not_taken_for_an_empty_one() -> None:
    disk = Disk()
    disk.note_durable()
    disk.append_blocks(BLOCK)
    disk.sync()
    for name in disk.store.list("journal"):
        disk.store.unlink(f"journal/{name}")
    disk.store.sync_directory("journal")
    disk.store.crash()
    with pytest.raises(FencedError, match=segment_name(1)):
        disk.recover()


def test_a_bad_segment_header_in_the_middle_fences_and_at_the_end_is_a_torn_tail() -> None:
    for is_durable in (True, False):
        disk = Disk()
        disk.append_blocks(BLOCK)
        next_segment(disk)
        if is_durable:
            disk.sync()
            next_segment(disk)
        disk.store.crash(style=KEPT)
        for copy in (0, 2048):
            flip(disk, 2 * SEGMENT + copy)
        if is_durable:
            with pytest.raises(FencedError):
                disk.recover()
        else:
            recovered = disk.adopt(disk.recover())
            assert all(record.lsn // SEGMENT != 2 for record in recovered.records)


def test_one_bad_sector_in_a_segment_header_costs_nothing() -> None:
    disk = Disk()
    next_segment(disk)
    disk.sync()
    disk.store.crash()
    flip(disk, 2 * SEGMENT)
    disk.adopt(disk.recover())


def test_segments_that_came_to_disk_before_the_one_below_them_are_void() -> None:
    disk = Disk()
    disk.append_blocks(BLOCK)
    disk.sync()
    for _ in range(2):
        next_segment(disk)
    disk.store.crash(style=KEPT)
    flip(disk, disk.lsns[10])
    recovered = disk.adopt(disk.recover())
    assert len(recovered.records) == 10
    assert disk.journal.end_lsn // SEGMENT == 4  # numbers are not used twice
    assert not disk.store.exists(segment_name(2))
    disk.append_blocks(BLOCK)
    disk.sync()
    assert len(disk.crash_and_recover().records) == 11


def test_scanning_from_exactly_the_end_of_a_segment() -> None:
    room = SEGMENT - 4096
    for rest in (0, 8, 64, 72, 4168):  # a full segment, and holes too short for a record
        disk = Disk()
        first = (room - rest) // 2 // 8 * 8
        disk.journal.append_record(RecordType.BLOCKS, [bytes(first - HEADER_BYTES)], wall_ns=0)
        second = room - rest - first - HEADER_BYTES
        disk.journal.append_record(RecordType.BLOCKS, [bytes(second)], wall_ns=0)
        assert disk.journal.end_lsn == 2 * SEGMENT - rest
        disk.sync()
        disk.scan_lsn = disk.known_durable_lsn = disk.journal.end_lsn
        assert disk.crash_and_recover().records == []
        disk.append_blocks(b"x" * 5000, b"y")
        disk.sync()
        assert len(disk.crash_and_recover().records) == 2


def test_segments_below_the_scan_position_are_kept_for_peers() -> None:
    disk = Disk()
    (old,) = disk.append_blocks(b"still needed")
    for _ in range(3):
        next_segment(disk)
    disk.sync()
    disk.scan_lsn = disk.known_durable_lsn = disk.journal.end_lsn
    disk.log, disk.durable_count = [], 0
    recovered = disk.crash_and_recover()
    assert recovered.records == []
    assert disk.journal.first_segment == 1
    assert disk.journal.read_record(old)[1] == b"still needed"
    disk.journal.pin(disk.scan_lsn, "checkpoint")
    job = disk.journal.trim_job()
    assert job is not None
    job.run()
    disk.journal.complete_trim(job)
    assert disk.journal.first_segment == 4


def test_the_segment_of_the_scan_position_is_kept_though_nothing_in_it_is_scanned() -> None:
    disk = Disk()
    (old,) = disk.append_blocks(b"still needed")
    disk.sync()
    disk.scan_lsn = disk.known_durable_lsn = disk.journal.end_lsn
    disk.log, disk.durable_count = [], 0
    for _ in range(3):
        disk.crash_and_recover()
        assert disk.journal.read_record(old)[1] == b"still needed"


def test_an_older_superblock_copy_finds_the_same_log() -> None:
    """Between checkpoints recoveries add segments; both scan positions must lead through them."""
    disk = Disk()
    disk.append_blocks(b"one")
    disk.sync()
    disk.note_durable()
    disk.crash_and_recover()
    newer = disk.journal.end_lsn  # the start of an empty segment
    disk.crash_and_recover()
    disk.append_blocks(b"two")
    disk.sync()
    disk.store.crash()
    recovered = disk.recover(scan_lsn=newer, known_durable_lsn=newer)
    assert [one.payload for one in entries(recovered)] == [b"two"]
    disk.store.crash()
    recovered = disk.recover()
    assert [one.payload for one in entries(recovered)] == [b"one", b"two"]


def epoch_of(addresses: list[int], first_lsn: int, end_lsn: int) -> Epoch:
    table = empty_table(len(addresses) + 1)
    for i, address in enumerate(addresses):
        table[i] = (0, 0, 0, 1, i, address, 7, 8)
    table[len(addresses)] = (1, KIND_ZERO, 1, 50, 0, 0, 0, 0)
    return Epoch(1, 1, bytes(16), first_lsn, end_lsn, 5, bytes(32), table)


def test_addresses_in_epoch_tables_follow_their_records() -> None:
    disk = Disk()
    lsns = disk.append_blocks(BLOCK, BLOCK[::-1])
    disk.sync()
    lsns += disk.append_blocks(b"moved" * 1000, b"z" * 4096)
    addresses = [lsn + HEADER_BYTES for lsn in lsns]
    addresses[2] += 904  # a block inside a longer write
    contents = [disk.journal.read(address, 4096) for address in addresses]
    journal, first, end = disk.journal, disk.scan_lsn, disk.journal.end_lsn
    for previous in (0, end):
        payload = encode_epoch(epoch_of(addresses, first, end), previous)
        journal.append_record(RecordType.EPOCH, [payload], wall_ns=5)
    disk.store.crash(style=KEPT)
    recovered = disk.recover()
    moved = dict(recovered.moved)
    assert set(lsns) & set(moved) == set(lsns[2:])
    one, other = recovered.records[-2:]
    for record, previous in ((one, 0), (other, one.lsn)):
        info, payload = recovered.journal.read_record(record.lsn)
        assert info.kind == RecordType.EPOCH
        epoch, found = decode_epoch(payload)
        assert (found, epoch.first_lsn, epoch.end_lsn) == (previous, first, end)
        table = epoch.table[epoch.table["kind"] == 0]
        assert [recovered.journal.read(int(a), 4096) for a in table["address"]] == contents
        assert int(table["address"][0]) == addresses[0]
        assert np.array_equal(epoch.table[-1:], epoch_of(addresses, 0, 0).table[-1:])


def test_a_rewrite_longer_than_a_segment() -> None:
    disk = Disk()
    for seed in range(6):
        disk.append(*random_writes(random.Random(seed), 60))
    recovered = recover_after(disk, KEPT)
    assert len(recovered.moved) == 360
    assert disk.journal.end_lsn // SEGMENT - recovered.moved[0][1] // SEGMENT >= 2
    again = recover_after(disk, LOST)
    assert (again.records, again.moved) == (recovered.records, [])  # now it is proven durable


class Stop(Exception):
    """The machine stops here."""


def stop_at(disk: Disk, call: int) -> None:
    calls = 0

    def hook(operation: str, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Stop

    disk.store.on_operation = hook


@pytest.mark.parametrize("seed", range(6))
def test_a_crash_at_any_call_of_a_recovery_changes_nothing_of_its_result(seed: int) -> None:
    source = random.Random(seed)
    call = 0
    while True:
        call += 1
        disk = Disk(seed)
        disk.append(*random_writes(random.Random(seed), 40))
        disk.sync()
        disk.append(*random_writes(random.Random(seed + 100), 120))
        disk.store.crash(style=KEPT)
        stop_at(disk, call)
        try:
            disk.recover()
        except Stop:
            disk.store.on_operation = None
            disk.crash_and_recover(lose_nothing=source.random() < 0.3)
            disk.append_blocks(BLOCK)
            disk.sync()
            disk.crash_and_recover()
            continue
        break
    assert call >= 20


def test_a_crash_while_the_rewritten_segments_get_their_names() -> None:
    for seed in range(40):
        disk = Disk(seed)
        for batch in range(6):
            disk.append(*random_writes(random.Random(batch), 60))
        disk.store.crash(style=KEPT)
        renames = 0

        def hook(operation: str, name: str) -> None:
            nonlocal renames
            renames += operation == "rename"
            if operation == "sync_directory" and renames > 2:
                raise Stop

        disk.store.on_operation = hook
        with pytest.raises(Stop):
            disk.recover()
        disk.store.on_operation = None
        disk.store.crash(style=CrashStyle(0.5))
        assert len(disk.adopt(disk.recover()).records) == 360


def test_a_full_disk_at_recovery_leaves_the_log_as_it_was() -> None:
    disk = Disk()
    disk.append_blocks(*[BLOCK] * 30)
    disk.sync()
    disk.append_blocks(*[BLOCK] * 30)
    disk.store.crash(style=KEPT)
    for operation in ("create", "pwritev", "fdatasync", "rename", "sync_directory"):
        disk.store.fail(operation, "journal*", skip=0)
        with pytest.raises(StorageError):
            disk.recover()
        disk.store.crash(lose_nothing=True)
    assert len(disk.adopt(disk.recover()).records) == 60


def story(seed: int, *, damage: bool) -> str:
    """One random life of a journal; how it ended. Checks the promises at every recovery."""
    source = random.Random(seed)
    disk = Disk(seed)
    pin = None
    for _ in range(source.randint(1, 6)):
        for _ in range(source.randint(0, 25)):
            with contextlib.suppress(JournalFullError):
                disk.append(*random_writes(source, source.randint(1, 20)))
            if source.random() < 0.4:
                disk.sync()
                if source.random() < 0.3:
                    disk.note_durable()
            job = disk.journal.spare_job() if source.random() < 0.2 else None
            if job is not None:
                job.run()
                disk.journal.complete_spare(job)
        if damage and source.random() < 0.4:
            return damaged_story(disk, source)
        disk.crash_and_recover(lose_nothing=source.random() < 0.3)
        pin = disk.journal.pin(disk.scan_lsn, "checkpoint")
        if source.random() < 0.5 and disk.lsns:
            checkpoint(disk, source.randrange(len(disk.lsns)))
            pin.move(disk.scan_lsn)
            job_ = disk.journal.trim_job()
            if job_ is not None:
                job_.run()
                disk.journal.complete_trim(job_)
    return "ended"


def checkpoint(disk: Disk, count: int) -> None:
    """Everything below record `count` is not needed any more."""
    disk.scan_lsn = disk.lsns[count]
    disk.known_durable_lsn = disk.journal.durable_lsn
    disk.log, disk.lsns = disk.log[count:], disk.lsns[count:]
    disk.durable_count = len(disk.log)


def damaged_story(disk: Disk, source: random.Random) -> str:
    """Flip a bit of some record after a crash that lost nothing: a fence, or an honest cut."""
    if not disk.log:
        return "ended"
    disk.store.crash(style=KEPT)
    index = source.randrange(len(disk.log))
    payload = disk.log[index].payload
    lsn = disk.lsns[index]
    number, offset = divmod(lsn, SEGMENT)
    bit = source.randrange(8 * (HEADER_BYTES + len(payload)))
    disk.store.flip_bit(segment_name(number), 8 * offset + bit)
    proven = max(disk.known_durable_lsn, disk.scan_lsn)
    try:
        recovered = disk.recover()
    except FencedError:
        return "fenced" if index < disk.durable_count else "fenced for nothing"
    found = entries(recovered)
    assert found == disk.log[:index], "damage must cut the log exactly there"
    assert lsn >= proven, "cut below what the superblock proves"
    return "cut"


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_random_lives_keep_every_promise(start: int) -> None:
    for seed in range(start, start + 20):
        try:
            story(seed, damage=False)
        except BaseException:
            print(f"seed={seed}")
            raise


def test_random_damage_is_fenced_or_cut_and_never_accepted() -> None:
    ends: dict[str, int] = {}
    for seed in range(1000, 1150):
        try:
            end = story(seed, damage=True)
        except BaseException:
            print(f"seed={seed}")
            raise
        ends[end] = ends.get(end, 0) + 1
    assert "fenced for nothing" not in ends
    assert ends["fenced"] >= 20
    assert ends["cut"] >= 5


@pytest.mark.parametrize("seed", range(40))
def test_a_record_that_any_later_batch_proves_durable_is_never_cut(seed: int) -> None:
    source = random.Random(seed)
    disk = Disk(seed)
    disk.append(*random_writes(source, 30))
    disk.sync()
    proven = len(disk.log)
    disk.append(*random_writes(source, 3))
    disk.store.crash(style=KEPT)
    index = source.randrange(proven)
    lsn = disk.lsns[index]
    bit = source.randrange(8 * (HEADER_BYTES + len(disk.log[index].payload)))
    number, offset = divmod(lsn, SEGMENT)
    disk.store.flip_bit(segment_name(number), 8 * offset + bit)
    with pytest.raises(FencedError):
        disk.recover()


def test_limits_of_the_simulation_fit_these_tests() -> None:
    assert SIMULATION.segment_bytes == SEGMENT
