"""Stories of the primary: epochs by age and size, flushes, a full journal, a full disk."""

from __future__ import annotations

import errno

import pytest

from geomirror.errors import FencedError, JournalFullError, StorageError
from geomirror.limits import KIB
from geomirror.volume.epoch_table import KIND_ZERO
from tests.wan_protocol.core_support import BLOCK, PRIMARY, Stage, noise, write_of


def test_an_epoch_is_sealed_at_its_age_and_not_before() -> None:
    stage = Stage()
    stage.write_blocks(0, 1, seed=1)
    stage.pass_time(200)
    stage.write_blocks(1, 1, seed=2)
    stage.pass_time(49)
    assert stage.primary.engine.sealed_epoch == 0
    assert not stage.primary.is_sealed
    stage.pass_time(1)
    assert stage.primary.engine.sealed_epoch == 1
    assert stage.primary.is_sealed
    stage.pass_time(10_000)
    assert stage.primary.engine.sealed_epoch == 1, "no epoch without a write"
    stage.check_in_sync()


def test_a_large_epoch_is_sealed_before_its_age() -> None:
    stage = Stage()
    stage.write_blocks(0, 15, seed=1)
    assert stage.primary.engine.sealed_epoch == 0
    stage.write_blocks(15, 1, seed=2)
    stage.write_blocks(16, 1, seed=3)
    assert stage.primary.engine.sealed_epoch == 1, "64 KiB are an epoch here"


def test_an_epoch_is_shipped_only_after_the_sync() -> None:
    stage = Stage()
    stage.hold(PRIMARY, "sync")
    stage.write_blocks(0, 2, seed=1)
    stage.pass_time(1000)
    assert stage.east.jobs.count("seal") == 1
    assert (stage.primary.engine.committed_epoch, stage.primary.engine.sealed_epoch) == (1, 0)
    assert "encode:west" not in stage.east.jobs
    assert not stage.east.frames
    stage.run_held(PRIMARY, "sync")
    assert stage.primary.engine.sealed_epoch == 1
    assert len(stage.east.frames) == 1


def test_writes_during_a_seal_are_the_next_epoch() -> None:
    stage = Stage()
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(0, 1, seed=1)
    stage.pass_time(250)
    stage.write_blocks(0, 1, seed=2)
    stage.pass_time(1000)
    assert stage.east.jobs.count("seal") == 1, "one at a time"
    assert stage.primary.target_epoch == 2
    stage.release(PRIMARY)
    stage.pass_time(300)
    assert stage.primary.engine.sealed_epoch == 2
    stage.check_in_sync()


def test_one_sync_answers_every_flush_that_waits() -> None:
    stage = Stage(is_connected=False)
    stage.hold(PRIMARY, "sync")
    stage.write_blocks(0, 1, seed=1)
    stage.primary.flush("a", stage.now_ns)
    stage.settle()
    stage.write_blocks(1, 1, seed=2)
    for token in "bcd":
        stage.primary.flush(token, stage.now_ns)
    stage.settle()
    assert stage.east.flushes == []
    assert len(stage.east.waiting) == 1, "one sync at a time"
    stage.run_held(PRIMARY, "sync")
    assert stage.east.flushes == [("a", None)], "the others were asked for after this sync began"
    assert len(stage.east.waiting) == 1
    stage.run_held(PRIMARY, "sync")
    assert stage.east.flushes == [(token, None) for token in "abcd"]
    assert stage.east.jobs.count("sync") == 2


def test_a_flush_with_nothing_to_sync_is_answered_at_once() -> None:
    stage = Stage(is_connected=False)
    stage.hold(PRIMARY, "sync")
    stage.primary.flush("empty", stage.now_ns)
    stage.settle()
    assert stage.east.flushes == [("empty", None)]


def test_what_was_flushed_survives_a_power_cut_and_is_sealed_after_it() -> None:
    stage = Stage()
    stage.write(1000, b"flushed")
    stage.primary.flush("a", stage.now_ns)
    stage.settle()
    assert stage.east.flushes == [("a", None)]
    stage.write(50_000, b"not flushed")
    expected = stage.at_epoch[0][0][:1000] + b"flushed" + bytes(100)
    stage.restart(PRIMARY)
    assert bytes(stage.content[0][:1107]) == expected
    assert bytes(stage.content[0][50_000:50_011]) == bytes(11)
    assert not stage.primary.is_sealed
    stage.pass_time(250)
    assert stage.primary.engine.sealed_epoch == 1
    stage.check_in_sync()


def test_a_killed_process_loses_no_write() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.write(77, b"unsealed")
    before = bytes(stage.content[0])
    stage.restart(PRIMARY, is_kill=True)
    assert bytes(stage.content[0]) == before
    stage.pass_time(300)
    assert stage.primary.engine.sealed_epoch == 4
    stage.check_in_sync()
    assert stage.sender().counters.resyncs == 0


