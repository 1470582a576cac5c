"""Stories of a disk that is put back to an older state under its node: it does not win."""

from __future__ import annotations

import pytest

from geomirror.volume.superblock import StartRecord
from geomirror.wan_protocol.messages import SessionRefuse, StartEntry
from geomirror.wan_protocol.primary_starts import (
    STARTS_MAX,
    add_start,
    follow_starts,
    lost_epochs,
    start_entries,
)
from geomirror.wan_protocol.sync_policy import parse_policy
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


@pytest.mark.parametrize("epochs_after", [0, 2, 4, 9, 60])
@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_a_primary_that_lost_epochs_is_refused_whatever_it_has_by_now(
    epochs_after: int, restarts: int
) -> None:
    """Also when its journal does not reach back any more, so that no hash can be compared."""
    stage = Stage(journal_bytes=1024 * 1024)
    stage.write_epochs(3)
    stage.pass_time(1000)
    before = stage.secondary.engine.sealed_epoch
    put_back_primary(stage, epochs_after)
    for _ in range(restarts):
        stage.crash(PRIMARY, is_kill=True)
        stage.start(PRIMARY, is_connected=False)
        stage.write_epochs(1, seed=200)
    held = stage.secondary.engine.sealed_epoch
    image, undo = stage.image(), stage.secondary.engine.undo.passes()
    assert held == before + 4
    stage.link_up()
    stage.pass_time(60_000)
    assert "put back to an older state" in stage.secondary.refusal
    assert f"epoch {held}" in stage.secondary.refusal or f"-{held}" in stage.secondary.refusal
    assert "put back to an older state" in stage.sender().refusal
    assert not stage.sender().is_open
    assert (stage.secondary.engine.sealed_epoch, stage.image()) == (held, image)
    assert stage.secondary.engine.undo.passes() == undo
    assert stage.secondary.data_state == "consistent"
    # Nor after a restart of the copy.
    stage.restart(PEER, is_kill=True)
    stage.pass_time(60_000)
    assert "put back" in stage.secondary.refusal
    assert stage.secondary.engine.sealed_epoch == held


def test_a_primary_that_lost_epochs_is_refused_by_the_state_of_its_bitmap_too() -> None:
    """The bits that it has speak of another history than the copy has."""
    stage = Stage(journal_bytes=1024 * 1024)
    stage.write_epochs(3)
    stage.pass_time(1000)
    put_back_primary(stage, 0)
    stage.overflow()
    held, image = stage.secondary.engine.sealed_epoch, stage.image()
    while stage.primary.engine.sealed_epoch <= held:
        stage.write_epochs(1, seed=90)
    assert stage.sender().mode == "Bitmap"
    stage.link_up()
    stage.pass_time(120_000)
    assert "put back" in stage.sender().refusal
    assert (stage.secondary.engine.sealed_epoch, stage.image()) == (held, image)


def test_an_honest_primary_is_followed_through_any_number_of_restarts() -> None:
    stage = Stage()
    for at in range(2 * STARTS_MAX):
        stage.write_epochs(1, seed=at)
        if at % 3 == 0:
            stage.link_down()
            stage.write_epochs(1, seed=at + 1)
        stage.restart(PRIMARY, is_kill=at % 2 == 0)
        if at % 5 == 0:
            stage.restart(PEER, is_kill=at % 2 == 1)
    stage.pass_time(2000)
    stage.check_in_sync()
    assert len(stage.secondary.engine.superblock.starts) == STARTS_MAX
    assert not stage.sender().refusal


def test_a_copy_that_was_away_for_more_starts_than_are_listed_comes_back() -> None:
    stage = Stage()
    stage.write_epochs(2)
    stage.pass_time(500)
    stage.link_down()
    for at in range(STARTS_MAX + 3):
        stage.crash(PRIMARY, is_kill=True)
        stage.start(PRIMARY, is_connected=False)
        if at % 10 == 0:
            stage.write_epochs(1, seed=at + 3)
    stage.link_up()
    stage.pass_time(3000)
    stage.check_in_sync()


def test_a_start_is_durable_before_a_session_is_offered() -> None:
    stage = Stage(is_connected=False)
    stage.crash(PRIMARY, is_kill=True)
    node = stage.nodes[PRIMARY]
    stage.hold(PRIMARY, "checkpoint")
    stage.start(PRIMARY, is_connected=False)
    stage.link_up()
    stage.pass_time(200)
    assert not stage.sender().is_open
    assert node.waiting or node.held
    stage.release(PRIMARY)
    stage.pass_time(200)
    assert stage.sender().is_open


