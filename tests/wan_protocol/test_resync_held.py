"""Stories of a copy that stays at E0 while a resync writes over its image."""

from __future__ import annotations

import errno

import pytest

from geomirror.cluster.history import ANCESTOR, DIVERGED, Generation, History, compare
from geomirror.environment import SeededEntropy
from geomirror.errors import RefusedError
from geomirror.limits import KIB
from geomirror.volume.engine import Engine
from geomirror.volume.view import View
from geomirror.wan_protocol.member_answer import answer_of
from geomirror.wan_protocol.messages import SessionAccept
from geomirror.wan_protocol.session import my_history, state_history
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage, different_blocks


def held_stage(blocks: int = 4) -> Stage:
    """A resync of which two frames are written, over a copy at epoch 2 with two times `blocks`."""
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2, blocks=blocks)
    stage.overflow()
    stage.park_frames()
    stage.link_up()
    stage.pass_time(2500)
    stage.unpark(2)
    return stage


def resynced() -> Stage:
    """All of a resync is durable at a copy whose readers hold applying back."""
    stage = held_stage()
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(1, seed=77)
    stage.unpark()
    stage.pass_time(3000)
    stage.write_epochs(1, seed=9)
    stage.pass_time(1000)
    engine = stage.secondary.engine
    assert engine.held is not None
    assert engine.held.epoch == 2
    assert engine.sealed_epoch == stage.primary.engine.sealed_epoch > 2
    return stage


def seen(stage: Stage, epoch: int) -> dict[int, bytes]:
    engine = stage.nodes[PEER].engine
    history = lambda: engine.undo.history  # noqa: E731
    view = View(epoch, engine.images, history, engine.store.open, 4096)
    return {index: view.read(index, 0, size) for index, size in stage.sizes.items()}


def check_at(stage: Stage, epoch: int) -> None:
    for volume, data in seen(stage, epoch).items():
        assert not different_blocks(data, stage.at_epoch[epoch][volume])


def go_back(engine: Engine) -> None:
    for step in (engine.begin_return, lambda: engine.return_job().run(), engine.complete_return):
        step()
        job = engine.checkpoint_job()
        if job is not None:
            job.run()
            engine.complete_checkpoint(job)


def test_a_copy_in_a_resync_over_a_growth_does_not_go_back_and_comes_to_its_end() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    stage.overflow()
    stage.grow(0, stage.sizes[0] + 64 * KIB)
    stage.seal()
    stage.pass_time(2500)
    stage.park_frames()
    stage.link_up()
    stage.pass_time(2500)
    stage.unpark(2)
    engine = stage.secondary.engine
    assert engine.held is not None
    assert engine.held.epoch == 2
    # So neither is it promoted nor does it follow another primary from there.
    assert not engine.can_return
    assert answer_of(PEER, stage.secondary).disk_state == "Inconsistent"
    with pytest.raises(RefusedError, match="before a volume grew"):
        engine.begin_return()
    stage.is_parked = lambda *_: False
    stage.unpark()
    stage.pass_time(120_000)
    stage.check_in_sync()


def test_the_state_from_before_is_seen_during_a_resync_and_after_it() -> None:
    stage = held_stage()
    assert stage.image() != stage.at_epoch[2]
    assert stage.secondary.engine.state_epoch == 2
    check_at(stage, 2)
    check_at(stage, 1)
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()
    check_at(stage, 2)
    check_at(stage, 1)
    (closed,) = [p for p in stage.secondary.engine.undo.passes() if p.from_epoch == 2]
    assert closed.to_epoch >= 8
    kept = stage.secondary.engine.undo.history.kept(stage.secondary.engine.applied_epoch)
    assert {1, 2} <= {each.from_epoch for each in kept}, "history goes on across the resync"


@pytest.mark.parametrize("is_kill", [True, False])
def test_a_crash_in_the_middle_of_a_resync_leaves_the_state_from_before(is_kill: bool) -> None:
    stage = held_stage()
    left = stage.primary.bitmaps[PEER].bitmap.count()
    stage.restart(PEER, is_kill=is_kill)
    assert stage.secondary.engine.state_epoch == 2
    check_at(stage, 2)
    assert stage.primary.bitmaps[PEER].bitmap.count() <= left, "what was copied stays copied"
    stage.unpark()
    stage.pass_time(8000)
    stage.check_in_sync()
    check_at(stage, 2)


def test_a_copy_that_is_opened_again_is_offered_a_session_while_the_link_stays() -> None:
    stage = held_stage()
    stage.secondary.leave(RefusedError("it is opened again"), stage.now_ns)
    stage.settle()
    assert not stage.sender().is_open, "it would go on with a session that nobody has"
    assert not stage.secondary.is_open
    node, accepted = stage.west, stage.west.sent(SessionAccept)
    node.engine = Engine.open(
        node.store, stage.limits, SeededEntropy("again"), lambda volume: node.store.open("none")
    )
    node.engine.give_up_held()
    node.core = stage._core(PEER, node.engine)
    node.core.link_up(PRIMARY, stage.now_ns)
    stage.unpark()
    stage.pass_time(8000)
    assert len(node.sent(SessionAccept)) == len(accepted) + 1
    stage.check_in_sync()


