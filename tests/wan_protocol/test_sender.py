"""Stories of one peer's stream: resume, windows, credit, lies, pauses, two speeds."""

from __future__ import annotations

from dataclasses import replace as replaced

import msgspec
import pytest

from geomirror.errors import RemoteProtocolError
from geomirror.limits import KIB, SIMULATION
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.encode_unit import EncodeUnitJob
from geomirror.wan_protocol.messages import Acknowledge, EpochCommit, SessionAccept
from geomirror.wan_protocol.sender import BEHIND_EPOCHS_MIN, LEVEL_BEHIND
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage, noise

FRAME = 64 * KIB
WIDE = replaced(SIMULATION, window_bytes_min=1024 * KIB)


def acknowledge(stage: Stage, **changes: object) -> Acknowledge:
    """A truthful acknowledgement of the peer, but for `changes`."""
    sender = stage.sender()
    fields: dict[str, object] = {
        "session": stage.primary.session,
        "received_epoch": sender.durable_epoch,
        "durable_epoch": sender.durable_epoch,
        "durable_hash": sender.durable_hash,
        "applied_epoch": sender.applied_epoch,
        "missing_epoch": 0,
        "missing_frames": b"",
        "received_bytes": 0,
        "credit_bytes": 0,
    }
    return Acknowledge(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_reconnect_resumes_at_the_next_missing_frame() -> None:
    stage = Stage(limits=WIDE)
    stage.park_frames()
    stage.write_blocks(0, 80, seed=1)
    stage.seal()
    assert len(stage.parked) == 5
    stage.deliver([stage.parked[0], stage.parked[3]])
    stage.link_down()
    before = len(stage.east.frames)
    stage.is_parked = lambda source, target, what: False
    stage.link_up()
    assert [frame.sequence for frame in stage.east.frames[before:]] == [1, 2, 4]
    stage.check_in_sync()


def test_a_reconnect_resumes_after_the_last_durable_epoch() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.link_down()
    stage.write_epochs(3, seed=50)
    before = len(stage.east.frames)
    stage.link_up()
    assert {frame.epoch for frame in stage.east.frames[before:]} == {4, 5, 6}
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_nothing_is_sent_again_when_only_the_acknowledgement_was_lost() -> None:
    stage = Stage()
    stage.is_lost = lambda source, target, what: source == PEER
    stage.write_epochs(1)
    assert stage.secondary.engine.sealed_epoch == 1
    assert stage.sender().durable_epoch == 0
    stage.is_lost = lambda source, target, what: False
    count = len(stage.east.frames)
    stage.reconnect()
    assert len(stage.east.frames) == count
    assert stage.sender().durable_epoch == 1
    stage.check_in_sync()


def test_the_window_bounds_what_is_on_its_way() -> None:
    stage = Stage()
    stage.park_frames()
    stage.write_blocks(0, 60, seed=1)
    stage.seal()
    window = stage.limits.window_bytes_min
    assert window - FRAME < stage.parked_bytes() <= window
    for _ in range(5):
        stage.pass_time(500)
        assert stage.parked_bytes() <= window, "time opens no window"
    while stage.unpark(1):
        stage.pass_time(30)
        assert stage.parked_bytes() <= window
    stage.check_in_sync()


def test_frames_that_are_sent_twice_do_not_widen_the_window() -> None:
    stage = Stage(limits=replaced(SIMULATION, window_bytes_min=256 * KIB))
    for round_number in range(6):
        stage.park_frames()
        stage.write_blocks(round_number * 20, 48, seed=round_number)
        stage.seal()
        # The commit is there, the frames are slow: they are asked for, and then come twice.
        stage.pass_time(1100)
        stage.unpark()
        stage.pass_time(100)
        assert stage.sender().durable_epoch == round_number + 1
    stage.park_frames()
    for _ in range(7):
        stage.write_blocks(200, 32, seed=99)
        stage.seal()
    assert stage.parked_bytes() <= 256 * KIB


def test_the_links_own_queue_bounds_what_is_handed_over() -> None:
    stage = Stage(limits=WIDE, peer_journal_bytes=8192 * KIB)
    stage.park_frames()
    for at in range(6):
        stage.write_blocks(at * 64, 48, seed=at)
        stage.seal()
    assert stage.parked_bytes() <= 1024 * KIB


def test_no_frame_is_sent_beyond_the_credit_until_more_is_granted() -> None:
    stage = Stage(limits=WIDE, is_connected=False)
    stage.write_blocks(0, 48, seed=1)
    stage.seal()
    stage.secondary._credit = lambda: 0  # type: ignore[method-assign]
    stage.link_up()
    stage.pass_time(5000)
    assert not stage.east.frames
    assert "encode:west" in stage.east.jobs
    sender = stage.sender()
    stage.primary.receive(PEER, acknowledge(stage, credit_bytes=70 * KIB), stage.now_ns)
    stage.settle()
    assert len(stage.east.frames) == 1
    stage.primary.receive(PEER, acknowledge(stage, credit_bytes=69 * KIB), stage.now_ns)
    stage.settle()
    assert len(stage.east.frames) == 1, "credit never goes back"
    stage.primary.receive(PEER, acknowledge(stage, credit_bytes=1024 * KIB), stage.now_ns)
    stage.settle()
    stage.pass_time(100)
    assert sender.durable_epoch == 1
    stage.check_in_sync()


def test_lost_connections_in_a_full_window_do_not_stop_the_stream() -> None:
    stage = Stage()
    lost: list[SendFrame] = []

    def is_lost(source: str, target: str, what: SendMessage | SendFrame) -> bool:
        if isinstance(what, SendFrame) and len(lost) < 2:
            lost.append(what)
            return True
        return False

    stage.is_lost = is_lost
    stage.write_blocks(0, 60, seed=1)
    stage.seal()
    assert sum(len(frame.body) for frame in lost) > stage.limits.window_bytes_min - FRAME
    stage.pass_time(10_000)
    stage.check_in_sync()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"durable_epoch": 5}, "was not sent"),
        ({"durable_epoch": 3, "durable_hash": noise(1, 32)}, "chain hashes differ"),
        ({"durable_hash": noise(1, 32)}, "chain hashes differ"),
        ({"durable_hash": b""}, "chain hashes differ"),
        ({"applied_epoch": 3}, "more applied than durable"),
    ],
    ids=str,
)
def test_a_peer_that_lies_about_its_position_is_cut_off(
    changes: dict[str, object], text: str
) -> None:
    stage = Stage()
    stage.write_epochs(2)
    stage.park_all()
    stage.write_epochs(1, seed=9)
    assert stage.sender().durable_epoch == 2
    with pytest.raises(RemoteProtocolError, match=text):
        stage.primary.receive(PEER, acknowledge(stage, **changes), stage.now_ns)
    assert stage.sender().durable_epoch == 2
    assert stage.primary.engine.epoch_numbers()[-1:] == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"applied_epoch": 3},
        {"applied_epoch": -1},
        {"durable_epoch": -1, "applied_epoch": -1},
        {"durable_hash": b""},
        {"data_state": "perfect"},
    ],
    ids=str,
)
def test_a_peer_that_accepts_with_an_impossible_position_is_cut_off(
    changes: dict[str, object],
) -> None:
    stage = Stage()
    stage.write_epochs(2)
    accept = stage.west.sent(SessionAccept)[-1]
    stage.link_down()
    stage.primary.link_up(PEER, stage.now_ns)
    with pytest.raises(RemoteProtocolError):
        stage.primary.receive(PEER, msgspec.structs.replace(accept, **changes), stage.now_ns)
    assert not stage.sender().is_open
    assert stage.sender().durable_epoch == 2


