"""Undo files that are damaged, cut or gone: what they held is out of reach, and it is said."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace

import pytest

from geomirror.errors import IntegrityError, NotFoundError, StorageError
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from tests.sim.disk import SimStore
from tests.volume.apply_support import LIMITS
from tests.volume.rollback_rig import WALL_NS, RollbackRig
from tests.volume.test_view import ENTRIES_MAX, SIZES, Copy, random_world

EPOCHS = 8


def name_of(copy: Copy, to_epoch: int) -> str:
    return next(each.name for each in copy.undo.passes() if each.to_epoch == to_epoch)


def copy_of(seed: int = 300) -> Copy:
    copy = Copy(random_world(seed, EPOCHS))
    copy.apply(*range(EPOCHS + 1))
    return copy


def view_at(copy: Copy, epoch: int) -> View:
    """Whose readers tell of damage that they meet."""
    history, suspect = lambda: copy.undo.history, copy.undo.suspect
    return View(epoch, copy.images, history, copy.store.open, ENTRIES_MAX, suspect)


def reopened(copy: Copy, settled: int = 1 << 40, applied: int | None = None) -> Copy:
    """The same after a restart."""
    copy.undo = UndoStore(copy.store, LIMITS)
    copy.undo.found(EPOCHS if applied is None else applied, settled)
    return copy


def check_points(copy: Copy, oldest: int) -> None:
    """From `oldest` on every state is what it was; none before it is to be had."""
    for epoch in range(EPOCHS + 1):
        if epoch >= oldest:
            copy.check(copy.view(epoch), random.Random(epoch))
        else:
            with pytest.raises(NotFoundError, match=f"the state at epoch {epoch} is not kept: "):
                copy.view(epoch)


def shortened(store: SimStore, name: str, size: int) -> None:
    content = store.content(name)
    store.unlink(name)
    with closing(store.create(name, 0)) as file:
        file.pwritev([content[:size]], 0)
        file.fdatasync()


def damage(copy: Copy, kind: str, to_epoch: int) -> str:
    name = name_of(copy, to_epoch)
    size = len(copy.store.content(name))
    match kind:
        case "header":
            copy.store.flip_bit(name, 8 * 30)
        case "magic":
            copy.store.flip_bit(name, 3)
        case "table":
            copy.store.flip_bit(name, 8 * (size - 40))
        case "footer":
            copy.store.flip_bit(name, 8 * (size - 4))
        case "cut":
            shortened(copy.store, name, size - 100)
        case "cut in the header":
            shortened(copy.store, name, 60)
        case "missing":
            copy.store.unlink(name)
    return name


KINDS = ("header", "magic", "table", "footer", "cut", "cut in the header", "missing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_epoch", [1, 4, EPOCHS])
def test_exactly_what_it_held_is_out_of_reach(kind: str, to_epoch: int) -> None:
    copy = copy_of()
    name = damage(copy, kind, to_epoch)
    reopened(copy)
    stretches = copy.undo.history.unusable(EPOCHS)
    if kind == "missing" and to_epoch == 1:
        assert stretches == [], "history begins later; that is all that can be known"
        assert copy.undo.history.horizon(EPOCHS) == 1
        return
    (found,) = stretches
    is_oldest = to_epoch == 1 and kind in ("header", "magic", "cut in the header")
    assert (found.from_epoch, found.to_epoch) == (None if is_oldest else to_epoch - 1, to_epoch)
    if kind == "missing":
        assert (found.fault, found.reason) == ("missing", "its undo file is missing")
    else:
        assert (found.fault, found.reason) == ("damaged", f"undo file {name} is damaged")
    check_points(copy, to_epoch)
    # The pass is not taken for one that is half applied, and what follows is kept as ever.
    assert copy.undo.pending_pass(EPOCHS) is None
    assert copy.undo.history.unusable(EPOCHS) == stretches


@pytest.mark.parametrize("kind", KINDS)
def test_replication_goes_on_over_it_and_the_reason_stays(kind: str) -> None:
    world = random_world(310, EPOCHS)
    copy = Copy(world)
    copy.apply(*range(6))
    damage(copy, kind, 3)
    reopened(copy, applied=5)
    before = copy.undo.history.unusable(5)
    copy.apply(5, 6, 7)
    reopened(copy, applied=7)
    copy.apply(7, 8)
    assert copy.undo.history.unusable(8) == before
    check_points(copy, 3)


def test_the_newest_damaged_header_stops_only_what_may_be_half_applied() -> None:
    copy = copy_of()
    damage(copy, "header", EPOCHS)
    with pytest.raises(Exception, match="may be half applied"):
        reopened(copy, settled=EPOCHS).undo.pending_pass(EPOCHS)
    assert reopened(copy, settled=EPOCHS + 1).undo.pending_pass(EPOCHS) is None


def test_damage_that_a_reader_meets_is_a_gap_from_then_on_also_after_a_restart() -> None:
    copy = copy_of()
    view = view_at(copy, 2)
    view.prepare()
    name = name_of(copy, 5)
    copy.store.flip_bit(name, 8 * 140)
    with pytest.raises(IntegrityError, match="damaged chunk"):
        view.read(0, 0, SIZES[0])
    assert copy.undo.has_suspects
    size = len(copy.store.content(name))
    for _ in range(2):
        ThinJob(copy.store, copy.undo, LIMITS, ()).run()
        assert not copy.undo.has_suspects
        (found,) = copy.undo.history.unusable(EPOCHS)
        assert (found.from_epoch, found.to_epoch, found.file) == (4, 5, name)
        with pytest.raises(NotFoundError, match=r"epochs 4-5: undo file .* is damaged"):
            view.read(0, 0, 512)
        check_points(copy, 5)
        assert len(copy.store.content(name)) == size, "what is in it stays"
        reopened(copy)
        copy.undo.suspect(name)


def test_a_file_that_goes_away_under_a_view_is_found_out() -> None:
    copy = copy_of()
    view = view_at(copy, 2)
    copy.store.unlink(name_of(copy, 6))
    with pytest.raises(StorageError):
        view.read(0, 0, SIZES[0])
    ThinJob(copy.store, copy.undo, LIMITS, ()).run()
    (found,) = copy.undo.history.unusable(EPOCHS)
    assert (found.to_epoch, found.fault) == (6, "missing")
    check_points(copy, 6)


def test_all_undo_is_read_through_in_rounds() -> None:
    copy = copy_of()
    for number in (3, 7):
        copy.store.flip_bit(name_of(copy, number), 8 * 140)
    size = max(each.stored_bytes for each in copy.undo.passes())
    rounds = 0
    while not copy.undo.scrub(2 * size):
        rounds += 1
    assert 1 < rounds < EPOCHS
    assert [each.to_epoch for each in copy.undo.passes() if each.fault] == [3, 7]
    check_points(copy, 7)
    assert copy.undo.scrub(1 << 30), "and again"
    job = ThinJob(copy.store, copy.undo, LIMITS, (), scrub_bytes=1 << 30)
    job.run()
    assert job.is_scrubbed


def test_a_merge_over_damage_ends_it_as_a_gap_and_nothing_is_lost_beside_it() -> None:
    limits = replace(
        LIMITS,
        undo_levels=((1000, 10**15), (2000, 10**16)),
        undo_settled_ns=0,
        undo_merge_bytes_max=1 << 30,
    )
    for kind in ("chunk", "missing"):
        copy = copy_of()
        if kind == "chunk":
            copy.store.flip_bit(name_of(copy, 2), 8 * 140)
        else:
            copy.store.unlink(name_of(copy, 2))
        for _ in range(10):
            ThinJob(copy.store, copy.undo, limits, ()).run()
        faults = [each.fault for each in copy.undo.history.unusable(EPOCHS)]
        assert faults == ["damaged" if kind == "chunk" else "missing"]
        assert copy.undo.history.horizon(EPOCHS) == 2


def test_a_pass_that_was_too_large_or_found_no_space_says_so_after_a_restart() -> None:
    for fault, words in (
        ("budget", "too much changed"),
        ("disk", "the disk was full"),
    ):
        copy = Copy(random_world(320, EPOCHS))
        copy.apply(0, 1, 2)
        small = replace(LIMITS, undo_bytes_max=1, apply_pass_bytes_max=1)
        limits = small if fault != "disk" else LIMITS
        if fault == "disk":
            copy.store.fail("pwritev", "undo/*", error=28, count=3)
            copy.apply(2, 3)
        else:
            job = copy.world.job(copy.images, copy.undo, 2, 3)
            job._limits = limits
            job.run()
        losses = copy.undo.take_losses()
        assert (losses[0].from_epoch, losses[-1].to_epoch) == (0, 3)
        copy.apply(3, 4)
        reopened(copy, applied=4)
        (found,) = copy.undo.history.unusable(4)
        assert (found.from_epoch, found.to_epoch) == (2, 3)
        assert words in found.reason


def test_a_rollback_over_damage_is_refused_before_anything_changes() -> None:
    rig = RollbackRig(9700)
    rig.history(16)
    engine = rig.engine
    points = [
        each for each in engine.rollback_points() if each <= engine.undo.passes()[1].from_epoch
    ]
    target = points[-1]
    info = next(
        each for each in engine.undo.passes() if each.from_epoch >= target and each.raw_bytes
    )
    tip, expected = engine.sealed_epoch, dict(rig.epochs)
    rig.store.flip_bit(info.name, 8 * 140)
    with pytest.raises(IntegrityError, match=f"undo file {info.name} is damaged") as caught:
        engine.roll_back(target, "tail", wall_ns=WALL_NS)
    assert "geomirror timeline" in str(caught.value)
    rig.check_history(expected)
    rig.reopen()
    assert rig.engine.sealed_epoch == tip
    assert rig.engine.superblock.rollback is None
    assert rig.engine.branches.records() == []
    assert target not in rig.engine.rollback_points()
    newest = [each for each in rig.engine.rollback_points() if each < tip][-1:]
    for epoch in newest:
        rig.engine.roll_back(epoch, "tail", wall_ns=WALL_NS)
        rig.check_at(epoch, expected[epoch])


@pytest.mark.parametrize("kind", ["chunk", "header", "missing"])
def test_an_engine_opens_and_goes_on_with_damaged_history(kind: str) -> None:
    rig = RollbackRig(9710)
    rig.history(12)
    rig.apply()
    rig.persist()
    rig.checkpoint()
    rig.engine.close()
    name = rig.engine.undo.passes()[-1].name
    match kind:
        case "chunk":
            rig.store.flip_bit(name, 8 * 140)
        case "header":
            rig.store.flip_bit(name, 8 * 30)
        case _:
            rig.store.unlink(name)
            rig.store.sync_directory("undo")
    rig.reopen(lose_nothing=True)
    engine = rig.engine
    for volume in engine.images:
        assert engine.read(volume, 0, 4096) == bytes(rig.content[volume][:4096])
    if kind != "chunk":
        assert [each.to_epoch for each in engine.undo.history.unusable(engine.applied_epoch)]
    rig.history(6)
    rig.reopen(lose_nothing=True)
    assert engine.undo.history.passes
    for volume in rig.engine.images:
        size = rig.engine.images[volume].size_bytes
        assert rig.engine.read(volume, 0, size) == bytes(rig.content[volume])
