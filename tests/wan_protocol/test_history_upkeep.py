"""Stories of history that has no room, or is damaged: it is told, and everything else goes on."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from geomirror.limits import KIB, SIMULATION
from geomirror.volume.points import points_of
from geomirror.wan_protocol.history_upkeep import loss_marks
from tests.wan_protocol.core_support import PEER, Stage
from tests.wan_protocol.test_mark_stories import check_state, mark
from tests.wan_protocol.test_resync_held import check_at, held_stage


def events(stage: Stage, kind: str, node: str = PEER) -> int:
    return stage.nodes[node].event_kinds().count(kind)


def point_epochs(stage: Stage) -> list[int]:
    engine = stage.secondary.engine
    found = points_of(engine.undo.history, engine.applied_epoch, 0, engine.marks.table)
    return [each.epoch for each in found]


def test_a_full_disk_costs_history_and_says_so_and_which_marks() -> None:
    stage = Stage()
    stage.write_epochs(2)
    made = mark(stage, "before-upgrade")
    stage.write_epochs(2, seed=7)
    stage.pass_time(500)
    assert made.epoch in point_epochs(stage)
    stage.west.store.fail("pwritev", "undo/*", error=errno.ENOSPC, count=4)
    stage.write_epochs(1, seed=9)
    stage.pass_time(500)
    stage.west.store.faults.clear()
    assert events(stage, "mark_lost") == 1
    assert events(stage, "history_dropped") >= 1
    assert [each.name for each in loss_marks(stage.secondary.engine)] == ["before-upgrade"]
    assert stage.secondary.stalled is None, "going on is worth more"
    (found,) = stage.secondary.engine.undo.history.unusable(stage.secondary.engine.applied_epoch)
    assert "the disk was full" in found.reason
    stage.write_epochs(2, seed=11)
    stage.pass_time(500)
    stage.check_in_sync()


def test_a_used_up_budget_is_told_now_and_then_not_with_every_pass() -> None:
    limits = replace(SIMULATION, undo_bytes_max=64 * KIB)
    stage = Stage(limits=limits)
    for at in range(20):
        stage.write_epochs(1, seed=at)
        stage.pass_time(300)
    assert events(stage, "history_dropped") == 1
    stage.pass_time(3_600_000)
    for at in range(6):
        stage.write_epochs(1, seed=at)
        stage.pass_time(300)
    assert events(stage, "history_dropped") == 2
    assert point_epochs(stage)[-1] == stage.secondary.engine.applied_epoch


def test_damage_that_a_round_finds_is_told_once_and_replication_goes_on() -> None:
    stage = Stage(limits=replace(SIMULATION, undo_levels=((1, 1 << 60), (2, 1 << 61))))
    for at in range(4):
        stage.write_epochs(1, seed=at)
        stage.pass_time(300)
    undo = stage.secondary.engine.undo
    info = next(each for each in undo.passes()[1:] if each.raw_bytes)
    stage.west.store.flip_bit(info.name, 8 * 140)
    for _ in range(30):
        stage.write_epochs(1, seed=50)
        stage.pass_time(11_000)
    assert events(stage, "history_damaged") == 1
    assert any(info.to_epoch == each.to_epoch for each in undo.history.unusable(1 << 40))
    stage.check_in_sync()
    stage.restart(PEER, is_kill=True)
    stage.pass_time(11_000)
    stage.write_epochs(1, seed=60)
    stage.pass_time(1000)
    stage.check_in_sync()
    assert stage.secondary.engine.undo.history.unusable(stage.secondary.engine.applied_epoch)


@pytest.mark.parametrize("skip", range(0, 16, 3))
def test_a_disk_that_is_full_somewhere_in_a_resync_keeps_the_state_from_before(skip: int) -> None:
    stage = held_stage()
    stage.west.store.fail("pwritev", "*", error=errno.ENOSPC, skip=skip, count=4)
    for _ in range(40):
        stage.unpark(1)
        stage.pass_time(400)
        if stage.secondary.data_state != "consistent":
            check_at(stage, 2)
    stage.west.store.faults.clear()
    stage.unpark()
    stage.pass_time(30_000)
    stage.check_in_sync()
    check_at(stage, 2)
    assert stage.sender().counters.resyncs == 1
    assert stage.secondary.stalled is None


def test_marks_stay_in_order_whatever_the_clock_does() -> None:
    stage = Stage()
    made = []
    for number, step_s in enumerate((0, -3600, 86_400, -86_400, 0)):
        stage.primary._last_wall_ns += step_s * 10**9
        stage.write_blocks(number * 4, 4, seed=number)
        made.append(mark(stage, f"m{number}"))
        stage.pass_time(500)
    for node in stage.nodes.values():
        found = node.engine.marks.table.marks()
        assert [each.name for each in found] == [each.name for each in made]
        assert [each.epoch for each in found] == sorted(each.epoch for each in found)
    for each in made[:-1]:
        check_state(stage, each.epoch)
