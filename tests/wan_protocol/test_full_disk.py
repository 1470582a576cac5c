"""Stories of a secondary whose disk is full, and has room again: who tries again, and when."""

from __future__ import annotations

import errno

from tests.wan_protocol.core_support import PEER, Stage


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
