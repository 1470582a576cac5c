"""Stories of a journal whose newest segment file is gone at the start: that is noticed."""

from __future__ import annotations

from dataclasses import replace as replaced

import pytest

from geomirror.errors import FencedError
from geomirror.limits import MIB, SIMULATION
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

LIMITS = replaced(SIMULATION, dirty_bytes_max=8 * MIB)
"""So that nothing is destaged."""


def newest_segment(stage: Stage, name: str) -> str:
    return max(n for n in stage.nodes[name].store.names() if n.endswith(".seg") and "/0" in n)


def lose_newest(stage: Stage, name: str) -> str:
    """Kill a machine and take its newest segment away; returns what the start says of it."""
    segment = newest_segment(stage, name)
    stage.crash(name, is_kill=True)
    stage.nodes[name].store.unlink(segment)
    with pytest.raises(FencedError, match="missing") as caught:
        stage.start(name)
    return str(caught.value)


def test_a_primary_misses_the_newest_segment_once_a_flush_was_answered_from_it() -> None:
    stage = Stage(is_connected=False, limits=LIMITS)
    before = newest_segment(stage, PRIMARY)
    for at in range(100):
        stage.write_blocks(at * 4 % 400, 4, seed=at)
        if newest_segment(stage, PRIMARY) != before:
            break
    stage.primary.flush("token", stage.now_ns)
    stage.settle()
    assert stage.east.flushes == [("token", None)]
    stage.pass_time(150)
    assert stage.primary.engine.applied_epoch == 0, "no pass has told the superblock"
    segment = newest_segment(stage, PRIMARY)
    assert f"{segment} is missing" in lose_newest(stage, PRIMARY)


def test_a_secondary_misses_the_newest_segment_of_what_it_called_durable() -> None:
    stage = Stage(peer_journal_bytes=4096 * 1024)
    stage.secondary.set_hold(True, stage.now_ns)
    before = newest_segment(stage, PEER)
    while newest_segment(stage, PEER) == before:
        stage.write_epochs(1, blocks=8, seed=stage.primary.engine.sealed_epoch)
    stage.pass_time(50)
    assert stage.secondary.engine.applied_epoch == 0
    assert stage.sender().durable_epoch == stage.primary.engine.sealed_epoch
    segment = newest_segment(stage, PEER)
    assert f"{segment} is missing" in lose_newest(stage, PEER)


def test_the_segment_that_a_start_goes_on_in_is_missed_too() -> None:
    stage = Stage(is_connected=False)
    stage.write_blocks(0, 4, seed=1)
    stage.restart(PRIMARY, is_kill=True)
    assert "missing" in lose_newest(stage, PRIMARY)


def test_a_segment_that_a_power_cut_took_before_its_first_sync_is_not_missed() -> None:
    stage = Stage(is_connected=False)
    stage.hold(PRIMARY, "sync")
    before = newest_segment(stage, PRIMARY)
    while newest_segment(stage, PRIMARY) == before:
        stage.write_blocks(0, 4, seed=1)
    stage.restart(PRIMARY)
    stage.write_epochs(2, seed=9)
    assert stage.primary.fenced is None
