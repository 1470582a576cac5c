"""Stories of a resync that asks first what the copy holds: what crosses, what may be believed."""

from __future__ import annotations

import msgspec
import pytest

from geomirror.errors import JournalFullError, RemoteProtocolError
from geomirror.limits import KIB, REGION_BYTES
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.epoch_decode import FrameDecoder
from geomirror.wan_protocol.messages import (
    ResyncAsk,
    ResyncBegin,
    ResyncDigests,
    ResyncEnd,
    SessionAccept,
    encode_message,
)
from tests.sim.disk import CrashStyle
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, Stage, noise

REGION = REGION_BYTES // BLOCK


def data_blocks(stage: Stage, begun: int = 0) -> int:
    """Blocks that were sent as data in resyncs, from a frame on."""
    frames = [frame for frame in stage.east.frames[begun:] if frame.is_resync]
    decoder = FrameDecoder(stage.limits, stage.sizes)
    return sum(len(decoder.decode(frame.body).data) for frame in frames) // BLOCK


def write(stage: Stage, block: int, data: bytes) -> None:
    while True:
        try:
            stage.write(block * BLOCK, data)
            return
        except JournalFullError:
            stage.pass_time(50)


def away(stage: Stage, changed: list[int]) -> int:
    """While the copy is away all data are written again as they are, until the journal has
    overflowed; then these blocks anew. Returns where frames begin."""
    stage.link_down()
    at = 0
    while at < 256 or stage.sender().mode != "Bitmap":
        block = at % 256
        write(stage, block, bytes(stage.content[0][block * BLOCK : (block + 4) * BLOCK]))
        at += 4
        if at % 16 == 0:
            stage.seal()
    for block in changed:
        write(stage, block, noise(7000 + block, BLOCK))
    stage.seal()
    stage.pass_time(2500)
    return len(stage.east.frames)


def filled(**options: int) -> Stage:
    """A copy that has 256 blocks of data."""
    stage = Stage(journal_bytes=1024 * KIB, **options)
    for first in range(0, 256, 8):
        stage.write_blocks(first, 8, seed=first + 1)
        stage.seal()
        stage.pass_time(50)
    stage.pass_time(3000)
    stage.check_in_sync()
    return stage


def test_blocks_that_are_equal_never_cross() -> None:
    stage = filled()
    begun = away(stage, [])
    assert stage.primary.bitmaps[PEER].bitmap.count() >= 16
    stage.link_up()
    stage.pass_time(8000)
    assert [frame for frame in stage.east.frames[begun:] if frame.is_resync] == []
    stage.check_in_sync()


def test_of_a_dirty_region_only_the_blocks_that_differ_cross() -> None:
    stage = filled()
    changed = [3, 40, 41, 100, 255]
    begun = away(stage, changed)
    resync_bytes = stage.primary.bitmaps[PEER].bitmap.count() * REGION_BYTES
    assert resync_bytes >= 16 * REGION_BYTES
    stage.link_up()
    stage.pass_time(8000)
    assert data_blocks(stage, begun) == len(changed)
    stage.check_in_sync()


def test_a_peer_of_the_previous_version_is_sent_dirty_regions_and_no_ask() -> None:
    stage = filled()
    real = stage._send

    def send(source: str, what: SendMessage | SendFrame) -> None:
        if isinstance(what, SendMessage) and isinstance(what.message, SessionAccept):
            what.message = msgspec.structs.replace(what.message, gives_digests=False)
        real(source, what)

    stage._send = send  # type: ignore[method-assign]
    begun = away(stage, [3])
    stage.link_up()
    stage.pass_time(8000)
    assert not stage.east.sent(ResyncAsk)
    assert stage.east.sent(ResyncBegin)[-1].key == 0
    assert data_blocks(stage, begun) >= 240
    stage.check_in_sync()


