"""Stories of where a connecting copy stands: other histories, older and blank disks."""

from __future__ import annotations

import msgspec
import pytest

from geomirror.errors import RemoteProtocolError, SupersededError
from geomirror.limits import KIB
from geomirror.wan_protocol.messages import (
    ResyncBegin,
    SessionAccept,
    SessionOpen,
    SessionRefuse,
)
from tests.sim.disk import SimStore
from tests.wan_protocol.core_support import (
    PEER,
    PRIMARY,
    SIZES,
    Stage,
    different_blocks,
    noise,
)


def last_accept(stage: Stage) -> SessionAccept:
    return stage.west.sent(SessionAccept)[-1]


def test_a_secondary_with_another_history_is_refused_as_diverged() -> None:
    stage = Stage()
    stage.write_epochs(1)
    stage.link_down()
    store = SimStore("other")
    engine = stage.create_engine(store, PEER, generation=noise(3, 16))
    engine.superblock.data_state = "consistent"
    stage.replace(PEER, engine, store)
    stage.link_up()
    stage.pass_time(3000)
    assert "another history" in stage.secondary.refusal
    assert "another history" in stage.sender().refusal
    assert not stage.sender().is_open
    assert not any(stage.image()[0])


def test_an_offer_that_does_not_know_our_history_is_refused_and_nothing_changes() -> None:
    stage = Stage()
    stage.write_epochs(1)
    offer = stage.east.sent(SessionOpen)[-1]
    stranger = msgspec.structs.replace(offer.chain[-1], identity=noise(3, 16), token=2)
    accepts = len(stage.west.sent(SessionAccept))
    other = msgspec.structs.replace(offer, chain=[stranger])
    stage.secondary.receive(PRIMARY, other, stage.now_ns)
    stage.settle()
    assert len(stage.west.sent(SessionAccept)) == accepts
    assert "has another history here: unrelated" in stage.west.sent(SessionRefuse)[-1].error_text
    assert stage.secondary.engine.generation == offer.chain[-1].identity

    # Parted before what is here.
    parted = msgspec.structs.replace(stranger, parent=offer.chain[-1].identity)
    longer = msgspec.structs.replace(offer, chain=[*offer.chain, parted])
    stage.secondary.receive(PRIMARY, longer, stage.now_ns)
    stage.settle()
    assert "diverged after epoch 0, epoch 1 here" in stage.secondary.refusal

    # A token that is over.
    for chain in ([], offer.chain):
        older = msgspec.structs.replace(offer, chain=chain)
        stage.secondary.receive(PRIMARY, older, stage.now_ns)
        stage.settle()
        assert stage.west.sent(SessionRefuse)[-1].chain == longer.chain, "the highest it heard of"
        assert not stage.secondary.is_open
    assert stage.secondary.is_outranked

    engine = stage.secondary.engine
    follower = msgspec.structs.replace(
        parted, token=3, parent_epoch=engine.sealed_epoch, parent_hash=engine.sealed_hash
    )
    longer = msgspec.structs.replace(offer, chain=[*offer.chain, follower])
    stage.secondary.receive(PRIMARY, longer, stage.now_ns)
    assert not stage.secondary.is_open, "the chain is not durable yet"
    stage.settle()
    taken = stage.west.sent(SessionAccept)[-1]
    assert taken.generation == follower.identity, "a history that goes on from ours is welcome"
    assert not stage.secondary.is_outranked


def test_a_copy_that_is_ahead_of_a_promoted_one_stops_its_old_primary_too() -> None:
    """I8: whoever has seen a higher token takes nothing of a lower one, and says so, for ever."""
    stage = Stage()
    stage.write_epochs(2)
    offer = stage.east.sent(SessionOpen)[-1]
    heir = msgspec.structs.replace(
        offer.chain[-1],
        identity=noise(3, 16),
        token=2,
        parent=offer.chain[-1].identity,
        parent_epoch=1,
        by="north-1",
    )
    promoted = msgspec.structs.replace(offer, chain=[*offer.chain, heir])
    assert stage.secondary.is_open
    stage.secondary.receive("north-1", promoted, stage.now_ns)
    assert not stage.secondary.is_open
    assert stage.secondary.primary == "north-1"
    stage.settle()
    assert stage.primary.superseded_by == promoted.chain, "the old primary hears of it from here"
    assert stage.primary.fenced is not None
    before = stage.secondary.engine.superblock.superseded_by
    assert before
    stage.restart(PEER)
    assert stage.secondary.engine.superblock.superseded_by == before
    stage.secondary.receive(PRIMARY, offer, stage.now_ns)
    stage.settle()
    assert stage.west.sent(SessionRefuse)[-1].chain == promoted.chain
    assert not stage.secondary.is_open


