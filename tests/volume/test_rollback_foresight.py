"""What a rollback would cut off, told before it is done: the branch holds just that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from geomirror.errors import IntegrityError, LimitExceededError, RefusedError
from geomirror.limits import MIB
from geomirror.volume.rollback_foresight import ForesightJob, TailSize
from tests.volume.rollback_rig import RollbackRig


def foresee(
    rig: RollbackRig, target: int, *, exact_bytes: int = 0, reads_undo: bool = True
) -> TailSize:
    engine = rig.engine
    job = ForesightJob(
        engine, engine.rollback_target(target), exact_bytes=exact_bytes, reads_undo=reads_undo
    )
    try:
        job.run()
    finally:
        job.release()
    assert job.size is not None
    return job.size


@pytest.mark.parametrize("seed", range(12))
def test_the_branch_holds_what_was_foretold(seed: int) -> None:
    rig = RollbackRig(9800 + seed)
    rig.follow = seed % 2 == 0
    rig.history(8)
    pins = set(rig.engine.undo.pinned_epochs())
    target = rig.random.choice(rig.engine.rollback_points()[:-1])
    most = foresee(rig, target, exact_bytes=64 * MIB)
    exact = foresee(rig, target, exact_bytes=max(0, most.data_bytes - 1))
    assert set(rig.engine.undo.pinned_epochs()) == pins
    branch = rig.engine.roll_back(target, "tail", wall_ns=1).branch
    assert branch is not None
    assert exact.is_exact == (exact != most or not most.blocks)
    assert exact.data_bytes == branch.raw_bytes
    view = rig.engine.view_branch("tail")
    try:
        runs = view.runs()
    finally:
        view.close()
    assert sum(count for _, _, count, is_zero in runs if is_zero) == exact.zero_blocks
    if exact.is_exact:
        assert sum(is_zero for *_, is_zero in runs) <= exact.zero_runs
    assert most.data_bytes >= exact.data_bytes
    assert most.blocks + most.zero_blocks == exact.blocks + exact.zero_blocks


def test_what_is_in_no_epoch_yet_counts() -> None:
    rig = RollbackRig(9820)
    rig.history(3)
    target = rig.engine.rollback_points()[-1]
    rig.put(0, bytes([7]) * 8192)
    found = foresee(rig, target)
    assert not found.is_exact
    assert found.blocks >= 2


def rig_with_a_pass() -> tuple[RollbackRig, int]:
    rig = RollbackRig(9830)
    for _ in range(2):
        target = rig.engine.applied_epoch
        rig.put(0, rig.random.randbytes(5 * 4096))
        rig.settle()
        while rig.engine.applied_epoch < rig.engine.sealed_epoch:
            rig.apply()
        rig.persist()
    return rig, target


def test_damaged_undo_is_found_and_nothing_else_is_changed() -> None:
    rig, target = rig_with_a_pass()
    newest = rig.engine.undo.passes()[-1]
    file = rig.store.open(newest.name)
    byte = file.pread(1, 1000)
    file.pwritev([bytes([byte[0] ^ 1])], 1000)
    assert foresee(rig, target, reads_undo=False).blocks
    with pytest.raises(IntegrityError, match="damaged"):
        foresee(rig, target)
    assert rig.engine.undo.has_suspects, "the next look makes a gap of it"
    assert rig.engine.undo.passes()[-1] == newest
    assert rig.engine.branches.records() == []


def test_what_the_rollback_would_refuse_is_refused() -> None:
    rig, target = rig_with_a_pass()
    limits = rig.engine.limits
    rig.engine.limits = replace(limits, rollback_entries_max=3)
    with pytest.raises(LimitExceededError, match="more than 3 blocks"):
        foresee(rig, target)
    rig.engine.limits = limits
    rig.engine.branches._limits = replace(limits, branches_bytes_max=2 * 4096)
    with pytest.raises(RefusedError, match="left for branches"):
        foresee(rig, target)
    assert rig.engine.branches.records() == []