def test_a_copy_of_unknown_content_that_is_equal_costs_digests_only() -> None:
    """The bitmap is lost with the disk that had it: everything may differ."""
    stage = filled()
    begun, said = away(stage, []), len(stage.west.messages)
    stage.primary._start_over(stage.sender(), is_initial=False)
    stage.settle()
    assert stage.primary.bitmaps[PEER].bitmap.is_full
    stage.link_up()
    stage.pass_time(3000)
    assert [frame for frame in stage.east.frames[begun:] if frame.is_resync] == []
    answers = [m for m in stage.west.messages[said:] if isinstance(m, ResyncDigests)]
    assert 0 < sum(len(encode_message(answer)) for answer in answers) < 1024
    stage.check_in_sync()


def test_a_first_sync_onto_a_disk_that_has_the_data_sends_what_differs() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    for block in (*range(0, 200, 8), 300):
        write(stage, block, noise(block, 8 * BLOCK))
        stage.seal()
    image = stage.west.engine.images[0]
    image.file.pwritev([bytes(stage.content[0])], 0)
    image.file.pwritev([noise(9, 2 * BLOCK)], 77 * BLOCK)
    image.file.pwritev([noise(9, BLOCK)], 400 * BLOCK)
    image.file.fdatasync()
    stage.link_up()
    stage.pass_time(3000)
    assert data_blocks(stage) == 2, "and a block of zeros, which is no data"
    stage.check_in_sync()


def test_what_was_found_equal_is_not_asked_for_again_after_an_interruption() -> None:
    stage = filled()
    away(stage, [3, 250])
    stage.park_frames()
    stage.link_up()
    stage.pass_time(1000)
    left = stage.primary.bitmaps[PEER].bitmap.count()
    assert left <= 3
    stage.reconnect()
    assert stage.east.sent(ResyncBegin)[-1].total_bytes == left * REGION_BYTES
    stage.unpark()
    stage.pass_time(8000)
    stage.check_in_sync()


def test_a_comparison_that_ends_late_clears_no_bits_of_the_next_overflow() -> None:
    stage = filled()
    away(stage, [])
    stage.hold(PRIMARY, "read:west")
    stage.link_up()
    stage.pass_time(1000)
    assert stage.run_held(PRIMARY, "read:west", is_done=False) == 1
    first = stage.primary.resyncs[PEER]
    at = 0
    while stage.primary.resyncs.get(PEER) is first:
        at += 1
        try:
            stage.write_blocks(at * 8 % 256, 8, seed=9000 + at)
        except JournalFullError:
            stage.pass_time(50)
        stage.seal()
        assert at < 500
    stage.pass_time(1500)
    dirty = stage.primary.bitmaps[PEER].bitmap.count()
    stage.release(PRIMARY)
    assert stage.primary.bitmaps[PEER].bitmap.count() >= dirty
    stage.pass_time(20_000)
    stage.check_in_sync()


def test_digests_of_a_resync_that_was_given_up_are_ignored() -> None:
    stage = filled()
    away(stage, [5])
    stage.link_up()
    stage.pass_time(8000)
    old = stage.west.sent(ResyncDigests)[-1]
    stage.primary.receive(PEER, old, stage.now_ns)
    away(stage, [6])
    stage.link_up()
    stage.park_frames()
    stage.primary.receive(PEER, old, stage.now_ns)
    stage.unpark()
    stage.pass_time(8000)
    stage.check_in_sync()


def test_a_block_with_an_unsealed_write_is_neither_compared_nor_sent() -> None:
    stage = filled()
    begun = away(stage, [9])
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(11, 1, seed=4242)
    stage.link_up()
    stage.pass_time(4000)
    assert data_blocks(stage, begun) == 1
    assert not stage.east.sent(ResyncEnd)
    stage.release(PRIMARY)
    stage.pass_time(5000)
    stage.check_in_sync()