def test_a_late_refusal_of_its_own_old_offer_ends_no_session_of_a_follower() -> None:
    """It offered as a primary, followed the offer that crossed it, and then has the answer."""
    stage = Stage()
    stage.write_epochs(1)
    chain = stage.east.sent(SessionOpen)[-1].chain
    late = SessionRefuse(stage.secondary.session, SupersededError.wire_code, "token 1", chain)
    stage.secondary.receive(PRIMARY, late, stage.now_ns)
    assert stage.secondary.is_open
    assert "primary_refused" not in stage.west.event_kinds()
    stage.write_epochs(1)
    stage.check_in_sync()
    stage.secondary.receive(PRIMARY, msgspec.structs.replace(late, chain=[]), stage.now_ns)
    assert not stage.secondary.is_open


def test_the_primary_too_refuses_another_history() -> None:
    stage = Stage()
    stage.write_epochs(2)
    accept = last_accept(stage)
    ours = stage.primary.engine.generation
    other = noise(1, 32)
    for changes in (
        {"generation": noise(3, 16), "durable_epoch": 1},
        {"generation": ours, "durable_epoch": 2, "durable_hash": other},
        {"generation": ours, "durable_epoch": 3, "durable_hash": other},
        {"generation": ours, "durable_epoch": 0, "durable_hash": other},
    ):
        stage.reconnect()
        stage.primary.link_down(PEER, stage.now_ns)
        stage.primary.link_up(PEER, stage.now_ns)
        lie = msgspec.structs.replace(accept, **changes)
        stage.primary.receive(PEER, lie, stage.now_ns)
        assert not stage.sender().is_open, changes
        assert "diverged" in stage.sender().refusal
        stage.settle()
    stage.reconnect()
    stage.check_in_sync()


@pytest.mark.parametrize("wrong", [-512, 512])
def test_wrong_volume_sizes_are_refused_with_both_named(wrong: int) -> None:
    stage = Stage(is_connected=False)
    store = SimStore("smaller")
    sizes = {0: SIZES[0] + wrong, 1: SIZES[1]}
    engine = stage.create_engine(store, PEER, sizes=sizes)
    engine.superblock.data_state = "consistent"
    stage.replace(PEER, engine, store)
    stage.link_up()
    assert str(SIZES[0]) in stage.sender().refusal
    assert str(SIZES[0] + wrong) in stage.sender().refusal
    assert not stage.secondary.is_open
    assert (stage.east if wrong < 0 else stage.west).sent(SessionRefuse)


def test_another_resource_is_refused() -> None:
    stage = Stage()
    (offer,) = stage.east.sent(SessionOpen)
    other = msgspec.structs.replace(offer, resource=bytes(16))
    stage.secondary.receive(PRIMARY, other, stage.now_ns)
    assert "another identity" in stage.secondary.refusal


def test_a_resync_to_another_history_is_a_protocol_error() -> None:
    stage = Stage()
    good = ResyncBegin(stage.primary.session, stage.primary.engine.generation, 0, bytes(32), 0, 1)
    for changes in ({"generation": noise(1, 16)}, {"chain_hash": b""}, {"epoch": -1}):
        with pytest.raises(RemoteProtocolError):
            stage.secondary.receive(PRIMARY, msgspec.structs.replace(good, **changes), stage.now_ns)
    assert stage.secondary.data_state == "consistent"


def test_an_old_disk_goes_on_from_where_it_was_when_the_epochs_are_there() -> None:
    stage = Stage()
    stage.write_epochs(2)
    old = stage.snapshot(PEER)
    stage.link_down()
    stage.write_epochs(2, seed=5)
    stage.primary.pause(PEER, is_paused=True)
    stage.restore(PEER, old)
    stage.primary.pause(PEER, is_paused=False)
    stage.settle()
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_an_old_disk_is_resynced_fully_when_the_epochs_are_gone() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    old = stage.snapshot(PEER)
    stage.write_epochs(20, seed=5, blocks=8)
    stage.pass_time(4000)
    stage.restore(PEER, old)
    stage.pass_time(5000)
    assert stage.sender().counters.resyncs == 1
    assert different_blocks(stage.image()[0], bytes(stage.content[0])) == []
    stage.check_in_sync()


