"""History beside a promotion that is served at once: nothing that it needs is given up for room, it
waits for no reading through, and undo that is damaged is found before or said after."""

from __future__ import annotations

from dataclasses import replace

import pytest

from geomirror.errors import IntegrityError, NoSpaceError, NotFoundError
from geomirror.limits import SIMULATION
from geomirror.volume import before_images, engine_held, undo_group
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_group import Group
from geomirror.volume.undo_history import History
from geomirror.volume.undo_label import PassInfo
from geomirror.volume.undo_merge import ThinJob
from geomirror.wan_protocol.history_upkeep import HistoryUpkeep
from tests.volume.apply_support import LIMITS
from tests.volume.engine_rig import BLOCK
from tests.volume.test_promoted_images import Fresh, held_engine, promote
from tests.volume.test_undo_damage import EPOCHS, copy_of, name_of
from tests.volume.test_view import Copy, random_world
from tests.wan_protocol.test_resync_held import held_stage

GENERATION = b"g" * 16


def kept_after(copy: Copy, epoch: int, **limits: int) -> UndoStore:
    """The same undo, at a primary whose images go back to an epoch."""
    copy.undo = UndoStore(copy.store, replace(LIMITS, **limits))
    copy.undo.kept_after = epoch
    return copy.undo


def test_a_budget_costs_only_what_is_before_the_promotion_and_says_so() -> None:
    copy = Copy(random_world(330, EPOCHS))
    copy.apply(*range(EPOCHS))
    undo = kept_after(copy, 5, undo_passes_max=2)
    copy.apply(EPOCHS - 1, EPOCHS)
    assert [each.to_epoch for each in undo.passes()] == [6, 7, 8]
    (loss,) = undo.take_losses()
    assert (loss.why, loss.from_epoch, loss.to_epoch) == ("budget", 0, 5)


@pytest.mark.parametrize("failures", [1, 3, 20])
def test_a_full_disk_costs_what_is_before_it_and_then_the_pass_waits(failures: int) -> None:
    copy = Copy(random_world(331, EPOCHS))
    copy.apply(*range(EPOCHS))
    undo = kept_after(copy, 5)
    copy.store.fail("pwritev", "undo/*", error=28, count=failures)
    if failures > 3:
        with pytest.raises(NoSpaceError):
            copy.apply(EPOCHS - 1, EPOCHS)
        assert [each.to_epoch for each in undo.passes()] == [6, 7]
    else:
        copy.apply(EPOCHS - 1, EPOCHS)
        assert [each.to_epoch for each in undo.passes()][-3:] == [6, 7, 8]
    losses = undo.take_losses()
    assert losses[0].from_epoch == 0
    assert losses[-1].to_epoch <= 5
    assert {each.why for each in losses} == {"no_space"}


def test_what_reads_undo_through_ends_when_a_promotion_waits() -> None:
    copy = copy_of()
    damaged = name_of(copy, 4)
    copy.store.flip_bit(damaged, 8 * 140)
    copy.undo.suspect(damaged)
    before = copy.undo.passes()
    stopped = ThinJob(copy.store, copy.undo, LIMITS, (), scrub_bytes=1 << 30)
    stopped.stop()
    stopped.run()
    assert not stopped.is_scrubbed
    assert copy.undo.passes() == before
    assert copy.undo.has_suspects, "it is looked at another time"
    again = ThinJob(copy.store, copy.undo, LIMITS, (), scrub_bytes=1 << 30)
    again.run()
    assert [each.to_epoch for each in copy.undo.passes() if each.fault] == [4]
    assert again.is_scrubbed


def part(number: int, epoch: int) -> PassInfo:
    return PassInfo(GENERATION, epoch, (1 << 63) - 1, name="undo/1.open", start=128 * number)


def whole(from_epoch: int, to_epoch: int, fault: str = "") -> PassInfo:
    name = f"undo/{to_epoch}.und"
    return PassInfo(GENERATION, from_epoch, to_epoch, name=name, fault=fault)


def test_what_cannot_be_seen_while_volumes_go_back_says_why() -> None:
    parts = (part(1, 3), part(2, 3))
    history = History((whole(0, 1), whole(1, 2), whole(2, 3), whole(3, 4), *parts), 0)
    assert history.since(3) == (*parts, whole(3, 4))
    assert history.since(1) == (whole(1, 2), whole(2, 3), *parts, whole(3, 4))
    with pytest.raises(NotFoundError, match="while the volumes go back to epoch 3"):
        history.since(4)
    holed = History((whole(0, 1), whole(1, 2, "damaged"), whole(2, 3), whole(3, 4), *parts), 0)
    with pytest.raises(NotFoundError, match=r"epochs 1-2: undo file undo/2.und is damaged"):
        holed.since(1)
    assert holed.since(2) == (whole(2, 3), *parts, whole(3, 4))
    # Damage since the promotion is in the way of what is before it.
    later = History((whole(0, 1), whole(1, 2), whole(2, 3), whole(3, 4, "damaged"), *parts), 0)
    with pytest.raises(NotFoundError, match=r"epochs 3-4: undo file undo/4.und is damaged"):
        later.since(2)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_images, "_READ_BLOCKS_MAX", 1)
    monkeypatch.setattr(undo_group, "GROUP_BYTES_MAX", BLOCK)


@pytest.mark.usefixtures("small_groups")
def test_history_is_left_alone_until_the_volumes_are_back() -> None:
    store, engine, content = held_engine(2)
    engine.take_held()
    promote(engine)
    fresh = Fresh(2, store, engine, content)
    fresh.write()
    fresh.seal()
    job = engine.apply_job(engine.sealed_epoch)
    job.run()
    engine.complete_apply(job)
    told: list[str] = []
    upkeep = HistoryUpkeep(engine, SIMULATION, lambda kind, fields: told.append(kind))
    engine.undo.suspect(engine.undo.passes()[0].name)
    assert upkeep.due_job(1 << 50) is None
    fresh.checkpoint()
    engine.finish_return()
    assert upkeep.due_job(1 << 51) is not None
    assert told == []


@pytest.mark.usefixtures("small_groups")
def test_damage_in_what_a_promotion_reads_through_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = held_stage(blocks=16)
    stage.unpark(3)
    store, engine = stage.west.store, stage.secondary.engine
    groups: list[Group] = []
    for _ in range(40):
        assert engine.open_pass is not None
        groups = [group for group in engine.open_pass._groups[1:] if group.end > group.body]
        if groups:
            break
        stage.unpark(1)
    name = engine.open_pass.name
    engine.check_held()
    store.flip_bit(name, 8 * groups[-1].body)
    with pytest.raises(IntegrityError, match=f"undo file {name} is damaged at {groups[-1].start}"):
        engine.check_held()
    assert engine.held is not None
    # As much as takes no time: what is behind that is met by whoever reads it.
    monkeypatch.setattr(engine_held, "HELD_CHECK_BYTES", 1)
    engine.check_held()
    store.unlink(name)
    with pytest.raises(IntegrityError, match=f"undo file {name} is missing"):
        engine.check_held()
