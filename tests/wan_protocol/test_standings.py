"""Stories of what the members know: told before it counts, kept beyond the loss of the primary."""

from __future__ import annotations

import msgspec
import pytest

from geomirror.cluster.standing import Standing
from geomirror.cluster.verdict import Confirmed, MemberAnswer, assess
from geomirror.environment import SECOND
from geomirror.errors import RemoteProtocolError
from geomirror.wan_protocol.member_answer import answer_of
from geomirror.wan_protocol.messages import Announce, AnnounceAcknowledge, SessionAccept
from geomirror.wan_protocol.sync_policy import SyncPolicy
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

COLO = "colo"
BOTH = {PEER: "durable", COLO: "durable"}
DEGRADE = SyncPolicy(BOTH, None, 5 * SECOND)
BLOCK = SyncPolicy(BOTH, None, None)


def synchronous(policy: SyncPolicy = DEGRADE) -> Stage:
    stage = Stage(PEER, COLO)
    stage.primary.set_policy(policy, stage.now_ns)
    stage.settle()
    return stage


def write_flushed(stage: Stage, seed: int) -> None:
    stage.write_blocks(seed % 100, 4, seed=seed)
    stage.primary.flush(seed, stage.now_ns)
    stage.settle()


def answered(stage: Stage) -> list[object]:
    return [token for token, error in stage.east.flushes if error is None]


def known(stage: Stage, name: str) -> Standing:
    standing = stage.mirror(name).standing
    assert standing is not None
    return standing


def verdict(stage: Stage, name: str, *asked: str) -> Confirmed:
    """On a copy, when only these members are left."""
    answers = [MemberAnswer(PRIMARY, error="lost")]
    for peer in (PEER, COLO):
        is_asked = peer in (asked or (name,))
        answers.append(
            answer_of(peer, stage.mirror(peer)) if is_asked else MemberAnswer(peer, error="away")
        )
    return assess(name, answers).confirmed


def test_every_member_knows_the_set_and_has_it_durable() -> None:
    stage = synchronous()
    write_flushed(stage, 1)
    stage.pass_time(1_100)
    for name in (PEER, COLO):
        standing = known(stage, name)
        assert standing.in_sync == [COLO, PEER]
        assert (standing.epoch, standing.confirmed_epoch) == (1, 1)
        assert not standing.is_binding
    stage.crash(PRIMARY)
    for name in (PEER, COLO):
        stage.restart(name)
        assert known(stage, name).confirmed_epoch == 1, "kept when the link went down"
        assert (verdict(stage, name).verdict, verdict(stage, name).reason) == (
            "complete_until",
            "in_sync",
        )


def test_a_flush_is_answered_without_a_peer_only_when_the_others_know() -> None:
    stage = synchronous()
    stage.link_down(COLO)
    stage.hold(PEER, "standing")
    write_flushed(stage, 1)
    stage.pass_time(5_100)
    assert stage.primary.out_of_sync == [COLO]
    assert answered(stage) == [], "west has not yet on its disk that colo is left out"
    stage.release(PEER)
    stage.settle()
    assert answered(stage) == [1]
    assert known(stage, PEER).in_sync == [PEER]
    # Colo cannot have been told; who asks both learns it, who asks colo learns until when it knows.
    assert verdict(stage, COLO, COLO, PEER).reason == "left_out"
    alone = verdict(stage, COLO)
    assert alone.verdict == "complete_until"
    together = verdict(stage, PEER, COLO, PEER)
    assert (together.verdict, together.reason) == ("complete_until", "in_sync")
    assert alone.until_wall_ns is not None
    assert together.until_wall_ns is not None
    assert alone.until_wall_ns < together.until_wall_ns


def test_a_member_that_hangs_stops_no_writer_for_long() -> None:
    stage = synchronous(SyncPolicy({PEER: "durable"}, None, 5 * SECOND))
    stage.hold(COLO, "standing")
    stage.link_down(PEER)
    write_flushed(stage, 1)
    stage.pass_time(6_900)
    assert answered(stage) == []
    stage.pass_time(300)
    assert answered(stage) == [1]


def test_what_the_primary_confirmed_later_is_told_a_second_later() -> None:
    stage = synchronous()
    for seed in range(1, 6):
        write_flushed(stage, seed)
    before = len(stage.east.sent(Announce))
    stage.pass_time(1_100)
    assert known(stage, PEER).confirmed_epoch == 5
    assert len(stage.east.sent(Announce)) == before + 2, "one for each"
    stage.pass_time(9_000)
    assert len(stage.east.sent(Announce)) == before + 2, "nothing happened"
    wall_ns = known(stage, PEER).wall_ns
    stage.pass_time(2_000)
    assert known(stage, PEER).wall_ns > wall_ns, "but that the primary is there is worth a word"


def test_an_asynchronous_flush_counts_what_no_epoch_holds_yet() -> None:
    stage = synchronous(SyncPolicy())
    stage.hold(PRIMARY, "seal")
    write_flushed(stage, 1)
    assert answered(stage) == [1]
    assert stage.primary.standing().confirmed_epoch == 1
    assert stage.primary.standing().epoch == 0
    assert verdict(stage, PEER).verdict == "asynchronous"


def test_with_block_a_copy_has_everything_whoever_else_is_lost() -> None:
    stage = synchronous(BLOCK)
    write_flushed(stage, 1)
    stage.link_down(COLO)
    write_flushed(stage, 2)
    stage.pass_time(60_000)
    assert answered(stage) == [1]
    assert verdict(stage, COLO).verdict == "complete"
    assert verdict(stage, PEER).verdict == "complete"


