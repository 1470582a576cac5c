"""Stories of sessions that a peer refuses, and of epochs that are not what was sealed."""

from __future__ import annotations

from dataclasses import replace as replaced

import msgspec
import pytest

from geomirror.limits import KIB, SIMULATION
from geomirror.wan_protocol import epoch_intake
from geomirror.wan_protocol import sender as sender_module
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.messages import SessionOpen, SessionRefuse
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

LIMITS = replaced(SIMULATION, window_bytes_min=1024 * KIB)


def test_a_refused_session_is_offered_again_less_and_less_often() -> None:
    stage = Stage(is_connected=False)
    stage.write_epochs(2)
    refuse = SessionRefuse(stage.primary.session, 5, "not now")
    stage.is_lost = lambda source, target, what: source == PRIMARY
    stage.link_up()
    times: list[int] = []
    for _ in range(8):
        offers = len(stage.east.sent(SessionOpen))
        stage.primary.receive(PEER, refuse, stage.now_ns)
        stage.settle()
        assert stage.sender().refusal == "not now"
        began_ns = stage.now_ns
        while len(stage.east.sent(SessionOpen)) == offers:
            stage.pass_time(100)
        times.append((stage.now_ns - began_ns) // 1_000_000_000)
    assert times == [1, 2, 4, 8, 16, 32, 60, 60]
    assert stage.east.event_kinds().count("peer_refused") == 1, "told once"
    stage.is_lost = lambda source, target, what: False
    stage.primary.receive(PEER, refuse, stage.now_ns)
    stage.pass_time(60_000)
    assert stage.sender().refusal == ""
    stage.check_in_sync()


def test_a_refused_session_is_not_offered_while_the_link_is_down() -> None:
    stage = Stage()
    stage.primary.receive(PEER, SessionRefuse(stage.primary.session, 5, "no"), stage.now_ns)
    stage.link_down()
    offers = len(stage.east.sent(SessionOpen))
    stage.pass_time(5000)
    assert len(stage.east.sent(SessionOpen)) == offers
    stage.link_up()
    stage.write_epochs(1)
    stage.check_in_sync()


@pytest.mark.parametrize("is_reversed", [False, True])
def test_frames_of_another_cut_are_taken_anew(is_reversed: bool) -> None:
    stage = Stage(limits=LIMITS, peer_journal_bytes=4096 * KIB, is_connected=False)
    stage.write_epochs(4, blocks=20)
    stage.park_all()
    stage.link_up()
    stage.deliver(stage.parked_commits())  # SessionOpen
    singles = stage.parked_frames()
    if is_reversed:
        singles.reverse()
    # The first frame of each epoch arrives; then the same epochs come as one fold.
    firsts = [w for w in singles if isinstance(w[2], SendFrame) and w[2].sequence == 0]
    stage.deliver(firsts[:4])
    assert len(stage.secondary.incoming) == 4
    stage.parked.clear()
    stage.is_parked = lambda source, target, what: False
    stage.link_down()
    sender = stage.sender()
    sender.forget_units(sender.durable_epoch + 1)
    sender.mode = "Fold"
    stage.link_up()
    stage.pass_time(1500)
    assert sender.durable_epoch == 4
    stage.pass_time(40_000)
    stage.check_in_sync()
    assert stage.west.sent(SessionRefuse) == []
    assert sender.counters.resyncs == 0


def test_an_epoch_that_is_never_what_was_sealed_is_refused_and_tried_again() -> None:
    stage = Stage()
    stage.write_epochs(1)
    real = stage.primary._encoded_unit

    def wrong(sender: object, job: object) -> None:
        # A primary that says of its epochs what is not true.
        real(sender, job)  # type: ignore[arg-type]
        unit = stage.sender().units[-1]
        unit.commit = msgspec.structs.replace(unit.commit, chain_hash=bytes(32))

    stage.primary._encoded_unit = wrong  # type: ignore[assignment,method-assign]
    stage.write_epochs(1, seed=5)
    stage.pass_time(50)
    assert "differs from the primary's" in stage.sender().refusal
    assert stage.west.event_kinds().count("bad_epoch") == 1
    stage.pass_time(20_000)
    assert 3 <= len(stage.west.sent(SessionRefuse)) <= 6
    assert stage.secondary.engine.committed_epoch == 1
    # It was a fault that passed: nobody has to touch the link.
    stage.primary._encoded_unit = real  # type: ignore[method-assign]
    stage.sender().forget_units(2)
    stage.pass_time(60_000)
    stage.check_in_sync()


def test_many_small_epochs_for_a_peer_that_cannot_take_them_do_not_close_the_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sender_module.UNITS_MAX < epoch_intake.INCOMING_MAX
    monkeypatch.setattr(sender_module, "UNITS_MAX", 8)
    monkeypatch.setattr(epoch_intake, "INCOMING_MAX", 16)
    stage = Stage(journal_bytes=8192 * KIB)

    def is_lost(source: str, target: str, what: SendMessage | SendFrame) -> bool:
        return isinstance(what, SendFrame) and what.epoch == 1

    stage.is_lost = is_lost
    for seed in range(40):
        stage.write_epochs(1, blocks=1, seed=seed)
        stage.pass_time(1)
    assert stage.errors == []
    assert len(stage.secondary.incoming) == 8
    stage.is_lost = lambda source, target, what: False
    stage.pass_time(40_000)
    stage.check_in_sync()
