"""An engine whose volumes grow: sealed, destaged, viewed, and recovered from any crash."""

from __future__ import annotations

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import JournalFullError, NoSpaceError, RefusedError
from geomirror.volume.engine import Engine
from geomirror.volume.record import RecordType
from geomirror.volume.superblock import PeerRecord
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from geomirror.volume.volume_change import VolumeChange
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, SIZES, Stop, make_engine, open_engine

WRITE = int(RecordType.WRITE)
END = SIZES[1]
"""Ends within a block."""
GROWN = END + 9 * BLOCK + 512
SHORT = bytes(range(1, 256)) * 6 + b"123456"


def change_of(engine: Engine, volume: int, size: int) -> VolumeChange:
    return VolumeChange(volume, f"v{volume}", engine.sizes.now.get(volume, 0), size)


def grow(engine: Engine, volume: int, size: int) -> int:
    change = change_of(engine, volume, size)
    engine.check_growth(change)
    job = engine.grow_job_for([change])
    if job is not None:
        job.run()
        engine.complete_grow(job)
    return engine.grow(change, wall_ns=1)


def write(engine: Engine, volume: int, offset: int, data: bytes) -> None:
    engine.write([(WRITE, volume, offset, len(data), data)], 1)


def sync(engine: Engine) -> None:
    job = engine.sync_job()
    job.run()
    engine.complete_sync(job)


def seal(engine: Engine) -> int:
    draft = engine.cut(2)
    assert draft is not None
    job = engine.seal_job(draft)
    job.run()
    engine.complete_seal(job)
    sync(engine)
    return draft.number


def destage(engine: Engine) -> None:
    checkpoint(engine)
    job = engine.apply_job(engine.sealed_epoch)
    job.run()
    engine.complete_apply(job)
    checkpoint(engine)


def checkpoint(engine: Engine) -> None:
    job = engine.checkpoint_job()
    if job is not None:
        job.run()
        engine.complete_checkpoint(job)


def everything(engine: Engine) -> dict[int, bytes]:
    return {v: engine.read(v, 0, size) for v, size in engine.sizes.now.items()}


def test_an_epoch_that_was_cut_before_the_growth_is_sealed_with_the_old_size() -> None:
    hashes = []
    for is_grown in (False, True):
        engine = make_engine(SimStore(1))
        write(engine, 1, END - 1536, SHORT)
        draft = engine.cut(2)
        assert draft is not None
        if is_grown:
            grow(engine, 1, GROWN)
        job = engine.seal_job(draft)
        job.run()
        engine.complete_seal(job)
        sync(engine)
        hashes.append(engine.sealed_hash)
        if is_grown:
            assert engine.load_epoch(1).changes == ()
            destage(engine)  # Through the old size only.
            assert engine.images[1].size_bytes == END
            assert engine.read(1, END - 1536, 4096) == SHORT + bytes(4096 - 1536)
            assert seal(engine) == 2
            destage(engine)
            assert engine.images[1].size_bytes == GROWN
            assert engine.read(1, END - 1536, 4096) == SHORT + bytes(4096 - 1536)
    assert hashes[0] == hashes[1]


def test_new_bytes_are_zeros_whatever_lies_behind_the_old_end() -> None:
    engine = make_engine(SimStore(2))
    for image in engine.images.values():
        image.file.pwritev([b"\xee" * 80 * BLOCK], image.size_bytes)
    grow(engine, 1, GROWN)
    write(engine, 1, END + 5000, b"new")
    assert [c.size_bytes for c in engine.load_epoch(seal(engine)).changes] == [GROWN]
    expected = bytes(GROWN - END)
    expected = expected[:5000] + b"new" + expected[5003:]
    assert engine.read(1, END, GROWN - END) == expected
    destage(engine)
    assert engine.read(1, END, GROWN - END) == expected
    assert engine.images[1].read(END, GROWN - END) == expected


