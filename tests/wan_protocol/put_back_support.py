"""Disks of a stage that are put back to an older state."""

from __future__ import annotations

from tests.sim.disk import SimStore
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage


def put_back_primary(stage: Stage, epochs_after: int, *, seed: int = 77) -> None:
    """The primary's disk is as it was, and it writes something else before it is reached."""
    store = stage.snapshot(PRIMARY)
    stage.write_epochs(4, seed=5)
    stage.pass_time(1000)
    stage.check_in_sync()
    stage.crash(PRIMARY, is_kill=True)
    stage.nodes[PRIMARY].store = store
    stage.start(PRIMARY, is_connected=False)
    stage.write_epochs(epochs_after, seed=seed)
    stage.pass_time(1000)


def disk_of_copy(stage: Stage) -> SimStore:
    """What the copy's disk holds after a few epochs."""
    stage.write_epochs(3)
    stage.pass_time(1000)
    return stage.snapshot(PEER)


def put_back_copy(stage: Stage, store: SimStore) -> None:
    """The copy has an older disk and a session; nothing of what it lacks has come yet."""
    stage.park_frames()
    stage.restore(PEER, store)
    stage.pass_time(100)