def test_a_draft_that_a_crash_interrupts_is_cut_anew() -> None:
    stage = Stage()
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(0, 2, seed=1)
    stage.pass_time(250)
    stage.write_blocks(1, 2, seed=2)
    stage.restart(PRIMARY, is_kill=True)
    stage.pass_time(300)
    assert stage.primary.is_sealed
    stage.check_in_sync()


def test_a_large_trim_travels_as_one_entry() -> None:
    stage = Stage()
    stage.write_blocks(0, 12, seed=1)
    stage.seal()
    stage.trim(0, 400 * BLOCK)
    epoch = stage.primary.engine.load_epoch(stage.seal())
    assert [(int(e["kind"]), int(e["count"])) for e in epoch.table] == [(KIND_ZERO, 400)]
    frame = stage.east.frames[-1]
    assert (frame.epoch, len(frame.body)) == (epoch.number, 24 + 16)
    stage.check_in_sync()
    assert not any(stage.image()[0][: 400 * BLOCK])


def test_a_partly_written_block_and_the_short_last_one_arrive_whole() -> None:
    stage = Stage()
    size = stage.sizes[0]
    stage.write(size - 600, noise(1, 600))
    stage.write(3 * BLOCK + 17, b"in the middle", volume=1)
    stage.seal()
    stage.write(size - 100, b"x" * 100)
    stage.write(3 * BLOCK + 20, b"over it", volume=1)
    stage.seal()
    stage.check_in_sync()


def test_a_full_journal_holds_writers_back_until_there_is_room() -> None:
    stage = Stage(is_connected=False)
    stage.hold(PRIMARY, "apply")
    with pytest.raises(JournalFullError):
        for at in range(100):
            stage.write_blocks(at * 4, 4, seed=at)
    stage.pass_time(2000)
    assert stage.east.rooms == 0
    stage.release(PRIMARY)
    stage.pass_time(2000)
    assert stage.east.rooms == 1
    stage.write_blocks(400, 4, seed=1000)
    stage.link_up()
    stage.pass_time(1000)
    stage.check_in_sync()


