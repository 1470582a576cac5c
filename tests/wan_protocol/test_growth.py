"""Volumes grow and are added while epochs stream, fold, go to the bitmap and are resynced."""

from __future__ import annotations

import errno

import msgspec
import pytest

from geomirror.errors import RefusedError, RemoteProtocolError
from geomirror.limits import SIMULATION
from geomirror.wan_protocol.epoch_decode import FrameDecoder
from geomirror.wan_protocol.epoch_encode import FRAME_ENTRY, KIND_SIZE, FrameEncoder
from geomirror.wan_protocol.messages import EpochCommit, ResyncBegin, SessionAccept
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, SIZES, Stage, noise

END = SIZES[0]
NEW = {0: END + 30 * BLOCK + 512, 1: 64 * BLOCK}


def test_a_copy_has_the_new_size_from_the_epoch_on_that_it_applies() -> None:
    stage = Stage()
    stage.write(END - 512, noise(1, 512))
    stage.secondary.set_hold(True, stage.now_ns)
    number = stage.grow(0, NEW[0])
    stage.write(NEW[0] - 512, noise(2, 512))
    stage.pass_time(1000)
    assert stage.sender().durable_epoch >= number > stage.west.engine.applied_epoch
    assert stage.check() < number  # `check` compares sizes, too.
    assert stage.secondary.served_sizes == SIZES
    stage.secondary.set_hold(False, stage.now_ns)
    stage.pass_time(1000)
    stage.check_in_sync()
    assert stage.secondary.served_sizes == {**SIZES, 0: NEW[0]}
    assert stage.west.sent(SessionAccept)[-1].volumes[0].size_bytes == END
    stage.link_down()
    stage.link_up()
    assert stage.west.sent(SessionAccept)[-1].volumes[0].size_bytes == NEW[0]


def test_a_session_opens_while_an_epoch_that_adds_a_volume_waits_to_be_applied() -> None:
    stage = Stage()
    stage.write(0, noise(1, BLOCK))
    stage.pass_time(1000)
    stage.secondary.set_hold(True, stage.now_ns)
    number = stage.grow(2, 9 * BLOCK)
    stage.pass_time(1000)
    assert stage.sender().durable_epoch >= number > stage.west.engine.applied_epoch
    stage.link_down()
    stage.link_up()
    sizes = {each.index: each.size_bytes for each in stage.west.sent(SessionAccept)[-1].volumes}
    assert sizes == {**SIZES, 2: 9 * BLOCK}
    stage.secondary.set_hold(False, stage.now_ns)
    stage.pass_time(2000)
    stage.check_in_sync()


def test_one_fold_goes_over_several_growths_and_a_new_volume() -> None:
    stage = Stage()
    stage.link_down()
    for at in range(4):
        end = len(stage.content[0])
        stage.write(end - 512, noise(at, 512))  # A last block that is short, until it is not.
        stage.grow(0, end + 3 * BLOCK + 512)
        stage.write(end - 100, noise(at + 50, 400))
        stage.write_epochs(12, seed=at * 40)
    stage.grow(2, 9 * BLOCK + 1024)
    stage.write(5 * BLOCK, noise(9, 4 * BLOCK), volume=2)
    stage.link_up()
    stage.pass_time(60_000)
    stage.check_in_sync()
    commits = [c for c in stage.east.sent(EpochCommit) if c.first_epoch < c.epoch and c.volumes]
    assert commits, "nothing was folded over a growth"


@pytest.mark.parametrize("is_initial", [False, True])
def test_a_resync_brings_all_volumes_of_its_base(is_initial: bool) -> None:
    stage = Stage(first_sync=is_initial, is_connected=not is_initial)
    stage.write_epochs(3)
    stage.overflow()
    stage.grow(0, NEW[0])
    stage.write(END + BLOCK, noise(1, 3 * BLOCK))
    stage.grow(2, 20 * BLOCK)
    stage.write(0, noise(2, BLOCK), volume=2)
    stage.seal()
    stage.pass_time(5000)
    stage.link_up()
    stage.pass_time(120_000)
    stage.check_in_sync()
    begun = stage.east.sent(ResyncBegin)
    assert {v.index: v.size_bytes for v in begun[-1].volumes} == {**SIZES, 0: NEW[0], 2: 20 * BLOCK}


def test_what_grows_during_a_resync_comes_with_its_epoch() -> None:
    stage = Stage()
    stage.overflow()
    stage.park_frames()
    stage.link_up()
    stage.pass_time(3000)
    assert stage.sender().mode == "Resync"
    stage.grow(1, NEW[1])
    stage.write(NEW[1] - BLOCK, noise(1), volume=1)
    stage.is_parked = lambda *_: False
    stage.unpark()
    stage.pass_time(120_000)
    stage.check_in_sync()