def test_block_ends_only_when_the_member_that_relies_on_it_knows() -> None:
    stage = synchronous(BLOCK)
    stage.link_down(COLO)
    write_flushed(stage, 1)
    stage.primary.set_policy(DEGRADE, stage.now_ns)
    stage.pass_time(60_000)
    assert answered(stage) == [], "colo, lost with the primary, would say that it has everything"
    assert stage.primary.unaware == [COLO]
    assert verdict(stage, COLO).verdict == "complete"
    # Also in the next life, which gets the new settings from the start.
    stage.crash(PRIMARY)
    stage.start(PRIMARY, is_connected=False)
    stage.link_up(PEER)
    stage.primary.set_policy(DEGRADE, stage.now_ns)
    stage.pass_time(60_000)
    assert stage.primary.policy == BLOCK
    stage.link_up(COLO)
    stage.pass_time(100)
    assert stage.primary.policy == DEGRADE
    assert verdict(stage, COLO).reason == "in_sync"
    stage.link_down(COLO)
    write_flushed(stage, 2)
    stage.pass_time(5_100)
    assert answered(stage)[-1] == 2
    assert verdict(stage, COLO).verdict == "complete_until", "no promise for what came later"


def test_block_ends_at_once_when_the_operator_insists() -> None:
    stage = synchronous(BLOCK)
    stage.link_down(COLO)
    write_flushed(stage, 1)
    stage.primary.set_policy(DEGRADE, stage.now_ns, is_forced=True)
    stage.pass_time(5_100)
    assert answered(stage) == [1]
    assert verdict(stage, COLO, COLO, PEER).reason == "left_out", "west was told"


def test_settings_taken_back_before_the_member_knows_are_as_if_never_changed() -> None:
    stage = synchronous(BLOCK)
    stage.link_down(COLO)
    stage.primary.set_policy(DEGRADE, stage.now_ns)
    stage.settle()
    assert not known(stage, PEER).is_binding
    stage.primary.set_policy(BLOCK, stage.now_ns)
    stage.link_up(COLO)
    stage.pass_time(100)
    assert stage.primary.pending_policy is None
    assert known(stage, PEER).is_binding
    assert verdict(stage, COLO).verdict == "complete"


def test_another_number_of_copies_keeps_only_who_has_everything() -> None:
    stage = synchronous(SyncPolicy(BOTH, 1, 5 * SECOND))
    stage.link_down(COLO)
    write_flushed(stage, 1)
    assert answered(stage) == [1], "one copy is enough"
    assert stage.primary.out_of_sync == []
    stage.primary.set_policy(DEGRADE, stage.now_ns)
    stage.settle()
    assert stage.primary.out_of_sync == [COLO], "it is in sync, and lacks a confirmed write"


def test_a_standing_is_acknowledged_only_when_it_is_durable() -> None:
    stage = Stage(PEER)
    stage.pass_time(100)
    stage.hold(PEER, "standing")
    before = len(stage.west.sent(AnnounceAcknowledge))
    stage.primary.set_policy(SyncPolicy({PEER: "durable"}, None, None), stage.now_ns)
    stage.pass_time(2_000)
    assert known(stage, PEER).is_binding
    assert len(stage.west.sent(AnnounceAcknowledge)) == before
    stage.crash(PEER)
    stage.start(PEER, is_connected=False)
    assert not known(stage, PEER).is_binding, "it never was on its disk"
    stage.link_up(PEER)
    stage.pass_time(100)
    assert known(stage, PEER).is_binding
    assert stage.west.sent(AnnounceAcknowledge)[-1].version == known(stage, PEER).version


def test_a_peer_of_the_previous_version_is_told_nothing_and_waited_for_all_the_same() -> None:
    stage = Stage(PEER, COLO)
    real = stage.primary.receive

    def receive(peer: str, message: object, now_ns: int) -> None:
        if isinstance(message, SessionAccept):
            message = msgspec.structs.replace(message, standing_version=-1)
        real(peer, message, now_ns)  # type: ignore[arg-type]

    stage.primary.receive = receive  # type: ignore[method-assign]
    for name in (PEER, COLO):
        stage.link_down(name)
        stage.link_up(name)
    before = len(stage.east.sent(Announce))
    stage.primary.set_policy(DEGRADE, stage.now_ns)
    write_flushed(stage, 1)
    stage.pass_time(20_000)
    assert answered(stage) == [1]
    assert len(stage.east.sent(Announce)) == before


def test_hostile_standings_and_acknowledgements_close_the_link() -> None:
    stage = synchronous()
    good = stage.primary.standing()
    for bad in (
        msgspec.structs.replace(good, epoch=-1),
        msgspec.structs.replace(good, generation="00" * 16),
    ):
        message = Announce(stage.secondary.session, bad)
        with pytest.raises(RemoteProtocolError, match="impossible"):
            stage.secondary.receive(PRIMARY, message, stage.now_ns)
    assert known(stage, PEER) == good or known(stage, PEER).version == good.version
    for version in (-1, good.version + 5):
        message = AnnounceAcknowledge(stage.primary.session, version)
        with pytest.raises(RemoteProtocolError, match="never said"):
            stage.primary.receive(PEER, message, stage.now_ns)


def test_after_an_older_disk_of_the_primary_no_version_means_two_things() -> None:
    stage = synchronous()
    old = stage.snapshot(PRIMARY)
    for after_s in (4, 3, 2):
        stage.primary.set_policy(SyncPolicy(BOTH, None, after_s * SECOND), stage.now_ns)
        stage.settle()
    before = known(stage, PEER)
    assert before.degrade_after_ns == 2 * SECOND
    stage.restore(PRIMARY, old)
    for name in (PEER, COLO):
        stage.link_up(name)
    stage.pass_time(2_000)
    assert known(stage, PEER).version > before.version
    assert known(stage, PEER).degrade_after_ns == 5 * SECOND