@pytest.mark.parametrize("journal_kib", [1024, 1536, 2560])
@pytest.mark.parametrize("shift", [0, 1000])
def test_a_writer_never_waits_for_a_peer_that_is_away(journal_kib: int, shift: int) -> None:
    stage = Stage("west", "south", journal_bytes=journal_kib * KIB, is_connected=False)
    stage.link_up("south")
    for at in range(2 * journal_kib // 16):
        write = [write_of(at % 100 * 20_000 + shift, noise(at, 16 * KIB))]
        for _ in range(3):
            try:
                stage.submit(write)
                break
            except JournalFullError:
                stage.pass_time(20)
        else:
            raise AssertionError(f"write {at} waits for a peer: {stage.sender().mode}")
        if at % 3 == 2:
            stage.seal()
    assert stage.sender("west").mode == "Bitmap"
    assert stage.sender("south").mode in ("Stream", "Fold")
    stage.pass_time(1000)
    assert stage.check("south") == stage.primary.engine.sealed_epoch


def test_a_failed_sync_fences_and_answers_flushes_with_the_error() -> None:
    stage = Stage()
    stage.write_blocks(0, 1, seed=1)
    stage.primary.flush("doomed", stage.now_ns)
    stage.east.store.fail("fdatasync", "journal/*")
    stage.settle()
    ((token, error),) = stage.east.flushes
    assert token == "doomed"
    assert isinstance(error, FencedError)
    assert stage.east.event_kinds().count("fenced") == 1
    with pytest.raises(FencedError):
        stage.write_blocks(1, 1, seed=2)
    stage.primary.flush("late", stage.now_ns)
    stage.pass_time(5000)
    assert isinstance(dict(stage.east.flushes)["late"], FencedError)
    assert stage.primary.engine.sealed_epoch == 0
    assert not stage.east.frames
    stage.restart(PRIMARY)
    stage.write_blocks(2, 1, seed=3)
    stage.pass_time(300)
    stage.check_in_sync()


def test_a_failed_write_to_the_journal_fences() -> None:
    stage = Stage()
    stage.write_blocks(0, 1, seed=1)
    stage.seal()
    stage.east.store.fail("pwritev", "journal/*")
    with pytest.raises(StorageError):
        stage.write_blocks(1, 1, seed=2)
    assert stage.primary.fenced is not None
    stage.restart(PRIMARY)
    stage.check_in_sync()


def test_a_disk_that_is_full_at_the_seal_stalls_and_goes_on_by_itself() -> None:
    stage = Stage()
    stage.write(10, b"partly written: it needs a fill")
    stage.east.store.fail("pwritev", "journal/*", error=errno.ENOSPC, count=3)
    stage.pass_time(250)
    assert stage.east.event_kinds() == ["peer_connected", "storage_full"]
    assert stage.primary.stalled is not None
    assert stage.primary.engine.sealed_epoch == 0
    stage.pass_time(999)
    assert stage.primary.engine.sealed_epoch == 0
    stage.pass_time(3000)
    assert stage.primary.stalled is None
    assert stage.east.event_kinds().count("storage_full") == 3
    stage.check_in_sync()


@pytest.mark.parametrize(
    ("operation", "pattern"),
    [
        ("create", "undo/*"),
        ("pwritev", "undo/*"),
        ("pwritev", "volumes/*"),
        ("pwritev", "superblock"),
    ],
)
def test_a_disk_that_is_full_at_the_destage_stalls_and_goes_on(
    operation: str, pattern: str
) -> None:
    stage = Stage()
    stage.write_blocks(0, 8, seed=1)
    stage.write_blocks(400, 2, seed=2)
    stage.seal()
    stage.east.store.fail(operation, pattern, error=errno.ENOSPC, count=2)
    stage.pass_time(3100)
    assert stage.primary.fenced is None
    assert stage.primary.stalled is not None
    # The target of the pass must not move while it is half applied.
    stage.write_blocks(0, 4, seed=3)
    stage.pass_time(10_000)
    assert stage.primary.stalled is None
    assert stage.primary.engine.applied_epoch == 2
    assert stage.image(PRIMARY)[0] == bytes(stage.content[0])
    stage.check_in_sync()


def test_the_spare_segment_that_a_full_disk_refused_is_made_later() -> None:
    stage = Stage()
    stage.crash(PRIMARY, is_kill=True)
    store = stage.east.store
    for name in [n for n in store.names() if "spare" in n]:
        store.unlink(name)
    store.fail("create", "journal/spare*", error=errno.ENOSPC)
    stage.east.jobs.clear()
    stage.start(PRIMARY)
    assert stage.east.jobs.count("spare") == 1
    assert stage.primary.stalled is None, "no room for a spare is no reason to wait"
    stage.write_epochs(3)
    stage.check_in_sync()
    stage.pass_time(9_900)
    assert stage.east.jobs.count("spare") == 1
    stage.pass_time(100)
    stage.write_epochs(1, seed=9)
    assert len([n for n in store.names() if "spare" in n]) == 2


def test_destage_comes_after_its_age_and_leaves_reads_as_they_are() -> None:
    stage = Stage(is_connected=False)
    stage.write_blocks(0, 4, seed=1)
    stage.seal()
    stage.pass_time(2950)
    assert "apply" not in stage.east.jobs
    stage.pass_time(100)
    assert stage.east.jobs.count("apply") == 1
    assert stage.primary.engine.dirty_entries == 0
    assert stage.primary.engine.read(0, 0, stage.sizes[0]) == bytes(stage.content[0])


def test_much_dirty_data_is_destaged_as_soon_as_nobody_writes() -> None:
    stage = Stage(is_connected=False)
    for number in range(5):
        stage.write_blocks(8 * number, 8, seed=number)
        stage.pass_time(150)
        assert "apply" not in stage.east.jobs, "somebody writes"
    stage.pass_time(300)
    assert stage.east.jobs.count("apply") == 1
    assert stage.primary.engine.dirty_entries < 5 * 8 // 2, "a little may wait for its age"


def test_an_orderly_stop_seals_and_destages() -> None:
    stage = Stage()
    stage.write_blocks(0, 4, seed=1)
    stage.primary.stop(stage.now_ns)
    stage.settle()
    assert stage.primary.is_settled
    assert stage.image(PRIMARY)[0] == bytes(stage.content[0])
    assert stage.check() == 1


def test_lag_is_the_age_of_the_first_write_that_is_not_durable_there() -> None:
    stage = Stage()
    sender = stage.sender()
    assert stage.primary.lag_seconds(sender, stage.now_ns) == 0.0
    stage.link_down()
    stage.write_blocks(0, 1, seed=1)
    stage.pass_time(2000)
    stage.submit([write_of(BLOCK, b"later")])
    stage.pass_time(1000)
    assert stage.primary.lag_seconds(sender, stage.now_ns) == pytest.approx(3.0)
    stage.link_up()
    assert stage.primary.lag_seconds(sender, stage.now_ns) == 0.0


def test_a_zeroing_that_no_epoch_holds_is_sealed_and_shipped_after_a_restart() -> None:
    stage = Stage()
    stage.write_blocks(0, 16, seed=1)
    stage.pass_time(400)
    stage.trim(0, 16 * BLOCK)
    stage.primary.flush("flush", stage.now_ns)
    stage.settle()
    stage.restart(PRIMARY)
    assert stage.primary.confirmed_epoch == 2
    stage.pass_time(400)
    assert stage.primary.engine.sealed_epoch == 2
    stage.pass_time(400)
    stage.check_in_sync()