def test_going_back_gives_the_image_of_before() -> None:
    stage = held_stage()
    stage.crash(PEER, is_kill=True)
    stage.start(PEER, is_connected=False)
    go_back(stage.secondary.engine)
    assert stage.image() == stage.at_epoch[2]
    assert stage.check() == 2
    stage.restart(PEER)
    stage.unpark()
    stage.pass_time(20_000)
    stage.check_in_sync()


def test_a_return_that_a_crash_interrupts_is_finished_at_the_start() -> None:
    stage = held_stage()
    stage.crash(PEER, is_kill=True)
    stage.start(PEER, is_connected=False)
    engine = stage.secondary.engine
    engine.begin_return()
    job = engine.checkpoint_job()
    assert job is not None
    job.run()
    engine.complete_checkpoint(job)
    stage.crash(PEER)
    stage.start(PEER, is_connected=False)
    assert stage.secondary.engine.held is None
    assert stage.check() == 2


def test_an_overflow_in_the_middle_of_a_resync_changes_nothing_of_it() -> None:
    stage = held_stage()
    stage.overflow()
    assert stage.secondary.engine.state_epoch == 2
    check_at(stage, 2)
    stage.link_up()
    stage.pass_time(3000)
    stage.unpark()
    stage.pass_time(20_000)
    stage.check_in_sync()
    check_at(stage, 2)


def test_the_next_resync_holds_what_the_last_one_has_made() -> None:
    stage = resynced()
    whole = stage.secondary.engine.sealed_epoch
    stage.overflow()
    stage.park_frames()
    stage.link_up()
    stage.pass_time(2500)
    engine = stage.secondary.engine
    assert engine.state_epoch == 2, "readers are pinned to it"
    stage.secondary.set_hold(False, stage.now_ns)
    stage.pass_time(1000)
    assert engine.held is not None
    assert engine.held.epoch == whole
    check_at(stage, whole)
    stage.unpark()
    stage.pass_time(8000)
    stage.check_in_sync()


def test_no_room_for_undo_leaves_the_copy_as_it_is_and_says_so() -> None:
    stage = held_stage()
    before = stage.image()
    stage.west.store.fail("pwritev", "undo/*", error=errno.ENOSPC, count=3)
    stage.unpark(4)
    assert stage.image() == before
    assert stage.secondary.stalled is not None
    check_at(stage, 2)
    stage.unpark()
    stage.pass_time(20_000)
    stage.check_in_sync()


def test_what_survivors_hear_is_the_state_from_before() -> None:
    stage = held_stage()
    answer = answer_of(PEER, stage.secondary)
    assert (answer.epoch, answer.disk_state) == (2, "Consistent")
    assert stage.sender().held_epoch == 2
    stage.unpark()
    stage.pass_time(5000)
    assert stage.sender().held_epoch == -1
    assert answer_of(PEER, stage.secondary).epoch == stage.primary.engine.sealed_epoch


def test_giving_the_state_up_is_said_and_the_copy_is_made_all_the_same() -> None:
    stage = held_stage()
    stage.crash(PEER, is_kill=True)
    stage.start(PEER, is_connected=False)
    stage.secondary.engine.give_up_held()
    stage.secondary._checkpoint_wanted = True
    stage.secondary.handle_timer(stage.now_ns)
    stage.settle()
    assert stage.secondary.engine.state_epoch is None
    assert answer_of(PEER, stage.secondary).disk_state == "Inconsistent"
    stage.link_up()
    stage.unpark()
    stage.pass_time(20_000)
    stage.check_in_sync()
    assert not [n for n in stage.west.store.names() if n.endswith(".open")]


def test_a_first_sync_holds_nothing() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(4, blocks=16)
    stage.park_frames()
    stage.link_up()
    stage.unpark(2)
    assert stage.secondary.engine.state_epoch is None
    assert stage.secondary.engine.open_pass is None
    assert not [n for n in stage.nodes[PRIMARY].store.names() if n.endswith(".open")]
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


def test_what_a_copy_in_a_resync_would_have_to_give_up_is_what_it_holds() -> None:
    """A promoted copy that is behind the resync's base, and ahead of the state that is held, leaves
    nothing out of it: nobody has to be asked."""
    stage = held_stage()
    engine = stage.secondary.engine
    assert engine.committed_epoch > 3
    mine = state_history(engine)
    assert (mine.epoch, mine.has_unsealed) == (2, False)
    heir = Generation(b"H", 2, engine.generation, 3, b"hash of 3")
    theirs = History((*mine.generations, heir), 3, b"hash of 3")
    assert compare(mine, theirs).relation == ANCESTOR
    assert compare(my_history(engine), theirs).relation == DIVERGED, "so it does not just go on"
    engine.give_up_held()
    assert state_history(engine).generations == (), "one that has no state has nothing to lose"
