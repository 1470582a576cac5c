"""Views: the volumes as they were, whatever is applied, merged or dropped meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from geomirror.errors import IntegrityError, LimitExceededError, NotFoundError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.image import Image
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import PassInfo
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from geomirror.volume.view_index import PassRuns
from tests.sim.disk import SimStore
from tests.volume.apply_support import LIMITS, World

ENTRIES_MAX = 1 << 16
SIZES = [300 * BLOCK_BYTES, 40 * BLOCK_BYTES + 512]


def random_world(seed: int, epochs: int = 8) -> World:
    rng = random.Random(seed)
    old = [rng.randbytes(size) for size in SIZES]
    world = World(SIZES, lambda volume: old[volume])
    for _ in range(epochs):
        changes: list[tuple[int, int, bytes | int, int]] = []
        for volume, size in enumerate(SIZES):
            last = -(-size // BLOCK_BYTES)
            block = rng.randrange(6)
            while block < last:
                if rng.random() < 0.1:
                    count = min(rng.randrange(2, 30), last - block)
                    changes.append((volume, block, count, rng.randrange(2)))
                    block += count + 1
                else:
                    length = min(BLOCK_BYTES, size - block * BLOCK_BYTES)
                    changes.append((volume, block, rng.randbytes(length), 0))
                    block += rng.choice((1, 1, 2, 9, 30))
        world.epoch(changes)
    return world


class Copy:
    """Images, undo and views over one simulated disk."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = SimStore()
        world.create_images(self.store)
        self.images: dict[int, Image] = world.images(self.store)
        self.undo = UndoStore(self.store, LIMITS)

    def view(self, epoch: int, entries_max: int = ENTRIES_MAX) -> View:
        undo, store = self.undo, self.store
        return View(epoch, self.images, lambda: undo.history, store.open, entries_max)

    def apply(self, *bounds: int) -> None:
        for first, last in itertools.pairwise(bounds):
            self.world.job(self.images, self.undo, first, last).run()

    def merge(self, first: int, last: int) -> None:
        passes = [p for p in self.undo.passes() if first <= p.from_epoch and p.to_epoch <= last]
        ThinJob(self.store, self.undo, LIMITS, ()).merge(passes)

    def check(self, view: View, rng: random.Random) -> None:
        """Some reads of any alignment are what the epoch held."""
        for volume, content in self.world.states[view.epoch].items():
            offset = rng.randrange(len(content))
            length = rng.randrange(1, len(content) - offset + 1)
            found = view.read(volume, offset, length)
            assert found == content[offset : offset + length], (view.epoch, volume, offset, length)


@pytest.mark.parametrize("seed", range(6))
def test_every_boundary_reads_as_it_was(seed: int) -> None:
    copy, rng = Copy(random_world(seed)), random.Random(seed)
    bounds = [0, *sorted(rng.sample(range(1, 8), 4)), 8]
    copy.apply(*bounds)
    for epoch in bounds:
        view = copy.view(epoch)
        for volume, content in copy.world.states[epoch].items():
            assert view.read(volume, 0, len(content)) == content
        for _ in range(10):
            copy.check(view, rng)


def test_a_view_reads_the_same_at_every_moment_of_a_pass() -> None:
    """Also while blocks are half written: the disk calls back into the view at each operation."""
    copy, rng = Copy(random_world(50)), random.Random(50)
    copy.apply(0, 2)
    views = [copy.view(0), copy.view(2)]
    moments = 0

    def look(operation: str, name: str) -> None:
        nonlocal moments
        moments += 1
        with copy.store.undisturbed():
            for view in views:
                copy.check(view, rng)

    copy.store.on_operation = look
    copy.apply(2, 3, 6, 8)
    assert moments > 200