def test_what_is_told_as_held_survives_a_power_cut() -> None:
    """A kill leaves copied blocks in the page cache; the next resync finds them equal there."""
    stage = filled()
    away(stage, [9, 10, 11])
    stage.hold(PEER, "resync")
    stage.link_up()
    stage.pass_time(3000)
    for image in stage.west.engine.images.values():
        image.fdatasync = lambda: None  # type: ignore[method-assign]
    assert stage.run_held(PEER, "resync", is_done=False) == 1
    stage.crash(PEER, is_kill=True)
    stage.start(PEER)
    stage.hold(PEER, "resync")
    stage.pass_time(3000)
    assert stage.primary.bitmaps == {} or stage.primary.bitmaps[PEER].bitmap.count() == 0
    stage.crash(PEER, style=CrashStyle(0.0))
    stage.release(PEER)
    stage.start(PEER)
    stage.pass_time(20_000)
    stage.check_in_sync()


def trips_to_compare(blocks: int) -> tuple[int, int]:
    """Times that something crosses the link, one way, until two equal copies of a volume with so
    many blocks of data count as equal; and the regions that were compared."""
    stage = Stage(journal_bytes=1024 * KIB, sizes={0: blocks * BLOCK})
    for first in range(0, blocks, 8):
        write(stage, first, noise(first + 1, 8 * BLOCK))
        if first % 64 == 0:
            stage.seal()
            stage.pass_time(20)
    stage.seal()
    stage.pass_time(8000)
    stage.check_in_sync()
    begun = away(stage, [])
    stage.primary._start_over(stage.sender(), is_initial=False)
    stage.settle()
    regions = stage.primary.bitmaps[PEER].bitmap.count()
    stage.is_parked = lambda source, target, what: True
    stage.link_up()
    count = 0
    while (stage.sender().mode, stage.sender().data_state) != ("Stream", "consistent"):
        assert stage.parked, "both sides wait, and nothing is on its way"
        stage.deliver(list(stage.parked))
        stage.pass_time(20)
        count += 1
        assert count < 100
    assert [frame for frame in stage.east.frames[begun:] if frame.is_resync] == []
    return count, regions


def test_a_comparison_of_large_equal_volumes_takes_as_many_trips_as_of_small_ones() -> None:
    small, small_regions = trips_to_compare(256)
    large, large_regions = trips_to_compare(4096)
    assert (small_regions, large_regions) == (16, 256)
    assert small <= 8, "offer and accept, begin and digests, end and its word"
    assert large == small


@pytest.mark.parametrize("name", [PRIMARY, PEER])
@pytest.mark.parametrize("is_kill", [True, False])
@pytest.mark.parametrize("kind", ["digest", "read:west"])
def test_a_crash_while_contents_are_compared(name: str, is_kill: bool, kind: str) -> None:
    stage = filled()
    away(stage, [1, 2, 200])
    stage.hold(PRIMARY if kind.startswith("read") else PEER, kind)
    stage.link_up()
    stage.pass_time(2000)
    stage.restart(name, is_kill=is_kill)
    stage.release(PRIMARY)
    stage.release(PEER)
    stage.pass_time(20_000)
    stage.check_in_sync()


def test_lies_about_digests_close_the_link() -> None:
    stage = filled()
    away(stage, [5])
    stage.hold(PEER, "digest")
    stage.link_up()
    stage.pass_time(500)
    number, session = stage.primary.resyncs[PEER].number, stage.primary.session
    with pytest.raises(RemoteProtocolError):
        stage.primary.receive(PEER, ResyncDigests(session, number, 99, 0, b"x" * 16), stage.now_ns)
    with pytest.raises(RemoteProtocolError):
        ask = ResyncAsk(session, number, 99, 1, [(0, 1 << 40, 1)])
        stage.secondary.receive(PRIMARY, ask, stage.now_ns)
    ignored = ResyncAsk(session, number + 1, 99, 1, [(0, 1 << 40, 1)])
    stage.secondary.receive(PRIMARY, ignored, stage.now_ns)
    with pytest.raises(RemoteProtocolError):
        begin = stage.east.sent(ResyncBegin)[-1]
        stage.secondary.receive(PRIMARY, msgspec.structs.replace(begin, key=-1), stage.now_ns)
