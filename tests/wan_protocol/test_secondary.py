"""Stories of the secondary: a crash at every point, readers, refusals, a full or failing disk."""

from __future__ import annotations

import errno

import pytest

from geomirror.wan_protocol.decisions import SendMessage
from geomirror.wan_protocol.messages import (
    Acknowledge,
    SessionAccept,
)
from tests.wan_protocol.core_support import (
    BLOCK,
    PEER,
    PRIMARY,
    Stage,
    noise,
)


def last_accept(stage: Stage) -> SessionAccept:
    return stage.west.sent(SessionAccept)[-1]


def test_spooled_frames_are_lost_by_a_power_cut_and_sent_again() -> None:
    stage = Stage()
    stage.park_all()
    stage.write_blocks(0, 30, seed=1)
    stage.seal()
    stage.deliver(stage.parked_frames())
    assert stage.secondary.incoming
    stage.is_parked = lambda source, target, what: False
    stage.restart(PEER)
    assert last_accept(stage).spooled == []
    stage.pass_time(100)
    stage.check_in_sync()


def test_a_committed_epoch_that_was_not_synced_is_taken_again() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.hold(PEER, "sync")
    stage.write_epochs(1, seed=5)
    assert stage.secondary.engine.committed_epoch == 2
    assert stage.secondary.engine.sealed_epoch == 1
    assert stage.sender().durable_epoch == 1, "not said before it is true"
    stage.restart(PEER)
    assert last_accept(stage).durable_epoch == 1
    stage.check_in_sync()


def test_a_session_opens_with_the_position_that_stands() -> None:
    stage = Stage()
    stage.hold(PEER, "sync")
    stage.write_epochs(2)
    accepts = len(stage.west.sent(SessionAccept))
    # Another life of the primary may fold otherwise; it must not begin inside what is committed.
    stage.restart(PRIMARY, is_kill=True)
    assert len(stage.west.sent(SessionAccept)) == accepts, "not before the sync"
    stage.write_epochs(1, seed=9)
    stage.release(PEER)
    assert last_accept(stage).durable_epoch == 2
    stage.pass_time(1500)
    stage.check_in_sync()
    assert stage.errors == []


def test_a_durable_epoch_that_was_not_applied_is_applied_after_the_restart() -> None:
    stage = Stage()
    stage.hold(PEER, "apply")
    stage.write_epochs(3)
    assert stage.sender().durable_epoch == 3
    assert stage.secondary.engine.applied_epoch == 0
    frames = len(stage.east.frames)
    stage.restart(PEER)
    assert last_accept(stage).durable_epoch == 3
    stage.pass_time(100)
    assert len(stage.east.frames) == frames, "nothing is sent again"
    stage.check_in_sync()


@pytest.mark.parametrize("is_kill", [True, False])
def test_a_half_applied_pass_is_repeated_before_anything_else(is_kill: bool) -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.hold(PEER, "apply")
    stage.write_blocks(0, 8, seed=5)
    stage.seal()
    stage.west.store.fail("pwritev", "volumes/*", skip=0, error=errno.ENOSPC)
    stage.trim(3 * BLOCK, BLOCK)
    stage.write(2 * BLOCK, noise(77))
    stage.write_blocks(300, 3, seed=6)
    stage.west.store.faults.clear()
    stage.west.store.fail("pwritev", "volumes/*", skip=1, error=errno.ENOSPC)
    stage.seal()
    stage.run_held(PEER, "apply")
    stage.restart(PEER, is_kill=is_kill)
    stage.pass_time(100)
    stage.check_in_sync()


def test_an_applied_pass_that_was_not_checkpointed_is_applied_again() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.hold(PEER, "checkpoint")
    stage.write_epochs(2, seed=5)
    assert stage.secondary.engine.applied_epoch > 1
    assert stage.sender().applied_epoch == 1, "applied is said when it is persisted"
    stage.restart(PEER)
    assert stage.check() >= 2
    stage.check_in_sync()


@pytest.mark.parametrize("kind", ["sync", "apply", "checkpoint"])
def test_a_crash_between_a_job_and_the_news_of_it(kind: str) -> None:
    stage = Stage()
    stage.write_epochs(2)
    stage.hold(PEER, kind)
    stage.write_epochs(2, seed=5)
    assert stage.run_held(PEER, kind, is_done=False) == 1
    stage.restart(PEER)
    stage.pass_time(100)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