@pytest.mark.parametrize("skipped", range(8))
def test_a_pass_that_begins_while_the_image_is_read_is_noticed(skipped: int) -> None:
    """The other way round: right before some of the view's reads a pass runs from end to end."""
    copy = Copy(random_world(60 + skipped))
    copy.apply(0, 1)
    view = copy.view(1)
    todo = [(1, 2), (2, 5), (5, 8)]
    reads = 0

    def begin(operation: str, name: str) -> None:
        nonlocal reads
        if operation != "pread" or not name.startswith("volumes/"):
            return
        reads += 1
        if todo and reads > skipped:
            with copy.store.undisturbed():
                copy.apply(*todo.pop(0))

    copy.store.on_operation = begin
    for volume, content in copy.world.states[1].items():
        for offset in range(0, len(content), 50_000):
            length = min(50_000, len(content) - offset)
            assert view.read(volume, offset, length) == content[offset : offset + length]
    assert not todo


@pytest.mark.parametrize("seed", range(4))
def test_merging_keeps_its_ends_and_what_views_see(seed: int) -> None:
    copy, rng = Copy(random_world(80 + seed)), random.Random(seed)
    copy.apply(*range(9))
    before = copy.view(0), copy.view(2), copy.view(6)
    for view in before:
        copy.check(view, rng)
    copy.merge(2, 6)
    copy.merge(0, 6)
    assert [(p.from_epoch, p.to_epoch) for p in copy.undo.passes()] == [(0, 6), (6, 7), (7, 8)]
    for epoch in (0, 6, 7, 8):
        copy.check(copy.view(epoch), rng)
    for view in (before[0], before[2]):
        copy.check(view, rng)
    with pytest.raises(NotFoundError, match="epoch 2 is not kept"):
        before[1].read(0, 0, 512)
    with pytest.raises(NotFoundError, match="epoch 3 is not kept"):
        copy.view(3)


class ReadingView(View):
    """Counts the passes whose tables it reads."""

    tables = 0

    def _read_tables(self, info: PassInfo) -> PassRuns:
        self.tables += 1
        return super()._read_tables(info)


@pytest.mark.parametrize("seed", range(12))
def test_an_open_view_reads_of_what_is_merged_the_merged_file_only(seed: int) -> None:
    copy, rng = Copy(random_world(400 + seed, epochs=24)), random.Random(seed)
    copy.apply(*range(9))
    epochs = sorted(rng.sample(range(9), 3))
    undo, store = copy.undo, copy.store
    views = [
        ReadingView(epoch, copy.images, lambda: undo.history, store.open, ENTRIES_MAX)
        for epoch in epochs
    ]
    for view in views:
        view.prepare()
        assert view.tables == 8 - view.epoch
    applied, expected = 8, [view.tables for view in views]
    while applied < 24:
        if rng.random() < 0.4:
            copy.apply(applied, applied + 1)
            applied += 1
            expected = [count + 1 for count in expected]
        else:
            passes = undo.passes()
            at = rng.randrange(len(passes) - 1)
            group = passes[at : at + rng.randrange(2, 5)]
            first, last = group[0].from_epoch, group[-1].to_epoch
            if len(group) < 2 or any(first < epoch < last for epoch in epochs):
                continue
            ThinJob(store, undo, LIMITS, ()).merge(group)
            expected = [
                count + (epoch <= first) for count, epoch in zip(expected, epochs, strict=True)
            ]
        for view, count in zip(views, expected, strict=True):
            # Sometimes several of these at once.
            if rng.random() < 0.7:
                copy.check(view, rng)
                assert view.tables <= count, "nothing is read twice"
    for view in views:
        for volume, content in copy.world.states[view.epoch].items():
            assert view.read(volume, 0, len(content)) == content


def test_zeros_that_hide_later_contents_are_followed_through_a_merge() -> None:
    """The first pass held zeros where the second one held data: the merged one has the zeros."""
    world = World([64 * BLOCK_BYTES], lambda _: bytes(64 * BLOCK_BYTES))
    data = bytes(range(256)) * 16
    world.epoch([(0, block, data, 0) for block in range(40)])
    world.epoch([(0, block, bytes(reversed(data)), 0) for block in range(40)])
    world.epoch([(0, 50, data, 0)])
    copy = Copy(world)
    copy.apply(0, 1)
    view = copy.view(0)
    view.prepare()
    copy.apply(1, 2)
    view.prepare()
    copy.merge(0, 2)
    copy.apply(2, 3)
    for _ in range(2):
        assert view.read(0, 0, 64 * BLOCK_BYTES) == bytes(64 * BLOCK_BYTES)
        copy.merge(0, 3)


