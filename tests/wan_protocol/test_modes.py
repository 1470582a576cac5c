"""Stories of a peer's modes: Stream, Fold, Bitmap, Resync, and what the superblock says of them."""

from __future__ import annotations

import errno

import pytest

from geomirror.errors import JournalFullError
from geomirror.limits import KIB, REGION_BYTES
from geomirror.volume.superblock import PeerRecord
from geomirror.wan_protocol.messages import EpochCommit
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage


def backlog_part(stage: Stage) -> float:
    engine = stage.primary.engine
    return engine.bytes_recorded(stage.sender().durable_epoch) / engine.journal.bytes_total


def write_until(stage: Stage, mode: str, *, blocks: int = 8) -> None:
    """Seal epoch after epoch until the peer is in this mode."""
    for at in range(400):
        if stage.sender().mode == mode:
            return
        stage.write_epochs(1, blocks=blocks, seed=at)
    raise AssertionError(f"still {stage.sender().mode}")


def modes(stage: Stage) -> list[object]:
    return [fields["mode"] for kind, fields in stage.east.events if kind == "peer_mode"]


def test_a_backlog_of_a_quarter_is_folded_and_not_before() -> None:
    stage = Stage()
    stage.link_down()
    for at in range(400):
        before = backlog_part(stage)
        stage.write_epochs(1, blocks=4, seed=at)
        if stage.sender().mode == "Fold":
            break
        assert backlog_part(stage) < 0.25
    assert before < 0.25 <= backlog_part(stage)


def test_folds_carry_many_epochs_and_end_in_the_same_content() -> None:
    stage = Stage()
    stage.link_down()
    write_until(stage, "Fold")
    sealed = stage.write_epochs(4, seed=300)
    stage.link_up()
    stage.pass_time(200)
    commits = stage.east.sent(EpochCommit)
    assert any(commit.epoch > commit.first_epoch for commit in commits)
    assert commits[-1].epoch == sealed
    assert len(commits) < sealed / 2
    assert stage.check() == sealed
    assert stage.secondary.engine.sealed_hash == stage.primary.engine.sealed_hash
    assert stage.sender().counters.resyncs == 0


def test_a_fold_drops_what_was_overwritten_before_it_travels() -> None:
    stage = Stage()
    stage.link_down()
    while stage.sender().mode != "Fold":
        stage.write_blocks(0, 8, seed=1)
        stage.seal()
    stage.link_up()
    stage.pass_time(100)
    raw = sum(commit.raw_bytes for commit in stage.east.sent(EpochCommit))
    assert raw < 0.3 * stage.primary.engine.sealed_epoch * 8 * 4096
    assert stage.check() == stage.primary.engine.sealed_epoch


def test_a_folding_peer_streams_again_when_it_is_drained_and_has_dwelt() -> None:
    stage = Stage()
    stage.link_down()
    write_until(stage, "Fold")
    since_ns = stage.now_ns
    stage.link_up()
    stage.pass_time(100)
    stage.write_epochs(1, seed=350)
    assert stage.sender().durable_epoch == stage.primary.engine.sealed_epoch
    assert stage.sender().mode == "Fold", "drained, but not for long enough"
    stage.pass_time(1700)
    stage.write_epochs(1, seed=360)
    assert stage.sender().mode == "Fold"
    stage.pass_time(300)
    stage.write_epochs(1, seed=370)
    assert stage.now_ns - since_ns >= stage.limits.mode_dwell_ns_min
    assert modes(stage) == ["Fold", "Stream"]
    stage.check_in_sync()


def test_a_folding_peer_streams_again_without_another_write() -> None:
    stage = Stage()
    stage.link_down()
    write_until(stage, "Fold")
    stage.link_up()
    stage.pass_time(4000)
    assert stage.sender().mode == "Stream"
    stage.check_in_sync()


def test_a_jittery_link_does_not_flip_modes() -> None:
    stage = Stage()
    for at in range(60):
        if at % 7 == 0:
            stage.link_down()
        elif at % 7 == 5:
            stage.link_up()
        stage.write_epochs(1, blocks=12, seed=at)
        stage.pass_time(100)
    assert len(modes(stage)) <= 6
    stage.link_up()
    stage.pass_time(3000)
    assert stage.check() == 60


def test_stream_fold_bitmap_resync_stream() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(2000)
    assert modes(stage) == ["Fold", "Bitmap"]
    assert stage.primary.engine.epoch_numbers() == [], "the bitmap has it all"
    stage.link_up()
    stage.pass_time(3000)
    assert modes(stage) == ["Fold", "Bitmap", "Resync", "Stream"]
    assert stage.sender().counters.resyncs == 1
    stage.check_in_sync()
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(2000)
    stage.link_up()
    stage.pass_time(3000)
    assert stage.sender().counters.resyncs == 2
    stage.check_in_sync()


