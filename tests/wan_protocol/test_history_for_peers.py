"""Stories of what a primary's undo is kept for: whoever is promoted, it can come back from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from geomirror.environment import SECOND
from geomirror.errors import RefusedError
from geomirror.limits import KIB, SIMULATION
from geomirror.node.history_report import history_object
from geomirror.volume.undo_history import History
from geomirror.volume.undo_label import PassInfo
from geomirror.wan_protocol.history_upkeep import peers_out_of_reach, reach_floor
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

BUDGET = 192 * KIB
LIMITS = replace(SIMULATION, undo_bytes_max=BUDGET)
GENERATION = bytes(16)


def alone(is_enough: Callable[[Stage], bool], *peers: str) -> tuple[Stage, int]:
    """A primary that goes on while its first peer is away, writing over what is there, until that
    is enough; and the epoch that the peer has."""
    stage = Stage(*peers, limits=LIMITS)
    for at in range(8):
        stage.write_blocks(64 * at, 64, seed=at)
        stage.seal()
        stage.pass_time(500)
    stage.pass_time(5000)
    name = stage.peers[0]
    common = stage.sender(name).durable_epoch
    assert stage.primary.engine.applied_epoch == common
    stage.link_down(name)
    for at in range(60):
        write_over(stage, at)
        if is_enough(stage):
            return stage, common
    raise AssertionError("it is never enough")


def write_over(stage: Stage, at: int) -> None:
    """32 KiB more of before-images, of blocks of their own."""
    stage.write_blocks(8 * at, 8, seed=500 + at)
    stage.seal()
    stage.pass_time(4000)


def stored(stage: Stage) -> float:
    return stage.primary.engine.undo.stored_bytes() / BUDGET


def horizon(stage: Stage) -> int:
    engine = stage.primary.engine
    return engine.undo.history.horizon(engine.applied_epoch)


def go_back(stage: Stage, epoch: int) -> int:
    engine = stage.primary.engine
    target, _ = engine.retreat_point(epoch)
    engine.roll_back(target, "orphan", wall_ns=stage.wall_ns, may_shrink=True)
    for volume, content in stage.at_epoch[target].items():
        assert engine.read(volume, 0, len(content)) == content
    return target


def test_a_failback_goes_back_to_the_peer_over_more_than_the_budget() -> None:
    stage, common = alone(lambda stage: stored(stage) >= 1.6)
    engine = stage.primary.engine
    since = [each for each in engine.undo.passes() if each.to_epoch > common]
    assert sum(each.stored_bytes for each in since) > 1.4 * BUDGET, "the divergence"
    assert horizon(stage) <= common
    assert peers_out_of_reach(engine) == []
    assert go_back(stage, common) <= common


def test_it_is_kept_over_a_restart_of_the_primary() -> None:
    stage, common = alone(lambda stage: stored(stage) >= 1.2)
    stage.crash(PRIMARY, is_kill=True)
    stage.start(PRIMARY, is_connected=False)
    for at in range(50, 53):
        write_over(stage, at)
    assert 1.5 < stored(stage) <= 2
    assert horizon(stage) <= common
    assert go_back(stage, common) <= common


def test_twice_the_budget_is_the_end_and_an_alarm_names_the_peer() -> None:
    most = [0.0]

    def is_given_up(stage: Stage) -> bool:
        most[0] = max(most[0], stored(stage))
        return horizon(stage) > stage.sender().durable_epoch

    stage, common = alone(is_given_up)
    engine = stage.primary.engine
    assert 1.7 < most[0] <= 2
    assert peers_out_of_reach(engine) == [(PEER, common)]
    alarm = history_object(engine, LIMITS)["alarm"]
    assert f'"{PEER}" has (epoch {common})' in alarm
    assert "history_dropped" in stage.east.event_kinds()
    with pytest.raises(RefusedError, match="make this copy anew"):
        engine.retreat_point(common)
    stage.link_up()
    stage.pass_time(20_000)
    stage.check_in_sync()
    assert peers_out_of_reach(engine) == []


def test_the_peer_that_is_furthest_behind_counts_and_one_that_left_does_not() -> None:
    stage, common = alone(lambda stage: stored(stage) >= 1.2, "west", "south")
    engine = stage.primary.engine
    assert stage.sender("south").durable_epoch > common
    assert engine.undo.needed_epochs()
    assert min(engine.undo.needed_epochs()) <= common
    stage.primary.remove_peer("west")
    stage.settle()
    assert engine.undo._floors["peers"] == stage.sender("south").durable_epoch


def test_a_peer_that_never_had_a_state_holds_nothing_back() -> None:
    stage = Stage(first_sync=True, is_connected=False, limits=LIMITS)
    stage.write_epochs(2)
    stage.pass_time(5000)
    assert "peers" not in stage.primary.engine.undo._floors
    assert peers_out_of_reach(stage.primary.engine) == []


def test_during_a_resync_it_is_the_state_that_the_peer_holds() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.pass_time(5000)
    common = stage.sender().durable_epoch
    stage.overflow()
    stage.park_frames()
    stage.link_up()
    stage.pass_time(4000)
    assert stage.sender().mode == "Resync"
    assert stage.primary.engine.undo._floors["peers"] == common
    stage.unpark()
    stage.pass_time(20_000)
    stage.write_epochs(1)
    stage.pass_time(5000)
    stage.check_in_sync()
    assert stage.primary.engine.undo._floors["peers"] > common


def test_the_last_hour_is_the_newest_point_that_is_so_old() -> None:
    """By the time between points: a clock that jumps makes nothing old."""

    def passes(*walls_s: int) -> History:
        found = [
            PassInfo(GENERATION, at, at + 1, wall * SECOND, name=f"undo/{at}.und")
            for at, wall in enumerate(walls_s)
        ]
        return History(tuple(found), 0)

    hour = 3600 * SECOND
    steps = [at * 60 for at in range(100)]
    assert reach_floor(passes(*steps), 100, hour) == 40, "its time is an hour before the last"
    assert reach_floor(passes(*steps[:30]), 30, hour) == 0
    assert reach_floor(passes(*(100_000 * at for at in range(5))), 5, hour) == 0
    assert reach_floor(History((), 0), 7, hour) == 7
