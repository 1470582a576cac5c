"""History that is too much for its budget: the oldest of the finest level gets coarser first, what
is coarse already stays, the newest point always, and nothing is given up without a word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, KIB
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import PassLabel, UndoWriter
from geomirror.volume.undo_levels import ages_of
from geomirror.volume.undo_merge import ThinJob
from tests.sim.disk import SimStore
from tests.volume.apply_support import GENERATION, LIMITS

LEVELS = ((SECOND, 60 * SECOND), (20 * SECOND, 1200 * SECOND))
COARSE = range(1140, 60, -20)
FINE = range(59, 0, -1)
NOW = 1_700_000_000 * SECOND
WIDE = replace(LIMITS, undo_levels=LEVELS, undo_settled_ns=2 * SECOND, undo_passes_max=1000)


def same_block(writer: UndoWriter) -> None:
    """Every pass changes it: merging two gains one."""
    noise = np.random.default_rng(writer.raw_bytes).bytes(BLOCK_BYTES)
    writer.add_blocks(0, np.array([5]), noise)


def filled() -> tuple[SimStore, UndoStore]:
    """54 coarse points and 59 fine ones, in a budget that has room for all."""
    store = SimStore()
    undo = UndoStore(store, WIDE)
    for epoch, age_s in enumerate([*COARSE, *FINE]):
        label = PassLabel(GENERATION, epoch, epoch + 1, NOW - age_s * SECOND, bytes(32))
        undo.write(label, same_block)
    ThinJob(store, undo, WIDE, ()).run()
    assert len(undo.passes()) == len(COARSE) + len(FINE), "nothing is due by age"
    return store, undo


def thin(store: SimStore, undo: UndoStore, **bounds: int) -> None:
    undo._limits = replace(WIDE, **bounds)
    for _ in range(200):
        job = ThinJob(store, undo, undo._limits, ())
        job.run()
        if not job.has_changed:
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    "bounds", [{"undo_passes_max": 120}, {"undo_bytes_max": 560 * KIB}], ids=["files", "bytes"]
)
def test_the_oldest_of_the_finest_level_makes_room_first(bounds: dict[str, int]) -> None:
    store, undo = filled()
    thin(store, undo, **bounds)
    passes = undo.passes()
    boundaries = {each.to_epoch for each in passes}
    coarse, fine = len(COARSE), len(FINE)
    gone = [epoch for epoch in range(1, coarse + fine + 1) if epoch not in boundaries]
    assert gone, "room was made"
    assert min(gone) > coarse - 1, "none of the coarse ones"
    assert set(range(max(gone) + 1, coarse + fine + 1)) <= boundaries, "none newer than those"
    assert undo.history.horizon(coarse + fine) == 0, "it reaches as far as before"
    assert undo.take_losses() == []
    assert len(passes) <= 0.8 * bounds.get("undo_passes_max", 1000)
    ages = ages_of([each.wall_ns for each in passes])
    assert min(ages) == 0


def test_what_no_merging_helps_is_dropped_from_the_old_end_and_told() -> None:
    store, undo = filled()
    thin(store, undo, undo_passes_max=8)
    newest = undo.passes()[-1]
    losses: list[int] = []
    for number in range(20):
        epoch = newest.to_epoch + number
        wall_ns = newest.wall_ns + number * 25 * SECOND
        undo.write(PassLabel(GENERATION, epoch, epoch + 1, wall_ns, bytes(32)), same_block)
        losses += [each.to_epoch for each in undo.take_losses()]
        assert undo.passes()[-1].to_epoch == epoch + 1, "the newest always stays"
        assert len(undo.passes()) <= 8
        assert undo.history.horizon(epoch + 1) == undo.passes()[0].from_epoch
    assert losses
    assert losses == sorted(losses)
    assert losses[-1] == undo.passes()[0].from_epoch


@pytest.mark.parametrize("passes_max", [1, 2, 3])
def test_however_small_the_budget_there_is_a_point(passes_max: int) -> None:
    store = SimStore()
    undo = UndoStore(store, replace(WIDE, undo_passes_max=passes_max))
    for epoch in range(12):
        label = PassLabel(GENERATION, epoch, epoch + 1, NOW + epoch * SECOND, bytes(32))
        undo.write(label, same_block)
        ThinJob(store, undo, undo._limits, ()).run()
        assert undo.history.kept(epoch + 1), "the newest point is there"
