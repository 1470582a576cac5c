"""The engine against its model: any order of calls, crashes anywhere, always a legal state."""

from __future__ import annotations

import errno
import random
from dataclasses import replace

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import (
    FencedError,
    JournalFullError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from geomirror.limits import SIMULATION
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.superblock import PeerRecord
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, Rig, Stop, make_engine, open_engine


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_calls_agrees_with_the_model(seed: int) -> None:
    rig = Rig(seed)
    for _ in range(250):
        rig.random_action()
    rig.read()
    rig.check_epochs()
    rig.make_room()
    rig.check_images()
    assert rig.engine.dirty_entries == 0
    assert rig.engine.applied_epoch == rig.engine.sealed_epoch > 3


@pytest.mark.parametrize("cuts", [100, 135, 260])
def test_writes_after_a_recycled_epoch_record_are_not_taken_for_applied(cuts: int) -> None:
    rig = Rig(0)
    for _ in range(cuts):
        rig.write()
        rig.make_room()
    rig.write()
    rig.seal(is_disturbed=False)
    rig.sync()
    rig.peer_epoch = rig.engine.superblock.peers["peer"].durable_epoch = rig.engine.sealed_epoch
    rig.persist()
    # The restart goes on in a new segment; when the epoch is applied, the old one is recycled.
    rig.recover()
    rig.make_room()
    assert not rig.engine.journal.holds(rig.engine.superblock.last_epoch_lsn)
    rig.write()
    rig.sync()
    rig.recover()


@pytest.mark.parametrize("seed", range(25))
def test_a_crash_anywhere_leaves_a_prefix_and_every_sealed_epoch(seed: int) -> None:
    rig = Rig(100 + seed)
    for _ in range(6):
        left = rig.random.randrange(5, 250)

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop(f"{operation} {name}")

        rig.store.on_operation = count
        with pytest.raises(Stop):
            while True:
                rig.random_action()
        rig.store.on_operation = None
        if rig.random.random() < 0.3:
            left = rig.random.randrange(1, 40)
            rig.store.on_operation = count
        rig.recover(lose_nothing=rig.random.random() < 0.3)
        rig.store.on_operation = None
    for _ in range(20):
        rig.random_action()
    rig.make_room()
    rig.check_images()


def drain(engine: Engine) -> None:
    """Everything to the image, and the journal free again."""
    draft = engine.cut(0)
    if draft is not None:
        job = engine.seal_job(draft)
        job.run()
        engine.complete_seal(job)
    sync(engine)
    if engine.applied_epoch < engine.sealed_epoch:
        apply = engine.apply_job(engine.sealed_epoch)
        apply.run()
        engine.complete_apply(apply)
    checkpoint(engine)
    trim = engine.journal.trim_job()
    if trim is not None:
        trim.run()
        engine.journal.complete_trim(trim)


def sync(engine: Engine) -> None:
    job = engine.sync_job()
    job.run()
    engine.complete_sync(job)


def checkpoint(engine: Engine) -> None:
    job = engine.checkpoint_job()
    if job is not None:
        job.run()
        engine.complete_checkpoint(job)


def seal(engine: Engine) -> None:
    draft = engine.cut(7)
    assert draft is not None
    job = engine.seal_job(draft)
    job.run()
    engine.complete_seal(job)


def test_a_long_write_is_split_between_blocks_and_reads_back() -> None:
    engine = make_engine(SimStore())
    data = random.Random(1).randbytes(30 * BLOCK + 300)
    engine.write([(1, 0, 100, len(data), memoryview(data))], 0)
    assert engine.read(0, 100, len(data)) == data
    assert engine.open_epoch_entries == 31
    # Only the blocks at both ends are partial: the splits lie between blocks.
    assert len(engine.indexes[0].open_partial) == 2


@pytest.mark.parametrize("style", ["whole", "part", "zero"])
def test_writers_are_held_back_before_sealing_lacks_room(style: str) -> None:
    engine = make_engine(SimStore(3))
    engine.retain("peer", 0)  # A peer that never comes: nothing can be trimmed.
    chance = random.Random(4)
    held_back = epochs = 0
    while held_back < 3:
        block = chance.randrange(40)
        data = chance.randbytes(BLOCK if style == "whole" else 100)
        kind = 2 if style == "zero" and chance.random() < 0.9 else 1
        offset = block * BLOCK + (17 if style == "part" else 0)
        length = BLOCK if kind == 2 else len(data)
        before = (engine.journal.end_lsn, engine.dirty_entries)
        try:
            engine.write([(kind, 0, offset, length, data if kind == 1 else None)], 0)
        except JournalFullError:
            held_back += 1
            assert (engine.journal.end_lsn, engine.dirty_entries) == before
            drain(engine)
            epochs += 1
            continue
        if chance.random() < 0.02:
            drain(engine)
    assert engine.applied_epoch == engine.sealed_epoch
    # The peer comes after all, and finds every epoch.
    assert engine.epoch_numbers() == list(range(1, engine.sealed_epoch + 1))
    engine.retain("peer", engine.sealed_epoch)
    drain(engine)
    assert engine.has_room(SIMULATION.record_payload_bytes_max)


def test_the_index_bound_holds_writers_back_until_the_image_has_it() -> None:
    limits = replace(SIMULATION, dirty_bytes_max=8 * BLOCK)
    engine = make_engine(SimStore(), limits)
    for block in range(8):
        engine.write([(1, 0, block * BLOCK, BLOCK, bytes([block]) * BLOCK)], 0)
    with pytest.raises(JournalFullError, match="32768 bytes wait for the local disk"):
        engine.write([(1, 0, 9 * BLOCK, BLOCK, b"n" * BLOCK)], 0)
    assert not engine.has_room(BLOCK)
    drain(engine)
    # An empty index takes any batch, or a batch above the bound would wait for ever.
    engine.write([(1, 0, 0, 20 * BLOCK, b"n" * 20 * BLOCK)], 0)
    assert engine.dirty_bytes == 20 * BLOCK


def test_a_full_disk_while_sealing_is_tried_again_with_the_same_job() -> None:
    store = SimStore()
    engine = make_engine(store)
    engine.write([(1, 0, 5, 7, b"partial")], 0)
    draft = engine.cut(0)
    assert draft is not None
    job = engine.seal_job(draft)
    job.run()
    store.fail("pwritev", "journal/*", error=errno.ENOSPC, skip=1)
    with pytest.raises(NoSpaceError):
        engine.complete_seal(job)
    assert engine.committed_epoch == 0
    engine.complete_seal(job)
    sync(engine)
    assert engine.sealed_epoch == 1
    address = int(engine.load_epoch(1).table["address"][0])
    assert engine.journal.read(address, 12) == bytes(5) + b"partial"


def test_an_epoch_is_sealed_only_by_a_sync_that_began_after_its_record() -> None:
    engine = make_engine(SimStore())
    engine.write([(1, 0, 0, BLOCK, b"a" * BLOCK)], 0)
    early = engine.sync_job()
    seal(engine)
    early.run()
    engine.complete_sync(early)
    assert (engine.committed_epoch, engine.sealed_epoch) == (1, 0)
    assert engine.unsealed_blocks(0, 0, 10) == [0]
    sync(engine)
    assert engine.sealed_epoch == 1
    assert engine.unsealed_blocks(0, 0, 10) == []
    engine.write([(1, 0, BLOCK + 9, 3, b"abc"), (2, 0, 4 * BLOCK, 5 * BLOCK, None)], 0)
    assert engine.unsealed_blocks(0, 0, 10) == [1, 4, 5, 6, 7, 8]
    draft = engine.cut(0)
    assert draft is not None
    assert engine.unsealed_blocks(0, 0, 7) == [1, 4, 5, 6]


def test_cut_of_an_empty_epoch_is_nothing_unless_it_is_a_mark() -> None:
    engine = make_engine(SimStore())
    assert engine.cut(0) is None
    draft = engine.cut(0, is_mark=True)
    assert draft is not None
    job = engine.seal_job(draft)
    job.run()
    engine.complete_seal(job)
    assert engine.load_epoch(1).is_mark
    with pytest.raises(NotFoundError):
        engine.load_epoch(2)


def test_a_checkpoint_without_news_is_none() -> None:
    engine = make_engine(SimStore())
    assert engine.checkpoint_job() is None
    engine.superblock.peers["b"] = PeerRecord(durable_epoch=4)
    checkpoint(engine)
    assert engine.checkpoint_job() is None
    engine.superblock.peers["b"].durable_epoch = 5
    job = engine.checkpoint_job()
    assert job is not None
    engine.superblock.peers["b"].durable_epoch = 6
    assert job.superblock.peers["b"].durable_epoch == 5


def test_a_restart_keeps_what_peers_need_and_their_epochs_are_readable() -> None:
    store = SimStore()
    engine = make_engine(store)
    engine.superblock.peers["b"] = PeerRecord(durable_epoch=2)
    engine.retain("b", 2)
    for number in range(6):
        engine.write([(1, 0, number * BLOCK, BLOCK, bytes([number + 1]) * BLOCK)], number)
        drain(engine)
    assert engine.applied_epoch == 6
    engine.close()
    engine = open_engine(store)
    assert engine.epoch_numbers() == [3, 4, 5, 6]
    for number in (3, 4, 5, 6):
        table = engine.load_epoch(number).table
        assert engine.journal.read(int(table["address"][0]), 1) == bytes([number])
    assert 4 * BLOCK <= engine.bytes_backlog(2) <= engine.journal.bytes_used
    assert engine.bytes_backlog(6) == 0
    engine.write([(1, 0, 0, BLOCK, b"z" * BLOCK)], 9)
    seal(engine)
    sync(engine)
    assert engine.epoch_info(7).previous_lsn == engine.epoch_info(6).record_lsn
    engine.release("b")
    assert engine.epoch_numbers()[0] <= 3, "a rollback may have to go as far as that peer"
    del engine.superblock.peers["b"]
    drain(engine)
    assert engine.epoch_numbers() == []


def test_a_volume_of_four_terabytes_costs_nothing() -> None:
    limits = replace(SIMULATION, volume_bytes_max=1 << 46)
    engine = Engine.create(
        SimStore(),
        limits,
        SeededEntropy(1),
        name="big",
        resource_id=bytes(16),
        volumes=[VolumeSpec(0, "0", 1 << 42)],
        journal_bytes=limits.journal_bytes_min,
        role="primary",
        chain=[],
        wall_ns=0,
    )
    engine.write([(3, 0, 0, 1 << 42, None), (1, 0, 1 << 41, BLOCK, b"m" * BLOCK)], 0)
    assert engine.dirty_entries == 2
    drain(engine)
    assert engine.read(0, (1 << 41) - 1, 3) == b"\0mm"
    assert engine.dirty_entries == 0


@pytest.mark.parametrize(
    ("size", "journal"), [(0, 1 << 20), (1000, 1 << 20), (1 << 40, 1 << 20), (4096, 1000)]
)
def test_sizes_that_are_not_allowed_are_refused_before_anything_is_made(
    size: int, journal: int
) -> None:
    store = SimStore()
    with pytest.raises(UsageError):
        Engine.create(
            store,
            SIMULATION,
            SeededEntropy(1),
            name="odd",
            resource_id=bytes(16),
            volumes=[VolumeSpec(0, "0", size)],
            journal_bytes=journal,
            role="primary",
            chain=[],
            wall_ns=0,
        )
    assert store.names() == []


def test_a_backing_that_is_too_small_is_refused() -> None:
    store = SimStore()
    backing = SimStore().create("device", 4096)
    with pytest.raises(RefusedError, match="needs 8192 bytes, device has 4096"):
        Engine.create(
            store,
            SIMULATION,
            SeededEntropy(1),
            name="small",
            resource_id=bytes(16),
            volumes=[VolumeSpec(0, "0", 8192, backing, "/dev/x")],
            journal_bytes=SIMULATION.journal_bytes_min,
            role="primary",
            chain=[],
            wall_ns=0,
        )


def test_an_epoch_that_does_not_follow_fences_the_resource() -> None:
    store = SimStore()
    engine = make_engine(store)
    engine.write([(1, 0, 0, BLOCK, b"a" * BLOCK)], 0)
    seal(engine)
    sync(engine)
    engine.superblock.applied_hash = "11" * 32
    checkpoint(engine)
    engine.close()
    with pytest.raises(FencedError, match="epoch 1 in the journal does not follow epoch 0"):
        open_engine(store)
