"""The dirty bitmap: sets as a model does, and loses no durable bit whenever the machine stops."""

from __future__ import annotations

import itertools
import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.errors import IntegrityError, NotFoundError, StorageError
from geomirror.limits import BLOCK_BYTES, GIB, REGION_BYTES, TIB
from geomirror.volume.bitmap_file import PAGE_REGIONS, BitmapHeader
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.epoch_table import ENTRY, KIND_DATA, KIND_ZERO, Table
from geomirror.volume.store_io import DirectoryStore
from tests.sim.disk import SimStore
from tests.volume.hexdump import VECTORS, dump, load

GENERATION = bytes(range(16))
HASH = bytes(range(32))
NAME = "bitmap/west-1.bits"


def bitmap(store: SimStore, volumes: dict[int, int]) -> DirtyBitmap:
    return DirtyBitmap.create(
        store, "west-1", volumes, generation=GENERATION, epoch=7, chain_hash=HASH
    )


def write(bits: DirtyBitmap) -> None:
    job = bits.write_job()
    assert job is not None
    job.run()


def table_of(rows: list[tuple[int, int, int]]) -> Table:
    return np.array(
        [
            (volume, KIND_DATA if count == 1 else KIND_ZERO, 0, count, block, 0, 0, 0)
            for volume, block, count in rows
        ],
        dtype=ENTRY,
    )


def dirty(bits: DirtyBitmap) -> set[tuple[int, int]]:
    return {
        (volume, region)
        for volume in bits.volumes
        for first, count in bits.runs(volume)
        for region in range(first, first + count)
    }


