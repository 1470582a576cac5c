"""The undo store: what a file says, what is kept, and what damage or a full disk leave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from geomirror.errors import FencedError, IntegrityError, NotFoundError, StorageError
from geomirror.limits import BLOCK_BYTES, KIB
from geomirror.volume.undo import UndoOverflowError, UndoStore
from geomirror.volume.undo_file import PassLabel, UndoReader, UndoWriter
from geomirror.volume.undo_header import mark_damaged
from geomirror.volume.undo_load import glance, inspect
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from geomirror.volume.zero_blocks import ZERO_BLOCK
from tests.sim.disk import SimStore
from tests.volume.apply_support import GENERATION, LIMITS
from tests.volume.hexdump import VECTORS, dump, load

FIRST = "undo/0000000000000001.und"
WALL_NS = 1_700_000_000_000_000_000
HASH = bytes(range(32))
Fill = Callable[[UndoWriter], None]


def block_of(tag: int) -> bytes:
    return (tag.to_bytes(8, "little") * 512)[:BLOCK_BYTES]


def blocks(volume: int, numbers: list[int], tag: int = 0) -> Fill:
    data = b"".join(block_of(tag + number) for number in numbers)
    return lambda writer: writer.add_blocks(volume, np.array(numbers, dtype=np.int64), data)


def noise(numbers: int) -> Fill:
    data = np.random.default_rng(1).bytes(numbers * BLOCK_BYTES)
    return lambda writer: writer.add_blocks(0, np.arange(numbers), data)


def write(undo: UndoStore, from_epoch: int, to_epoch: int, fill: Fill) -> None:
    label = PassLabel(GENERATION, from_epoch, to_epoch, WALL_NS + to_epoch, HASH)
    undo.write(label, fill)


class UnchangedImage:
    """An image that tells that it was asked."""

    size_bytes = 1 << 62

    def read(self, offset: int, length: int) -> bytes:
        return b"image".ljust(length, b".")


def block_at(undo: UndoStore, volume: int, block: int, epoch: int) -> bytes | None:
    """What undo says a block held, None when it leaves it to the image."""
    images = {volume: UnchangedImage()}
    view = View(epoch, images, lambda: undo.history, undo._store.open, 1 << 20)
    content = view.read(volume, block * BLOCK_BYTES, BLOCK_BYTES)
    return None if content.startswith(b"image") else content


def test_the_state_at_an_epoch_is_the_oldest_pass_after_it_that_holds_the_block() -> None:
    undo = UndoStore(SimStore(), LIMITS)
    write(undo, 0, 3, blocks(0, [1, 2], 100))
    write(undo, 3, 4, blocks(0, [2, 9], 200))
    write(undo, 4, 8, blocks(0, [1, 9], 300))
    assert block_at(undo, 0, 1, 0) == block_of(101)
    assert block_at(undo, 0, 1, 3) == block_of(301)
    assert block_at(undo, 0, 2, 3) == block_of(202)
    assert block_at(undo, 0, 2, 4) is None
    assert block_at(undo, 0, 9, 4) == block_of(309)
    assert block_at(undo, 0, 9, 8) is None
    assert block_at(undo, 1, 1, 0) is None
    assert (undo.history.horizon(8), undo.history.horizon(3)) == (0, 0)


def test_zeros_runs_and_chunk_borders_are_read_back() -> None:
    store = SimStore()
    undo = UndoStore(store, LIMITS)

    def fill(writer: UndoWriter) -> None:
        many = np.arange(10, 210)
        writer.add_blocks(0, many, b"".join(block_of(int(n)) for n in many))
        writer.add_zero(0, 210, 1 << 30)
        data = block_of(7) + bytes(BLOCK_BYTES) + block_of(9)[:1024]
        writer.add_blocks(5, np.array([3, 4, 5]), data)

    write(undo, 1, 2, fill)
    with closing(undo.reader(1, 2)) as reader:
        entries = reader.entries()
    assert entries == [
        (0, 0, 10, 200),
        (0, 1, 210, 1 << 30),
        (5, 0, 3, 1),
        (5, 1, 4, 1),
        (5, 0, 5, 1),
    ]
    for number in (10, 73, 74, 209):
        assert block_at(undo, 0, number, 1) == block_of(number)
    assert block_at(undo, 0, 9, 1) is None
    assert block_at(undo, 0, 1 << 29, 1) == ZERO_BLOCK
    assert block_at(undo, 5, 4, 1) == ZERO_BLOCK
    assert block_at(undo, 5, 5, 1) == block_of(9)[:1024].ljust(BLOCK_BYTES, b"\0")
    assert undo.passes()[0].raw_bytes == 202 * BLOCK_BYTES
    assert undo.passes()[0].stored_bytes == len(store.content(FIRST))
    assert UndoStore(store, LIMITS).passes() == undo.passes()


def test_the_oldest_passes_are_dropped_over_the_budget() -> None:
    store = SimStore()
    undo = UndoStore(store, replace(LIMITS, undo_bytes_max=100 * KIB), start_counter=41)
    for epoch in range(10):
        write(undo, epoch, epoch + 1, noise(8))
    assert [each.from_epoch for each in undo.passes()] == [7, 8, 9]
    assert undo.stored_bytes() <= 100 * KIB
    assert undo.passes()[0].name == f"undo/{41 + 7:016x}.und"
    assert undo.history.horizon(10) == 7
    with pytest.raises(NotFoundError, match="epoch 6 is not kept"):
        block_at(undo, 0, 0, 6)
    write(undo, 10, 11, noise(100))
    assert [each.from_epoch for each in undo.passes()] == [10], "the newest is always kept"
    undo = UndoStore(store, replace(LIMITS, undo_passes_max=2))
    for epoch in range(11, 14):
        write(undo, epoch, epoch + 1, noise(1))
    assert [each.from_epoch for each in undo.passes()] == [12, 13]


def test_a_gap_ends_what_can_be_restored() -> None:
    store = SimStore()
    undo = UndoStore(store, LIMITS)
    write(undo, 0, 1, blocks(0, [1]))

    def overflow(writer: UndoWriter) -> None:
        writer.add_blocks(0, np.array([4]), block_of(4))
        raise UndoOverflowError

    write(undo, 1, 5, overflow)
    write(undo, 5, 6, blocks(0, [2]))
    undo = UndoStore(store, LIMITS)
    assert [(each.to_epoch, each.is_gap) for each in undo.passes()] == [(5, True), (6, False)]
    assert undo.history.horizon(6) == 5
    assert block_at(undo, 0, 2, 5) == block_of(2)
    with pytest.raises(NotFoundError):
        block_at(undo, 0, 2, 4)


def test_a_full_disk_costs_old_passes_first_and_then_leaves_a_gap() -> None:
    store = SimStore(capacity_bytes=200 * KIB)
    undo = UndoStore(store, LIMITS)
    for epoch in range(4):
        write(undo, epoch, epoch + 1, noise(8))
    write(undo, 4, 5, noise(20))
    assert [(each.from_epoch, each.is_gap) for each in undo.passes()] == [
        (2, False),
        (3, False),
        (4, False),
    ]
    write(undo, 5, 6, noise(60))
    assert [(each.from_epoch, each.is_gap) for each in undo.passes()] == [(5, True)]
    other = store.create("full", 0)
    with closing(other), pytest.raises(StorageError):
        other.pwritev([bytes(300 * KIB)], 0)


def test_a_failing_disk_writes_no_undo_and_says_so() -> None:
    store = SimStore()
    undo = UndoStore(store, LIMITS)
    store.fail("fdatasync", "undo/*")
    with pytest.raises(StorageError):
        write(undo, 0, 1, blocks(0, [1]))
    assert undo.passes() == []
    write(undo, 0, 1, blocks(0, [1]))
    assert undo.find(0, 1, GENERATION) is not None


def test_damage_is_a_gap_or_a_fence_never_a_second_undo() -> None:
    store = SimStore()
    undo = UndoStore(store, LIMITS)
    write(undo, 0, 1, noise(70))
    size_bits = len(store.content(FIRST)) * 8

    def damaged(bit: int) -> UndoStore:
        copy = SimStore()
        with closing(copy.create(FIRST, 0)) as file:
            file.pwritev([store.content(FIRST)], 0)
        copy.flip_bit(FIRST, bit)
        return UndoStore(copy, LIMITS)

    for bit in range(128 * 8):
        with pytest.raises(FencedError, match="may be half applied"):
            damaged(bit).pending_pass(0)
    for bit in range(size_bits - 8 * (32 + 24 + 32), size_bits):
        found = damaged(bit)
        assert found.pending_pass(0) == (0, 1)
        assert found.find(0, 1) is not None, "half-applied or not, it is not made again"
        assert found.passes()[0].is_gap
    for bit in range(128 * 8, size_bits - 8 * 88, 4999):
        found = damaged(bit)
        reader = found.reader(0, 1)
        with closing(reader), pytest.raises(IntegrityError, match="damaged chunk"):
            reader.verify()


def test_a_truncated_file_is_a_gap() -> None:
    store = SimStore()
    undo = UndoStore(store, LIMITS)
    write(undo, 0, 1, noise(3))
    content = store.content(FIRST)
    for size in (128, 150, len(content) - 1):
        copy = SimStore()
        with closing(copy.create(FIRST, 0)) as file:
            file.pwritev([content[:size]], 0)
        assert UndoStore(copy, LIMITS).passes()[0].is_gap


def test_forgetting_everything_is_durable() -> None:
    store = SimStore()
    undo = UndoStore(store, LIMITS)
    write(undo, 0, 1, blocks(0, [1]))
    undo.drop_all()
    store.crash()
    undo = UndoStore(store, LIMITS, undo.next_counter)
    assert undo.passes() == []
    assert undo.pending_pass(0) is None
    write(undo, 0, 1, blocks(0, [1]))
    assert undo.passes()[0].name == "undo/0000000000000002.und", "numbers are not used again"


def test_the_golden_file_reads_as_documented() -> None:
    store = SimStore()
    content = load((VECTORS / "undo_v2.hex").read_text())
    with closing(store.create(FIRST, 0)) as file:
        file.pwritev([content], 0)
        reader = UndoReader(file, FIRST)
        reader.verify()
        assert (reader.info.from_epoch, reader.info.to_epoch) == (17, 19)
        assert reader.info.generation == GENERATION
        assert (reader.info.wall_ns, reader.info.chain_hash) == (WALL_NS + 19, HASH)
        assert reader.entries() == [(0, 0, 5, 2), (0, 1, 7, 1), (2, 1, 100, 4096), (2, 0, 4196, 1)]
        assert reader.read_block(0, 6) == block_of(6)
        assert reader.read_block(2, 4196) == block_of(1)
    undo = UndoStore(SimStore(), LIMITS)
    write(undo, 17, 19, golden)
    with closing(undo.reader(17, 19)) as written:
        assert (written.entries(), written.info) == (reader.entries(), reader.info)
    assert dump(load(dump(content))) == dump(content)


def put(content: bytes) -> SimStore:
    store = SimStore()
    with closing(store.create(FIRST, 0)) as file:
        file.pwritev([content], 0)
    return store


def test_a_header_says_how_large_the_file_is_so_that_a_start_reads_no_more() -> None:
    sized, old = (
        load((VECTORS / name).read_text()) for name in ("undo_v2_sized.hex", "undo_v2.hex")
    )
    store = put(sized)
    with closing(store.open(FIRST)) as file:
        info = glance(file, FIRST)
        assert info == inspect(file, FIRST)
    assert info is not None
    assert (info.raw_bytes, info.stored_bytes) == (3 * BLOCK_BYTES, len(sized))
    limits = replace(LIMITS, undo_inspected_max=0)
    assert UndoStore(store, limits).has_unseen
    for content in (old, sized[:-1], sized + b"x"):
        with closing(put(content).open(FIRST)) as file:
            assert glance(file, FIRST) is None
        undo = UndoStore(put(content), limits)
        assert not undo.has_unseen, "it was read"
        assert undo.passes()[0].is_gap == (content is not old)
    assert UndoStore(put(old), limits).passes()[0].raw_bytes == 3 * BLOCK_BYTES
    # Nor does one that is known to be damaged have to be read.
    with closing(store.open(FIRST)) as file:
        mark_damaged(file, FIRST)
    undo = UndoStore(store, limits)
    assert not undo.has_unseen
    assert undo.passes()[0].is_gap


def test_a_damaged_merged_file_takes_the_place_of_nothing() -> None:
    """What it was made of is still there after a crash; its own damage shows in the table only."""
    limits = replace(LIMITS, undo_inspected_max=0)
    for is_damaged in (False, True):
        store = SimStore()
        undo = UndoStore(store, limits)
        for epoch in range(3):
            write(undo, epoch, epoch + 1, blocks(0, [epoch]))
        before = {each.name: store.content(each.name) for each in undo.passes()[:2]}
        ThinJob(store, undo, limits, ()).merge(undo.passes()[:2])
        merged = undo.passes()[0].name
        for name, content in before.items():
            with closing(store.create(name, 0)) as file:
                file.pwritev([content], 0)
        if is_damaged:
            store.flip_bit(merged, 8 * (len(store.content(merged)) - 40))
        undo = UndoStore(store, limits)
        kept = [each.name for each in undo.passes() if not each.is_gap]
        assert (merged in kept, kept[0] in before) == (not is_damaged, is_damaged)
        assert set(before) <= set(store.names()) or not is_damaged


def test_a_file_of_the_first_format_is_named_not_guessed() -> None:
    store = SimStore()
    with closing(store.create(FIRST, 0)) as file:
        file.pwritev([load((VECTORS / "undo_v1.hex").read_text())], 0)
    with pytest.raises(FencedError, match="unknown header"):
        UndoStore(store, LIMITS).pending_pass(17)


def golden(writer: UndoWriter) -> None:
    writer.add_blocks(0, np.array([5, 6, 7]), block_of(5) + block_of(6) + bytes(BLOCK_BYTES))
    writer.add_zero(2, 100, 4096)
    writer.add_blocks(2, np.array([4196]), block_of(1))
