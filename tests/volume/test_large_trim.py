"""TRIM and ZERO over much old data: what history keeps of it, and what that may take."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from geomirror.errors import NoSpaceError, NotFoundError
from geomirror.limits import BLOCK_BYTES, KIB, MIB, PRODUCTION, Limits
from geomirror.volume.epoch_table import FLAG_PUNCH
from geomirror.volume.pass_room import PassRoom
from geomirror.volume.undo import UndoOverflowError, UndoStore
from geomirror.volume.undo_file import UndoWriter
from tests.sim.disk import SimStore
from tests.volume import apply_support
from tests.volume.apply_support import LIMITS, World, content_of, restored
from tests.volume.memory_store import MemoryStore

BUDGET = replace(LIMITS, undo_bytes_max=6 * MIB)


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def trimmed(data_bytes: int, flags: int = FLAG_PUNCH) -> World:
    """A write, then a discard of everything; 2 MiB of holes lie behind the data."""
    size = data_bytes + 2 * MIB
    world = World([size], lambda _: noise(1, data_bytes).ljust(size, b"\0"))
    world.epoch([(0, 3, noise(2, BLOCK_BYTES), 0)])
    world.epoch([(0, 0, size // BLOCK_BYTES, flags)])
    return world


def trimmed_ledger(size: int) -> World:
    """Data that compresses well, and a trim of all of it."""
    world = World([size], lambda _: (b"ledger 17;" * (size // 10 + 1))[:size])
    world.epoch([(0, 0, size // BLOCK_BYTES, FLAG_PUNCH)])
    return world


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    monkeypatch.setattr(apply_support, "LIMITS", BUDGET)
    return BUDGET


@pytest.mark.parametrize("flags", [0, FLAG_PUNCH], ids=["zero", "trim"])
def test_what_a_large_trim_covers_is_kept_as_far_as_history_may_take_it(
    limits: Limits, flags: int
) -> None:
    world, store = trimmed(5 * MIB, flags), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, limits)
    world.job(images, undo, 0, 1).run()
    store.operations.clear()
    world.job(images, undo, 1, 2).run()
    reads = [op[3] for op in store.operations if op[0] == "pread" and op[1].startswith("volumes")]
    assert max(reads) <= 1 * MIB
    assert sum(reads) == 5 * MIB, "no holes"
    assert content_of(images) == world.states[2]
    assert not any(each.is_gap for each in undo.passes())
    assert undo.history.horizon(2) == 0
    for epoch in (0, 1):
        assert restored(images, store, undo, epoch) == world.states[epoch]


def test_more_than_all_history_may_take_is_a_gap_and_said_so(limits: Limits) -> None:
    world, store = trimmed(7 * MIB), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, limits)
    world.job(images, undo, 0, 2).run()
    assert content_of(images) == world.states[2]
    assert [each.fault for each in undo.passes()] == ["too_large"]
    with pytest.raises(NotFoundError, match="too much changed at once"):
        restored(images, store, undo, 0)


def test_what_compresses_well_counts_as_it_is_stored(limits: Limits) -> None:
    world, store = trimmed_ledger(24 * MIB), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, limits)
    world.job(images, undo, 0, 1).run()
    assert restored(images, store, undo, 0) == world.states[0]
    assert undo.stored_bytes() < 1 * MIB


def test_the_disk_is_not_filled_for_it_older_points_go_first(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    careful = replace(limits, undo_free_bytes_min=2 * MIB)
    monkeypatch.setattr(apply_support, "LIMITS", careful)
    for room, fault in ((6 * MIB, ""), (4 * MIB, "no_space")):
        world, store = trimmed(3 * MIB), SimStore()
        world.create_images(store)
        images, undo = world.images(store), UndoStore(store, careful)
        world.job(images, undo, 0, 1).run()
        store.capacity_bytes = (1 << 40) - 1
        store.capacity_bytes += room - store.free_bytes()
        lowest = [room]

        def look(operation: str, name: str, s: SimStore = store, seen: list[int] = lowest) -> None:
            seen.append(s.free_bytes())

        store.on_operation = look
        world.job(images, undo, 1, 2).run()
        store.on_operation = None
        assert content_of(images) == world.states[2]
        assert undo.passes()[-1].fault == fault
        assert min(lowest) >= 1 * MIB - 64 * KIB, "it is looked at with each MiB"


def test_a_stop_ends_it_within_a_few_reads(limits: Limits) -> None:
    """Somebody waits to promote this copy."""
    world, store = trimmed(5 * MIB), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, limits)
    world.job(images, undo, 0, 1).run()
    job = world.job(images, undo, 1, 2)
    job.stop()
    store.operations.clear()
    job.run()
    assert job.is_stopped
    assert sum(op[3] for op in store.operations if op[0] == "pread") <= 2 * MIB
    assert content_of(images) == world.states[1]
    assert undo.pending_pass(1) is None
    world.job(images, undo, 1, 2).run()
    assert restored(images, store, undo, 1) == world.states[1]


def test_the_bounds_of_a_pass_are_of_what_is_stored_read_and_held_in_memory() -> None:
    small = replace(LIMITS, undo_bytes_max=1 * MIB, view_entries_max=600, rollback_entries_max=900)

    def filled(blocks: int, step: int, content: bytes) -> UndoWriter:
        writer = UndoWriter(SimStore().create("undo/x", 0))
        numbers = np.arange(0, blocks * step, step, dtype=np.int64)
        for at in range(0, blocks, 100):
            part = numbers[at : at + 100]
            writer.add_blocks(0, part, content * len(part))
        return writer

    flat = b"x" * BLOCK_BYTES
    room = PassRoom(small, lambda: 1 << 40)
    room.check(filled(900, 1, flat))
    room.check(filled(600, 2, flat))
    for blocks, step, content in ((901, 1, flat), (601, 2, flat)):
        with pytest.raises(UndoOverflowError):
            room.check(filled(blocks, step, content))
    writer, at = UndoWriter(SimStore().create("undo/x", 0)), 0
    with pytest.raises(UndoOverflowError):
        for at in range(300):
            writer.add_blocks(0, np.array([at]), noise(at, BLOCK_BYTES))
            room.check(writer)
    assert 255 <= at <= 257
    full = PassRoom(replace(small, undo_free_bytes_min=1 * MIB), lambda: 1 * MIB - 1)
    full.check(filled(1, 1, flat))
    with pytest.raises(NoSpaceError):
        full.check(filled(50, 1, noise(4, BLOCK_BYTES)))


def test_a_long_trim_takes_little_memory(limits: Limits) -> None:
    world, store = trimmed_ledger(16 * MIB), SimStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, limits)
    job = world.job(images, undo, 0, 1)
    tracemalloc.start()
    try:
        job.run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB, "contents pass through a MiB at a time"
    assert PRODUCTION.view_entries_max * 24 <= 32 * MIB
