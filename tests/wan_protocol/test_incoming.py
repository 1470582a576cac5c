"""Stories of frames and commits on their way into a secondary: out of order, twice, hostile."""

from __future__ import annotations

from dataclasses import replace as replaced

import msgspec
import pytest

from geomirror.errors import LimitExceededError, RemoteProtocolError
from geomirror.limits import KIB, SIMULATION
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.epoch_intake import INCOMING_MAX
from geomirror.wan_protocol.incoming import FRAMES_MAX
from geomirror.wan_protocol.messages import Acknowledge, EpochCommit, SessionOpen
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage, Wire, noise

CHUNK = 16
"""Blocks of a full frame."""
LIMITS = replaced(SIMULATION, window_bytes_min=1024 * KIB)
"""So that a whole epoch is on its way at once."""


def parked_epoch(stage: Stage, chunks: int = 3, seed: int = 1) -> tuple[list[Wire], Wire]:
    """Write and seal an epoch of `chunks` frames; (frames, commit), all still on their way."""
    stage.park_all()
    before = len(stage.parked)
    stage.write_blocks(seed % 10 * 40, chunks * CHUNK, seed=seed)
    stage.seal()
    new = stage.parked[before:]
    frames = [wire for wire in new if isinstance(wire[2], SendFrame)]
    (commit,) = [wire for wire in new if isinstance(wire[2], SendMessage)]
    assert len(frames) == chunks
    return frames, commit


def hostile(stage: Stage, **changes: object) -> EpochCommit:
    """The commit of a parked epoch with changed fields."""
    commit = parked_epoch(stage)[1][2]
    assert isinstance(commit, SendMessage)
    assert isinstance(commit.message, EpochCommit)
    return msgspec.structs.replace(commit.message, **changes)


def test_frames_arrive_in_any_order() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, commit = parked_epoch(stage)
    stage.deliver([frames[2], frames[0]])
    stage.deliver([frames[1]])
    assert stage.secondary.engine.committed_epoch == 0, "no commit yet"
    stage.deliver([commit])
    assert stage.check() == 1


def test_a_commit_may_come_before_its_frames() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, commit = parked_epoch(stage)
    stage.deliver([commit, frames[1], frames[0]])
    assert stage.secondary.engine.committed_epoch == 0, "a frame is missing"
    stage.deliver([frames[2]])
    assert stage.check() == 1


def test_epochs_are_committed_in_order_whatever_comes_first() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    first_frames, first_commit = parked_epoch(stage, seed=1)
    second_frames, second_commit = parked_epoch(stage, seed=2)
    stage.deliver([*second_frames, second_commit])
    assert stage.secondary.engine.committed_epoch == 0
    stage.deliver([first_commit, *first_frames])
    assert stage.check() == 2


def test_a_frame_that_comes_twice_is_taken_once() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, commit = parked_epoch(stage)
    before = stage.secondary.engine.journal.end_lsn
    stage.deliver([frames[0]])
    once = stage.secondary.engine.journal.end_lsn
    assert once > before
    stage.deliver([frames[0], frames[0]])
    assert stage.secondary.engine.journal.end_lsn == once
    stage.deliver([*frames, commit, *frames, commit])
    assert stage.check() == 1


def test_what_comes_after_its_epoch_is_committed_is_dropped() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, commit = parked_epoch(stage)
    stage.deliver([*frames, commit])
    end_lsn = stage.secondary.engine.journal.end_lsn
    stage.deliver([*frames, commit])
    assert stage.secondary.engine.journal.end_lsn == end_lsn
    assert not stage.secondary.incoming
    assert stage.check() == 1


def test_a_damaged_frame_is_asked_for_again_after_a_second() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, commit = parked_epoch(stage)
    source, target, frame = frames[1]
    assert isinstance(frame, SendFrame)
    damaged = frame.body[:5000] + bytes([frame.body[5000] ^ 4]) + frame.body[5001:]
    stage.deliver([frames[0], (source, target, replaced(frame, body=damaged)), frames[2], commit])
    assert stage.west.event_kinds().count("bad_frame") == 1
    stage.parked.clear()
    stage.unpark()
    count = len(stage.east.frames)
    stage.pass_time(999)
    assert stage.secondary.engine.committed_epoch == 0
    assert len(stage.east.frames) == count
    stage.pass_time(1)
    assert [f.sequence for f in stage.east.frames[count:]] == [1], "only the damaged one"
    assert stage.check() == 1


def test_a_lost_frame_is_asked_for_again_and_again() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    lost: list[int] = []

    def is_lost(source: str, target: str, what: SendMessage | SendFrame) -> bool:
        is_victim = isinstance(what, SendFrame) and what.sequence == 0 and len(lost) < 3
        if is_victim:
            lost.append(1)
        return is_victim

    stage.is_lost = is_lost
    stage.write_blocks(0, 40, seed=1)
    stage.seal()
    stage.pass_time(2999)
    assert stage.secondary.engine.committed_epoch == 0
    stage.pass_time(1)
    stage.check_in_sync()


def test_frames_that_trickle_in_are_not_asked_for() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, commit = parked_epoch(stage, chunks=6)
    stage.deliver([commit])
    for frame in frames:
        stage.pass_time(900)
        stage.deliver([frame])
    assert not [ack for ack in stage.west.sent(Acknowledge) if ack.missing_epoch]
    assert stage.check() == 1


