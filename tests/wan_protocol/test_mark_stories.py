"""Stories of marks: made at the primary, held by whoever streamed through them, never pretended."""

from __future__ import annotations

import errno

import pytest

from geomirror.errors import (
    GeomirrorError,
    LimitExceededError,
    NotFoundError,
    RefusedError,
    RemoteProtocolError,
    UsageError,
    WaitTimeoutError,
)
from geomirror.limits import SIMULATION
from geomirror.volume.marks import Mark
from geomirror.volume.view import View
from geomirror.wan_protocol.mark_intake import check_marks
from geomirror.wan_protocol.mark_making import MarkRequest
from geomirror.wan_protocol.messages import EpochCommit, MarkEntry, Marks
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage, different_blocks
from tests.wan_protocol.test_modes import write_until


def mark(stage: Stage, name: str = "before-upgrade") -> Mark:
    request = stage.primary.mark(name, stage.now_ns, stage.wall_ns)
    stage.settle()
    assert request.is_done
    assert request.error is None
    assert request.mark is not None
    return request.mark


def delete(stage: Stage, name: str = "before-upgrade") -> None:
    stage.primary.delete_mark(name, stage.now_ns)
    stage.settle()


def names(stage: Stage, node: str = PEER) -> list[str]:
    return [each.name for each in stage.nodes[node].engine.marks.table.marks()]


def held(stage: Stage, node: str = PEER) -> tuple[int, ...]:
    return stage.nodes[node].engine.marks.table.marked_epochs()


def check_state(stage: Stage, epoch: int, node: str = PEER) -> None:
    """Undo gives exactly the primary's content at the epoch."""
    engine = stage.nodes[node].engine
    assert epoch in [each.to_epoch for each in engine.undo.history.kept(engine.applied_epoch)]
    entries_max = engine.limits.view_entries_max
    view = View(epoch, engine.images, lambda: engine.undo.history, engine.store.open, entries_max)
    for volume, image in engine.images.items():
        content = view.read(volume, 0, image.size_bytes)
        assert not different_blocks(bytes(content), stage.at_epoch[epoch][volume])


def test_a_mark_cuts_at_once_and_is_there_on_both_sides() -> None:
    stage = Stage()
    stage.write_blocks(0, 4, seed=1)
    made = mark(stage)
    assert made == ("before-upgrade", stage.primary.engine.generation, 1, stage.wall_ns, False)
    assert stage.primary.engine.sealed_epoch == 1
    stage.write_blocks(0, 4, seed=2)
    stage.seal()
    stage.pass_time(200)
    for node in (PRIMARY, PEER):
        assert names(stage, node) == ["before-upgrade"]
        assert held(stage, node) == (1,)
    check_state(stage, 1)


def test_a_mark_without_a_write_is_an_epoch_of_its_own() -> None:
    stage = Stage()
    assert mark(stage, "empty").epoch == 1
    assert mark(stage, "again").epoch == 2
    stage.pass_time(100)
    assert held(stage) == (1, 2)
    stage.check_in_sync()


def test_a_mark_is_answered_when_it_is_durable_and_not_before() -> None:
    stage = Stage()
    stage.hold(PRIMARY, "sync")
    stage.write_blocks(0, 4, seed=1)
    request = stage.primary.mark("slow", stage.now_ns, stage.wall_ns)
    stage.settle()
    assert request.mark is not None
    assert not request.is_done
    stage.crash(PRIMARY)
    stage.start(PRIMARY)
    assert names(stage, PRIMARY) == []


def test_an_answered_mark_survives_every_crash() -> None:
    stage = Stage("west", "colo")
    stage.write_blocks(0, 4, seed=1)
    mark(stage)
    for name in (PRIMARY, "west", "colo", PRIMARY):
        stage.restart(name)
        stage.pass_time(1500)
        for node in (PRIMARY, "west", "colo"):
            assert names(stage, node) == ["before-upgrade"]
            assert held(stage, node) == (1,)


def test_the_name_is_told_before_the_commit_of_its_epoch() -> None:
    stage = Stage()
    stage.write_epochs(3)
    made = mark(stage)
    kinds = [
        message
        for message in stage.east.messages
        if isinstance(message, Marks)
        or (isinstance(message, EpochCommit) and message.epoch == made.epoch)
    ]
    assert [type(message) for message in kinds] == [Marks, Marks, EpochCommit]
    assert kinds[1].marks[0].epoch == made.epoch
    # So they are durable together: a power cut right after the acknowledgement loses neither.
    stage.restart(PEER)
    assert names(stage) == ["before-upgrade"]