def test_a_folding_peer_goes_on_so_while_another_one_has_filled_the_journal() -> None:
    """Drained by itself, but what would come during another outage has no room."""
    stage = Stage("west", "south", journal_bytes=4096 * KIB)
    stage.link_down("west")
    stage.link_down("south")
    write_until(stage, "Fold")
    stage.link_up("west")
    stage.pass_time(100)
    engine = stage.primary.engine
    total = engine.journal.bytes_total
    # Small enough of a backlog by the first rule, and more than half of what is free.
    engine.journal.room_bytes = lambda: total // 40  # type: ignore[method-assign]
    engine.bytes_recorded = lambda epoch: total // 20  # type: ignore[method-assign]
    stage.pass_time(5000)
    assert stage.sender("west").mode == "Fold"
    engine.journal.room_bytes = lambda: total // 8  # type: ignore[method-assign]
    stage.pass_time(100)
    stage.primary.handle_timer(stage.now_ns)
    stage.settle()
    assert stage.sender("west").mode == "Stream"


def test_a_peer_that_is_back_stays_in_bitmap_until_it_has_dwelt() -> None:
    """A link that comes and goes would begin a resync each time, and overflow again."""
    stage = Stage()
    stage.write_epochs(1)
    stage.link_down()
    write_until(stage, "Bitmap")
    overflowed_ns, dwell_ns = stage.now_ns, stage.limits.mode_dwell_ns_min
    stage.pass_time(dwell_ns // 4 / 10**6)
    stage.link_up()
    while stage.now_ns < overflowed_ns + dwell_ns * 9 // 10:
        assert stage.sender().mode == "Bitmap"
        assert stage.primary.resyncs == {}
        stage.pass_time(50)
    for _ in range(4):
        stage.reconnect()
        assert stage.sender().mode == "Bitmap", "a new connection is no reason"
    stage.pass_time(dwell_ns // 4 / 10**6)
    assert "Resync" in modes(stage)
    stage.pass_time(5000)
    assert modes(stage) == ["Fold", "Bitmap", "Resync", "Stream"]
    stage.check_in_sync()


def test_each_overflow_begins_the_stay_in_bitmap_again() -> None:
    stage = Stage()
    stage.write_epochs(1)
    for _ in range(2):
        stage.link_down()
        write_until(stage, "Bitmap")
        overflowed_ns = stage.now_ns
        stage.link_up()
        while stage.sender().mode == "Bitmap":
            stage.pass_time(20)
        assert stage.now_ns - overflowed_ns >= stage.limits.mode_dwell_ns_min
        assert stage.now_ns - overflowed_ns < 2 * stage.limits.mode_dwell_ns_min
        stage.pass_time(5000)
        stage.check_in_sync()


def test_the_bitmap_follows_every_second_while_the_peer_is_away() -> None:
    stage = Stage()
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(1500)
    count = stage.east.jobs.count("bitmap:west")
    for at in range(20):
        stage.write_epochs(1, seed=at)
        stage.pass_time(100)
    assert 1 <= stage.east.jobs.count("bitmap:west") - count <= 3
    stage.pass_time(1000)
    count = stage.east.jobs.count("bitmap:west")
    stage.pass_time(60_000)
    assert stage.east.jobs.count("bitmap:west") == count, "an idle disk is left alone"


def test_epochs_stay_until_the_superblock_says_that_the_bitmap_has_them() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(1)
    stage.link_down()
    stage.hold(PRIMARY, "bitmap:*")
    for at in range(400):
        try:
            stage.write_blocks(at * 8 % 500, 8, seed=at)
        except JournalFullError:
            break
        stage.seal()
        stage.pass_time(20)
    assert stage.sender().mode == "Bitmap"
    assert stage.primary.engine.epoch_numbers()[0] == 2
    stage.hold(PRIMARY, "checkpoint")
    stage.release(PRIMARY, "bitmap:*")
    assert stage.primary.engine.epoch_numbers()[0] == 2
    stage.release(PRIMARY, "checkpoint")
    stage.pass_time(2000)
    assert stage.primary.engine.epoch_numbers() == []
    assert stage.east.rooms == 1


@pytest.mark.parametrize("held", ["bitmap:*", "checkpoint", "trim"])
@pytest.mark.parametrize("is_kill", [True, False])
def test_a_crash_of_the_primary_on_the_way_into_the_bitmap(held: str, is_kill: bool) -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(12, blocks=16, seed=300)
    stage.pass_time(4000)
    stage.link_down()
    stage.hold(PRIMARY, held)
    for at in range(400):
        if stage.sender().mode == "Bitmap":
            break
        try:
            stage.write_blocks(at * 8 % 200, 8, seed=at)
        except JournalFullError:
            stage.pass_time(50)
            if stage.east.waiting and held == "checkpoint":
                stage.run_held(PRIMARY, held)
        stage.seal()
    assert stage.sender().mode == "Bitmap"
    stage.restart(PRIMARY, is_kill=is_kill)
    stage.pass_time(5000)
    stage.check_in_sync()
    copied = [frame for frame in stage.east.frames if frame.is_resync]
    assert sum(len(frame.body) for frame in copied) < 14 * REGION_BYTES, "not the whole volume"


@pytest.mark.parametrize("is_kill", [True, False])
def test_a_restart_in_bitmap_mode_keeps_the_bits_and_adds_later_epochs(is_kill: bool) -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(2000)
    stage.write_epochs(3, seed=400)
    stage.crash(PRIMARY, is_kill=is_kill)
    stage.start(PRIMARY, is_connected=False)
    assert stage.sender().mode == "Bitmap"
    assert stage.sender().counters.resyncs == 1
    stage.write_epochs(3, seed=450)
    stage.link_up()
    stage.pass_time(5000)
    assert stage.sender().counters.resyncs == 1
    stage.check_in_sync()


def test_a_damaged_bitmap_means_that_everything_may_differ() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(2000)
    stage.crash(PRIMARY, is_kill=True)
    for byte in (100, 4196):
        stage.east.store.flip_bit("bitmap/west.bits", byte * 8)
    stage.start(PRIMARY)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_the_file_of_a_bitmap_goes_when_the_superblock_no_longer_speaks_of_it() -> None:
    stage = Stage()
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(2000)
    assert stage.east.store.exists("bitmap/west.bits")
    stage.hold(PRIMARY, "checkpoint")
    stage.link_up()
    stage.pass_time(3000)
    assert stage.sender().mode == "Stream"
    assert stage.east.store.exists("bitmap/west.bits")
    stage.release(PRIMARY)
    stage.pass_time(100)
    assert not stage.east.store.exists("bitmap/west.bits")


def test_a_full_disk_at_the_bitmap_holds_the_journal_and_goes_on() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.link_down()
    stage.east.store.fail("create", "bitmap/*", error=errno.ENOSPC, count=2)
    write_until(stage, "Bitmap")
    stage.pass_time(200)
    assert stage.primary.engine.epoch_numbers()[0] == 2
    assert stage.primary.fenced is None
    stage.pass_time(5000)
    assert stage.primary.engine.epoch_numbers() == []
    stage.link_up()
    stage.pass_time(3000)
    stage.check_in_sync()


def test_a_peer_that_was_removed_and_added_again_is_copied_whole() -> None:
    stage = Stage(first_sync=True)
    stage.write_epochs(3, blocks=16)
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.hold(PRIMARY, "bitmap:*")
    stage.write_epochs(2, seed=77)
    stage.pass_time(1500)
    # The job that runs now must not leave a file behind that counts for the next member.
    stage.primary.remove_peer(PEER)
    stage.settle()
    stage.release(PRIMARY)
    stage.pass_time(100)
    assert not stage.east.store.exists("bitmap/west.bits")
    stage.primary.add_peer(PEER)
    assert stage.primary.bitmaps[PEER].bitmap.is_full
    stage.restart(PRIMARY, is_kill=True)
    assert stage.primary.engine.superblock.peers[PEER] != PeerRecord()
    stage.pass_time(5000)
    assert stage.check() == stage.primary.engine.sealed_epoch


def test_the_file_of_an_earlier_member_says_nothing_of_a_new_one() -> None:
    stage = Stage(first_sync=True)
    stage.write_epochs(12, blocks=16)
    blank = Stage(first_sync=True).snapshot(PEER)
    stage.link_down()
    write_until(stage, "Bitmap")
    stage.pass_time(2000)
    stage.hold(PRIMARY, "bitmap:*")
    stage.write_epochs(2, seed=77)
    stage.pass_time(1500)
    assert [run.kind for run in stage.east.waiting] == ["bitmap:west"]
    stage.primary.remove_peer(PEER)
    stage.primary.add_peer(PEER)
    stage.settle()
    assert stage.east.store.exists("bitmap/west.bits"), "its last job still runs"
    assert stage.primary.bitmaps[PEER].bitmap.is_full
    stage.write_epochs(2, seed=200)
    stage.pass_time(4000)
    assert stage.primary.engine.superblock.peers[PEER].bitmap_is_full, "and a checkpoint says so"
    stage.crash(PRIMARY, is_kill=True)
    stage.start(PRIMARY, is_connected=False)
    assert stage.primary.bitmaps[PEER].bitmap.is_full
    stage.restore(PEER, blank)
    stage.pass_time(5000)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_one_peer_in_bitmap_mode_and_one_that_streams() -> None:
    stage = Stage("west", "south")
    stage.link_down("west")
    write_until(stage, "Bitmap")
    assert stage.check("south") == stage.primary.engine.sealed_epoch
    stage.restart(PRIMARY, is_kill=True)
    stage.write_epochs(2, seed=9)
    stage.pass_time(5000)
    stage.check_in_sync("south")
    stage.check_in_sync("west")
    assert stage.sender("south").counters.resyncs == 0