def test_a_crash_at_any_operation_leaves_the_old_volumes_or_the_new_ones() -> None:
    stops = 0
    for count in range(1, 400):
        engine, store = None, SimStore(f"crash {count}")
        engine = make_engine(store)
        write(engine, 1, END - 1536, SHORT)
        sync(engine)
        remaining = count

        def stop(_operation: str, _name: str) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise Stop

        store.on_operation = stop
        certain: dict[int, int] = dict(SIZES)
        try:
            grow(engine, 1, GROWN)
            sync(engine)
            certain = dict(engine.sizes.now)
            grow(engine, 2, 5 * BLOCK)
            sync(engine)
            certain = dict(engine.sizes.now)
            write(engine, 2, 100, b"here")
            seal(engine)
            destage(engine)
            store.on_operation = None
        except Stop:
            stops += 1
        is_over = remaining > 0
        store.on_operation = None
        store.crash()
        engine = open_engine(store, count)
        found = dict(engine.sizes.now)
        allowed = [SIZES, {**SIZES, 1: GROWN}, {**SIZES, 1: GROWN, 2: 5 * BLOCK}]
        assert found in allowed[allowed.index(certain) :], f"stopped at {count}"
        assert engine.read(1, END - 1536, 1536) == SHORT
        assert not any(engine.read(1, END, found[1] - END))
        before = everything(engine)
        if engine.open_epoch_since_wall_ns is not None:
            seal(engine)
        if engine.sealed_epoch > engine.applied_epoch:
            destage(engine)
        assert everything(engine) == before
        sizes = {v: image.size_bytes for v, image in engine.images.items() if image.size_bytes}
        assert sizes == found
        again = Engine.open(store, engine.limits, SeededEntropy("again"), lambda _: None)
        assert again.sizes.now == found and everything(again) == before
        if is_over:
            break
    assert is_over and stops > 30


def test_an_addition_that_did_not_come_to_be_leaves_room_for_another() -> None:
    store = SimStore(4)
    engine = make_engine(store)
    change = change_of(engine, 2, 8 * BLOCK)
    job = engine.grow_job_for([change])
    assert job is not None
    job.run()
    assert engine.complete_grow(job)
    checkpoint(engine)
    engine = open_engine(store)
    assert engine.sizes.now == SIZES
    engine.forget_addition(2)
    renamed = VolumeChange(2, "wal", 0, 4 * BLOCK)
    engine.check_growth(renamed)
    job = engine.grow_job_for([renamed])
    assert job is not None
    job.run()
    engine.complete_grow(job)
    engine.grow(renamed, wall_ns=1)
    write(engine, 2, 0, b"first")
    seal(engine)
    destage(engine)
    engine = open_engine(store)
    assert engine.sizes.names[2] == "wal"
    assert engine.read(2, 0, 5) == b"first"
    engine.forget_addition(2)  # It did come to be: nothing happens.
    assert engine.read(2, 0, 5) == b"first"


def test_views_have_the_sizes_of_their_epoch_also_when_passes_are_merged() -> None:
    store = SimStore(5)
    engine = make_engine(store)
    contents = []
    for number in range(1, 7):
        if number in (2, 4):
            grow(engine, 1, engine.sizes.now[1] + 3 * BLOCK + 512)
        if number == 3:
            grow(engine, 2, 2 * BLOCK)
        write(engine, 1, engine.sizes.now[1] - 100, bytes([number]) * 100)
        assert seal(engine) == number
        destage(engine)
        contents.append(everything(engine))
    passes = engine.undo.history.passes

    def check(epochs: list[int]) -> None:
        for epoch in epochs:
            view = View(
                epoch, engine.images, lambda: engine.undo.history, engine.store.open, 1 << 20
            )
            sizes = {v: size for v in engine.images if (size := view.size_of(v))}
            assert {v: view.read(v, 0, size) for v, size in sizes.items()} == contents[epoch - 1]

    check([1, 2, 3, 4, 5])
    ThinJob(store, engine.undo, engine.limits, []).merge(passes[1:4])  # (1, 4]
    check([1, 4, 5])


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    engine = make_engine(SimStore(6))
    with pytest.raises(RefusedError, match="would not grow"):
        engine.check_growth(VolumeChange(1, "v1", END, END - 512))
    with pytest.raises(RefusedError, match="cannot be added"):
        engine.check_growth(VolumeChange(5, "v5", 0, BLOCK))
    paths = {f"node-{n}": "/" + "x" * 4000 for n in range(30)}
    with pytest.raises(RefusedError, match="no room"):
        engine.check_growth(VolumeChange(2, "v2", 0, BLOCK, paths))


