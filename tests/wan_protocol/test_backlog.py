"""What counts as a peer's backlog, over restarts of the primary."""

from __future__ import annotations

import pytest

from geomirror.limits import KIB
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, Stage


def backlog_part(stage: Stage) -> float:
    engine = stage.primary.engine
    return engine.bytes_backlog(stage.sender().durable_epoch) / engine.journal.bytes_total


def modes(stage: Stage) -> list[object]:
    return [fields["mode"] for kind, fields in stage.east.events if kind == "peer_mode"]


@pytest.mark.parametrize("is_kill", [True, False])
def test_what_a_restart_leaves_of_a_segment_is_no_backlog(is_kill: bool) -> None:
    """Up to a whole segment, which is a quarter of the smallest journal."""
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(1)
    stage.pass_time(20_000)
    engine = stage.primary.engine
    assert engine.applied_epoch == engine.sealed_epoch == stage.sender().durable_epoch
    stage.restart(PRIMARY, is_kill=is_kill)
    stage.link_down()
    stage.write_epochs(1, blocks=4)
    # All of it is destaged, so neither does it take room.
    assert backlog_part(stage) < 0.05
    assert modes(stage) == []


def test_restarts_without_a_write_leave_the_tail_of_a_copy_as_long_as_it_is() -> None:
    stage = Stage(journal_bytes=2048 * KIB)
    for _ in range(4):
        stage.write_epochs(1, blocks=4)
    stage.pass_time(5000)
    for _ in range(4):
        engine = stage.secondary.engine
        assert 4 * BLOCK < engine.bytes_recorded(engine.sealed_epoch - 1) < 5 * BLOCK
        stage.restart(PEER, is_kill=False)


def test_a_backlog_over_restarts_is_what_there_is_to_send() -> None:
    stage = Stage(journal_bytes=2048 * KIB)
    stage.write_epochs(1)
    for _ in range(3):
        stage.link_down()
        stage.write_epochs(1, blocks=4)
        stage.pass_time(20_000)
        stage.crash(PRIMARY)
        stage.start(PRIMARY, is_connected=False)
    stage.write_epochs(1, blocks=4)
    engine, durable_epoch = stage.primary.engine, stage.sender().durable_epoch
    assert engine.sealed_epoch == durable_epoch + 4
    # The room that it takes counts for the overflow: segments are freed whole.
    assert backlog_part(stage) > 0.25
    assert 4 * 4 * BLOCK < engine.bytes_recorded(durable_epoch) < 6 * 4 * BLOCK
    assert stage.sender().mode == "Stream"
    stage.link_up()
    stage.pass_time(5000)
    stage.check_in_sync()
    assert modes(stage) == []
