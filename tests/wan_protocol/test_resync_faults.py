"""Stories of a plain resync that is interrupted: by links, crashes, slow disks, lost frames."""

from __future__ import annotations

from dataclasses import replace as replaced

import pytest

from geomirror.errors import BadFrameError, JournalFullError
from geomirror.limits import KIB, REGION_BYTES
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.messages import ResyncBegin
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, Stage

REGION = REGION_BYTES // BLOCK
"""Blocks of a region."""


def test_a_resync_interrupted_by_the_link_goes_on_where_it_was() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(16, blocks=16)
    total = stage.primary.bitmaps[PEER].bitmap.count()
    stage.park_frames()
    stage.link_up()
    for _ in range(6):
        stage.unpark(1)
        stage.pass_time(50)
    left = stage.primary.bitmaps[PEER].bitmap.count()
    assert left < total
    stage.reconnect()
    begins = stage.east.sent(ResyncBegin)
    assert [begin.total_bytes // REGION_BYTES for begin in begins] == [total, left]
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


@pytest.mark.parametrize("name", [PRIMARY, PEER])
@pytest.mark.parametrize("is_kill", [True, False])
def test_a_resync_interrupted_by_a_restart_goes_on_where_it_was(name: str, is_kill: bool) -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(16, blocks=16)
    stage.primary.flush("all", stage.now_ns)
    total = stage.primary.bitmaps[PEER].bitmap.count()
    stage.park_frames()
    stage.link_up()
    for _ in range(6):
        stage.unpark(1)
        stage.pass_time(50)
    left = stage.primary.bitmaps[PEER].bitmap.count()
    assert left < total - 2
    stage.pass_time(2000)
    stage.restart(name, is_kill=is_kill)
    assert stage.primary.bitmaps[PEER].bitmap.count() == left
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_bits_are_cleared_on_disk_only_when_the_base_is_known_there() -> None:
    """A crash of the primary just then must not leave an old base beside cleared bits."""
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    old = stage.snapshot(PEER)
    stage.overflow()
    stage.hold(PRIMARY, "checkpoint")
    stage.park_frames()
    stage.link_up()
    for _ in range(6):
        stage.unpark(1)
        stage.pass_time(500)
    stage.crash(PRIMARY, is_kill=True)
    stage.is_parked = lambda source, target, what: False
    # The copy is replaced by an older one: what was copied is not there.
    stage.crash(PEER, is_kill=True)
    stage.nodes[PEER].store = old
    stage.start(PEER, is_connected=False)
    stage.start(PRIMARY)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_slow_write_of_an_earlier_resync_does_not_count_for_the_present_one() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.hold(PEER, "resync")
    stage.link_up()
    assert [run.kind for run in stage.west.waiting] == ["resync"]
    # Another life of the primary counts its resyncs from one again, and copies newer content.
    stage.restart(PRIMARY, is_kill=True)
    stage.link_down()
    stage.write_blocks(0, 16, seed=77)
    stage.seal()
    stage.restart(PRIMARY, is_kill=True)
    (begin,) = {message.number for message in stage.east.sent(ResyncBegin)}
    assert begin == 1
    stage.release(PEER)
    stage.pass_time(10_000)
    stage.check_in_sync()


@pytest.mark.parametrize("kind", ["checkpoint", "apply", "sync"])
def test_a_crash_of_the_secondary_at_the_end_of_a_resync(kind: str) -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(4, blocks=16)
    stage.park_frames()
    stage.link_up()
    stage.write_epochs(2, seed=30)
    stage.hold(PEER, kind)
    stage.unpark()
    stage.pass_time(500)
    stage.restart(PEER)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_crash_of_the_primary_at_the_end_of_a_resync_copies_nothing_again() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(6, blocks=16)
    stage.hold(PRIMARY, "checkpoint")
    stage.link_up()
    stage.pass_time(500)
    assert stage.sender().mode == "Stream"
    assert stage.secondary.data_state == "consistent"
    frames = len([f for f in stage.east.frames if f.is_resync])
    stage.restart(PRIMARY, is_kill=True)
    stage.pass_time(3000)
    assert len([f for f in stage.east.frames if f.is_resync]) == frames
    stage.check_in_sync()


def test_lost_frames_of_a_resync_are_sent_again() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(6, blocks=16)
    lost: list[int] = []

    def is_lost(source: str, target: str, what: SendMessage | SendFrame) -> bool:
        is_victim = isinstance(what, SendFrame) and what.sequence in (0, 2) and len(lost) < 3
        if is_victim:
            lost.append(1)
        return is_victim

    stage.is_lost = is_lost
    stage.link_up()
    stage.pass_time(2500)
    assert stage.secondary.data_state == "inconsistent"
    stage.pass_time(12_000)
    stage.check_in_sync()


def test_a_damaged_frame_of_a_resync_is_sent_again() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(2, blocks=16)
    stage.park_frames()
    stage.link_up()
    source, target, frame = stage.parked[0]
    assert isinstance(frame, SendFrame)
    damaged = frame.body[:-9] + bytes([frame.body[-9] ^ 1]) + frame.body[-8:]
    stage.deliver([(source, target, replaced(frame, body=damaged))])
    stage.parked.pop(0)
    stage.unpark()
    stage.pass_time(10_000)
    stage.check_in_sync()
    assert not stage.errors
    assert BadFrameError.is_retryable


def test_late_packets_of_the_stream_do_not_disturb_what_follows_a_resync() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(1)
    stage.park_all()
    at = 0
    while stage.sender().mode in ("Stream", "Fold"):
        at += 1
        stage.write_epochs(1, blocks=8, seed=at)
        stage.pass_time(20)
    stage.pass_time(1500)
    stream = [wire for wire in stage.parked if not getattr(wire[2], "is_resync", False)]
    copies = [wire for wire in stage.parked if getattr(wire[2], "is_resync", False)]
    late = [wire for wire in stream if isinstance(wire[2], SendFrame)]
    assert late
    # Data connections are in no order: frames of the stream arrive after the resync began.
    stage.deliver([wire for wire in stream if isinstance(wire[2], SendMessage)])
    stage.deliver(late)
    stage.deliver(copies)
    stage.unpark()
    stage.pass_time(6000)
    assert all(
        number > stage.secondary.engine.committed_epoch for number in stage.secondary.incoming
    )
    stage.write_epochs(2, seed=99)
    stage.pass_time(1000)
    stage.check_in_sync()


def test_an_overflow_during_a_resync_starts_another_one_of_the_rest() -> None:
    stage = Stage(journal_bytes=1024 * KIB, first_sync=True, is_connected=False)
    stage.write_epochs(10, blocks=16)
    stage.park_frames()
    stage.link_up()
    at = 0
    while stage.east.event_kinds().count("journal_overflow") == 0:
        at += 1
        try:
            stage.write_blocks(at * 8 % 500, 8, seed=at)
        except JournalFullError:
            stage.pass_time(50)
        stage.seal()
        assert at < 500
    stage.unpark()
    stage.pass_time(10_000)
    assert stage.sender().counters.resyncs == 0, "it is still the first sync"
    stage.check_in_sync()
