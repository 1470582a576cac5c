"""The superblock pair: a torn or damaged copy never costs more than the newest update."""

from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from geomirror.errors import IntegrityError, StorageError
from geomirror.volume.superblock import (
    NAME,
    SLOT_BYTES,
    GenerationRecord,
    PeerRecord,
    StartRecord,
    Superblock,
    SuperblockFile,
    VolumeRecord,
    pack_slot,
    parse_slot,
)
from tests.sim.disk import CrashStyle, SimStore
from tests.volume.hexdump import VECTORS, load


def superblock(epoch: int = 0) -> Superblock:
    return Superblock(
        resource_id="00112233445566778899aabbccddeeff",
        name="orders",
        segment_bytes=1 << 18,
        journal_bytes=1 << 22,
        volumes=[VolumeRecord(0, "0", 1 << 20), VolumeRecord(1, "logs", 1 << 21, "/dev/vdb")],
        role="primary",
        data_state="consistent",
        chain=[GenerationRecord("ab" * 16, 1, reason="created", by="east-1", wall_ns=5)],
        scan_lsn=1 << 18,
        known_durable_lsn=1 << 19,
        applied_epoch=epoch,
        peers={"west-1": PeerRecord(durable_epoch=epoch)},
        settings={"ack": "completed"},
    )


def updated(store: SimStore, *epochs: int) -> None:
    file = SuperblockFile(store)
    file.load()
    for epoch in epochs:
        file.write_job(superblock(epoch)).run()
    file.close()


def created(seed: int = 0) -> SimStore:
    store = SimStore(seed)
    file = SuperblockFile(store)
    file.create(superblock(0))
    file.close()
    return store


def loaded_epoch(store: SimStore) -> int:
    file = SuperblockFile(store)
    try:
        return file.load().applied_epoch
    finally:
        file.close()


def test_golden_vector_is_read_for_ever() -> None:
    found = parse_slot(load((VECTORS / "superblock_v1.hex").read_text()))
    assert found is not None
    assert found.sequence == 42
    assert (found.name, found.scan_lsn, found.applied_epoch) == ("orders", 1 << 18, 6)
    assert found.volumes == superblock().volumes
    assert found.peers["west-1"].durable_epoch == 6
    assert found.starts == found.superseded_starts == [], "of before starts were listed"


def test_the_starts_of_primaries_are_kept() -> None:
    written = superblock(6)
    written.starts = [StartRecord("ab" * 16, 0, "00" * 32), StartRecord("cd" * 16, 5, "ef" * 32)]
    written.superseded_starts = written.starts[:1]
    found = parse_slot(pack_slot(written, 3))
    assert found is not None
    assert (found.starts, found.superseded_starts) == (written.starts, written.starts[:1])


def test_a_key_of_newer_software_is_ignored_and_a_missing_one_has_its_default() -> None:
    body = msgspec.json.decode(msgspec.json.encode(superblock(3)))
    body["colour"] = "green"
    del body["undo_next"]
    found = msgspec.json.decode(msgspec.json.encode(body), type=Superblock)
    assert (found.applied_epoch, found.undo_next) == (3, 1)


def test_the_newest_version_is_loaded() -> None:
    store = created()
    assert loaded_epoch(store) == 0
    for epoch in range(1, 6):
        updated(store, epoch)
        assert loaded_epoch(store) == epoch


def test_a_job_holds_the_state_of_the_moment_it_was_made() -> None:
    store = created()
    file = SuperblockFile(store)
    found = file.load()
    found.applied_epoch = 1
    job = file.write_job(found)
    found.applied_epoch = 2
    job.run()
    assert loaded_epoch(store) == 1
    file.close()


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("newest", [3, 4])
def test_when_one_copy_is_damaged_the_other_is_used(newest: int, slot: int) -> None:
    for bit in range(0, 8 * 600, 37):
        store = created()
        updated(store, *range(1, newest + 1))
        store.flip_bit(NAME, 8 * slot * SLOT_BYTES + bit)
        # Both copies hold it, so nothing falls back to a state whose journal may be gone.
        assert loaded_epoch(store) == newest
        # Loading has made a second copy again: damage to the other one is harmless, too.
        store.flip_bit(NAME, 8 * (1 - slot) * SLOT_BYTES + bit)
        assert loaded_epoch(store) == newest
        # The next update must not overwrite the copy that is left.
        updated(store, 9)
        assert loaded_epoch(store) == 9


