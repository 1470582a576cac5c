"""Stories of a disk that is put back to an older state under its node: it does not win."""

from __future__ import annotations

import msgspec
import pytest

from geomirror.cluster.history import DIVERGED, STARTS_MAX, compare
from geomirror.errors import PutBackError, RemoteProtocolError, SupersededError
from geomirror.wan_protocol.messages import SessionOpen, SessionRefuse, StartEntry
from geomirror.wan_protocol.primary_starts import (
    LISTED_MAX,
    add_start,
    check_starts,
    start_entries,
    start_records,
)
from geomirror.wan_protocol.session import claim_history, state_history
from geomirror.wan_protocol.sync_policy import parse_policy
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage, noise
from tests.wan_protocol.put_back_support import disk_of_copy, put_back_copy, put_back_primary


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
        stage.write_epochs(1, seed=at + 3)
    assert len(stage.primary.engine.superblock.starts) == STARTS_MAX
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
    store = disk_of_copy(stage)
    stage.write_epochs(4, seed=5)
    stage.pass_time(1000)
    said = stage.sender().durable_epoch
    assert stage.primary.is_in_sync(PEER) is is_synchronous
    put_back_copy(stage, store)
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
    store = disk_of_copy(stage)
    said = stage.write_epochs(4, seed=5)
    stage.pass_time(40_000)
    stage.restart(PRIMARY, is_kill=True)
    stage.pass_time(1000)
    put_back_copy(stage, store)
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


@pytest.mark.parametrize("field", ["identity", "epoch", "chain_hash", "order", "count"])
def test_a_list_of_starts_that_cannot_be_closes_the_link(field: str) -> None:
    good = [StartEntry(bytes([at]) * 16, at, bytes(32)) for at in range(3)]
    check_starts(good)
    wrong: dict[str, list[StartEntry]] = {
        "identity": [*good, StartEntry(b"short", 9, bytes(32))],
        "epoch": [StartEntry(bytes(16), -1, bytes(32)), *good],
        "chain_hash": [*good, StartEntry(bytes(16), 9, bytes(33))],
        "order": [*good, good[-1]],
        "count": [StartEntry(bytes(16), at, bytes(32)) for at in range(LISTED_MAX + 1)],
    }
    stage = Stage()
    offer = msgspec.structs.replace(stage.east.sent(SessionOpen)[-1], starts=wrong[field])
    before = stage.secondary.engine.superblock.starts
    with pytest.raises(RemoteProtocolError, match="starts of a primary that cannot be"):
        stage.secondary.receive(PRIMARY, offer, stage.now_ns)
    assert stage.secondary.engine.superblock.starts == before
    with pytest.raises(RemoteProtocolError, match="starts of a primary that cannot be"):
        stage.primary.receive(PEER, offer, stage.now_ns)


def test_the_list_is_bounded_and_starts_that_sealed_nothing_are_not_kept() -> None:
    superblock = Stage().primary.engine.superblock
    for number in range(2 * STARTS_MAX):
        for again in range(2):
            identity = (2 * number + again).to_bytes(16, "big")
            add_start(superblock, identity, number, bytes(32))
    listed = start_entries(superblock.starts)
    assert [each.epoch for each in listed] == [*range(STARTS_MAX, 2 * STARTS_MAX)]
    assert all(int.from_bytes(each.identity, "big") % 2 for each in listed), "the last of each"
    add_start(superblock, bytes(16), 40, bytes(32))
    assert [each.epoch for each in superblock.starts] == [*range(STARTS_MAX, 40), 40]


def heir_of(stage: Stage, name: str) -> SessionOpen:
    """What a copy would offer after its promotion."""
    offer, superblock = stage.east.sent(SessionOpen)[-1], stage.mirror(name).engine.superblock
    engine = stage.mirror(name).engine
    last = offer.chain[-1]
    heir = msgspec.structs.replace(
        last,
        identity=noise(9, 16),
        token=last.token + 1,
        parent=last.identity,
        parent_epoch=engine.sealed_epoch,
        parent_hash=engine.sealed_hash,
        by=name,
    )
    start = StartEntry(noise(8, 16), engine.sealed_epoch, engine.sealed_hash)
    return msgspec.structs.replace(
        offer,
        chain=[*offer.chain, heir],
        epoch=engine.sealed_epoch,
        chain_hash=engine.sealed_hash,
        starts=[*start_entries(superblock.starts), start],
    )