@pytest.mark.parametrize("count", range(1, 40, 3))
def test_a_power_cut_at_any_disk_operation(count: int) -> None:
    class PowerCutError(BaseException):
        pass

    stage = Stage()
    stage.write_epochs(1)
    left = [count]

    def cut(operation: str, name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise PowerCutError

    stage.west.store.on_operation = cut
    try:
        stage.write_epochs(2, seed=5)
        stage.pass_time(100)
    except PowerCutError:
        stage.west.store.on_operation = None
        stage.west.is_alive = True
        stage.restart(PEER)
    stage.west.store.on_operation = None
    stage.write_epochs(1, seed=9)
    stage.pass_time(1500)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_hold_keeps_the_image_still_while_epochs_become_durable() -> None:
    stage = Stage()
    stage.write_epochs(2)
    before = stage.image()
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(4, seed=5)
    stage.pass_time(5000)
    assert stage.sender().durable_epoch == 6
    assert stage.sender().applied_epoch == 2
    assert stage.image() == before
    assert stage.check() == 2
    stage.secondary.set_hold(False, stage.now_ns)
    stage.settle()
    stage.check_in_sync()


def test_a_pass_that_a_full_disk_stopped_leaves_no_settled_image() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.west.store.fail("pwritev", "volumes/*", error=errno.ENOSPC, count=2)
    stage.write_epochs(1, seed=5)
    assert not stage.secondary.is_image_settled
    # A reader that comes now must not keep the half-applied image as it is.
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(1, seed=9)
    stage.pass_time(3000)
    assert stage.secondary.is_image_settled
    assert stage.check() == 2, "the pass was repeated as it was, and no other one begun"
    stage.secondary.set_hold(False, stage.now_ns)
    stage.settle()
    stage.check_in_sync()


@pytest.mark.parametrize(
    ("operation", "pattern"),
    [
        ("pwritev", "undo/*"),
        ("pwritev", "volumes/*"),
        ("pwritev", "superblock"),
        ("pwritev", "journal/*"),
    ],
)
def test_a_full_disk_stalls_and_goes_on_by_itself(operation: str, pattern: str) -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.west.store.fail(operation, pattern, error=errno.ENOSPC, count=3)
    stage.write_epochs(2, seed=5, blocks=8)
    stage.pass_time(8000)
    assert stage.secondary.fenced is None
    events = stage.west.event_kinds()
    assert "storage_full" in events or "spool_full" in events
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_a_disk_that_is_full_at_the_commit_stalls_and_goes_on() -> None:
    stage = Stage()
    stage.park_all()
    stage.write_blocks(0, 8, seed=1)
    stage.seal()
    stage.deliver(stage.parked_frames())
    stage.west.store.fail("pwritev", "journal/*", error=errno.ENOSPC)
    stage.unpark()
    assert stage.west.events[-1][0] == "storage_full"
    assert stage.west.events[-1][1]["job"] == "commit"
    assert stage.secondary.stalled is not None
    stage.pass_time(999)
    assert stage.secondary.engine.committed_epoch == 0
    stage.pass_time(1)
    assert stage.secondary.stalled is None
    stage.check_in_sync()


@pytest.mark.parametrize("pattern", ["journal/*", "volumes/*", "undo/*", "superblock"])
def test_a_failed_sync_fences_the_secondary_and_a_restart_mends_it(pattern: str) -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.west.store.fail("fdatasync", pattern)
    stage.write_epochs(1, seed=5)
    assert stage.secondary.fenced is not None
    assert stage.west.event_kinds().count("fenced") == 1
    assert "stopped serving" in stage.sender().refusal
    durable = stage.sender().durable_epoch
    stage.write_epochs(1, seed=9)
    stage.pass_time(5000)
    assert stage.sender().durable_epoch == durable, "nothing is answered as done any more"
    stage.restart(PEER)
    assert stage.secondary.engine.sealed_epoch >= durable
    stage.pass_time(1000)
    stage.check_in_sync()


def test_an_orderly_stop_applies_what_is_durable() -> None:
    stage = Stage()
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(3)
    assert not stage.secondary.is_open or stage.secondary.engine.applied_epoch == 0
    stage.secondary.stop(stage.now_ns)
    stage.settle()
    assert stage.secondary.is_settled
    assert stage.check() == 3


def test_acknowledgements_never_go_back_within_a_session() -> None:
    stage = Stage()
    stage.write_epochs(6)
    stage.pass_time(100)
    acks = stage.west.sent(Acknowledge)
    for field in ("received_epoch", "durable_epoch", "applied_epoch", "received_bytes"):
        values = [getattr(ack, field) for ack in acks]
        assert values == sorted(values), field
    for ack in acks:
        assert ack.applied_epoch <= ack.durable_epoch <= ack.received_epoch
    assert isinstance(stage.west.messages[0], SessionAccept)
    assert not isinstance(stage.west.messages[0], SendMessage)