def test_with_both_copies_damaged_nothing_is_served() -> None:
    store = created()
    updated(store, 1)
    store.flip_bit(NAME, 400)
    store.flip_bit(NAME, 8 * SLOT_BYTES + 400)
    with pytest.raises(IntegrityError, match="both copies in superblock are damaged"):
        SuperblockFile(store).load()


def test_a_crash_at_any_call_of_an_update_leaves_the_old_or_the_new_version() -> None:
    class Stop(Exception):
        pass

    for seed in range(40):
        for stop in range(1, 6):
            store = created(seed)
            updated(store, 1)
            calls = 0

            def hook(operation: str, name: str) -> None:
                nonlocal calls
                calls += 1
                if calls > stop:  # noqa: B023
                    raise Stop

            store.on_operation = hook
            with contextlib.suppress(Stop):
                updated(store, 2)
            store.on_operation = None
            store.crash(lose_nothing=seed % 3 == 0)
            first = loaded_epoch(store)
            assert first in (1, 2)
            # And what was loaded is not lost by the next crash, wherever the next update stops.
            file = SuperblockFile(store)
            file.load()
            store.fail("fdatasync")
            with pytest.raises(StorageError):
                file.write_job(superblock(3)).run()
            store.crash(style=CrashStyle(0.5, 0.1))
            assert loaded_epoch(store) in (first, 3)


def test_a_failed_update_does_not_turn_to_the_good_copy_next() -> None:
    store = created()
    updated(store, 1)
    file = SuperblockFile(store)
    file.load()
    store.fail("pwritev")
    with pytest.raises(StorageError):
        file.write_job(superblock(2)).run()
    store.fail("fdatasync")
    with pytest.raises(StorageError):
        file.write_job(superblock(3)).run()
    store.crash(style=CrashStyle(0.5, 0.5))
    assert loaded_epoch(store) in (1, 3)


def test_a_body_that_does_not_fit_is_refused_before_writing() -> None:
    store = created()
    file = SuperblockFile(store)
    file.load()
    long = superblock(1)
    long.settings = {f"key-{i}": "x" * 100 for i in range(1000)}
    with pytest.raises(StorageError, match="superblock of orders would have"):
        file.write_job(long)
    file.close()
    assert loaded_epoch(store) == 0


def test_every_truncation_and_flipped_bit_makes_a_slot_invalid() -> None:
    data = pack_slot(superblock(1), 7)
    for size in range(len(data)):
        assert parse_slot(data[:size]) is None
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert parse_slot(bytes(damaged)) is None


def test_another_format_version_is_named() -> None:
    body = pack_slot(superblock(1), 7)[40:]
    covered = struct.pack("<IIQ", 2, len(body), 7)
    slot = b"GMSBv1\0\0" + covered + xxh3_128_digest(covered + body) + body
    with pytest.raises(IntegrityError, match="format version 2"):
        parse_slot(slot)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_slot(data: bytes) -> None:
    assert parse_slot(data) is None
    assert parse_slot(b"GMSBv1\0\0" + data) is None


@pytest.mark.parametrize("body", [b'{"name":"\xff"}', b"[" * 60_000, b'{"x":' * 10_000, b"{}"])
def test_a_body_that_cannot_be_read_makes_a_slot_invalid(body: bytes) -> None:
    covered = struct.pack("<IIQ", 1, len(body), 7)
    assert parse_slot(b"GMSBv1\0\0" + covered + xxh3_128_digest(covered + body) + body) is None