@pytest.mark.parametrize("epochs_after", [1, 4, 9])
def test_several_copies_one_of_which_was_away(epochs_after: int) -> None:
    """It follows the older disk, since it has nothing that was lost; the other one refuses. When
    that one is promoted, both who went on from the older disk have a tail from there on."""
    stage = Stage(PEER, "north")
    before = stage.write_epochs(3)
    stage.pass_time(1000)
    store = stage.snapshot(PRIMARY)
    stage.link_down("north")
    held = stage.write_epochs(4, seed=5)
    stage.pass_time(1000)
    stage.crash(PRIMARY, is_kill=True)
    stage.nodes[PRIMARY].store = store
    stage.start(PRIMARY, is_connected=False)
    stage.write_epochs(epochs_after, seed=77)
    stage.link_up("north")
    stage.link_up(PEER)
    stage.pass_time(60_000)
    stage.check_in_sync("north")
    assert stage.secondary.put_back_primary == PRIMARY
    assert f"it has lost epochs {before + 1}-{held}, which" in stage.sender().refusal
    assert stage.sender().has_what_was_lost
    assert not stage.sender("north").has_what_was_lost
    assert stage.east.event_kinds().count("put_back") == 1
    assert stage.west.event_kinds().count("put_back") == 1
    assert stage.secondary.engine.sealed_epoch == held

    promoted = heir_of(stage, PEER)
    image = stage.image("north")
    stage.mirror("north").receive(PEER, promoted, stage.now_ns)
    stage.primary.receive(PEER, promoted, stage.now_ns)
    stage.settle()
    north = stage.mirror("north")
    assert north.is_outranked
    assert f"diverged after epoch {before}" in north.refusal or north.primary == PEER
    for engine in (north.engine, stage.primary.engine):
        superblock = engine.superblock
        if superblock.role == "primary":
            starts = start_records(stage.primary.superseded_starts)
            engine.supersede(stage.primary.superseded_by, starts)
        found = compare(state_history(engine), claim_history(superblock))
        assert found.relation == DIVERGED
        assert found.branch is not None
        assert found.branch.epoch == before, "not where the numbers part"
    assert stage.image("north") == image


def test_a_primary_of_an_older_generation_that_was_put_back_learns_where_it_parted() -> None:
    """It has other epochs below where the copy was promoted: by numbers it would just follow."""
    stage = Stage()
    before = stage.write_epochs(3)
    stage.pass_time(1000)
    put_back_primary(stage, 2)
    promoted = heir_of(stage, PEER)
    refuse = SessionRefuse(
        stage.primary.session,
        SupersededError.wire_code,
        "token 1",
        promoted.chain,
        promoted.starts,
    )
    stage.link_up()
    stage.primary.receive(PEER, refuse, stage.now_ns)
    stage.settle()
    primary = stage.primary
    assert primary.fenced is not None
    job = primary.engine.supersede(primary.superseded_by, start_records(primary.superseded_starts))
    assert job is not None
    job.run()
    stage.crash(PRIMARY, is_kill=True)
    stage.start(PRIMARY, is_connected=False)
    engine = stage.primary.engine
    found = compare(state_history(engine), claim_history(engine.superblock))
    assert (found.relation, found.branch and found.branch.epoch) == (DIVERGED, before)
    assert stage.primary.superseded_starts == promoted.starts


def test_a_refusal_names_both_ways_out() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.pass_time(1000)
    put_back_primary(stage, 1)
    stage.link_up()
    stage.pass_time(1000)
    (refuse, *_) = stage.west.sent(SessionRefuse)
    assert refuse.error_code == PutBackError.wire_code
    assert '"geomirror failover orders --to NODE", given at this node' in refuse.error_text
    assert f'"geomirror resolve orders --keep {PRIMARY}"' in refuse.error_text