def test_a_peer_cannot_claim_part_of_a_fold() -> None:
    stage = Stage(is_connected=False)
    stage.write_epochs(30, blocks=8)
    assert stage.sender().mode == "Fold"
    stage.park_all()
    stage.link_up()
    stage.deliver(stage.parked_commits())
    assert stage.sender().units[0].encoded.number > 2
    lie = acknowledge(stage, durable_epoch=1, durable_hash=noise(1, 32))
    with pytest.raises(RemoteProtocolError):
        stage.primary.receive(PEER, lie, stage.now_ns)


def test_a_lying_peer_loses_its_link_and_hurts_nobody_else() -> None:
    stage = Stage("west", "south")
    stage.write_epochs(1)
    lie = acknowledge(stage, durable_epoch=99)
    stage.nodes["west"].core._decide(SendMessage(PRIMARY, 1, lie))
    stage.settle()
    assert [type(error) for error in stage.errors] == [RemoteProtocolError]
    assert stage.links == {"south"}
    stage.write_epochs(2, seed=5)
    stage.check_in_sync("south")
    stage.link_up("west")
    stage.check_in_sync("west")


def test_garbage_about_missing_frames_changes_nothing() -> None:
    stage = Stage()
    stage.park_frames()
    stage.write_blocks(0, 8, seed=1)
    stage.seal()
    count = len(stage.east.frames)
    for epoch, bitmap in [(1, b"\xfe" + b"\xff" * 1000), (7, b"\xff"), (-1, b"\xff")]:
        message = acknowledge(stage, missing_epoch=epoch, missing_frames=bitmap)
        stage.primary.receive(PEER, message, stage.now_ns)
        stage.settle()
    assert len(stage.east.frames) == count
    stage.unpark()
    stage.check_in_sync()


