"""Stories of a verify: what differs is found and healed, and nothing else is called different."""

from __future__ import annotations

import pytest

from geomirror.volume.view import View
from geomirror.wan_protocol.messages import VerifyAnswer
from geomirror.wan_protocol.verify_run import CLEAN, DIFFERENT, DONE, HEALED, Span, VerifyRun
from tests.wan_protocol.core_support import (
    BLOCK,
    PEER,
    PRIMARY,
    SIZES,
    Stage,
    noise,
)

RATE = 8 << 20
ALL_BLOCKS = 513 + 20


def written_stage(*peers: str) -> Stage:
    """Both volumes hold something here and there, applied on both sides."""
    stage = Stage(*peers)
    for at in range(8):
        stage.write_blocks(at * 60, 12, seed=at)
        stage.seal()
    stage.write_blocks(3, 5, seed=77, volume=1)
    stage.write(512 * BLOCK, noise(5, 1536))
    stage.pass_time(4000)
    stage.check_in_sync(stage.peers[0])
    return stage


def start(stage: Stage, *, heals: bool = True, peer: str = PEER, rate: int = RATE) -> VerifyRun:
    run = stage.primary.start_verify(
        peer, bytes_per_second=rate, is_healing=heals, now_ns=stage.now_ns
    )
    stage.settle()
    return run


def verified(stage: Stage, *, heals: bool = True, peer: str = PEER) -> VerifyRun:
    run = start(stage, heals=heals, peer=peer)
    stage.pass_time(8000)
    assert run.state == DONE, run.reason
    return run


def rot(stage: Stage, block: int, *, volume: int = 0, node: str = PEER, byte: int = 100) -> bytes:
    """One bit of an image is another one, durably; returns the block as it is now."""
    file = stage.nodes[node].engine.images[volume].file
    stage.nodes[node].store.flip_bit(f"volumes/{volume}.img", (block * BLOCK + byte) * 8 + 4)
    size = min(BLOCK, SIZES[volume] - block * BLOCK)
    return file.pread(size, block * BLOCK)


def kinds(stage: Stage) -> list[str]:
    return [kind for kind, _ in stage.east.events if kind.startswith("verify")]


def test_copies_that_are_the_same_are_found_the_same() -> None:
    stage = written_stage()
    run = verified(stage)
    assert run.result == CLEAN
    assert run.found.compared_blocks == run.total_blocks == ALL_BLOCKS
    assert run.epoch == stage.primary.engine.sealed_epoch
    assert kinds(stage) == ["verify_started", "verify_ended"]
    stage.check_in_sync()


def test_a_flipped_bit_is_found_healed_by_an_epoch_and_seen_in_the_undo() -> None:
    stage = written_stage()
    before = stage.primary.engine.sealed_epoch
    rotten = rot(stage, 65)
    run = verified(stage)
    assert run.result == HEALED
    assert run.found.runs == [Span(0, 65, 1)]
    assert (run.found.different_blocks, run.found.healed_blocks) == (1, 1)
    assert run.unhealed_blocks == 0
    assert stage.primary.engine.sealed_epoch == before + 1
    stage.check_in_sync()
    engine = stage.secondary.engine
    history = lambda: engine.undo.history  # noqa: E731
    view = View(before, engine.images, history, engine.store.open, 4096)
    assert view.read(0, 65 * BLOCK, BLOCK) == rotten
    assert kinds(stage) == ["verify_started", "verify_mismatch", "verify_ended"]
    (mismatch,) = [fields for kind, fields in stage.east.events if kind == "verify_mismatch"]
    assert (mismatch["volume"], mismatch["block"], mismatch["blocks"]) == (0, 65, 1)
    assert verified(stage).result == CLEAN


@pytest.mark.parametrize(
    ("volume", "block", "byte"), [(0, 0, 0), (0, 200, 5), (0, 512, 1535), (1, 19, 4095), (1, 4, 9)]
)
def test_a_difference_is_found_wherever_it_is(volume: int, block: int, byte: int) -> None:
    stage = written_stage()
    rot(stage, block, volume=volume, byte=byte)
    run = verified(stage)
    assert run.result == HEALED
    assert run.found.runs == [Span(volume, block, 1)]
    stage.check_in_sync()


def test_what_the_primary_holds_counts_where_its_own_image_is_rotten() -> None:
    stage = written_stage()
    rotten = rot(stage, 65, node=PRIMARY)
    assert verified(stage).result == HEALED
    assert stage.image()[0][65 * BLOCK : 66 * BLOCK] == rotten
    assert verified(stage).result == CLEAN


def test_without_healing_it_is_only_said() -> None:
    stage = written_stage()
    rotten = rot(stage, 65)
    rot(stage, 66)
    rot(stage, 300)
    before = stage.primary.engine.sealed_epoch
    for _ in range(2):
        run = verified(stage, heals=False)
        assert run.result == DIFFERENT
        assert run.found.runs == [Span(0, 65, 2), Span(0, 300, 1)]
    assert run.found.healed_blocks == 0
    assert stage.primary.engine.sealed_epoch == before
    assert stage.image()[0][65 * BLOCK : 66 * BLOCK] == rotten


def test_many_differences_are_healed_and_the_first_runs_named() -> None:
    stage = written_stage()
    for block in range(0, 512, 3):
        rot(stage, block)
    run = verified(stage)
    assert run.result == HEALED
    assert run.found.different_blocks == run.found.healed_blocks == 171
    assert run.found.runs == [Span(0, block, 1) for block in (0, 3, 6, 9)]
    stage.check_in_sync()