@pytest.mark.parametrize("name", [PRIMARY, PEER])
def test_a_power_cut_after_the_change_is_sealed_loses_nothing_of_it(name: str) -> None:
    stage = Stage()
    number = stage.grow(1, NEW[1])
    stage.grow(2, 5 * BLOCK)
    stage.pass_time(500)
    assert stage.primary.engine.sealed_epoch >= number
    stage.restart(name)
    assert stage.primary.engine.sizes.now == {**SIZES, 1: NEW[1], 2: 5 * BLOCK}
    stage.write(4 * BLOCK, noise(1), volume=2)
    stage.pass_time(60_000)
    stage.check_in_sync()


def test_a_copy_that_cannot_grow_waits_says_so_and_goes_on() -> None:
    stage = Stage()
    stage.west.store.fail("truncate", "volumes/0.img", error=errno.ENOSPC, count=3)
    number = stage.grow(0, NEW[0])
    stage.write(END, noise(1))
    stage.pass_time(1500)
    assert stage.sender().durable_epoch > number
    assert stage.check() < number
    assert "volume_waits" in stage.west.event_kinds()
    assert stage.secondary.stalled is not None and stage.secondary.fenced is None
    stage.pass_time(10_000)
    assert stage.secondary.stalled is None
    stage.check_in_sync()


def test_a_peer_that_does_not_know_growth_is_not_sent_any() -> None:
    stage = Stage()
    accept = stage.west.sent(SessionAccept)[-1]
    old = msgspec.structs.replace(accept, volumes=[])
    stage.primary.link_down(PEER, stage.now_ns)
    stage.primary.link_up(PEER, stage.now_ns)
    stage.primary.receive(PEER, old, stage.now_ns)
    with pytest.raises(RefusedError, match="update it"):
        stage.grow(0, NEW[0])
    assert stage.primary.engine.sizes.now == SIZES
    stage.primary.link_down(PEER, stage.now_ns)
    stage.grow(0, NEW[0])
    stage.primary.link_up(PEER, stage.now_ns)
    stage.primary.receive(PEER, old, stage.now_ns)
    assert not stage.sender().is_open
    assert "update it" in stage.sender().refusal


def test_a_commit_with_another_size_is_refused() -> None:
    stage = Stage(is_connected=False)
    stage.grow(0, NEW[0])
    stage.seal()

    def lie(_source: str, _target: str, sent: object) -> bool:
        message = getattr(sent, "message", None)
        if isinstance(message, EpochCommit) and message.volumes:
            wrong = msgspec.structs.replace(message.volumes[0], size_bytes=NEW[0] + 512)
            sent.message = msgspec.structs.replace(message, volumes=[wrong])  # type: ignore[attr-defined]
        return False

    stage.is_lost = lie
    stage.link_up()
    stage.pass_time(5000)
    assert stage.west.engine.committed_epoch == 0
    assert "bytes" in stage.sender().refusal
    assert stage.image().keys() == SIZES.keys()
    stage.is_lost = lambda *_: False
    stage.pass_time(60_000)
    stage.check_in_sync()


@pytest.mark.parametrize(
    "entries",
    [
        [(0, KIND_SIZE, 0, 0, 0)],
        [(0, KIND_SIZE, 0, 0, 700)],
        [(0, KIND_SIZE, 0, 0, SIMULATION.volume_bytes_max + 512)],
        [(0, KIND_SIZE, 1, 0, 8192)],
        [(0, KIND_SIZE, 0, 1, 8192)],
        [(1, KIND_SIZE, 0, 0, 8192), (0, KIND_SIZE, 0, 0, 8192)],
        [(SIMULATION.volumes_max, KIND_SIZE, 0, 0, 8192)],
        [(0, 1, 0, 1, 0), (0, KIND_SIZE, 0, 0, 8192)],
        [(0, KIND_SIZE, 0, 0, 8192), (0, 1, 0, 1, 2)],
    ],
)
def test_a_frame_with_an_impossible_size_is_refused(entries: list[tuple[int, ...]]) -> None:
    encoder = FrameEncoder(1)
    encoder.add(len(entries), b"".join(FRAME_ENTRY.pack(*entry) for entry in entries), b"")
    with pytest.raises(RemoteProtocolError):
        FrameDecoder(SIMULATION, {0: 4096}).decode(encoder.frames[0])


def test_a_frame_names_sizes_that_the_receiver_does_not_know_yet() -> None:
    encoder = FrameEncoder(1)
    entries = [(0, KIND_SIZE, 0, 0, 8192 + 512), (0, 1, 0, 1, 2)]
    encoder.add(2, b"".join(FRAME_ENTRY.pack(*entry) for entry in entries), b"")
    frame = FrameDecoder(SIMULATION, {0: 4096}).decode(encoder.frames[0])
    assert frame.sizes == {0: 8192 + 512}
    assert frame.table["block"].tolist() == [2]
