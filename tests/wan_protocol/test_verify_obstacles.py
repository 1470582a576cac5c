"""Stories of what gets in the way of a verify: links, restarts, resyncs, other versions, liars."""

from __future__ import annotations

import errno

import msgspec
import pytest

from geomirror.errors import NotFoundError, RefusedError
from geomirror.wan_protocol.decisions import SendMessage
from geomirror.wan_protocol.messages import SessionAccept, VerifyAnswer, VerifyAsk, VerifyPin
from geomirror.wan_protocol.verify_run import CLEAN, DONE, HEALED, Span
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY
from tests.wan_protocol.test_modes import write_until
from tests.wan_protocol.test_verify import ALL_BLOCKS, RATE, rot, start, verified, written_stage


def test_a_link_that_goes_away_is_waited_for() -> None:
    stage = written_stage()
    rot(stage, 480)
    run = start(stage, rate=300_000)
    stage.pass_time(1500)
    stage.link_down()
    stage.pass_time(3000)
    assert run.state == "running"
    assert run.reason == "not connected"
    reached = run.position()
    assert 0 < reached.block < 480
    stage.link_up()
    stage.pass_time(20_000)
    assert (run.state, run.result) == (DONE, HEALED)
    assert run.found.runs == [Span(0, 480, 1)]
    assert run.found.compared_blocks == ALL_BLOCKS
    stage.check_in_sync()


def test_a_peer_that_catches_up_is_not_compared_before_it_has() -> None:
    stage = written_stage()
    stage.overflow()
    run = start(stage)
    stage.link_up()
    assert not stage.east.sent(VerifyPin)
    stage.pass_time(10_000)
    stage.check_in_sync()
    assert (run.state, run.result) == (DONE, CLEAN)


def test_an_epoch_that_was_folded_into_others_is_asked_again_at_a_later_one() -> None:
    stage = written_stage()
    stage.park_frames()
    run = start(stage)
    write_until(stage, "Fold")
    assert run.reason == "it catches up (Fold)"
    stage.unpark()
    stage.pass_time(10_000)
    assert (run.state, run.result) == (DONE, CLEAN)
    stage.check_in_sync()


def test_a_restart_of_the_peer_loses_only_questions() -> None:
    stage = written_stage()
    rot(stage, 400)
    stage.hold(PEER, "verify")
    run = start(stage)
    stage.pass_time(500)
    stage.restart(PEER)
    stage.nodes[PEER].held.clear()
    stage.pass_time(10_000)
    assert (run.state, run.result) == (DONE, HEALED)
    assert run.found.runs == [Span(0, 400, 1)]


def test_a_verify_goes_on_from_its_position_after_a_restart_of_the_primary() -> None:
    stage = written_stage()
    rot(stage, 10)
    rot(stage, 480)
    run = start(stage, heals=False, rate=300_000)
    while run.position().block < 100:
        stage.pass_time(50)
    found = run.position()
    assert found.runs == [Span(0, 10, 1)]
    stage.restart(PRIMARY)
    run = stage.primary.start_verify(
        PEER, bytes_per_second=RATE, is_healing=False, now_ns=stage.now_ns, found=found
    )
    stage.pass_time(8000)
    assert run.state == DONE
    assert run.found.runs == [Span(0, 10, 1), Span(0, 480, 1)]
    assert ALL_BLOCKS <= run.found.compared_blocks < ALL_BLOCKS + 100


def test_a_sector_that_cannot_be_read_stops_nothing_else() -> None:
    for node in (PRIMARY, PEER):
        stage = written_stage()
        stage.nodes[node].store.fail("pread", "*volume*", error=errno.EIO, count=3)
        run = start(stage)
        stage.pass_time(200)
        stage.pass_time(20_000)
        assert stage.nodes[node].core.fenced is None
        assert (run.state, run.result) == (DONE, CLEAN)


def test_the_rate_is_kept() -> None:
    stage = written_stage()
    began = stage.now_ns
    run = start(stage, rate=300_000)
    while run.state != DONE:
        stage.pass_time(50)
    data = 8 * 12 * BLOCK + 5 * BLOCK + BLOCK
    assert stage.now_ns - began >= (data / 300_000 - 0.3) * 1e9