REGIONS = {0: 3 * PAGE_REGIONS + 5, 4: 100}
operations = st.lists(
    st.tuples(
        st.sampled_from(["table", "range", "clear", "clear many"]),
        st.sampled_from([0, 0, 4]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.integers(1, 3), st.integers(1, 40), st.integers(1, 2 * PAGE_REGIONS)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_regions_are_set_and_cleared_as_in_a_plain_set(
    steps: list[tuple[str, int, float, int]],
) -> None:
    store = SimStore()
    bits = bitmap(store, {v: count * REGION_BYTES for v, count in REGIONS.items()})
    model: dict[int, set[int]] = {0: set(), 4: set()}
    for what, volume, where, length in steps:
        first = int(REGIONS[volume] * where)
        count = min(length, REGIONS[volume] - first)
        regions = set(range(first, first + count))
        if what == "clear":
            bits.clear_range(volume, first, count)
            model[volume] -= regions
        elif what == "clear many":
            if bits.is_changed:
                write(bits)
            single = {0, REGIONS[volume] - 1, REGIONS[volume] // 2}
            many = [(volume, first, first + count), *((volume, r, r + 1) for r in single)]
            bits.clear_runs(many)
            model[volume] -= regions | single
        elif what == "range":
            bits.set_range(volume, first * REGION_BYTES + 1, count * REGION_BYTES - 1)
            model[volume] |= regions
        else:
            blocks = 1 if count == 1 else count * 16 - 15
            bits.set_table(table_of([(volume, first * 16 + 15, blocks)]))
            model[volume] |= set(range(first, first + count))
    assert bits.count() == sum(map(len, model.values()))
    for volume, regions in model.items():
        runs = list(bits.runs(volume))
        assert {r for first, count in runs for r in range(first, first + count)} == regions
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))
        within = bits.runs_within(volume, 5, REGIONS[volume] + 9)
        assert {r for first, end in within for r in range(first, end)} == {
            r for r in regions if r >= 5
        }
    if bits.is_changed:
        write(bits)
    assert dirty(DirtyBitmap.load(store, "west-1")) == dirty(bits)


def test_a_table_marks_every_region_it_touches() -> None:
    bits = bitmap(SimStore(), {0: GIB, 1: GIB + 512})
    last = GIB // BLOCK_BYTES
    bits.set_table(table_of([(0, 15, 2), (0, 100, 1), (0, 160, 1600), (1, last, 1)]), 9)
    assert list(bits.runs(0)) == [(0, 2), (6, 1), (10, 100)]
    assert list(bits.runs(1)) == [(GIB // REGION_BYTES, 1)]
    assert bits.is_dirty(0, 109)
    assert not bits.is_dirty(0, 110)
    assert bits.through_epoch == 9
    assert bits.next_run(0, 11, 8) == (11, 8)
    assert bits.next_run(0, 110) is None


def test_what_was_written_is_loaded_again_and_growth_keeps_it() -> None:
    store = SimStore()
    with pytest.raises(NotFoundError):
        DirtyBitmap.load(store, "west-1")
    bits = bitmap(store, {0: 4 * GIB, 2: GIB})
    assert bits.durable_through_epoch == 0
    bits.set_table(table_of([(0, 5, 1), (0, 900_000, 1), (2, 77, 400)]), 8)
    write(bits)
    assert bits.durable_through_epoch == 8
    assert bits.write_job() is None, "nothing has changed"
    loaded = DirtyBitmap.load(store, "west-1")
    assert dirty(loaded) == dirty(bits)
    assert loaded.count() == bits.count()
    assert loaded.base == (GENERATION, 7, HASH)
    assert loaded.durable_through_epoch == 8

    loaded.resize({0: 9 * GIB, 1: GIB, 2: GIB})
    assert dirty(loaded) == dirty(bits)
    loaded.set_range(0, 9 * GIB - 1, 1)
    loaded.set_range(1, 0, 1)
    write(loaded)
    assert dirty(DirtyBitmap.load(store, "west-1")) == dirty(loaded)
    loaded.resize({0: GIB})
    assert dirty(loaded) == {(0, 0)}
    loaded.delete()
    assert store.names() == []


def test_only_changed_pages_are_written() -> None:
    store = SimStore()
    bits = bitmap(store, {0: TIB})
    bits.set_all()
    assert bits.count() == TIB // REGION_BYTES
    write(bits)
    bits.clear_range(0, PAGE_REGIONS * 3, 1)
    bits.clear_range(0, PAGE_REGIONS * 9 - 1, 2)
    bits.set_range(0, 0, REGION_BYTES * PAGE_REGIONS)
    job = bits.write_job()
    assert job is not None
    assert [(page.page, page.slot) for page in job.pages] == [(3, 1), (8, 1), (9, 1)]
    job.run()
    bits.set_range(0, 0, TIB)
    job = bits.write_job()
    assert job is not None
    assert [(page.page, page.slot) for page in job.pages] == [(3, 0), (8, 0), (9, 0)]


def test_a_sparse_volume_of_64_tib_costs_only_what_is_set() -> None:
    store = SimStore()
    bits = bitmap(store, {0: 64 * TIB})
    bits.set_table(table_of([(0, 0, 1), (0, 64 * TIB // BLOCK_BYTES - 1, 1)]))
    job = bits.write_job()
    assert job is not None
    assert len(job.pages) == 2
    job.run()
    assert dirty(DirtyBitmap.load(store, "west-1")) == {(0, 0), (0, (1 << 30) - 1)}
    bits.set_table(table_of([(0, 64, 1)]))
    job = bits.write_job()
    assert job is not None
    assert len(job.pages) == 1


def test_a_failed_write_is_written_again() -> None:
    store = SimStore()
    bits = bitmap(store, {0: GIB})
    write(bits)
    bits.set_range(0, 0, 1)
    store.fail("fdatasync", NAME)
    job = bits.write_job()
    assert job is not None
    with pytest.raises(StorageError):
        job.run()
    assert bits.durable_through_epoch == 7
    write(bits)
    store.crash()
    assert dirty(DirtyBitmap.load(store, "west-1")) == {(0, 0)}


class StopError(Exception):
    """The simulated machine stops here."""


@pytest.mark.parametrize("seed", range(60))
def test_a_crash_at_any_operation_loses_no_durable_bit(seed: int) -> None:
    rng = random.Random(seed)
    store = SimStore(seed)
    bits = bitmap(store, {0: 5 * GIB, 1: GIB})
    durable: set[tuple[int, int]] = set()
    everything: set[tuple[int, int]] = set()
    through = exists = 0
    for epoch in range(8, 24):
        volume = rng.randrange(2)
        blocks = (GIB if volume else 5 * GIB) // BLOCK_BYTES
        bits.set_table(table_of([(volume, rng.randrange(blocks - 2000), 1 + rng.randrange(2))]))
        bits.set_table(table_of([(0, rng.randrange(blocks - 2000), 2000)]), epoch)
        everything |= dirty(bits)
        if rng.random() < 0.3 and dirty(bits):
            cleared = rng.choice(sorted(dirty(bits)))
            bits.clear_range(*cleared, 1)
            durable.discard(cleared)
        countdown = rng.randrange(12)

        def stop(operation: str, name: str) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown < 0:
                raise StopError

        store.on_operation = stop
        try:
            job = bits.write_job()
            if job is not None:
                job.run()
            durable, through, exists = dirty(bits), bits.through_epoch, 1
            store.on_operation = None
        except StopError:
            store.on_operation = None
            store.crash()
            try:
                bits = DirtyBitmap.load(store, "west-1")
            except NotFoundError:
                assert not exists
                bits = bitmap(store, {0: 5 * GIB, 1: GIB})
            assert dirty(bits) >= durable, "a durable bit was lost"
            assert dirty(bits) <= everything, "a bit came from nowhere"
            assert bits.through_epoch >= through
            durable |= dirty(bits) if exists else set()


def test_damage_is_noticed() -> None:
    store = SimStore()
    bits = bitmap(store, {0: 4 * GIB})
    for region in (0, 1):
        bits.set_range(0, region * REGION_BYTES, 1)
        write(bits)
    for bit in (8192 * 8 + 300, 12288 * 8 + 300):
        store.flip_bit(NAME, bit)
    with pytest.raises(IntegrityError, match="no valid version of page 0"):
        DirtyBitmap.load(store, "west-1")
    store.flip_bit(NAME, 4096 * 8)
    store.flip_bit(NAME, 40)
    with pytest.raises(IntegrityError, match="no valid header"):
        DirtyBitmap.load(store, "west-1")


@given(st.binary(max_size=4096))
def test_any_bytes_are_a_header_or_none(data: bytes) -> None:
    assert BitmapHeader.decode(data.ljust(4096, b"\0")) is None


def test_a_header_with_any_bit_flipped_is_none() -> None:
    header = BitmapHeader(GENERATION, 7, HASH, 9, ((0, 10), (3, 1 << 30)), 5)
    slot = header.encode()
    assert BitmapHeader.decode(slot) == header
    end = len(slot.rstrip(b"\0"))
    for bit in range(end * 8):
        flipped = bytearray(slot)
        flipped[bit // 8] ^= 1 << bit % 8
        assert BitmapHeader.decode(bytes(flipped)) is None


def test_the_file_is_byte_for_byte_as_documented() -> None:
    store = SimStore()
    bits = bitmap(store, {0: 3 * GIB, 3: 1 << 20})
    bits.set_table(table_of([(0, 1, 1), (0, 700_000, 64), (3, 255, 1)]), 9)
    write(bits)
    bits.set_range(3, 0, 1)
    bits.through_epoch = 10
    write(bits)
    vector = (VECTORS / "dirty_bitmap_v1.hex").read_text()
    assert dump(store.content(NAME)) == vector
    file = SimStore()
    with closing(file.create(NAME, 0)) as raw:
        raw.pwritev([load(vector)], 0)
    assert dirty(DirtyBitmap.load(file, "west-1")) == dirty(bits)


def test_it_is_the_same_on_a_real_file_system(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    bits = DirtyBitmap.create(
        store, "west-1", {0: 8 * TIB, 1: GIB}, generation=GENERATION, epoch=7, chain_hash=HASH
    )
    bits.delete()
    bits.set_table(table_of([(0, 5, 1), (0, 2_000_000_000, 1000), (1, 77, 400)]), 8)
    write(bits)
    bits.clear_range(0, 0, 1)
    write(bits)
    loaded = DirtyBitmap.load(store, "west-1")
    assert dirty(loaded) == dirty(bits)
    assert (tmp_path / NAME).stat().st_blocks * 512 <= 64 << 10, "the file is sparse"
    loaded.delete()
    assert list((tmp_path / "bitmap").iterdir()) == []
    store.close()
