"""Stories of a plain resync: what is copied, what an interruption costs, when it is consistent."""

from __future__ import annotations

from dataclasses import replace as replaced

import pytest

from geomirror.errors import RemoteProtocolError
from geomirror.limits import KIB, REGION_BYTES, SIMULATION
from geomirror.wan_protocol.decisions import SendFrame
from geomirror.wan_protocol.messages import ResyncAcknowledge, ResyncBegin, ResyncEnd
from geomirror.wan_protocol.resync_receiver import FRAMES_AHEAD_MAX
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, SIZES, Stage, noise

REGION = REGION_BYTES // BLOCK
"""Blocks of a region."""


def copied_regions(stage: Stage) -> int:
    resync = stage.primary.resyncs.get(PEER)
    return 0 if resync is None else resync.compared_bytes // REGION_BYTES


def test_a_first_sync_copies_everything_and_is_no_resync() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(12, blocks=16)
    stage.write(SIZES[0] - 700, b"the short last block")
    stage.seal()
    assert stage.sender().mode == "Bitmap"
    stage.link_up()
    stage.pass_time(100)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0
    assert stage.west.event_kinds().count("consistent") == 1


def test_a_first_sync_of_an_empty_volume_sends_only_holes() -> None:
    stage = Stage(first_sync=True)
    assert stage.check() == 0
    assert sum(len(frame.body) for frame in stage.east.frames) < 1024


def test_an_overflow_ends_in_a_counted_resync_of_what_changed() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    stage.overflow()
    assert stage.east.event_kinds().count("journal_overflow") == 1
    assert stage.sender().counters.resyncs == 1
    assert stage.check() == 2
    begun = len(stage.east.messages)
    stage.link_up()
    stage.pass_time(5000)
    (begin,) = [m for m in stage.east.messages[begun:] if isinstance(m, ResyncBegin)]
    assert 0 < begin.total_bytes <= 17 * REGION_BYTES < stage.sizes[0]
    assert stage.sender().counters.resyncs == 1
    stage.check_in_sync()


def test_data_state_is_inconsistent_from_the_first_copied_block_to_the_end() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    stage.overflow()
    before = stage.image()
    stage.hold(PEER, "checkpoint")
    stage.park_frames()
    stage.link_up()
    stage.pass_time(2500)
    stage.unpark(2)
    assert stage.image() == before, "nothing is written before Inconsistent is durable"
    assert "resync" not in stage.west.jobs
    stage.release(PEER)
    stage.unpark(2)
    assert "resync" in stage.west.jobs
    assert stage.image() != before
    assert stage.secondary.data_state == "inconsistent"
    stage.restart(PEER)
    assert stage.secondary.engine.superblock.data_state == "inconsistent", "it is durable"
    stage.unpark()
    stage.pass_time(5000)
    assert stage.secondary.data_state == "consistent"
    stage.check_in_sync()


def test_writes_during_a_resync_are_there_at_its_end() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(10, blocks=16)
    stage.park_frames()
    stage.link_up()
    for at in range(12):
        stage.write_blocks(at * 13, 3, seed=100 + at)
        stage.write(at * 50_000 + 100, b"unsealed until later")
        stage.unpark(1)
        stage.pass_time(100)
    assert stage.secondary.data_state == "inconsistent"
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_block_with_an_unsealed_write_is_waited_for() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.hold(PRIMARY, "seal")
    # Its sealed content is not what a reader of the primary sees, so it cannot be copied now.
    stage.write_blocks(3, 2, seed=99)
    stage.link_up()
    stage.pass_time(5000)
    assert stage.primary.resyncs[PEER].compared_bytes >= stage.sizes[0]
    assert not stage.east.sent(ResyncEnd)
    assert stage.secondary.data_state == "inconsistent"
    stage.release(PRIMARY)
    stage.pass_time(1000)
    stage.check_in_sync()


def test_the_word_that_all_is_copied_does_not_count_before_it_is() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(4, blocks=16)
    stage.park_frames()
    stage.link_up()
    # The control connection is not in order with the data connections.
    stage.secondary.receive(PRIMARY, ResyncEnd(stage.primary.session, 1, 4, 1000), stage.now_ns)
    stage.pass_time(100)
    assert stage.secondary.data_state == "inconsistent"
    assert stage.sender().mode == "Resync"
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_hostile_frame_of_a_resync_ends_the_session() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.park_frames()
    stage.link_up()
    source, target, frame = stage.parked[0]
    assert isinstance(frame, SendFrame)
    stage.deliver([(source, target, replaced(frame, body=b"\x07" + frame.body[1:]))])
    assert not stage.secondary.is_open
    assert "codec 7" in stage.secondary.refusal
    assert "codec 7" in stage.sender().refusal