def test_only_the_copy_that_is_asked_about_is_compared() -> None:
    stage = written_stage("colo", PEER)
    rot(stage, 65, node="colo")
    assert verified(stage).result == CLEAN
    assert verified(stage, peer="colo").result == HEALED
    stage.check_in_sync("colo")


# Writers go on.


def test_what_is_written_meanwhile_is_no_difference() -> None:
    stage = written_stage()
    run = start(stage)
    for at in range(200):
        stage.write_blocks(at * 37 % 500, 6, seed=1000 + at)
        stage.pass_time(30)
    stage.pass_time(8000)
    assert (run.state, run.result) == (DONE, CLEAN)
    assert run.found.compared_blocks >= ALL_BLOCKS
    stage.check_in_sync()


@pytest.mark.parametrize("node", [PRIMARY, PEER])
def test_a_pass_past_the_epoch_does_not_show_while_it_is_read(node: str) -> None:
    stage = written_stage()
    stage.hold(node, "verify*")
    run = start(stage)
    for at in range(4):
        stage.write_blocks(0, 60, seed=2000 + at)
        stage.seal()
        stage.pass_time(400)
    stage.pass_time(4000)
    applied = stage.nodes[node].engine.applied_epoch
    assert applied == stage.primary.engine.sealed_epoch
    assert stage.nodes[node].waiting
    stage.release(node)
    stage.pass_time(8000)
    assert (run.state, run.result) == (DONE, CLEAN)
    stage.check_in_sync()


def test_a_difference_shows_while_everything_around_it_is_written() -> None:
    stage = written_stage()
    rot(stage, 490)
    run = start(stage, heals=False)
    for at in range(150):
        stage.write_blocks(at * 37 % 480, 6, seed=1000 + at)
        stage.pass_time(30)
    stage.pass_time(8000)
    assert run.state == DONE
    assert run.found.runs == [Span(0, 490, 1)]


def test_an_epoch_that_is_on_its_way_is_waited_for() -> None:
    stage = written_stage()
    stage.park_frames()
    stage.write_blocks(0, 8, seed=5)
    stage.seal()
    run = start(stage)
    stage.pass_time(3000)
    assert stage.west.sent(VerifyAnswer) == []
    stage.unpark()
    stage.pass_time(8000)
    assert (run.state, run.result) == (DONE, CLEAN)


def test_a_copy_that_is_held_still_by_readers_is_compared_all_the_same() -> None:
    stage = written_stage()
    stage.secondary.set_hold(True, stage.now_ns)
    for at in range(3):
        stage.write_blocks(20, 30, seed=at + 50)
        stage.seal()
    rot(stage, 65)
    run = start(stage, heals=False)
    stage.pass_time(8000)
    assert run.state == DONE
    assert run.found.runs == [Span(0, 65, 1)]
    assert stage.secondary.engine.applied_epoch < stage.secondary.engine.sealed_epoch


def test_a_volume_that_grows_meanwhile_is_compared_with_its_new_blocks() -> None:
    stage = written_stage()
    stage.hold(PEER, "verify")
    run = start(stage)
    stage.grow(1, 40 * BLOCK)
    stage.write_blocks(25, 4, seed=9, volume=1)
    stage.grow(2, 9 * BLOCK + 512)
    stage.pass_time(1000)
    stage.release(PEER)
    stage.pass_time(8000)
    assert (run.state, run.result) == (DONE, CLEAN)
    assert run.found.compared_blocks == ALL_BLOCKS + 20 + 10
    stage.check_in_sync()


# Healing never takes anything back.


def overwritten_while_healing() -> tuple[Stage, VerifyRun]:
    """Block 65 is read to be healed, and written before that is done."""
    stage = written_stage()
    rot(stage, 65)
    stage.hold(PRIMARY, "heal")
    run = start(stage)
    stage.pass_time(2000)
    assert stage.run_held(PRIMARY, "heal", is_done=False) == 1
    stage.write_blocks(65, 1, seed=4321)
    return stage, run


def test_a_write_that_comes_while_a_block_is_being_healed_stands() -> None:
    stage, run = overwritten_while_healing()
    stage.release(PRIMARY)
    stage.pass_time(8000)
    assert (run.state, run.result) == (DONE, HEALED)
    assert stage.primary.engine.read(0, 65 * BLOCK, BLOCK) == noise(4321)
    stage.check_in_sync()


def test_a_write_that_is_destaged_while_a_block_is_being_healed_stands() -> None:
    stage, run = overwritten_while_healing()
    stage.seal()
    stage.pass_time(8000)
    assert stage.primary.engine.applied_epoch == stage.primary.engine.sealed_epoch
    stage.east.waiting[0].job.run = lambda: None  # type: ignore[method-assign]
    stage.release(PRIMARY)
    stage.pass_time(8000)
    assert (run.state, run.result) == (DONE, HEALED)
    assert stage.primary.engine.read(0, 65 * BLOCK, BLOCK) == noise(4321)
    stage.check_in_sync()


def test_zeros_are_healed_with_zeros() -> None:
    stage = written_stage()
    for block in range(20, 40):
        rot(stage, block)
    assert not any(stage.content[0][20 * BLOCK : 40 * BLOCK])
    assert verified(stage).result == HEALED
    stage.check_in_sync()