def test_losing_every_frame_of_two_epochs_does_not_make_the_timer_spin() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    first_frames, first_commit = parked_epoch(stage, seed=1)
    _, second_commit = parked_epoch(stage, seed=2)
    stage.deliver([first_commit, second_commit])
    stage.is_parked = lambda source, target, what: False
    stage.is_lost = lambda source, target, what: isinstance(what, SendFrame)
    stage.parked.clear()
    stage.pass_time(5000)
    assert len(stage.west.sent(Acknowledge)) < 20
    stage.is_lost = lambda source, target, what: False
    stage.pass_time(3000)
    assert first_frames
    stage.check_in_sync()


def test_a_commit_with_a_wrong_hash_is_refused_and_nothing_is_taken() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    stage.write_epochs(1)
    frames, (source, target, commit) = parked_epoch(stage)
    assert isinstance(commit, SendMessage)
    assert isinstance(commit.message, EpochCommit)
    wrong = msgspec.structs.replace(commit.message, chain_hash=noise(9, 32))
    stage.deliver([*frames, (source, target, replaced(commit, message=wrong))])
    assert stage.secondary.engine.committed_epoch == 1
    assert stage.secondary.is_open, "its frames are asked for once more"
    assert not stage.secondary.incoming[2].parts
    stage.deliver(frames)
    assert stage.secondary.engine.committed_epoch == 1
    assert not stage.secondary.is_open
    assert "differs from the primary's" in stage.secondary.refusal
    assert "differs from the primary's" in stage.sender().refusal
    assert not stage.secondary.incoming
    assert stage.check() == 1
    stage.unpark()
    stage.reconnect()
    stage.pass_time(1000)
    assert stage.check() == 2, "the true epoch is still welcome"


def test_a_frame_of_another_epoch_in_the_place_of_one_is_noticed() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    first, commit = parked_epoch(stage, seed=1)
    second, _ = parked_epoch(stage, seed=2)
    source, target, frame = second[0]
    assert isinstance(frame, SendFrame)
    stage.deliver([(source, target, replaced(frame, epoch=1, sequence=0)), *first[1:], commit])
    assert stage.secondary.engine.committed_epoch == 0
    assert not any(stage.image()[0])
    stage.parked.clear()
    stage.unpark()
    stage.pass_time(3000)
    assert stage.check() == 1, "the right one is asked for"


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": FRAMES_MAX + 1},
        {"frames": 1 << 62},
        {"frames": -1},
        {"entries": 1 << 40},
        {"entries": -1},
        {"first_epoch": 0},
        {"first_epoch": 2},
        {"epoch": 1 << 64},
        {"first_lsn": -1},
        {"end_lsn": 1 << 64},
        {"wall_ns": -1},
        {"generation": b"short"},
        {"chain_hash": b"short"},
        {"table_hash": b"short"},
    ],
    ids=str,
)
def test_a_hostile_commit_closes_the_link(changes: dict[str, object]) -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    message = hostile(stage, **changes)
    with pytest.raises(RemoteProtocolError):
        stage.secondary.receive(PRIMARY, message, stage.now_ns)
    assert stage.secondary.engine.committed_epoch == 0


def test_epochs_under_way_are_bounded() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    message = hostile(stage)
    with pytest.raises(LimitExceededError):
        for number in range(2, INCOMING_MAX + 3):
            ahead = msgspec.structs.replace(message, epoch=number, first_epoch=number)
            stage.secondary.receive(PRIMARY, ahead, stage.now_ns)
    assert len(stage.secondary.incoming) == INCOMING_MAX


@pytest.mark.parametrize("sequence", [-1, FRAMES_MAX])
def test_a_frame_number_out_of_bounds_closes_the_link(sequence: int) -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    frames, _ = parked_epoch(stage)
    frame = frames[0][2]
    assert isinstance(frame, SendFrame)
    with pytest.raises(RemoteProtocolError):
        stage.secondary.receive_frame(
            PRIMARY, 1, sequence, frame.body, is_resync=False, now_ns=stage.now_ns
        )
    assert not stage.secondary.incoming or not stage.secondary.incoming[1].parts


def test_an_unasked_primary_is_refused() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB)
    message = hostile(stage)
    before = len(stage.west.messages)
    stage.secondary.receive("stranger", message, stage.now_ns)
    stage.settle()
    assert len(stage.west.messages) == before, "only an offer is answered"
    assert not stage.secondary.incoming
    offer = stage.east.sent(SessionOpen)[-1]
    stage.secondary.receive("stranger", offer, stage.now_ns)
    stage.settle()
    assert 'is not the primary of "orders"' in str(stage.west.messages[-1])
    assert stage.secondary.is_open


def test_forgotten_frames_do_not_fill_the_journal() -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=1024 * KIB)
    stage.park_all()
    stage.write_blocks(0, 48, seed=1)
    stage.seal()
    for _ in range(8):
        stage.restart(PRIMARY, is_kill=True)
        stage.deliver(stage.parked_commits())  # SessionOpen
        for _ in range(3):
            # Every frame arrives, but not the commit: the next life cuts the epoch anew.
            stage.deliver(stage.parked_frames())
            stage.pass_time(50)
        assert stage.secondary.engine.committed_epoch == 0
        stage.parked.clear()
    assert stage.secondary.received_total > 1024 * KIB
    stage.restart(PRIMARY, is_kill=True)
    stage.unpark()
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_secondary_whose_journal_is_full_finishes_the_epoch_that_is_next() -> None:
    stage = Stage(limits=LIMITS, journal_bytes=8192 * KIB, peer_journal_bytes=1024 * KIB)
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(60, blocks=16)
    stage.pass_time(3000)
    held = stage.secondary.engine.sealed_epoch
    assert 2 < held < 60
    assert stage.secondary.engine.applied_epoch == 0
    stage.secondary.set_hold(False, stage.now_ns)
    stage.pass_time(20_000)
    assert stage.check(PEER) == stage.primary.engine.sealed_epoch
