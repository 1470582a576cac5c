"""A disk that is full at any write of a rollback, of a branch, or of the end of a resync's undo:
nothing has changed, or it is ended when there is room; nothing is lost and nothing is left over."""

from __future__ import annotations

import contextlib
import errno
import random

import pytest

from geomirror.errors import NoSpaceError, NotFoundError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.branches import BranchRecord, BranchStore
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import PassLabel
from geomirror.volume.undo_open import OPEN_EPOCH, OpenPass
from tests.sim.disk import SimStore
from tests.volume.apply_support import GENERATION, LIMITS, World, content_of, restored
from tests.volume.rollback_rig import WALL_NS, RollbackRig

SIZE = 60 * BLOCK_BYTES


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("operation", ["pwritev", "create"])
def test_a_rollback_that_finds_the_disk_full_changes_nothing_or_is_ended(
    seed: int, operation: str
) -> None:
    rig = RollbackRig(9800 + seed)
    rig.follow = seed % 2 == 0
    rig.history(8)
    target = rig.random.choice(rig.engine.rollback_points()[:-1])
    expected, tip = dict(rig.epochs), max(rig.epochs)
    rig.engine.close()
    snapshot = rig.store.snapshot()
    undone = begun = 0
    for skip in range(400):
        rig.store.restore(snapshot)
        rig.reopen()
        rig.store.fail(operation, error=errno.ENOSPC, skip=skip, count=1 + seed)
        try:
            rig.engine.roll_back(target, "tail", wall_ns=WALL_NS)
        except NoSpaceError:
            pass
        else:
            if rig.store.faults:
                break
            # Old history made room for the undo of a pass.
            rig.check_at(target, expected[target])
            rig.check_branch("tail", expected[target], expected[tip])
            continue
        if rig.engine.superblock.rollback is None and rig.random.random() < 0.5:
            rig.store.faults.clear()
        # As the node does: it is opened again, as often as the disk is still full.
        for _ in range(10):
            with contextlib.suppress(NoSpaceError):
                rig.reopen(lose_nothing=True)
                break
        rig.store.faults.clear()
        if rig.engine.sealed_epoch == tip:
            undone += 1
            rig.check_history(expected)
            assert rig.engine.branches.records() == []
            left = [each for each in rig.store.names() if each.startswith("branches/")]
            assert left == [], "what a try left behind is removed"
            rig.engine.roll_back(target, "tail", wall_ns=WALL_NS)
        else:
            begun += 1
        rig.check_at(target, expected[target])
        rig.check_history(expected)
        rig.check_branch("tail", expected[target], expected[tip])
    else:
        raise AssertionError("it never had room enough")
    assert undone
    assert begun or operation == "create"


def test_a_branch_that_finds_the_disk_full_is_not_there_at_all() -> None:
    for skip in range(30):
        store = SimStore()
        branches = BranchStore(store, LIMITS, "")
        store.fail("pwritev", "branches/*", error=errno.ENOSPC, skip=skip)
        record = BranchRecord(
            "tail", "", 1, "00" * 32, 0, GENERATION.hex(), 2, "00" * 32, 0, 0, WALL_NS
        )
        try:
            branches.save(record, lambda writer: writer.add_zero(0, 1, 5))
        except NoSpaceError:
            assert branches.records() == []
            assert BranchStore(store, LIMITS, "").records() == []
            assert [name for name in store.names() if name.startswith("branches/")] == []
            with pytest.raises(NotFoundError):
                branches.get("tail")
        else:
            assert skip > 0
            return
    raise AssertionError("it never had room enough")


def held_world(seed: int) -> tuple[World, SimStore]:
    chance = random.Random(seed)
    old = chance.randbytes(SIZE)
    world = World([SIZE], lambda volume: old)
    for _ in range(3):
        blocks = sorted(chance.sample(range(SIZE // BLOCK_BYTES), 9))
        world.epoch([(0, block, chance.randbytes(BLOCK_BYTES), 0) for block in blocks])
    store = SimStore(f"held/{seed}")
    world.create_images(store)
    return world, store


@pytest.mark.parametrize("seed", range(5))
def test_the_undo_of_a_resync_is_saved_and_closed_whenever_there_is_room(seed: int) -> None:
    for skip in range(60):
        world, store = held_world(seed)
        images, undo = world.images(store), UndoStore(store, LIMITS, 2, 1)
        label = PassLabel(GENERATION, 0, OPEN_EPOCH)
        open_pass = OpenPass(store, undo, 1, label, 1 << 30)
        store.fail("pwritev", "*", error=errno.ENOSPC, skip=skip, count=2)
        failed = 0
        for epoch in range(3):
            for _ in range(4):
                job = world.job(images, undo, epoch, epoch + 1, with_undo=False)
                job._open_pass = open_pass
                try:
                    job.run()
                except NoSpaceError:
                    failed += 1
                    # Whatever was written, the state from before is there.
                    assert restored(images, store, undo, 0) == world.states[0]
                else:
                    break
        assert content_of(images) == world.states[3]
        assert restored(images, store, undo, 0) == world.states[0]
        for _ in range(4):
            try:
                closed = open_pass.close(PassLabel(GENERATION, 0, 3), {})
            except NoSpaceError:
                failed += 1
                assert restored(images, store, undo, 0) == world.states[0]
            else:
                break
        undo.show_open([], closed)
        assert closed.is_resync
        assert restored(images, store, undo, 0) == world.states[0]
        store.crash()
        again = UndoStore(store, LIMITS)
        assert [(each.from_epoch, each.to_epoch, each.fault) for each in again.passes()] == [
            (0, 3, "")
        ]
        assert again.passes()[0].is_resync
        images = world.images(store)
        assert restored(images, store, again, 0) == world.states[0]
        if not failed:
            return
    raise AssertionError("it never had room enough")


def test_a_return_over_damaged_undo_is_refused_before_anything_is_written() -> None:
    world, store = held_world(7)
    images, undo = world.images(store), UndoStore(store, LIMITS, 2, 1)
    open_pass = OpenPass(store, undo, 1, PassLabel(GENERATION, 0, OPEN_EPOCH), 1 << 30)
    for epoch in range(3):
        job = world.job(images, undo, epoch, epoch + 1, with_undo=False)
        job._open_pass = open_pass
        job.run()
    open_pass.verify()
    store.flip_bit(open_pass.name, 8 * (open_pass.stored_bytes - 50))
    with pytest.raises(Exception, match="the state at epoch 0, from before the resync") as caught:
        open_pass.verify()
    assert open_pass.name in str(caught.value)
    assert content_of(images) == world.states[3]
    open_pass.stop()
