"""Applying epochs: the image is the target, the undo is the past, and crashes change neither."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from geomirror.errors import StorageError
from geomirror.limits import BLOCK_BYTES, KIB, MIB
from geomirror.volume.epoch_table import FLAG_PUNCH
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.undo import UndoStore
from tests.sim.disk import SimStore
from tests.volume import apply_support
from tests.volume.apply_support import GENERATION, LIMITS, Change, World, content_of, restored
from tests.volume.memory_store import MemoryStore


def noise(seed: int, length: int = BLOCK_BYTES) -> bytes:
    return random.Random(seed).randbytes(length)


def small_world() -> World:
    """Two volumes, the second with a short last block; data at their beginning, holes behind."""
    sizes = [1 * MIB, 300 * KIB + 512]
    world = World(sizes, lambda v: noise(v, 100 * KIB).ljust(sizes[v], b"\0"))
    world.epoch([(0, 3, noise(10), 0), (0, 4, noise(11), 0), (1, 75, noise(12, 512), 0)])
    world.epoch([(0, 4, noise(13), 0), (0, 100, 90, FLAG_PUNCH), (1, 0, 76, 0)])
    world.epoch([(0, 0, 70, 0), (0, 110, noise(14), 0), (1, 75, noise(15, 512), 0)])
    return world


def random_world(seed: int, epochs: int = 4) -> World:
    rng = random.Random(seed)
    sizes = [rng.randrange(20, 400) * BLOCK_BYTES, rng.randrange(20, 100) * BLOCK_BYTES + 1536]
    world = World(sizes, lambda v: noise(seed + v, sizes[v] // 2).ljust(sizes[v], b"\0"))
    for _ in range(epochs):
        changes: list[Change] = []
        for volume, size in enumerate(sizes):
            block, blocks = 0, -(-size // BLOCK_BYTES)
            while (block := block + rng.choice((0, 0, 0, 1, 2, 9))) < blocks:
                if rng.random() < 0.15:
                    count = min(rng.randrange(1, 100), blocks - block)
                    changes.append((volume, block, count, rng.randrange(2)))
                    block += count
                elif rng.random() < 0.7:
                    length = min(BLOCK_BYTES, size - block * BLOCK_BYTES)
                    changes.append((volume, block, rng.randbytes(length), 0))
                    block += 1
                else:
                    block += rng.randrange(60)
        world.epoch(changes or [(0, 0, noise(seed), 0)])
    return world


def test_epochs_are_applied_as_one_and_the_undo_gives_the_old_state_back() -> None:
    world, store = small_world(), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    job = world.job(images, undo, 0, 2)
    job.run()
    assert content_of(images) == world.states[2]
    assert restored(images, store, undo, 0) == world.states[0]
    world.job(images, undo, 2, 3).run()
    assert content_of(images) == world.states[3]
    assert restored(images, store, undo, 0) == world.states[0]
    assert restored(images, store, undo, 2) == world.states[2]
    assert (undo.history.horizon(3), undo.history.horizon(2)) == (0, 0)
    assert job.bytes_written == 2 * BLOCK_BYTES, "two of the three data blocks were superseded"
    assert job.undo_bytes == undo.passes()[0].stored_bytes


@pytest.mark.parametrize("seed", range(12))
def test_any_epochs_are_applied_and_undone_exactly(seed: int) -> None:
    world, store = random_world(seed), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    world.job(images, undo, 0, 1).run()
    world.job(images, undo, 1, 4).run()
    assert content_of(images) == world.states[4]
    assert restored(images, store, undo, 1) == world.states[1]
    assert restored(images, store, undo, 0) == world.states[0]


def test_the_undo_is_durable_before_the_first_image_block_changes() -> None:
    world, store = small_world(), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    store.operations.clear()
    world.job(images, undo, 0, 3).run()
    changes = [
        index
        for index, (name, file, _, _) in enumerate(store.operations)
        if file.startswith("volumes/") and name in ("pwritev", "zero", "punch")
    ]
    before = [name for name, *_ in store.operations[: changes[0]]]
    assert before[-3:] == ["fdatasync", "rename", "sync_directory"]
    synced = [file for name, file, *_ in store.operations[changes[-1] :] if name == "fdatasync"]
    assert synced == ["volumes/0.img", "volumes/1.img"]


def test_adjacent_blocks_are_read_and_written_with_few_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apply_support, "LIMITS", replace(LIMITS, apply_read_bytes_max=4 * MIB))
    world, store = World([8 * MIB], lambda _: noise(1, 8 * MIB)), MemoryStore()
    world.epoch([(0, block, noise(block), 0) for block in range(256, 768)])
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    store.operations.clear()
    world.job(images, undo, 0, 1, with_undo=False).run()
    assert [op[0] for op in store.operations] == ["pwritev", "fdatasync"]
    assert world.journal.reads <= 12, "2 MiB in segments of 256 KiB"
    store.operations.clear()
    world.job(images, undo, 0, 1).run()
    reads = [op for op in store.operations if op[0] == "pread"]
    assert [op[3] for op in reads] == [1 * MIB, 1 * MIB]


def test_blocks_scattered_over_the_journal_take_few_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_support, "LIMITS", replace(LIMITS, apply_read_bytes_max=4 * MIB))
    world, store = World([8 * MIB], lambda _: bytes(8 * MIB)), MemoryStore()
    for number in range(4):
        # Written in an order that has nothing to do with the blocks'; every epoch goes everywhere.
        world.epoch([(0, b, noise(b), 0) for b in range(number, 2048, 8)])
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    job = world.job(images, undo, 0, 4)
    job.run()
    assert content_of(images) == world.states[4]
    assert job.bytes_written == 4 * MIB
    assert world.journal.reads <= 20, "one for each segment of 256 KiB"


def test_holes_under_many_blocks_are_asked_for_and_not_read() -> None:
    size = 64 * MIB
    world, store = World([size], lambda _: noise(1, 128 * KIB).ljust(size, b"\0")), MemoryStore()
    world.epoch([(0, block, noise(block), 0) for block in range(0, size // BLOCK_BYTES, 64)])
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    store.operations.clear()
    world.job(images, undo, 0, 1).run()
    assert [op[2] for op in store.operations if op[0] == "pread"] == [0]
    assert content_of(images) == world.states[1]
    assert restored(images, store, undo, 0) == world.states[0]


def test_an_image_in_too_many_pieces_is_read_and_not_asked() -> None:
    size = 16 * MIB
    pieces = b"".join(noise(at, 64 * KIB) + bytes(64 * KIB) for at in range(128))
    world, store = World([size], lambda _: pieces), MemoryStore()
    world.epoch([(0, block, noise(block), 0) for block in range(0, size // BLOCK_BYTES, 8)])
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    store.operations.clear()
    world.job(images, undo, 0, 1).run()
    reads = [op for op in store.operations if op[0] == "pread"]
    # 512 blocks are worth 32 pieces: half of the blocks up to there, all of them behind.
    assert 350 < len(reads) < 512
    assert content_of(images) == world.states[1]
    assert restored(images, store, undo, 0) == world.states[0]


def test_a_plain_resync_keeps_no_undo() -> None:
    world, store = small_world(), MemoryStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    world.job(images, undo, 0, 3, with_undo=False).run()
    assert content_of(images) == world.states[3]
    assert undo.passes() == []


def test_holes_under_a_large_trim_cost_neither_reads_nor_undo() -> None:
    size = 64 * MIB
    world, store = World([size], lambda _: noise(1, 128 * KIB).ljust(size, b"\0")), MemoryStore()
    world.epoch([(0, 0, size // BLOCK_BYTES, FLAG_PUNCH)])
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    store.operations.clear()
    world.job(images, undo, 0, 1).run()
    assert sum(op[3] for op in store.operations if op[0] == "pread") == 128 * KIB
    with closing(undo.reader(0, 1)) as reader:
        entries = reader.entries()
    assert entries == [(0, 0, 0, 32), (0, 1, 32, size // BLOCK_BYTES - 32)]


def test_a_pass_too_large_to_undo_leaves_a_gap_and_is_applied_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, store = random_world(7), MemoryStore()
    world.create_images(store)
    images = world.images(store)
    undo = UndoStore(store, LIMITS)
    world.job(images, undo, 0, 1).run()
    small = replace(LIMITS, undo_bytes_max=4096, apply_pass_bytes_max=4096)
    monkeypatch.setattr(apply_support, "LIMITS", small)
    world.job(images, undo, 1, 3).run()
    assert content_of(images) == world.states[3]
    assert [(each.from_epoch, each.to_epoch, each.is_gap) for each in undo.passes()] == [
        (1, 3, True)
    ]
    assert undo.history.horizon(3) == 3
    assert undo.pending_pass(1) == (1, 3), "a gap still says which pass may be half applied"


def test_an_undo_file_that_exists_is_used_and_not_made_from_a_half_applied_image() -> None:
    world, store = small_world(), MemoryStore()
    world.create_images(store)
    images = world.images(store)
    undo = UndoStore(store, LIMITS)
    world.job(images, undo, 0, 2).run()
    # The crash came before the checkpoint: the same pass again, over its own result.
    again = UndoStore(store, LIMITS)
    assert again.pending_pass(0) == (0, 2)
    assert again.next_counter == 2
    job = world.job(images, again, 0, 2)
    job.run()
    assert content_of(images) == world.states[2]
    assert restored(images, store, again, 0) == world.states[0]
    assert len(again.passes()) == 1
    assert again.find(0, 2, GENERATION) is not None
    assert again.find(0, 2, bytes(16)) is None, "the same numbers of another history"


class StopError(Exception):
    """The simulated machine stops here."""


class StopAfter:
    """Stops the machine before the k-th operation from now on."""

    def __init__(self, store: SimStore, operations: int) -> None:
        self.left = operations
        store.on_operation = self

    def __call__(self, operation: str, name: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopError


def crash_world() -> World:
    """Small enough to stop it at every single operation."""
    sizes = [50 * BLOCK_BYTES, 12 * BLOCK_BYTES + 512]
    world = World(sizes, lambda v: noise(v, 9 * BLOCK_BYTES).ljust(sizes[v], b"\0"))
    world.epoch([(0, n, noise(n), 0) for n in (1, 2, 7, 30)] + [(1, 12, noise(5, 512), 0)])
    world.epoch([(0, 2, noise(90), 0), (0, 5, 40, FLAG_PUNCH), (1, 0, 3, 0)])
    world.epoch([(0, 2, noise(91), 0), (0, 8, noise(92), 0), (1, 2, noise(93), 0)])
    return world


def power_on(
    world: World, store: SimStore, applied: int, target: int, stop_after: int | None
) -> bool:
    """Start, do what may be half done, then go on to `target`; False if the machine stopped."""
    try:
        if stop_after is not None:
            StopAfter(store, stop_after)
        images, undo = world.images(store), UndoStore(store, LIMITS)
        pending = undo.pending_pass(applied)
        if pending is not None:
            world.job(images, undo, *pending).run()
            applied = pending[1]
        if applied < target:
            world.job(images, undo, applied, target).run()
    except StopError:
        return False
    finally:
        store.on_operation = None
    return True


@pytest.mark.parametrize("lose_nothing", [False, True], ids=["power", "kill"])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_crash_at_any_operation_the_pass_ends_and_the_past_is_intact(
    seed: int, lose_nothing: bool
) -> None:
    rng = random.Random(seed)
    world = crash_world()
    has_ended, stop_after = False, 0
    while not has_ended:
        store = SimStore(f"{seed} {stop_after}")
        world.create_images(store)
        assert power_on(world, store, 0, 1, None)
        # The checkpoint says 1; the machine stops in (1, 3], then perhaps again while repeating.
        has_ended = power_on(world, store, 1, 3, stop_after)
        store.crash(lose_nothing=lose_nothing)
        while rng.random() < 0.4:
            power_on(world, store, 1, 3, rng.randrange(20))
            store.crash(lose_nothing=lose_nothing)
        assert power_on(world, store, 1, 3, None)
        images, undo = world.images(store), UndoStore(store, LIMITS)
        assert content_of(images) == world.states[3], f"stopped after {stop_after} operations"
        assert restored(images, store, undo, 1) == world.states[1], f"stopped after {stop_after}"
        assert restored(images, store, undo, 0) == world.states[0]
        assert len(undo.passes()) == 2
        stop_after += 1
    assert stop_after > 20


@pytest.mark.parametrize("operation", ["pread", "pwritev", "zero", "fdatasync", "rename"])
def test_a_failing_call_raises_and_the_pass_can_be_repeated(operation: str) -> None:
    world, store = crash_world(), SimStore()
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    store.fail(operation, "*")
    with pytest.raises(StorageError):
        world.job(images, undo, 0, 2).run()
    images, undo = world.images(store), UndoStore(store, LIMITS)
    world.job(images, undo, 0, 2).run()
    assert content_of(images) == world.states[2]
    assert restored(images, store, undo, 0) == world.states[0]


def test_it_is_the_same_on_a_real_file_system(tmp_path: Path) -> None:
    world, store = random_world(3), DirectoryStore(tmp_path)
    world.create_images(store)
    images, undo = world.images(store), UndoStore(store, LIMITS)
    undo.drop_all()
    world.job(images, undo, 0, 2).run()
    world.job(images, undo, 2, 4).run()
    assert content_of(images) == world.states[4]
    assert restored(images, store, undo, 2) == world.states[2]
    assert restored(images, store, undo, 0) == world.states[0]
    for image in images.values():
        image.close()
    store.close()
