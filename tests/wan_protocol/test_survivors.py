"""Stories of three members whose primary dies: the survivors find each other, without a full copy.

The most advanced one is promoted; what crosses to the other is what differs, however far it is
behind.
"""

from __future__ import annotations

import pytest

from geomirror.limits import KIB
from tests.wan_protocol.core_machinery import Node
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, Stage, different_blocks, noise
from tests.wan_protocol.test_resync_hash import away, data_blocks, write

HEIR = "south"
BLOCKS = 256


def three(heir_journal_bytes: int = 1024 * KIB) -> Stage:
    """All three have the same blocks of data; the peer is the one that will be behind."""
    stage = Stage(PEER, HEIR, journal_bytes=1024 * KIB, peer_journal_bytes=heir_journal_bytes)
    for first in range(0, BLOCKS, 8):
        write(stage, first, noise(first + 1, 8 * BLOCK))
        stage.seal()
        stage.pass_time(50)
    stage.pass_time(3000)
    stage.check_in_sync(PEER)
    stage.check_in_sync(HEIR)
    return stage


def heir_takes_over(stage: Stage) -> list[int]:
    """The primary is lost for good, and the heir has its place and its name. Returns the blocks in
    which the other survivor's image differs from it; they are not linked yet."""
    stage.pass_time(1000)
    lost_epoch = stage.primary.engine.sealed_epoch
    stage.crash(PRIMARY)
    heir = stage.nodes.pop(HEIR)
    stage.peers = [PEER]
    heir.core.freeze()
    engine = heir.engine
    assert engine.committed_epoch == engine.sealed_epoch == lost_epoch
    generation = engine.next_generation(b"g" * 16, "forced", PRIMARY, stage.wall_ns)
    job = engine.promote(generation, [PEER])
    job.run()
    engine.complete_checkpoint(job)
    stage._take_recovered(engine)
    assert stage.at_epoch[lost_epoch] == {v: bytes(c) for v, c in stage.content.items()}
    stage.nodes[PRIMARY] = Node(PRIMARY, heir.store, engine, stage._core(PRIMARY, engine))
    stage.settle()
    image = stage.image(PEER)[0]
    return different_blocks(image, bytes(stage.content[0]))


def reconciled(stage: Stage) -> int:
    """Data blocks that crossed until both are equal."""
    stage.link_up(PEER)
    stage.pass_time(8000)
    stage.check_in_sync(PEER)
    assert stage.secondary.engine.generation == stage.primary.engine.generation
    return data_blocks(stage)


def resync_bytes(stage: Stage) -> int:
    return sum(len(frame.body) for frame in stage.east.frames if frame.is_resync)


def test_a_survivor_that_is_a_little_behind_gets_the_epochs_that_it_lacks() -> None:
    stage = three()
    stage.link_down(PEER)
    for at in range(6):
        write(stage, 8 * at, noise(400 + at, BLOCK))
        stage.seal()
    behind = stage.secondary.engine.sealed_epoch
    differing = heir_takes_over(stage)
    assert len(differing) == 6
    assert stage.primary.engine.epoch_numbers()[0] <= behind + 1
    assert reconciled(stage) == 0, "nothing was copied"
    assert stage.sender().counters.resyncs == 0


def test_a_survivor_in_bitmap_mode_gets_what_differs() -> None:
    """The bitmap died with the primary: nobody knows what changed."""
    stage = three()
    changed = [3, 40, 41, 100, 255]
    away(stage, changed)
    assert stage.sender(PEER).mode == "Bitmap"
    behind = stage.secondary.engine.sealed_epoch
    differing = heir_takes_over(stage)
    assert differing == changed
    numbers = stage.primary.engine.epoch_numbers()
    assert not numbers or numbers[0] > behind + 1, "the heir's journal does not reach back either"
    assert reconciled(stage) == len(changed)
    assert resync_bytes(stage) < 2 * len(changed) * BLOCK
    assert stage.sender().counters.resyncs == 1


def test_a_survivor_behind_the_heirs_journal_gets_what_differs() -> None:
    """The dead primary's journal had it all, the heir's is smaller."""
    stage = three()
    stage.link_down(PEER)
    changed = [7, 8, 9, 200]
    for block in changed:
        write(stage, block, noise(7000 + block, BLOCK))
    stage.seal()
    behind = stage.secondary.engine.sealed_epoch
    heir = stage.mirror(HEIR).engine
    while not heir.epoch_numbers() or heir.epoch_numbers()[0] <= behind + 1:
        again = 8 * (stage.primary.engine.sealed_epoch % 24) + 16
        write(stage, again, bytes(stage.content[0][again * BLOCK : (again + 4) * BLOCK]))
        stage.seal()
        stage.pass_time(100)
        assert stage.primary.engine.sealed_epoch < 1000
    differing = heir_takes_over(stage)
    assert differing == changed
    assert reconciled(stage) == len(changed)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_a_survivor_in_the_middle_of_a_resync_gets_what_differs(frames: int) -> None:
    """It holds the state from before; what it was copied is there, too, and is not sent again."""
    stage = three()
    changed = list(range(0, 200, 5))
    away(stage, changed)
    held = stage.secondary.engine.applied_epoch
    stage.park_frames(PEER)
    stage.link_up(PEER)
    stage.pass_time(500)
    stage.unpark(frames, name=PEER) if frames else None
    stage.pass_time(500)
    assert stage.sender(PEER).mode == "Resync"
    engine = stage.secondary.engine
    assert engine.held is not None and engine.held.epoch == held
    stage.is_parked = lambda source, target, what: False
    differing = heir_takes_over(stage)
    assert set(differing) <= set(changed)
    assert engine.held is not None, "it can be promoted at the state from before"
    assert reconciled(stage) <= len(changed)


def test_the_heir_may_have_written_meanwhile() -> None:
    stage = three()
    changed = [3, 100]
    away(stage, changed)
    heir_takes_over(stage)
    for at in range(10):
        write(stage, 128 + at, noise(800 + at, BLOCK))
        stage.seal()
    stage.pass_time(4000)
    assert reconciled(stage) <= len(changed) + 10
