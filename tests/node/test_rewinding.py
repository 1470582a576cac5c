"""A rewind and its return on a disk that loses what was not synced, stopped at every change."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import RefusedError
from geomirror.node.branch_desk import REWOUND, rewind_branch
from geomirror.node.rewinding import RETURNED, begin_return, finish_return, rewind
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


def rewound(seed: int) -> tuple[RollbackRig, dict[int, bytes], dict[int, bytes]]:
    """A rig after a rewind and some writes; what it held before the rewind, and holds now."""
    rig = RollbackRig(seed)
    rig.follow = True
    rig.history(5)
    before = content(rig)
    points = rig.engine.rollback_points()
    branch = rewind(rig.engine, Node(), points[-2])
    assert branch is not None
    assert content(rig) == rig.epochs[points[-2]].content
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


def test_what_does_not_fit_in_one_epoch_is_refused_before_anything_is_done() -> None:
    rig, _, since = rewound(9720)
    rig.engine.limits = rig.engine.limits.__class__(
        **{**rig.engine.limits.__dict__, "dirty_bytes_max": 4096}
    )
    branch = rig.engine.branches.records()[0]
    with pytest.raises(RefusedError, match="come back as one epoch"):
        begin_return(rig.engine, Node(), branch)
    assert content(rig) == since
    assert rig.engine.superblock.chain[-1].reason == REWOUND