def test_a_full_disk_or_journal_refuses_the_growth() -> None:
    store = SimStore(7)
    engine = make_engine(store)
    store.fail("truncate", "volumes/1.img", error=28)
    with pytest.raises(NoSpaceError):
        grow(engine, 1, GROWN)
    assert engine.sizes.now == SIZES
    with pytest.raises(JournalFullError):
        for at in range(10_000):
            write(engine, 0, at % 40 * BLOCK, bytes([at % 255 + 1]) * BLOCK)
    with pytest.raises(JournalFullError):
        for _ in range(100):
            grow(engine, 1, engine.sizes.now[1] + 512)


def check_views(engine: Engine, contents: dict[int, dict[int, bytes]]) -> None:
    kept = engine.undo.history.kept(engine.applied_epoch)
    for epoch in [*(each.from_epoch for each in kept), engine.applied_epoch]:
        view = View(epoch, engine.images, lambda: engine.undo.history, engine.store.open, 1 << 20)
        sizes = {v: size for v in engine.images if (size := view.size_of(v))}
        assert {v: view.read(v, 0, size) for v, size in sizes.items()} == contents[epoch]


@pytest.mark.parametrize("is_reopened", [False, True])
def test_going_back_ends_at_or_after_the_newest_growth(is_reopened: bool) -> None:
    store = SimStore(6)
    engine = make_engine(store)
    engine.superblock.peers["peer"] = PeerRecord(durable_epoch=1)  # Keeps the journal.
    engine.retain("peer", 1)
    contents = {}
    for number in range(1, 8):
        if number == 3:
            grow(engine, 1, GROWN)
            grow(engine, 2, 2 * BLOCK)
        write(engine, 1, engine.sizes.now[1] - 700 * number, bytes([number]) * 700)
        assert seal(engine) == number
        contents[number] = everything(engine)
        if number in (1, 6):
            destage(engine)  # Passes (0, 1], (1, 6]: the growth and the target lie within one.
    if is_reopened:
        store.crash()
        engine = open_engine(store, 60)
    assert [each for each in engine.rollback_points() if each] == [3, 4, 5, 6, 7]
    with pytest.raises(RefusedError, match="since epoch 2, and volumes never shrink"):
        engine.roll_back(2, "tail", wall_ns=5)
    with pytest.raises(RefusedError, match="since epoch 1, and volumes never shrink"):
        engine.roll_back(1, "tail", wall_ns=5)
    assert (engine.sealed_epoch, everything(engine)) == (7, contents[7])
    engine.roll_back(4, "tail", wall_ns=5)
    for opened in (61, 62):
        assert (engine.sealed_epoch, everything(engine)) == (4, contents[4])
        assert engine.sizes.now == {0: SIZES[0], 1: GROWN, 2: 2 * BLOCK}
        assert {i: image.size_bytes for i, image in engine.images.items()} == engine.sizes.now
        check_views(engine, {0: {v: bytes(size) for v, size in SIZES.items()}, **contents})
        store.crash()
        engine = open_engine(store, opened)
    grow(engine, 1, GROWN + BLOCK)
    assert seal(engine) == 5
    destage(engine)
    assert engine.read(1, GROWN, BLOCK) == bytes(BLOCK)


def test_a_growth_that_only_undo_knows_of_is_in_the_way_too() -> None:
    engine = make_engine(SimStore(7))
    for number in range(1, 5):
        if number == 2:
            grow(engine, 1, GROWN)
        write(engine, 0, 0, bytes([number]) * BLOCK)
        seal(engine)
        destage(engine)
    engine.sizes.reset((v.index, v.name, v.size_bytes) for v in engine.superblock.volumes)
    engine._directory.clear()
    content = everything(engine)
    job = engine.rollback_job(1, "tail", wall_ns=5)
    with pytest.raises(RefusedError, match="volumes never shrink"):
        job.run()
    assert not job.is_begun
    assert everything(engine) == content
    assert engine.branches.records() == []