def test_a_crash_at_any_point_of_a_merge_leaves_a_whole_history() -> None:
    world = random_world(90)

    def merged(stop_at: int) -> tuple[SimStore, int]:
        copy, count = Copy(world), 0
        copy.apply(0, 1, 2, 4, 8)

        def crash(operation: str, name: str) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt

        copy.store.on_operation = crash
        with contextlib.suppress(KeyboardInterrupt):
            copy.merge(1, 8)
        copy.store.on_operation = None
        return copy.store, count

    total = merged(0)[1]
    assert total > 15
    for stop_at in range(1, total + 1):
        store, _ = merged(stop_at)
        store.crash()
        images, undo = world.images(store), UndoStore(store, LIMITS)
        kept = [(p.from_epoch, p.to_epoch) for p in undo.passes()]
        assert kept in ([(0, 1), (1, 8)], [(0, 1), (1, 2), (2, 4), (4, 8)]), stop_at
        for epoch in (0, 1):
            view = View(epoch, images, lambda u=undo: u.history, store.open, ENTRIES_MAX)  # type: ignore[misc]
            for volume, content in world.states[epoch].items():
                assert view.read(volume, 0, len(content)) == content
        numbers = {name for name in store.names() if name.endswith(".und")}
        assert len(numbers) == len(kept), "what the merged pass covers is removed at the start"


def test_what_is_gone_is_an_error_never_other_content() -> None:
    copy = Copy(random_world(95))
    copy.apply(0, 1, 3)
    view, oldest = copy.view(1), copy.view(0)
    copy.undo.drop_oldest(1)
    with pytest.raises(NotFoundError):
        oldest.read(0, 0, 512)
    view.read(0, 0, 512)
    copy.undo.void()
    with pytest.raises(NotFoundError, match="made anew"):
        view.read(0, 0, 512)
    copy.undo.drop_all()
    with pytest.raises(NotFoundError, match="made anew"):
        view.read(0, 0, 512)


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_the_newest_undo_file_is_missing(lost: int) -> None:
    world = random_world(9)
    copy = Copy(world)
    copy.apply(0, 2, 4, 6, 8)
    for info in copy.undo.passes()[-lost:]:
        copy.store.unlink(info.name)
    copy.undo = UndoStore(copy.store, LIMITS)
    copy.undo.image_is_at(8)
    copy.check(copy.view(8), random.Random(1))
    for epoch in (0, 2, 4, 6):
        with pytest.raises(NotFoundError):
            copy.view(epoch).read(0, 0, 100)
    # Nor when there is a next one.
    world.epoch([(0, 3, bytes(range(256)) * 16, 0)])
    copy.apply(8, 9)
    copy.check(copy.view(8), random.Random(2))
    with pytest.raises(NotFoundError):
        copy.view(6).read(0, 0, 100)


def test_an_index_over_its_bound_is_refused() -> None:
    copy = Copy(random_world(96))
    copy.apply(0, 1, 2)
    with pytest.raises(LimitExceededError, match="more than 10 blocks were changed since epoch 0"):
        copy.view(0, entries_max=10).prepare()


def test_a_damaged_chunk_is_an_error() -> None:
    copy = Copy(random_world(97))
    copy.apply(0, 1)
    view = copy.view(0)
    view.prepare()
    copy.store.flip_bit(copy.undo.passes()[0].name, 8 * 200)
    with pytest.raises(IntegrityError, match="damaged chunk 0"):
        view.read(0, 0, SIZES[0])


def test_pinned_history_may_take_twice_the_room() -> None:
    def kept(pin: Callable[[UndoStore], None]) -> int:
        copy = Copy(random_world(98, epochs=30))
        copy.undo = UndoStore(copy.store, replace(LIMITS, undo_passes_max=6))
        pin(copy.undo)
        copy.apply(*range(31))
        return copy.undo.passes()[0].from_epoch

    assert kept(lambda undo: None) == 30 - 6
    assert kept(lambda undo: undo.pin("view", 20)) == 20
    assert kept(lambda undo: undo.pin("view", 5)) == 30 - 12, "but not more than that"
