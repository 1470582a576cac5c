"""A rewind and its return on a disk that loses what was not synced, stopped at every change."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import RefusedError
from geomirror.limits import KIB, REGION_BYTES
from geomirror.node.branch_desk import REWOUND, rewind_branch
from geomirror.node.rewinding import RETURNED, begin_return, finish_return, rewind
from geomirror.volume.branches import BranchRecord
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.view import View
from tests.volume.engine_rig import SIZES, Stop
from tests.volume.rollback_rig import WALL_NS, RollbackRig


class Clock:
    def wall_ns(self) -> int:
        return WALL_NS


@dataclass
class Node:
    """What rewinding needs of a node."""

    name: str = "east-1"
    clock: Clock = field(default_factory=Clock)
    entropy: SeededEntropy = field(default_factory=lambda: SeededEntropy("rewinding"))


def content(rig: RollbackRig) -> dict[int, bytes]:
    return {volume: rig.engine.read(volume, 0, size) for volume, size in SIZES.items()}


def rewound(
    seed: int, *, is_large: bool = False
) -> tuple[RollbackRig, dict[int, bytes], dict[int, bytes]]:
    """A rig after a rewind and some writes; what it held before the rewind, and holds now."""
    rig = RollbackRig(seed)
    rig.follow = True
    rig.history(5)
    target = rig.engine.rollback_points()[-2]
    if is_large:
        target = rig.engine.rollback_points()[-1]
        for offset in range(0, 30 * 4096, 3 * 4096):
            rig.put(offset, rig.random.randbytes(2 * 4096 + 100))
            rig.settle()
    before = content(rig)
    branch = rewind(rig.engine, Node(), target)
    assert branch is not None
    assert content(rig) == rig.epochs[target].content
    assert rig.engine.superblock.chain[-1].reason == REWOUND
    assert branch.name == rewind_branch(rig.engine.generation.hex())
    for _ in range(3):
        rig.engine.write([(1, 0, 4096, 512, rig.random.randbytes(512))], 1)
    rig.engine.seal_all(2)
    return rig, before, content(rig)


def test_a_new_generation_begins_with_a_higher_token_where_the_old_one_was_left() -> None:
    rig, _, _ = rewound(9700)
    first, last = rig.engine.superblock.chain
    assert (first.token, last.token) == (1, 2)
    assert last.parent == first.identity
    assert last.parent_epoch == rig.engine.branches.records()[0].base_epoch
    assert bytes.fromhex(last.parent_hash) == rig.epochs[last.parent_epoch].chain_hash


@pytest.mark.parametrize("seed", range(3))
def test_a_return_that_is_stopped_anywhere_is_gone_on_with(seed: int) -> None:
    rig, before, since = rewound(9710 + seed)
    branch = rig.engine.branches.records()[0]
    rig.engine.close()
    snapshot = rig.store.snapshot()
    for count in range(1000):
        rig.store.restore(snapshot)
        rig.reopen()
        rig.stop_after(count)
        try:
            begin_return(rig.engine, Node(), branch)
        except Stop:
            pass
        else:
            break
        rig.reopen()
        if rig.random.random() < 0.3:
            rig.stop_after(rig.random.randrange(40))
            with contextlib.suppress(Stop):
                finish_return(rig.engine, Node())
            rig.reopen()
        finish_return(rig.engine, Node())
        if rig.engine.superblock.chain[-1].reason == REWOUND:
            assert content(rig) == since, "it was not begun"
            assert [each.name for each in rig.engine.branches.records()] == [branch.name]
            begin_return(rig.engine, Node(), branch)
        check_returned(rig, before, since)
    assert count > 20
    rig.store.on_operation = None
    rig.reopen()
    check_returned(rig, before, since)


def check_returned(rig: RollbackRig, before: dict[int, bytes], since: dict[int, bytes]) -> None:
    engine = rig.engine
    assert engine.superblock.chain[-1].reason == RETURNED
    assert content(rig) == before
    unrewound = [r for r in engine.branches.records() if r.name.startswith("unrewound-")]
    assert len(unrewound) == 1
    view = engine.view_branch(unrewound[0].name)
    try:
        assert {volume: view.read(volume, 0, size) for volume, size in SIZES.items()} == since
    finally:
        view.close()


def tiny(rig: RollbackRig) -> None:
    """Of a branch two blocks at a time fit into memory."""
    rig.engine.limits = replace(rig.engine.limits, dirty_bytes_max=32 * KIB)


def check_one_step(rig: RollbackRig, branch: BranchRecord) -> None:
    """Nothing leads to a part of the branch: no undo, no journal; peers are told by a bitmap."""
    engine, base = rig.engine, branch.base_epoch
    tip = engine.sealed_epoch
    assert tip > base + 2, "it came in pieces"
    assert [e for e in engine.rollback_points() if base < e < tip] == []
    assert base in engine.rollback_points()
    assert [n for n in engine.epoch_numbers() if n <= tip] == []
    peer = engine.superblock.peers["peer"]
    assert (peer.mode, peer.bitmap_base, peer.bitmap_through) == ("Bitmap", base, tip)
    assert (peer.bitmap_base_hash, peer.durable_epoch) == (branch.base_hash, base)
    bitmap = DirtyBitmap.load(rig.store, "peer")
    base_view = View(base, engine.images, lambda: engine.undo.history, rig.store.open, 1 << 20)
    for volume, size in SIZES.items():
        for offset in range(0, size, 4096):
            length = min(4096, size - offset)
            is_same = base_view.read(volume, offset, length) == engine.read(volume, offset, length)
            assert is_same or bitmap.is_dirty(volume, offset // REGION_BYTES)


def test_a_large_branch_comes_back_as_one_step_wherever_it_is_stopped() -> None:
    rig, before, since = rewound(9730, is_large=True)
    branch = rig.engine.branches.records()[0]
    rig.engine.close()
    snapshot = rig.store.snapshot()
    for count in range(rig.random.randrange(11), 5000, 11):
        rig.store.restore(snapshot)
        rig.reopen()
        tiny(rig)
        rig.stop_after(count)
        try:
            begin_return(rig.engine, Node(), branch)
        except Stop:
            pass
        else:
            break
        rig.reopen()
        tiny(rig)
        if rig.random.random() < 0.3:
            rig.stop_after(rig.random.randrange(100))
            with contextlib.suppress(Stop):
                finish_return(rig.engine, Node())
            rig.reopen()
            tiny(rig)
        finish_return(rig.engine, Node())
        if rig.engine.superblock.chain[-1].reason == REWOUND:
            assert content(rig) == since, "it was not begun"
            continue
        check_returned(rig, before, since)
        check_one_step(rig, branch)
    assert count > 100
    rig.store.on_operation = None
    check_one_step(rig, branch)
    rig.reopen()
    check_returned(rig, before, since)
    check_one_step(rig, branch)


def test_what_a_crash_could_not_be_followed_by_is_refused_before_anything_is_done() -> None:
    rig, _, since = rewound(9720, is_large=True)
    branch = rig.engine.branches.records()[0]
    full = replace(rig.engine.limits, branches_bytes_max=rig.engine.branches.stored_bytes() + 4096)
    many = replace(rig.engine.limits, rollback_entries_max=2)
    for limits, why in ((full, "branches_bytes_max"), (many, "at most 2 of them come back")):
        rig.engine.limits = replace(limits, dirty_bytes_max=32 * KIB)
        with pytest.raises(RefusedError, match=why):
            begin_return(rig.engine, Node(), branch)
        assert content(rig) == since
        assert rig.engine.superblock.chain[-1].reason == REWOUND