@pytest.mark.parametrize("is_synchronous", [False, True])
def test_a_copy_that_has_less_than_it_said_is_noticed_and_brought_up_to_date(
    is_synchronous: bool,
) -> None:
    stage = Stage()
    if is_synchronous:
        stage.primary.set_policy(parse_policy({"ack": "durable"}, [PEER]), stage.now_ns)
    stage.write_epochs(3)
    stage.pass_time(1000)
    store = stage.snapshot(PEER)
    stage.write_epochs(4, seed=5)
    stage.pass_time(1000)
    said = stage.sender().durable_epoch
    assert stage.primary.is_in_sync(PEER) is is_synchronous
    stage.park_frames()
    stage.restore(PEER, store)
    stage.pass_time(100)
    assert stage.sender().gone_back_from == said
    assert stage.east.event_kinds().count("peer_gone_back") == 1
    assert not stage.primary.is_in_sync(PEER), "confirmed writes are not there"
    stage.unpark()
    stage.pass_time(2000)
    stage.check_in_sync()
    assert stage.sender().gone_back_from == 0
    assert stage.primary.is_in_sync(PEER) is is_synchronous
    assert stage.sender().counters.resyncs == 0


def test_the_word_of_a_copy_outlives_the_primary() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.pass_time(1000)
    store = stage.snapshot(PEER)
    said = stage.write_epochs(4, seed=5)
    stage.pass_time(40_000)
    stage.restart(PRIMARY, is_kill=True)
    stage.pass_time(1000)
    stage.park_frames()
    stage.restore(PEER, store)
    stage.pass_time(100)
    assert stage.sender().gone_back_from == said


def test_a_copy_that_crashes_has_what_it_said_and_is_not_suspected() -> None:
    stage = Stage()
    for at in range(6):
        stage.write_epochs(2, seed=at)
        stage.pass_time(300 if at % 2 else 5)
        stage.restart(PEER)
    stage.pass_time(2000)
    stage.check_in_sync()
    assert "peer_gone_back" not in stage.east.event_kinds()


def entries(*starts: tuple[int, int]) -> list[StartEntry]:
    return [
        StartEntry(bytes([name] * 16), epoch, bytes([epoch % 256] * 32)) for name, epoch in starts
    ]


@pytest.mark.parametrize(
    ("mine", "theirs", "epoch", "said"),
    [
        ([(1, 0)], [(1, 0)], 100, ""),
        ([(1, 0)], [(1, 0), (2, 100)], 100, ""),
        ([(1, 0)], [(1, 0), (2, 120), (3, 130)], 100, ""),
        ([(1, 0)], [(1, 0), (2, 60)], 100, "it began at epoch 60, and has lost 61-100"),
        ([(1, 0)], [(1, 0), (2, 60), (3, 500)], 100, "it began at epoch 60, and has lost 61-100"),
        ([(1, 0), (2, 50)], [(1, 0), (3, 40)], 100, "it began at epoch 40, and has lost 41-100"),
        ([(1, 0), (2, 50)], [(1, 0), (2, 50), (3, 90)], 80, ""),
        ([(1, 0), (2, 50)], [(3, 40)], 100, "it began at epoch 40, and has lost 41-100"),
        ([], [(3, 40)], 100, ""),
        ([(1, 0)], [], 100, ""),
    ],
)
def test_what_the_lists_of_starts_tell(
    mine: list[tuple[int, int]], theirs: list[tuple[int, int]], epoch: int, said: str
) -> None:
    superblock = Stage().secondary.engine.superblock
    assert follow_starts(superblock, "aa", entries(*mine)) or not mine
    chain_hash = bytes([epoch] * 32)
    assert lost_epochs(superblock, "aa", entries(*theirs), epoch, chain_hash) == said
    assert lost_epochs(superblock, "bb", entries(*theirs), epoch, chain_hash) == ""


def test_an_equal_number_with_another_hash_is_another_epoch() -> None:
    superblock = Stage().secondary.engine.superblock
    follow_starts(superblock, "aa", entries((1, 0)))
    found = lost_epochs(superblock, "aa", entries((1, 0), (2, 100)), 100, bytes(32))
    assert found == "it began at another epoch 100 than the one here"


def test_the_list_is_bounded_and_begins_anew_with_a_generation() -> None:
    superblock = Stage().primary.engine.superblock
    for number in range(2 * STARTS_MAX):
        add_start(superblock, number.to_bytes(16, "big"), number, bytes(32))
    assert [each.epoch for each in start_entries(superblock)] == [
        *range(STARTS_MAX, 2 * STARTS_MAX)
    ]
    superblock.chain[-1].identity = "ff" * 16
    add_start(superblock, bytes(16), 5, bytes(32))
    assert superblock.starts == [StartRecord("00" * 16, 5, "00" * 32)]


def test_a_refusal_names_both_ways_out() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.pass_time(1000)
    put_back_primary(stage, 1)
    stage.link_up()
    stage.pass_time(1000)
    (refuse, *_) = stage.west.sent(SessionRefuse)
    assert "geomirror failover orders" in refuse.error_text
    assert "remove-secondary orders" in refuse.error_text
