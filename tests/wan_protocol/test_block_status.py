"""What the primary says that its peers lack: never too little, and exact where it can be."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.errors import JournalFullError
from geomirror.limits import KIB, REGION_BYTES
from geomirror.volume.block_runs import BlockRuns
from geomirror.wan_protocol import block_status
from geomirror.wan_protocol.block_status import BACKING, BlockStatus
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, SIZES, Stage, different_blocks

REGION = REGION_BYTES // BLOCK


def blocks_of(runs: BlockRuns) -> set[int]:
    return {
        block
        for start, end in zip(runs.starts.tolist(), runs.ends.tolist(), strict=True)
        for block in range(start, end)
    }


def ask(
    status: BlockStatus, *names: str, volume: int = 0, offset: int = 0, length: int | None = None
) -> dict[str, set[int]]:
    """Blocks that each holder lacks, of the whole volume unless told otherwise."""
    length = SIZES[volume] - offset if length is None else length
    for _ in range(1000):
        job = status.next_job(names, volume, offset, length)
        job.run()
        job.release()
        if job.lacking is not None:
            return {name: blocks_of(runs) for name, runs in job.lacking.items()}
    raise AssertionError("no answer")


def lacked(stage: Stage, name: str = PEER, volume: int = 0) -> set[int]:
    return ask(BlockStatus(stage.primary), name, volume=volume)[name]


def whole(volume: int = 0) -> set[int]:
    return set(range(-(-SIZES[volume] // BLOCK)))


def test_a_peer_lacks_what_was_written_until_it_has_it_durable() -> None:
    stage = Stage()
    assert lacked(stage) == set()
    stage.write_blocks(7, 3, seed=1)
    stage.write(100 * BLOCK + 5, b"in part")
    assert lacked(stage) == {7, 8, 9, 100}
    assert lacked(stage, volume=1) == set()
    stage.hold(PRIMARY, "seal")
    stage.primary.seal_now(stage.now_ns)
    stage.settle()
    stage.write_blocks(200, 1, seed=2)
    assert lacked(stage) == {7, 8, 9, 100, 200}  # One epoch is being sealed, the next is open.
    stage.park_all()
    stage.release(PRIMARY)
    stage.pass_time(300)
    assert stage.primary.is_sealed
    assert lacked(stage) == {7, 8, 9, 100, 200}
    stage.unpark()
    stage.pass_time(500)
    assert lacked(stage) == set()


def test_zeroes_are_changes_too_and_a_range_is_clipped() -> None:
    stage = Stage(is_connected=False)
    stage.trim(16 * BLOCK, 64 * BLOCK)
    status = BlockStatus(stage.primary)
    assert ask(status, PEER)[PEER] == set(range(16, 80))
    stage.seal()
    assert ask(status, PEER)[PEER] == set(range(16, 80))
    assert ask(status, PEER, offset=20 * BLOCK + 1, length=1)[PEER] == {20}
    assert ask(status, PEER, offset=20 * BLOCK - 1, length=2)[PEER] == {19, 20}
    assert ask(status, PEER, offset=80 * BLOCK, length=BLOCK)[PEER] == set()


def test_the_backing_device_lacks_what_is_not_destaged() -> None:
    stage = Stage()
    stage.write_blocks(5, 2, seed=1)
    status = BlockStatus(stage.primary)
    stage.seal()
    assert ask(status, BACKING, PEER) == {BACKING: {5, 6}, PEER: set()}
    stage.pass_time(5000)
    assert stage.primary.engine.applied_epoch == stage.primary.engine.sealed_epoch
    assert ask(status, BACKING) == {BACKING: set()}


def test_in_bitmap_mode_whole_regions_are_lacked_and_the_copy_clears_them() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.overflow()
    found = lacked(stage)
    written = {block for at in range(1, 1000) for block in range(at * 8 % 256, at * 8 % 256 + 8)}
    assert found <= {b // REGION * REGION + i for b in written for i in range(REGION)}
    assert not found & set(range(256 + REGION, 512))
    stage.write_blocks(400, 1, seed=77)
    assert lacked(stage) == found | {400}  # The journal is exact, the bitmap is not.
    stage.link_up()
    stage.pass_time(5000)
    stage.check_in_sync()
    assert lacked(stage) == set()


def test_blank_unknown_and_refused_peers_lack_everything() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    assert lacked(stage) == whole()
    assert lacked(stage, "nobody") == whole()
    assert lacked(stage, "nobody", volume=1) == whole(1)
    stage.link_up()
    stage.pass_time(500)
    status = BlockStatus(stage.primary)
    assert ask(status, PEER)[PEER] == set()
    stage.sender().refusal = "it holds another history"
    assert ask(status, PEER)[PEER] == whole()
    stage.sender().refusal = ""
    stage.primary.remove_peer(PEER)
    assert ask(status, PEER)[PEER] == whole()
    # One that comes back under this name is another one.
    stage.primary.add_peer(PEER)
    assert ask(status, PEER)[PEER] == whole()


def test_epochs_that_the_journal_has_no_more_mean_everything() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.write_epochs(60)
    stage.pass_time(6000)
    assert not stage.primary.engine.epochs_after(1, 1) or (
        stage.primary.engine.epochs_after(1, 1)[0].first_number > 2
    )
    stage.sender().durable_epoch = 1
    assert lacked(stage) == whole()


def test_a_long_backlog_is_read_in_steps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_status, "EPOCHS_OF_JOB", 8)
    stage = Stage(is_connected=False)
    stage.write_epochs(30, blocks=2)
    status, loaded = BlockStatus(stage.primary), []
    real = stage.primary.engine.table_of
    monkeypatch.setattr(
        stage.primary.engine, "table_of", lambda info: (loaded.append(info.number), real(info))[1]
    )
    wanted = set(range(60))
    assert ask(status, PEER)[PEER] == wanted
    assert loaded == list(range(1, 31))
    for first in range(0, 512, 64):
        found = ask(status, PEER, offset=first * BLOCK, length=64 * BLOCK)[PEER]
        assert found == {block for block in wanted if first <= block < first + 64}
    assert len(loaded) == 30, "nothing is read again for the next range"
    # The peer moves on: only the span that it stands in is read again.
    stage.sender().durable_epoch = 21
    assert ask(status, PEER)[PEER] == set(range(42, 60))
    assert loaded[30:] == [22, 23, 24]
    stage.sender().durable_epoch = 30
    assert ask(status, PEER)[PEER] == set()
    assert len(loaded) == 33


def test_the_journal_is_kept_while_a_job_reads_it() -> None:
    stage = Stage(journal_bytes=1024 * KIB)
    stage.park_all()
    stage.write_epochs(3)
    job = BlockStatus(stage.primary).next_job([PEER], 0, 0, SIZES[0])
    stage.unpark()
    for at in range(200):
        try:
            stage.write_blocks(at % 60 * 8, 8, seed=at)
        except JournalFullError:
            stage.pass_time(100)
        stage.pass_time(10)
        if at == 100:
            job.run()
            assert job.lacking is not None
            assert blocks_of(job.lacking[PEER]) == set(range(12))
            job.release()
    assert stage.primary.fenced is None


def test_two_peers_share_what_was_read() -> None:
    stage = Stage("west", "colo")
    stage.link_down("colo")
    stage.write_epochs(10, blocks=2)
    status = BlockStatus(stage.primary)
    assert ask(status, "west", "colo") == {"west": set(), "colo": set(range(20))}
    stage.link_down("west")
    stage.write_blocks(300, 2, seed=9)
    stage.seal()
    assert ask(status, "west") == {"west": {300, 301}}
    assert ask(status, "colo") == {"colo": set(range(20)) | {300, 301}}


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "write", "trim", "part", "seal", "time", "long", "cut", "link", "restart"]
        ),
        st.integers(0, 511),
        st.integers(1, 90),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS, st.sampled_from([512, 1024, 2048]), st.booleans())
def test_what_a_peer_lacks_is_never_left_out(
    actions: Iterable[tuple[str, int, int]], journal_kib: int, first_sync: bool
) -> None:
    """Against the model: contents at the epoch that the peer has durable, and those of now."""
    stage = Stage("west", "colo", journal_bytes=max(1024, journal_kib) * KIB, first_sync=first_sync)
    status = BlockStatus(stage.primary)
    chance = random.Random(1)
    for what, block, count in actions:
        count = min(count, 512 - block) or 1
        cut = max(stage.at_epoch)
        try:
            match what:
                case "write":
                    stage.write_blocks(block, count, seed=block + 1)
                case "part":
                    stage.write(block * BLOCK + 7, b"x" * count)
                case "trim":
                    stage.trim(block * BLOCK, count * BLOCK)
                case "seal":
                    stage.seal()
                case "time":
                    stage.pass_time(count * 10)
                case "long":
                    stage.pass_time(4000)
                case "cut":
                    stage.link_down(chance.choice(stage.peers))
                case "link":
                    stage.link_up(chance.choice(stage.peers))
                case "restart":
                    stage.restart(PRIMARY, is_kill=True)
                    status = BlockStatus(stage.primary)
        except JournalFullError:
            # An epoch that was cut by the refused write does not hold it.
            for epoch in [epoch for epoch in stage.at_epoch if epoch > cut]:
                stage.at_epoch[epoch] = {v: bytes(data) for v, data in stage.content.items()}
            stage.pass_time(200)
        check_all(stage, status)


def check_all(stage: Stage, status: BlockStatus) -> None:
    for volume, size in stage.sizes.items():
        found = ask(status, *stage.peers, BACKING, volume=volume, length=size)
        now = bytes(stage.content[volume])
        for name in stage.peers:
            sender, engine = stage.sender(name), stage.nodes[name].engine
            held = engine.superblock.data_state == "consistent"
            if name not in stage.primary.bitmaps and sender.mode in ("Stream", "Fold") and held:
                there = stage.at_epoch[engine.sealed_epoch][volume]
                assert set(different_blocks(there, now)) <= found[name], (name, volume)
            elif name in stage.primary.bitmaps and name not in stage.primary.resyncs and held:
                there = stage.image(name)[volume]
                if engine.applied_epoch == engine.sealed_epoch:
                    assert set(different_blocks(there, now)) <= found[name], (name, volume)
        image = stage.east.engine.images[volume].read(0, size)
        assert set(different_blocks(image, now)) <= found[BACKING], volume
