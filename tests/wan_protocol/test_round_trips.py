"""Stories counted in one-way trips: how soon the first epoch of a session is durable there.

All that one side has sent by then travels together and is one trip, so nothing here depends on a
clock or on this machine. What is told beside the stream (marks, standings) and what is only
remembered (superblock, standing file) must cost the stream no trip and no write.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from geomirror.environment import SECOND
from geomirror.wan_protocol.sync_policy import SyncPolicy
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

DURABLE = SyncPolicy({PEER: "durable"})


def away(policy: SyncPolicy | None = None) -> Stage:
    """A pair that has been connected once; from now on packets take their time."""
    stage = Stage()
    if policy is not None:
        stage.primary.set_policy(policy, stage.now_ns)
    stage.write_epochs(2)
    stage.pass_time(2000)
    stage.link_down()
    far(stage)
    return stage


def far(stage: Stage) -> None:
    stage.is_parked = lambda source, target, what: True


def trips(stage: Stage, is_done: Callable[[], bool]) -> int:
    """One-way trips until it is so."""
    for count in range(20):
        if is_done():
            return count
        assert stage.parked, "both sides wait, and nothing is on its way"
        stage.deliver(list(stage.parked))
    raise AssertionError("too many trips")


def durable_there(stage: Stage, epoch: int) -> Callable[[], bool]:
    return lambda: stage.west.engine.sealed_epoch >= epoch


def durable_known(stage: Stage, epoch: int) -> Callable[[], bool]:
    return lambda: stage.sender().durable_epoch >= epoch


@pytest.mark.parametrize("slow", [(), ("standing",), ("checkpoint",), ("spare", "thin", "trim")])
def test_what_waited_is_durable_three_trips_after_the_link_is_up(slow: tuple[str, ...]) -> None:
    """The offer, its acceptance, the epoch itself; then the word that it is there."""
    stage = away(DURABLE)
    stage.hold(PRIMARY, *slow)
    stage.hold(PEER, *slow)
    # The set is saved again, and told.
    stage.primary.set_policy(SyncPolicy({PEER: "durable"}, None, SECOND), stage.now_ns)
    stage.settle()
    assert stage.primary.is_running("checkpoint") == ("checkpoint" in slow)
    stage.primary.mark("before-upgrade", stage.now_ns, stage.wall_ns)
    stage.write_blocks(0, 4, seed=1)
    epoch = stage.seal()
    stage.link_up()
    assert trips(stage, durable_there(stage, epoch)) == 3
    assert trips(stage, durable_known(stage, epoch)) == 1


def test_a_flush_that_waited_for_the_link_is_answered_after_two_round_trips() -> None:
    stage = away(DURABLE)
    stage.write_blocks(0, 4, seed=1)
    stage.primary.flush("flush", stage.now_ns)
    stage.settle()
    stage.link_up()
    assert trips(stage, lambda: bool(stage.east.flushes)) == 4
    assert stage.east.flushes == [("flush", None)]


def test_a_restart_of_the_primary_costs_no_trip() -> None:
    """In a new life it says everything anew, with another version of what it says."""
    stage = away(DURABLE)
    stage.write_blocks(0, 4, seed=1)
    epoch = stage.seal()
    stage.crash(PRIMARY, is_kill=True)
    stage.hold(PEER, "standing")
    stage.start(PRIMARY)
    assert trips(stage, durable_known(stage, epoch)) == 4


@pytest.mark.parametrize("policy", [None, DURABLE])
def test_in_a_running_session_an_epoch_takes_one_trip(policy: SyncPolicy | None) -> None:
    stage = away(policy)
    stage.link_up()
    stage.unpark()
    stage.pass_time(1500)  # A standing is due with it.
    far(stage)
    stage.hold(PEER, "standing", "checkpoint")
    stage.primary.mark("before-upgrade", stage.now_ns, stage.wall_ns)
    stage.write_blocks(0, 4, seed=1)
    if policy is not None:
        stage.primary.flush("flush", stage.now_ns)
    epoch = stage.seal()
    assert trips(stage, durable_there(stage, epoch)) == 1
    assert trips(stage, durable_known(stage, epoch)) == 1
    assert stage.east.flushes == ([("flush", None)] if policy is not None else [])


def test_a_blank_mirror_of_a_small_volume_is_a_copy_after_four_round_trips() -> None:
    """Offer and acceptance, begin and credit, the blocks, the end."""
    stage = Stage(is_connected=False, first_sync=True)
    far(stage)
    stage.write_blocks(0, 4, seed=1)
    epoch = stage.seal()
    stage.link_up()
    sender = stage.sender()
    count = trips(
        stage,
        lambda: (
            (sender.mode, sender.data_state) == ("Stream", "consistent")
            and sender.applied_epoch >= epoch
        ),
    )
    assert count == 8
    stage.unpark()
    stage.check_in_sync()