def test_a_fold_ends_at_a_marked_epoch() -> None:
    stage = Stage()
    stage.link_down()
    write_until(stage, "Fold")
    made = mark(stage)
    for at in range(6):
        stage.write_blocks(at * 4, 4, seed=900 + at)
        stage.seal()
    stage.link_up()
    stage.pass_time(500)
    commits = stage.east.sent(EpochCommit)
    assert any(commit.first_epoch < commit.epoch == made.epoch for commit in commits)
    assert [commit.epoch for commit in commits if commit.is_mark] == [made.epoch]
    assert stage.check() == stage.primary.engine.sealed_epoch
    assert held(stage) == (made.epoch,)
    check_state(stage, made.epoch)


def test_a_pass_ends_at_a_marked_epoch_on_both_sides() -> None:
    stage = Stage()
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(3)
    made = mark(stage)
    stage.write_epochs(4, seed=1)
    stage.secondary.set_hold(False, stage.now_ns)
    stage.pass_time(5000)
    for node in (PRIMARY, PEER):
        engine = stage.nodes[node].engine
        assert engine.applied_epoch == 8
        check_state(stage, made.epoch, node)


def test_who_was_resynced_past_a_mark_knows_it_and_does_not_hold_it() -> None:
    stage = Stage("west", "colo")
    stage.write_epochs(2)
    before = mark(stage, "before")
    stage.link_down("west")
    during = mark(stage, "during")
    stage.overflow("west")
    stage.link_up("west")
    stage.pass_time(60_000)
    after = mark(stage, "after")
    stage.pass_time(500)
    stage.check_in_sync("west")
    assert names(stage, "west") == names(stage, "colo") == ["before", "during", "after"]
    # What it held when the resync began, undo still shows.
    assert held(stage, "west") == (before.epoch, after.epoch)
    check_state(stage, before.epoch, "west")
    assert held(stage, "colo") == (before.epoch, during.epoch, after.epoch)
    stage.restart("west")
    assert held(stage, "west") == (before.epoch, after.epoch)


def test_a_mark_at_which_a_resync_ends_is_held() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    stage.write_epochs(3)
    made = mark(stage)
    stage.link_up()
    stage.pass_time(2000)
    assert stage.check() == made.epoch
    assert held(stage) == (made.epoch,)
    stage.restart(PEER)
    assert held(stage) == (made.epoch,)


def test_a_deleted_mark_goes_everywhere_also_where_nobody_listens() -> None:
    stage = Stage("west", "colo")
    stage.write_blocks(0, 4, seed=1)
    mark(stage)
    kept = mark(stage, "kept")
    stage.pass_time(100)
    stage.link_down("colo")
    delete(stage)
    assert names(stage, PRIMARY) == names(stage, "west") == ["kept"]
    assert names(stage, "colo") == ["before-upgrade", "kept"]
    stage.restart(PRIMARY)
    stage.pass_time(1500)
    for node in (PRIMARY, "west", "colo"):
        assert names(stage, node) == ["kept"]
        assert held(stage, node) == (kept.epoch,)
    with pytest.raises(NotFoundError):
        stage.primary.delete_mark("before-upgrade", stage.now_ns)


def test_a_name_that_was_deleted_may_be_given_again_also_behind_a_peers_back() -> None:
    stage = Stage()
    stage.write_blocks(0, 4, seed=1)
    mark(stage)
    stage.pass_time(100)
    stage.link_down()
    delete(stage)
    stage.write_blocks(0, 4, seed=2)
    second = mark(stage)
    stage.link_up()
    stage.pass_time(100)
    assert stage.west.engine.marks.table.get("before-upgrade") == second
    assert held(stage) == (second.epoch,)


def test_a_confirmed_mark_says_so_on_every_side() -> None:
    stage = Stage()
    made = mark(stage)
    stage.primary.confirm_mark(made, stage.now_ns)
    stage.settle()
    stage.pass_time(100)
    for node in (PRIMARY, PEER):
        stage.restart(node)
        assert stage.nodes[node].engine.marks.table.get("before-upgrade").is_quiesced
    delete(stage)
    mark(stage)
    with pytest.raises(RefusedError, match="another one now"):
        stage.primary.confirm_mark(made, stage.now_ns)


def test_a_name_is_given_once() -> None:
    stage = Stage()
    mark(stage)
    with pytest.raises(RefusedError, match="already at epoch 1"):
        stage.primary.mark("before-upgrade", stage.now_ns, stage.wall_ns)
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(0, 1, seed=1)
    first = stage.primary.mark("second", stage.now_ns, stage.wall_ns)
    with pytest.raises(RefusedError, match="already"):
        stage.primary.mark("second", stage.now_ns, stage.wall_ns)
    assert not first.is_done
    with pytest.raises(UsageError):
        stage.primary.mark("-10m", stage.now_ns, stage.wall_ns)