def test_an_old_disk_is_copied_whole_although_there_is_a_bitmap_from_a_later_epoch_on() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    old = stage.snapshot(PEER)
    stage.write_blocks(480, 8, seed=5)
    stage.seal()
    stage.check_in_sync()
    stage.link_down()
    for at in range(100):
        stage.write_epochs(1, blocks=8, seed=at)
    stage.pass_time(5000)
    assert stage.sender().mode == "Bitmap"
    assert not stage.primary.bitmaps[PEER].bitmap.is_full
    stage.restore(PEER, old)
    stage.pass_time(8000)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 2, "one for the overflow, one for the old disk"


def test_an_old_disk_from_the_middle_of_a_resync_is_never_called_consistent() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(8, blocks=16)
    stage.hold(PEER, "resync")
    stage.link_up()
    stage.run_held(PEER, "resync")
    old = stage.snapshot(PEER)
    assert stage.secondary.data_state == "inconsistent"
    stage.release(PEER)
    stage.pass_time(3000)
    stage.check_in_sync()
    stage.restore(PEER, old)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_a_blank_disk_in_the_middle_of_the_first_sync_is_copied_from_the_start() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    blank = stage.snapshot(PEER)
    stage.write_epochs(8, blocks=16)
    stage.hold(PEER, "resync")
    stage.link_up()
    stage.run_held(PEER, "resync")
    stage.restore(PEER, blank)
    stage.pass_time(5000)
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def bitmap_stage() -> Stage:
    """A copy at epoch 2 that is away, behind a bitmap that begins there."""
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    stage.overflow()
    assert stage.primary.bitmaps[PEER].base_epoch == 2
    return stage


def served(stage: Stage, epoch: int, chain_hash: bytes) -> bool:
    """Whether the bitmap is used for a copy that says that it is there."""
    stage.primary.link_up(PEER, stage.now_ns)
    accept = msgspec.structs.replace(
        last_accept(stage), durable_epoch=epoch, durable_hash=chain_hash, applied_epoch=epoch
    )
    stage.primary.receive(PEER, accept, stage.now_ns)
    assert stage.sender().is_open
    return not stage.primary.bitmaps[PEER].bitmap.is_full


def test_a_bitmap_serves_a_copy_at_its_base() -> None:
    stage = bitmap_stage()
    assert served(stage, 2, stage.primary.bitmaps[PEER].base_hash)


def test_a_bitmap_serves_a_copy_past_its_base_whose_hash_is_remembered() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(2)
    # The third is on its way, and perhaps there, when the link is lost.
    stage.park_all()
    stage.write_blocks(300, 4, seed=3)
    stage.seal()
    third = stage.primary.engine.sealed_hash
    stage.overflow()
    stage.is_parked = lambda source, target, what: False
    assert 3 not in stage.primary.engine.epoch_numbers()
    stage.crash(PRIMARY, is_kill=True)
    stage.start(PRIMARY, is_connected=False)
    assert served(stage, 3, third)


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_copy_whose_history_is_not_known_any_more_is_compared_as_a_whole(epoch: int) -> None:
    """As when the primary itself went back to an older disk, and gave the same numbers again."""
    stage = bitmap_stage()
    assert epoch not in stage.primary.engine.epoch_numbers()
    assert not served(stage, epoch, noise(epoch, 32))
    assert stage.sender().mode in ("Bitmap", "Resync")


def test_the_base_of_a_bitmap_survives_a_restart() -> None:
    stage = bitmap_stage()
    before = stage.primary.bitmaps[PEER]
    stage.crash(PRIMARY, is_kill=True)
    stage.start(PRIMARY, is_connected=False)
    after = stage.primary.bitmaps[PEER]
    assert (after.base_epoch, after.base_hash) == (before.base_epoch, before.base_hash)


def test_a_half_copied_copy_is_served_by_what_is_left_after_a_restart() -> None:
    stage = bitmap_stage()
    stage.park_frames()
    stage.link_up()
    stage.pass_time(2500)
    stage.unpark(2)
    left = stage.primary.bitmaps[PEER].bitmap.count()
    stage.pass_time(1500)
    stage.restart(PRIMARY, is_kill=True)
    assert stage.primary.bitmaps[PEER].bitmap.count() == left
    assert stage.sender().counters.resyncs == 1
    stage.unpark()
    stage.pass_time(8000)
    stage.check_in_sync()