def test_nothing_stays_pinned() -> None:
    stage = written_stage()
    verified(stage)
    run = start(stage, rate=300_000)
    stage.pass_time(300)
    stage.link_down()
    stage.pass_time(100)
    assert run.state == "running"
    for node in stage.nodes.values():
        pins = [pin.owner for pin in node.engine.journal._pins.values()]
        assert not [owner for owner in pins if "verify" in owner or owner == "read"]
        assert not [owner for owner in node.engine.undo._pins if "verify" in owner]


def test_a_primary_that_says_nothing_more_holds_nothing_for_ever() -> None:
    stage = written_stage()
    number = stage.primary.engine.sealed_epoch
    pin = VerifyPin(stage.primary.session, 1, number)
    stage.secondary.receive(PRIMARY, pin, stage.now_ns)
    journal = stage.secondary.engine.journal
    assert "verify 1" in [each.owner for each in journal._pins.values()]
    stage.pass_time(61_000)
    assert "verify 1" not in [each.owner for each in journal._pins.values()]


def test_a_role_that_ends_lets_go_of_everything() -> None:
    stage = written_stage()
    stage.hold(PRIMARY, "verify*")
    stage.hold(PEER, "verify*")
    start(stage, rate=300_000)
    stage.pass_time(100)
    for node in stage.nodes.values():
        node.core.freeze()
    stage.release(PRIMARY)
    stage.release(PEER)
    for node in stage.nodes.values():
        pins = [pin.owner for pin in node.engine.journal._pins.values()]
        assert not [owner for owner in pins if "verify" in owner]


# Peers of other versions, and hostile ones.


def test_a_peer_of_the_previous_version_is_asked_nothing() -> None:
    stage = written_stage()
    accept = stage.west.sent(SessionAccept)[-1]
    stage.primary._takes_verify.clear()
    assert accept.takes_verify
    run = start(stage)
    stage.pass_time(1000)
    assert not stage.east.sent(VerifyPin)
    assert run.reason == "it runs a version that does not know verify: update it"


def test_a_verify_needs_a_peer_and_one_at_a_time() -> None:
    stage = written_stage()
    with pytest.raises(NotFoundError):
        start(stage, peer="nowhere")
    start(stage, rate=300_000)
    with pytest.raises(RefusedError):
        start(stage)
    stage.primary.stop_verify(PEER, "by hand", stage.now_ns)
    assert verified(stage).result == CLEAN


def test_answers_that_cannot_be_close_the_link() -> None:
    for change in ("region", "length", "equal", "number", "count"):
        stage = written_stage()
        stage.is_parked = lambda source, target, what: (
            source == PEER and isinstance(getattr(what, "message", None), VerifyAnswer)
        )
        start(stage)
        stage.pass_time(500)
        ask = stage.east.sent(VerifyAsk)[0]
        different = {
            "region": [(99, bytes(16 * ask.region_blocks))],
            "length": [(0, bytes(16))],
            "equal": [(0, bytes(16 * ask.region_blocks))],
            "number": [],
            "count": [],
        }[change]
        number = 10**9 if change == "number" else ask.ask
        if change == "equal":
            run = stage.primary.verifies[PEER]
            assert run.round is not None
            held = run.round.asks[ask.ask]
            held.low[:] = 0
            held.high[:] = 0
        count = 9 if change == "count" else ask.block_count
        answer = VerifyAnswer(ask.session, ask.number, number, count, different, 0)
        stage._arrive(PEER, PRIMARY, _message(answer))
        assert len(stage.errors) == 1, change


def test_questions_that_cannot_be_close_the_link() -> None:
    good = VerifyAsk(0, 1, 1, 0, 0, 16, 8, bytes(32), 1000)
    for fields in (
        {"block_count": 0},
        {"block_count": 1 << 20},
        {"first_block": -1},
        {"region_blocks": 0},
        {"digests": bytes(16)},
        {"bytes_per_second": 0},
    ):
        stage = written_stage()
        bad = msgspec.structs.replace(good, session=stage.primary.session, **fields)
        stage._arrive(PRIMARY, PEER, _message(bad))
        assert len(stage.errors) == 1, fields


def _message(message: VerifyAnswer | VerifyAsk) -> SendMessage:
    return SendMessage(PEER, message.session, message)
