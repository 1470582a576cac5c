"""A copy that was ahead of a new primary goes back and follows it."""

from __future__ import annotations

import contextlib
import random

import pytest

from geomirror.errors import RefusedError
from geomirror.volume.superblock import PeerRecord
from tests.volume.engine_rig import BLOCK, SIZES, Stop, open_engine
from tests.volume.rollback_rig import WALL_NS, RollbackRig
from tests.volume.test_engine_secondary import Secondary


def grown(seed: int, epochs: int = 25) -> Secondary:
    """A copy with a history, an unapplied end, and some contents that are in no epoch yet."""
    node = Secondary(seed)
    while node.engine.sealed_epoch < epochs:
        node.random_action()
    node.spool()
    return node


def go_on(node: Secondary, epochs: int, seed: int) -> None:
    """Take other epochs than those that were cut off."""
    node.spooled.clear()
    node.primary.random = random.Random(seed)
    del node.primary.sent[node.engine.committed_epoch + 1 :]
    goal = node.engine.sealed_epoch + epochs
    while node.engine.applied_epoch < goal:
        node.random_action()


def tip_of(node: Secondary) -> bytes:
    """Volume 0 at the newest epoch here."""
    return node.primary.epoch(node.engine.committed_epoch).content


@pytest.mark.parametrize("seed", range(8))
def test_it_goes_back_and_follows_another_history_through_crashes(seed: int) -> None:
    node = grown(800 + seed)
    for turn in range(3):
        engine = node.engine
        node.sync()
        tip, target = tip_of(node), node.random.choice(engine.rollback_points()[-12:-1])
        left = node.random.randrange(60)

        def stop(operation: str, name: str) -> None:
            nonlocal left
            left -= any(part in operation for part in ("write", "sync", "rename", "unlink"))
            if left < 0:
                raise Stop(f"{operation} {name}")

        node.store.on_operation = stop
        with contextlib.suppress(Stop):
            engine.roll_back(target, f"orphan-{turn}", wall_ns=WALL_NS)
        node.store.on_operation = None
        node.store.crash(lose_nothing=node.random.random() < 0.3)
        node.engine = open_engine(node.store, 1000 + turn)
        node.forget()
        node.check()
        names = [each.name for each in node.engine.branches.records()]
        if f"orphan-{turn}" not in names:
            tip = tip_of(node)
            node.engine.roll_back(target, f"orphan-{turn}", wall_ns=WALL_NS)
        assert node.engine.committed_epoch == node.engine.applied_epoch == target
        node.check()
        view = node.engine.view_branch(f"orphan-{turn}")
        assert view.read(0, 0, SIZES[0]) == tip
        view.close()
        go_on(node, 8, seed * 10 + turn)
        node.recover(lose_nothing=False)
    assert len(node.engine.branches.records()) == 3


def test_after_a_restart_it_can_go_back_as_far_as_before() -> None:
    node = grown(900, 60)
    node.forget()
    node.sync()
    while node.engine.applied_epoch < node.engine.sealed_epoch:
        node.apply()
    node.apply()
    before = node.engine.rollback_points()
    within = set(range(before[-12], before[-1])) & set(before)
    assert len(within) > 8, "also epochs that no pass ended at"
    node.recover(lose_nothing=True)
    assert node.engine.rollback_points()[-12:] == before[-12:]


def test_the_journal_is_kept_from_the_boundary_that_every_streaming_peer_has() -> None:
    rig = RollbackRig(910)
    engine = rig.engine
    for name in ("near", "far", "away"):
        engine.superblock.peers[name] = PeerRecord()
    engine.superblock.peers.pop("peer")
    engine.release("peer")
    for number in range(1, 13):
        engine.write([(1, 0, number * BLOCK, BLOCK, bytes([number]) * BLOCK)], number)
        engine.seal_all(number)
        if number % 4 == 0:
            engine.apply_through(number)
            rig.checkpoint()
    assert [each.to_epoch for each in engine.undo.passes()] == [4, 8, 12]
    engine.superblock.peers["near"].durable_epoch = 12
    engine.superblock.peers["far"].durable_epoch = 10
    engine.superblock.peers["away"] = PeerRecord(mode="Bitmap", bitmap_through=12)
    for name, epoch in (("near", 12), ("far", 10), ("away", 12)):
        engine.retain(name, epoch)
    engine.superblock.applied_wall_ns += 1
    rig.checkpoint()
    assert engine.epoch_numbers() == [9, 10, 11, 12]
    assert engine.rollback_points() == [0, 4, 8, 9, 10, 11, 12]
    engine.close()
    rig.engine = engine = open_engine(rig.store)
    assert engine.rollback_points() == [0, 4, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("step", [0, 1])
def test_a_copy_that_is_being_made_goes_back_to_nothing(step: int) -> None:
    node = grown(920)
    node.engine.superblock.data_state = "inconsistent"
    assert node.engine.rollback_points() == []
    target = node.engine.applied_epoch - step
    with pytest.raises(RefusedError, match="Inconsistent"):
        node.engine.roll_back(target, "tail", wall_ns=WALL_NS)
    assert node.engine.branches.records() == []


def test_what_is_not_kept_is_gone_back_before() -> None:
    rig = RollbackRig(930)
    rig.follow = True
    rig.history(40)
    engine = rig.engine
    points = engine.rollback_points()
    missing = [e for e in range(points[0], engine.sealed_epoch) if e not in points]
    assert missing, "every epoch was kept"
    for epoch in missing:
        assert engine.retreat_point(epoch) == (max(p for p in points if p < epoch), None)
    for epoch in points:
        chain_hash = engine.rollback_target(epoch).chain_hash
        assert engine.retreat_point(epoch, chain_hash) == (epoch, chain_hash)
    with pytest.raises(RefusedError, match="not the same here and there"):
        engine.retreat_point(points[0], bytes(range(32)))
    engine.superblock.consistent_from = points[1]
    with pytest.raises(RefusedError, match="no state at or before"):
        engine.retreat_point(points[0])
