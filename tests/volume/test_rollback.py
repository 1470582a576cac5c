"""Going back: the images at exactly the target, the tail in a branch, whatever crashes."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from geomirror.errors import NotFoundError, RefusedError
from geomirror.volume.epoch_table import empty_table
from geomirror.volume.rollback_tail import fill_joint
from geomirror.volume.superblock import GenerationRecord
from geomirror.volume.undo_contents import OldPart
from geomirror.volume.undo_file import UndoWriter
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, Stop
from tests.volume.rollback_rig import WALL_NS, RollbackRig, message_of


@pytest.mark.parametrize("seed", range(30))
def test_any_possible_epoch_can_be_gone_back_to(seed: int) -> None:
    rig = RollbackRig(9000 + seed)
    rig.follow = seed % 2 == 0
    rig.history(14)
    if rig.random.random() < 0.5:
        rig.write()
    rig.peer_epoch = rig.engine.sealed_epoch
    points = rig.engine.rollback_points()
    target = rig.random.choice(points)
    is_open = rig.engine.open_epoch_since_wall_ns is not None
    if is_open:
        number = rig.engine.sealed_epoch + 1
        rig.epochs[number] = rig._expect(number, len(rig.steps), rig.engine.journal.end_lsn)
    tip = max(rig.epochs)
    expected = dict(rig.epochs)
    job = rig.engine.roll_back(target, "tail", wall_ns=len(rig.steps))
    rig.check_at(target, expected[target])
    rig.check_history(expected)
    if target == tip:
        assert job.branch is None
    else:
        assert job.branch is not None
        assert (job.branch.base_epoch, job.branch.end_epoch) == (target, tip)
        rig.check_branch("tail", expected[target], expected[tip])
    rig.reopen(lose_nothing=rig.random.random() < 0.5)
    rig.check_at(target, expected[target])
    rig.check_history(expected)
    if target != tip:
        rig.check_branch("tail", expected[target], expected[tip])


@pytest.mark.parametrize("seed", range(6))
def test_a_crash_at_every_change_of_the_disk_is_finished_after_it(seed: int) -> None:
    rig = RollbackRig(9100 + seed)
    rig.follow = seed % 2 == 0
    rig.history(10)
    points = rig.engine.rollback_points()
    target = rig.random.choice(points[:-1])
    expected, tip = dict(rig.epochs), max(rig.epochs)
    assert rig.engine.sealed_epoch == tip
    rig.engine.close()
    snapshot = rig.store.snapshot()
    for count in range(1000):
        rig.store.restore(snapshot)
        rig.reopen()
        rig.stop_after(count)
        try:
            rig.engine.roll_back(target, "tail", wall_ns=WALL_NS)
        except Stop:
            pass
        else:
            break
        if rig.random.random() < 0.3:
            # The finishing is stopped, too.
            rig.store.on_operation = None
            rig.store.crash()
            rig.stop_after(rig.random.randrange(30))
            with contextlib.suppress(Stop):
                rig.reopen_stopped()
        rig.reopen(lose_nothing=rig.random.random() < 0.2)
        if rig.engine.sealed_epoch == tip:
            assert rig.engine.branches.records() == []
            rig.check_history(expected)
            rig.engine.roll_back(target, "tail", wall_ns=WALL_NS)
        rig.check_at(target, expected[target])
        rig.check_history(expected)
        rig.check_branch("tail", expected[target], expected[tip])
    assert count > 10
    rig.store.on_operation = None
    rig.reopen()
    rig.check_at(target, expected[target])


def test_what_is_not_kept_is_refused_and_the_nearest_states_are_named() -> None:
    rig = RollbackRig(9200)
    rig.follow = True
    rig.history(30)
    engine = rig.engine
    points = engine.rollback_points()
    missing = [e for e in range(points[0], engine.sealed_epoch) if e not in points]
    assert missing, "every epoch was kept"
    target = missing[0]
    below = max(each for each in points if each < target)
    above = min(each for each in points if each > target)
    text = message_of(lambda: engine.roll_back(target, "tail", wall_ns=WALL_NS))
    assert f"the nearest states are those at {below} and {above}" in text
    assert engine.branches.records() == []
    rig.check_history(rig.epochs)


def test_writes_go_on_after_it_and_nothing_of_the_tail_comes_back() -> None:
    rig = RollbackRig(9300)
    for _ in range(4):
        rig.history(6)
        target = rig.random.choice(rig.engine.rollback_points()[:-1])
        rig.go_back(target, "tail")
        rig.check_at(target, rig.epochs[target])
        rig.reopen(lose_nothing=rig.random.random() < 0.5)
        rig.check_at(target, rig.epochs[target])
    rig.history(4)
    rig.seal()
    rig.sync_all()
    rig.recover()
    rig.check_history(rig.epochs)
    names = [each.name for each in rig.engine.branches.records()]
    assert names == ["tail", "tail-2", "tail-3", "tail-4"]


def test_a_tail_that_does_not_fit_is_refused_and_nothing_has_changed() -> None:
    rig = RollbackRig(9400)
    rig.history(8)
    target = rig.engine.rollback_points()[0]
    tip = rig.engine.sealed_epoch
    rig.engine.branches._limits = replace(rig.engine.limits, branches_bytes_max=5000)
    with pytest.raises(RefusedError, match="left for branches"):
        rig.engine.roll_back(target, "tail", wall_ns=WALL_NS)
    rig.reopen()
    assert rig.engine.sealed_epoch == tip
    rig.check_history(rig.epochs)
    assert not [name for name in rig.store.names() if name.startswith("branches/")]


def test_another_chain_hash_is_refused() -> None:
    rig = RollbackRig(9500)
    rig.history(8)
    with pytest.raises(RefusedError, match="not the same here and there"):
        rig.engine.roll_back(3, "tail", wall_ns=WALL_NS, chain_hash=bytes(32))


def test_the_chain_loses_generations_that_began_at_the_target_or_later() -> None:
    rig = RollbackRig(9600)
    rig.history(8)
    first = rig.engine.superblock.chain[0].identity
    for epoch in (3, 5):
        rig.engine.superblock.chain.append(
            GenerationRecord(f"{epoch:032x}", 2, first, epoch, "00" * 32, "promoted")
        )
    job = rig.engine.roll_back(5, "tail", wall_ns=WALL_NS)
    assert [each.identity for each in rig.engine.superblock.chain] == [first, f"{3:032x}"]
    assert job.branch is not None
    assert job.branch.base_generation == f"{3:032x}"
    assert job.branch.generation == f"{5:032x}"


def test_a_branch_of_a_history_that_was_given_up_too_is_not_shown_over_another_one() -> None:
    """Epochs of two histories have the same numbers: a view of the one would mix both."""
    rig = RollbackRig(9610)
    rig.history(12)
    first = rig.engine.superblock.chain[0]
    later = GenerationRecord(f"{8:032x}", 2, first.identity, 8, "00" * 32, "promoted")
    rig.engine.superblock.chain.append(later)
    tip = bytes(rig.epochs[max(rig.epochs)].content[0])
    rig.go_back(10, "second")
    view = rig.engine.view_branch("second")
    assert view.read(0, 0, len(tip)) == tip
    view.close()
    rig.go_back(5, "third")
    while rig.engine.sealed_epoch < 12:
        rig.put(0, b"other" + bytes(BLOCK - 5))
        rig.settle()
    with pytest.raises(NotFoundError, match="epoch 10 of a history that was given up"):
        rig.engine.view_branch("second")
    rig.engine.view_branch("third").close()


@pytest.mark.parametrize("cuts", [100, 135, 200])
def test_writes_after_a_long_tail_was_cut_off_are_not_taken_for_applied(cuts: int) -> None:
    rig = RollbackRig(9650)
    rig.history(4)
    target = rig.engine.applied_epoch
    for number in range(cuts):
        rig.put(0, bytes([number]) * BLOCK)
        rig.settle()
    assert rig.engine.applied_epoch == target
    rig.go_back(target, "tail")
    rig.put(0, b"new" + bytes(BLOCK - 3))
    rig.sync_all()
    rig.reopen()
    assert rig.engine.read(0, 0, 3) == b"new"


def test_epochs_that_changed_nothing_need_nothing_on_the_way_back() -> None:
    writer = UndoWriter(SimStore().create("undo/x", 0))
    parts = [OldPart(0, [1, 2], 2, [bytes([1]) * BLOCK] * 2), OldPart(0, [5], 9, None)]
    fill_joint(writer, parts, empty_table())
    assert (writer.entry_count, writer.raw_bytes) == (0, 0)