def test_a_message_of_the_wrong_direction_is_a_protocol_error() -> None:
    stage = Stage()
    stage.write_epochs(1)
    (commit,) = stage.east.sent(EpochCommit)
    with pytest.raises(RemoteProtocolError, match="to the primary"):
        stage.primary.receive(PEER, commit, stage.now_ns)
    with pytest.raises(RemoteProtocolError, match="to a secondary"):
        stage.secondary.receive(PRIMARY, acknowledge(stage), stage.now_ns)


def test_what_a_sender_holds_is_bounded_whatever_the_backlog() -> None:
    stage = Stage(journal_bytes=8192 * KIB)
    stage.park_frames()
    bound = stage.limits.window_bytes_min + stage.limits.fold_bytes_max + 4 * FRAME
    for at in range(60):
        stage.write_epochs(1, blocks=16, seed=at)
        assert stage.sender().held_bytes <= bound
    assert stage.sender().next_number < 60, "the backlog stays in the journal"
    stage.unpark()
    stage.pass_time(5000)
    assert stage.check() == 60


def test_a_slow_peer_holds_up_neither_the_fast_one_nor_the_writer() -> None:
    stage = Stage("west", "south", journal_bytes=4096 * KIB)
    stage.park_frames("west")
    for at in range(40):
        stage.write_epochs(1, blocks=8, seed=at)
        assert stage.check("south") == at + 1
        if at % 3 == 0:
            stage.unpark(1, name="west")
        stage.pass_time(25)
    assert 0 < stage.sender("west").durable_epoch < 40
    stage.unpark()
    stage.pass_time(5000)
    assert stage.check("west") == 40
    assert stage.sender("west").counters.resyncs == 0


def test_a_paused_peer_gets_nothing_until_it_is_resumed() -> None:
    stage = Stage("west", "south")
    stage.write_epochs(1)
    assert stage.primary.pause("west", is_paused=True) == ["west"]
    stage.write_epochs(3, seed=7)
    stage.pass_time(2000)
    stage.reconnect("west")
    assert stage.check("west") == 1
    assert stage.check("south") == 4
    stage.primary.pause("west", is_paused=False)
    stage.settle()
    stage.check_in_sync("west")


def test_pausing_all_peers_names_them_and_one_that_is_unknown_is_nobody() -> None:
    stage = Stage("west", "south")
    assert stage.primary.pause(None, is_paused=True) == ["south", "west"]
    assert stage.primary.pause("north", is_paused=True) == []


def test_a_removed_peer_holds_nothing_and_may_come_back_blank() -> None:
    stage = Stage("west", "south", journal_bytes=1024 * KIB)
    stage.link_down("west")
    stage.write_epochs(5, blocks=8)
    stage.pass_time(4000)
    used = stage.primary.engine.journal.bytes_used
    stage.primary.remove_peer("west")
    stage.links.discard("west")
    stage.settle()
    stage.write_epochs(20, blocks=8, seed=7)
    stage.pass_time(4000)
    assert stage.primary.engine.journal.bytes_used <= max(used, 512 * KIB)
    assert "west" not in stage.primary.engine.superblock.peers
    stage.primary.add_peer("west")
    stage.link_up("west")
    stage.pass_time(3000)
    assert stage.sender("west").counters.resyncs == 0, "a first sync is none"
    stage.check_in_sync("west")


def note_levels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The level of each unit that is encoded from now on."""
    levels: list[int] = []
    run = EncodeUnitJob.run

    def noted(job: EncodeUnitJob) -> None:
        levels.append(job.level)
        run(job)

    monkeypatch.setattr(EncodeUnitJob, "run", noted)
    return levels


def test_a_copy_that_is_behind_gets_more_bytes_while_its_link_waits_for_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = note_levels(monkeypatch)
    stage = Stage(limits=WIDE)
    stage.write_epochs(20, seed=1)
    assert set(levels) == {1}, "it is never behind"
    stage.link_down()
    del levels[:]
    stage.write_epochs(20, seed=40)
    stage.link_up()
    assert stage.sender().mode == "Stream"
    assert levels[0] == LEVEL_BEHIND
    assert set(levels[-BEHIND_EPOCHS_MIN:]) == {1}, "at the end it is not behind any more"
    stage.check_in_sync()


def test_a_copy_that_is_behind_is_sent_no_more_bytes_over_a_busy_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = note_levels(monkeypatch)
    stage = Stage(limits=WIDE)
    stage.park_frames()
    for number in range(20):
        stage.write_blocks(0, 14, seed=number)
        stage.seal()
    while stage.unpark(1):
        pass
    assert set(levels) == {1}, "the link had something left each time"