def test_there_are_only_so_many() -> None:
    stage = Stage()
    for number in range(SIMULATION.marks_max):
        mark(stage, f"m{number}")
    with pytest.raises(LimitExceededError, match="12 marks"):
        stage.primary.mark("one-more", stage.now_ns, stage.wall_ns)
    delete(stage, "m3")
    mark(stage, "one-more")


def test_what_is_being_changed_is_not_changed_by_another() -> None:
    stage = Stage()
    mark(stage)
    stage.hold(PRIMARY, "sync")
    stage.primary.delete_mark("before-upgrade", stage.now_ns)
    stage.settle()
    with pytest.raises(RefusedError, match="being changed"):
        stage.primary.delete_mark("before-upgrade", stage.now_ns)
    # The name is free, and the deletion on its way does not hit the new one.
    request = stage.primary.mark("before-upgrade", stage.now_ns, stage.wall_ns)
    stage.release(PRIMARY)
    stage.run_held(PRIMARY)
    assert request.is_done
    stage.restart(PRIMARY)
    assert stage.primary.engine.marks.table.get("before-upgrade") == request.mark


def test_a_mark_that_waits_can_be_withdrawn_and_one_that_is_cut_cannot() -> None:
    stage = Stage()
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(0, 1, seed=1)
    first = stage.primary.mark("first", stage.now_ns, stage.wall_ns)
    second = stage.primary.mark("second", stage.now_ns, stage.wall_ns)
    stage.settle()
    assert not stage.primary.withdraw_mark(first)
    assert stage.primary.withdraw_mark(second)
    assert isinstance(second.error, WaitTimeoutError)
    stage.release(PRIMARY)
    stage.run_held(PRIMARY)
    assert first.is_done
    assert names(stage, PRIMARY) == ["first"]


def test_marks_that_wait_are_told_that_the_primary_has_stopped() -> None:
    stage = Stage()
    stage.hold(PRIMARY, "seal")
    stage.write_blocks(0, 1, seed=1)
    requests: list[MarkRequest] = [
        stage.primary.mark(name, stage.now_ns, stage.wall_ns) for name in ("first", "second")
    ]
    stage.settle()
    stage.east.store.fail("fdatasync", error=errno.EIO)
    stage.release(PRIMARY)
    stage.run_held(PRIMARY)
    assert stage.primary.fenced is not None
    assert all(request.is_done and request.error is not None for request in requests)
    with pytest.raises(GeomirrorError):
        stage.primary.mark("third", stage.now_ns, stage.wall_ns)


def test_a_peer_that_does_not_know_marks_is_sent_none() -> None:
    stage = Stage()
    stage.sender().takes_marks = False  # As in the accept of an older version.
    before = len(stage.east.sent(Marks))
    stage.write_blocks(0, 4, seed=1)
    mark(stage)
    stage.pass_time(100)
    assert len(stage.east.sent(Marks)) == before
    stage.check_in_sync()
    assert names(stage) == []
    # When it knows them, it learns the name; the epoch came as one, so it is held, too.
    stage.reconnect()
    assert names(stage) == ["before-upgrade"]
    assert held(stage) == (1,)


ENTRY = MarkEntry("a-name", b"g" * 16, 5, 7, False)


@pytest.mark.parametrize(
    "entries",
    [
        [MarkEntry("../x", b"g" * 16, 5, 7, False)],
        [MarkEntry("a-name", b"g" * 15, 5, 7, False)],
        [MarkEntry("a-name", b"g" * 16, 0, 7, False)],
        [MarkEntry("a-name", b"g" * 16, 1 << 63, 7, False)],
        [MarkEntry("a-name", b"g" * 16, 5, -1, False)],
        [ENTRY, ENTRY],
        [MarkEntry(f"n{i}", b"g" * 16, 5, 7, False) for i in range(SIMULATION.marks_max + 1)],
    ],
)
def test_marks_that_no_primary_sends_end_the_session(entries: list[MarkEntry]) -> None:
    assert len(check_marks(Marks(7, [ENTRY]), SIMULATION)) == 1
    with pytest.raises(RemoteProtocolError, match="marks that cannot be"):
        check_marks(Marks(7, entries), SIMULATION)


def test_a_full_disk_at_the_secondary_delays_a_name_and_loses_none() -> None:
    stage = Stage()
    stage.write_blocks(0, 4, seed=1)
    made = mark(stage)
    stage.pass_time(100)
    store = stage.west.store
    store.fail("pwritev", error=errno.ENOSPC)
    stage.primary.confirm_mark(made, stage.now_ns)
    stage.settle()
    assert not stage.west.engine.marks.table.get("before-upgrade").is_quiesced
    stage.pass_time(3000)
    assert stage.west.engine.marks.table.get("before-upgrade").is_quiesced
