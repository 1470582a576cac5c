"""Stories of a secondary whose disk is full, and has room again: who tries again, and when."""

from __future__ import annotations

import errno

from geomirror.wan_protocol.messages import ResyncBegin, ResyncEnd
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage


def test_what_a_full_disk_stopped_is_applied_without_another_message() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.hold(PEER, "apply")
    stage.write_epochs(1, seed=3)
    disk = stage.west.store
    for seed in (5, 9):
        # A frame finds no room while a pass runs; the pass fails, too, before it is asked for.
        disk.fail("pwritev", "journal/*", error=errno.ENOSPC)
        stage.write_epochs(2, seed=seed)
        stage.pass_time(500)
        disk.fail("pwritev", "volumes/*", error=errno.ENOSPC)
        stage.run_held(PEER, "apply")
        stage.pass_time(1100)
        assert stage.west.waiting, "it is tried again"
    assert stage.west.event_kinds().count("storage_full") == 2
    assert stage.secondary.engine.sealed_epoch == 6
    # There is room again, and nobody writes any more.
    stage.release(PEER)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_secondary_that_cannot_spool_says_so_until_it_can() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.west.store.fail("pwritev", "journal/*", error=errno.ENOSPC, count=4)
    stage.write_epochs(1, seed=5)
    assert "journal" in str(stage.secondary.stalled)
    stage.pass_time(2500)
    assert stage.secondary.stalled is not None
    stage.pass_time(600)
    assert stage.secondary.stalled is None
    stage.check_in_sync()


def test_attempts_to_commit_do_not_put_off_what_makes_room() -> None:
    stage = Stage()
    stage.park_all()
    stage.write_blocks(0, 1, seed=1)
    stage.seal()
    stage.deliver(stage.parked_frames())
    (commit,) = stage.parked_commits()
    stage.west.store.fail("pwritev", "journal/*", error=errno.ENOSPC, count=99)
    pumps: list[int] = []
    secondary = stage.secondary
    real = secondary._pump_upkeep

    def pump_upkeep() -> None:
        pumps.append(stage.now_ns)
        real()

    secondary._pump_upkeep = pump_upkeep  # type: ignore[method-assign]
    for _ in range(30):
        stage.deliver([commit])
        stage.pass_time(100)
    assert len(pumps) >= 2, "trims are looked for once a second, whatever arrives"
    stage.west.store.faults.clear()
    stage.unpark()
    stage.pass_time(1500)
    stage.check_in_sync()


def test_a_resync_without_any_frame_begins_after_a_sync_that_sealed_nothing() -> None:
    stage = Stage()
    stage.write_epochs(2)
    stage.hold(PEER, "sync")
    secondary = stage.secondary
    secondary._reclaim()
    secondary.handle_timer(stage.now_ns)
    stage.settle()
    assert stage.west.waiting
    engine, session = stage.primary.engine, secondary.session
    epoch, chain_hash = engine.sealed_epoch, engine.sealed_hash
    begin = ResyncBegin(session, engine.generation, epoch, chain_hash, 0, 7)
    end = ResyncEnd(session, 7, epoch, 0)
    for message in (begin, end):
        secondary.receive(PRIMARY, message, stage.now_ns)
    stage.settle()
    assert secondary.resync is not None
    stage.release(PEER)
    stage.pass_time(2000)
    assert secondary.resync is None
    assert secondary.data_state == "consistent"