def test_frames_beyond_the_credit_are_refused() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.hold(PEER, "resync")
    stage.park_frames()
    stage.link_up()
    body = noise(1, 64 * KIB)
    with pytest.raises(RemoteProtocolError, match="beyond the granted credit"):
        for sequence in range(100):
            stage.secondary.receive_frame(
                PRIMARY, 1, sequence, body, is_resync=True, now_ns=stage.now_ns
            )
    assert stage.secondary.resync is not None
    assert stage.secondary.resync.queued_bytes <= 2 * SIMULATION.credit_bytes


def test_a_frame_far_ahead_of_all_others_is_refused() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.park_frames()
    stage.link_up()
    with pytest.raises(RemoteProtocolError, match="after 0"):
        stage.secondary.receive_frame(
            PRIMARY, 1, FRAMES_AHEAD_MAX, b"", is_resync=True, now_ns=stage.now_ns
        )


def test_an_acknowledgement_of_frames_never_sent_is_a_lie() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.park_frames()
    stage.link_up()
    lie = ResyncAcknowledge(stage.primary.session, 1, 1000, 0, 0)
    with pytest.raises(RemoteProtocolError, match="never sent"):
        stage.primary.receive(PEER, lie, stage.now_ns)
    early = ResyncAcknowledge(stage.primary.session, 1, 0, 0, 0, is_finished=True)
    stage.primary.receive(PEER, early, stage.now_ns)
    assert stage.sender().mode == "Resync", "its end was not sent yet"
    old = ResyncAcknowledge(stage.primary.session, 0, 1000, 0, 0, is_finished=True)
    stage.primary.receive(PEER, old, stage.now_ns)
    assert stage.sender().mode == "Resync", "it was for another resync"


def test_a_resync_holds_only_a_window_in_memory() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(30, blocks=16)
    stage.park_frames()
    stage.link_up()
    resync = stage.primary.resyncs[PEER]
    for _ in range(40):
        held = sum(map(len, resync._frames.values()))
        assert held <= stage.limits.resync_held_bytes_max + stage.limits.resync_read_bytes_max + KIB
        assert stage.parked_bytes() <= stage.limits.window_bytes_min
        stage.unpark(1)
        stage.pass_time(30)
    assert copied_regions(stage) > 0 or stage.sender().mode == "Stream"
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


@pytest.mark.parametrize("is_restarted", [False, True])
def test_what_was_durable_and_not_applied_is_there_after_a_resync(is_restarted: bool) -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_blocks(400, 8, seed=1)
    stage.seal()
    assert stage.sender().durable_epoch == 1
    stage.overflow()
    if is_restarted:
        stage.restart(PEER)
    stage.link_up()
    stage.pass_time(5000)
    stage.secondary.set_hold(False, stage.now_ns)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_pause_stops_a_resync_and_resuming_goes_on() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(20, blocks=16)
    stage.park_frames()
    stage.link_up()
    stage.primary.pause(PEER, is_paused=True)
    for _ in range(10):
        stage.unpark(1)
        stage.pass_time(100)
    reads = stage.east.jobs.count("read:west")
    stage.pass_time(10_000)
    assert stage.east.jobs.count("read:west") == reads
    assert not stage.east.sent(ResyncEnd)
    stage.primary.pause(PEER, is_paused=False)
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_resync_of_a_disk_that_changes_is_consistent_only_at_its_end_epoch() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(6, blocks=16)
    stage.park_frames()
    stage.link_up()
    stage.write_epochs(3, seed=40, blocks=16)
    stage.hold(PEER, "apply")
    stage.unpark()
    stage.pass_time(2000)
    (end,) = stage.east.sent(ResyncEnd)
    assert end.epoch == 9
    assert stage.secondary.engine.sealed_epoch == 9
    assert stage.secondary.data_state == "inconsistent", "copied is not yet consistent"
    assert stage.sender().data_state != "consistent"
    stage.release(PEER)
    stage.pass_time(100)
    stage.check_in_sync()


def test_a_resync_ends_without_another_write() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(3, 1, seed=5)
    stage.pass_time(400)
    # The block is in an epoch that is being sealed, and nothing is written after it.
    stage.link_up()
    stage.pass_time(2000)
    stage.release(PRIMARY)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_an_abandoned_resync_leaves_the_window_open() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.overflow()
    stage.is_lost = lambda source, target, what: isinstance(what, SendFrame)
    stage.link_up()
    stage.pass_time(2500)
    first = stage.primary.resyncs[PEER]
    # Frames of this one were lost; the next overflow gives it up without a new session.
    for at in range(200):
        if stage.primary.resyncs.get(PEER) is not first:
            break
        stage.write_blocks(at * 8 % 256, 8, seed=1000 + at)
        stage.seal()
    assert stage.primary.resyncs.get(PEER) is not first
    stage.is_lost = lambda source, target, what: False
    stage.pass_time(8000)
    stage.check_in_sync()
