"""Stories of flushes that wait for peers: answered when it is true, never before."""

from __future__ import annotations

import errno

from geomirror.environment import SECOND
from geomirror.wan_protocol.sync_policy import SyncPolicy
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

DURABLE = SyncPolicy({PEER: "durable"})


def synchronous(policy: SyncPolicy = DURABLE, *peers: str) -> Stage:
    stage = Stage(*peers)
    stage.primary.set_policy(policy, stage.now_ns)
    stage.settle()
    return stage


def flush(stage: Stage, token: str = "flush") -> None:
    stage.primary.flush(token, stage.now_ns)
    stage.settle()


def answered(stage: Stage) -> list[object]:
    assert all(error is None for _, error in stage.east.flushes)
    return [token for token, _ in stage.east.flushes]


def events(stage: Stage) -> list[str]:
    return [kind for kind in stage.east.event_kinds() if kind.startswith("sync_")]


def test_a_flush_seals_at_once_and_is_answered_when_the_peer_has_it_durable() -> None:
    stage = synchronous()
    began_ns = stage.now_ns
    stage.hold(PEER, "sync")
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    assert stage.primary.engine.sealed_epoch == 1
    assert answered(stage) == []
    stage.release(PEER)
    stage.settle()
    assert answered(stage) == ["flush"]
    assert stage.secondary.engine.sealed_epoch == 1
    assert stage.now_ns == began_ns, "nothing waits for an epoch's age"
    flush(stage, "again")
    assert answered(stage) == ["flush", "again"], "nothing was written: nothing is waited for"


def test_an_applied_flush_waits_for_the_image_of_the_peer() -> None:
    stage = synchronous(SyncPolicy({PEER: "applied"}))
    stage.hold(PEER, "apply")
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    assert stage.secondary.engine.sealed_epoch == 1
    assert answered(stage) == []
    stage.release(PEER)
    stage.pass_time(100)
    assert answered(stage) == ["flush"]
    assert stage.check() == 1


def test_a_received_flush_needs_no_disk_of_the_peer() -> None:
    stage = synchronous(SyncPolicy({PEER: "received"}))
    stage.hold(PEER, "sync")
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.pass_time(50)
    assert stage.secondary.engine.sealed_epoch == 0
    assert answered(stage) == ["flush"]


def test_flushes_that_come_meanwhile_share_the_next_epoch() -> None:
    stage = synchronous()
    stage.hold(PRIMARY, "seal")
    for number in range(6):
        stage.write_blocks(number, 1, seed=number)
        flush(stage, f"flush {number}")
    stage.release(PRIMARY)
    stage.settle()
    assert answered(stage) == [f"flush {number}" for number in range(6)]
    assert stage.primary.engine.sealed_epoch == 2


def test_a_peer_that_is_away_is_given_up_after_the_time_and_that_is_known_first() -> None:
    stage = synchronous()
    stage.link_down()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.pass_time(4_900)
    assert answered(stage) == []
    assert events(stage) == ["sync_restored"]
    stage.hold(PRIMARY, "checkpoint")
    stage.pass_time(200)
    assert events(stage) == ["sync_restored", "sync_degraded"]
    assert answered(stage) == [], "a crash now would not know it"
    stage.release(PRIMARY)
    stage.settle()
    assert answered(stage) == ["flush"]
    assert stage.primary.out_of_sync == [PEER]
    # The next one does not wait at all, and the next life knows.
    stage.write_blocks(4, 4, seed=2)
    flush(stage, "second")
    assert answered(stage) == ["flush", "second"]
    stage.crash(PRIMARY)
    stage.start(PRIMARY, is_connected=False)
    assert stage.primary.engine.superblock.peers[PEER].in_sync is False
    assert stage.primary.out_of_sync == [PEER]


def test_a_peer_is_waited_for_again_once_it_has_caught_up() -> None:
    stage = synchronous()
    stage.link_down()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.pass_time(5_100)
    stage.hold(PEER, "sync")
    stage.link_up()
    stage.pass_time(100)
    assert stage.primary.out_of_sync == [PEER]
    stage.release(PEER)
    stage.pass_time(100)
    assert stage.primary.out_of_sync == []
    assert events(stage) == ["sync_restored", "sync_degraded", "sync_restored"]
    stage.hold(PEER, "sync")
    stage.write_blocks(4, 4, seed=2)
    flush(stage, "second")
    assert answered(stage) == ["flush"]
    stage.release(PEER)
    stage.settle()
    assert answered(stage) == ["flush", "second"]


def test_block_waits_for_ever() -> None:
    stage = synchronous(SyncPolicy({PEER: "durable"}, None, None))
    stage.link_down()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.pass_time(3_600_000)
    assert answered(stage) == []
    stage.link_up()
    stage.pass_time(100)
    assert answered(stage) == ["flush"]
    assert stage.primary.out_of_sync == []


def test_one_copy_of_two_is_enough_when_one_is_asked_for() -> None:
    peers = {PEER: "durable", "colo": "durable"}
    stage = synchronous(SyncPolicy(peers, 1), PEER, "colo")
    stage.link_down("colo")
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    assert answered(stage) == ["flush"]
    assert stage.primary.out_of_sync == []
    stage.link_down(PEER)
    stage.write_blocks(4, 4, seed=2)
    flush(stage, "second")
    stage.pass_time(4_900)
    assert answered(stage) == ["flush"]
    stage.pass_time(200)
    assert answered(stage) == ["flush", "second"]
    assert stage.primary.out_of_sync == ["colo", PEER]


def test_changed_settings_count_for_flushes_that_wait() -> None:
    stage = synchronous()
    stage.link_down()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.pass_time(1000)
    stage.primary.set_policy(SyncPolicy({PEER: "durable"}, None, 2 * SECOND), stage.now_ns)
    stage.settle()
    assert answered(stage) == []
    stage.pass_time(1100)
    assert answered(stage) == ["flush"]


def test_a_removed_peer_is_waited_for_no_more() -> None:
    stage = synchronous(SyncPolicy({PEER: "durable"}, None, None))
    stage.link_down()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.primary.remove_peer(PEER)
    stage.primary.set_policy(SyncPolicy(), stage.now_ns)
    stage.settle()
    assert answered(stage) == ["flush"]


def test_a_peer_in_a_resync_counts_for_nothing() -> None:
    stage = synchronous(SyncPolicy({PEER: "durable"}, None, None))
    stage.overflow()
    stage.hold(PEER, "resync")
    stage.link_up()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.pass_time(60_000)
    assert answered(stage) == []
    stage.release(PEER)
    stage.pass_time(60_000)
    assert answered(stage) == ["flush"]
    stage.check_in_sync()


def test_a_fenced_primary_answers_what_waits_with_the_error() -> None:
    stage = synchronous()
    stage.link_down()
    stage.write_blocks(0, 4, seed=1)
    flush(stage)
    stage.east.store.fail("fdatasync", "journal/*", error=errno.EIO)
    stage.write_blocks(4, 4, seed=2)
    stage.pass_time(300)
    assert stage.primary.fenced is not None
    (token, error), *rest = stage.east.flushes
    assert (token, error, rest) == ("flush", stage.primary.fenced, [])
