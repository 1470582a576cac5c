"""Cutting and sealing: the table of an epoch and its hash, from what the journal holds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from geomirror.volume.digest import ZERO_DIGEST, digest_of, digests_of
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.epoch_table import KIND_DATA, KIND_ZERO, chain_hash, is_canonical
from geomirror.volume.image import Image
from geomirror.volume.open_epoch import EpochDraft, OpenEpoch, cut
from geomirror.volume.seal import READ_BYTES_MAX, SealJob
from tests.sim.disk import SimStore

BLOCK = 4096
SEGMENT = 1 << 22
GENERATION = b"g" * 16


class Bench:
    """An index, an image, and a journal that is one byte array."""

    def __init__(self, size: int = 64 * BLOCK + 1536) -> None:
        self.log = bytearray(8192)
        self.reads: list[tuple[int, int]] = []
        store = SimStore()
        self.image = Image(3, "3", size, store.create("volumes/3.img", size))
        self.index = DirtyIndex(size, zero_run_blocks_min=4)
        self.epoch = OpenEpoch(1, 8192, 8192)

    def write(self, offset: int, data: bytes) -> int:
        address = len(self.log) + 72
        self.log += bytes(72) + data + bytes(-len(data) % 8)
        self.index.write(offset, len(data), address)
        return address

    def zero(self, first: int, count: int, *, punch: bool = False) -> None:
        self.index.zero(first * BLOCK, count * BLOCK, len(self.log), punch=punch)
        self.log += bytes(72)

    def read(self, address: int, length: int) -> bytes:
        assert address // SEGMENT == (address + length - 1) // SEGMENT
        self.reads.append((address, length))
        return bytes(self.log[address : address + length])

    def cut(self) -> EpochDraft:
        end = len(self.log)
        draft = cut(self.epoch, {3: self.index}, end_lsn=end, wall_ns=5)
        self.epoch = OpenEpoch(self.epoch.number + 1, end, end)
        return draft

    def seal(self, draft: EpochDraft | None = None) -> SealJob:
        job = SealJob(
            draft or self.cut(),
            previous_hash=bytes(32),
            generation=GENERATION,
            read=self.read,
            images={3: self.image},
            segment_bytes=SEGMENT,
        )
        job.run()
        assert is_canonical(job.table)
        return job


def rows(job: SealJob) -> list[tuple[int, int, int, int, int]]:
    """(kind, flags, count, block, address)."""
    names = ["kind", "flags", "count", "block", "address"]
    return [tuple(int(row[name]) for name in names) for row in job.table]


def test_whole_blocks_are_entered_with_address_and_digest() -> None:
    bench = Bench()
    data = random.Random(1).randbytes(2 * BLOCK)
    address = bench.write(5 * BLOCK, data)
    job = bench.seal()
    assert rows(job) == [
        (KIND_DATA, 0, 1, 5, address),
        (KIND_DATA, 0, 1, 6, address + BLOCK),
    ]
    low, high = digest_of(data[BLOCK:])
    assert (int(job.table["digest_low"][1]), int(job.table["digest_high"][1])) == (low, high)
    assert low | high << 64 == xxhash.xxh3_128_intdigest(data[BLOCK:])
    assert int(job.table["volume"][0]) == 3
    assert len(bench.reads) == 1
    draft = job.draft
    expected = chain_hash(bytes(32), GENERATION, 1, draft.first_lsn, draft.end_lsn, job.table)
    assert job.chain_hash == expected


def test_the_newest_version_of_a_block_counts() -> None:
    bench = Bench()
    bench.write(0, b"a" * BLOCK)
    address = bench.write(0, b"b" * BLOCK)
    assert rows(bench.seal()) == [(KIND_DATA, 0, 1, 0, address)]


def test_parts_become_a_fill_over_image_and_earlier_epochs() -> None:
    bench = Bench()
    bench.image.write_blocks([(1, b"i" * BLOCK)])
    bench.write(BLOCK + 100, b"x" * 50)
    first = bench.seal()
    assert first.fills == [b"i" * 100 + b"x" * 50 + b"i" * (BLOCK - 150)]
    assert first.fill_rows.tolist() == [0]
    bench.write(BLOCK + 120, b"y" * 10)
    second = bench.seal()
    assert second.fills == [b"i" * 100 + b"x" * 20 + b"y" * 10 + b"x" * 20 + b"i" * (BLOCK - 150)]


def test_parts_that_make_all_zeros_become_a_zero_entry() -> None:
    bench = Bench()
    bench.write(BLOCK, b"x" * 10)
    bench.write(BLOCK, bytes(BLOCK - 1))
    job = bench.seal()
    assert rows(job) == [(KIND_ZERO, 0, 1, 1, 0)]
    assert job.fills == []


def test_fills_are_found_again_among_other_entries() -> None:
    bench = Bench()
    bench.write(9 * BLOCK, b"z" * BLOCK)
    bench.write(2 * BLOCK + 7, b"b" * 9)
    bench.zero(0, 2)
    bench.write(20 * BLOCK + 1, b"c")
    job = bench.seal()
    assert [int(job.table["block"][row]) for row in job.fill_rows] == [2, 20]
    assert job.fills[1] == b"\0c" + bytes(BLOCK - 2)


def test_a_block_of_zeros_in_the_journal_becomes_zero() -> None:
    bench = Bench()
    bench.write(3 * BLOCK, bytes(2 * BLOCK) + b"d" * BLOCK)
    job = bench.seal()
    assert [row[:4] for row in rows(job)] == [(KIND_ZERO, 0, 2, 3), (KIND_DATA, 0, 1, 5)]


def test_zero_runs_are_joined_where_flags_agree_and_split_by_data() -> None:
    bench = Bench()
    bench.zero(0, 10, punch=True)
    bench.zero(10, 2, punch=True)
    bench.zero(12, 3)
    bench.write(4 * BLOCK, b"q" * BLOCK)
    job = bench.seal()
    assert [row[:4] for row in rows(job)] == [
        (KIND_ZERO, 1, 4, 0),
        (KIND_DATA, 0, 1, 4),
        (KIND_ZERO, 1, 7, 5),
        (KIND_ZERO, 0, 3, 12),
    ]


def test_extents_of_earlier_epochs_are_not_entered_again() -> None:
    bench = Bench()
    bench.zero(0, 32)
    bench.seal()
    bench.write(3 * BLOCK, b"n" * BLOCK)
    assert [row[:4] for row in rows(bench.seal())] == [(KIND_DATA, 0, 1, 3)]
    bench.zero(0, 8)
    bench.zero(40, 8)
    assert [row[:4] for row in rows(bench.seal())] == [(KIND_ZERO, 0, 8, 0), (KIND_ZERO, 0, 8, 40)]


def test_the_short_last_block_has_a_digest_of_the_bytes_that_exist() -> None:
    bench = Bench()
    data = b"s" * 1536
    bench.write(64 * BLOCK, data)
    job = bench.seal()
    assert int(job.table["digest_low"][0]) == digest_of(data)[0]
    bench.write(64 * BLOCK + 3, b"t")
    assert bench.seal().fills == [b"sss" + b"t" + b"s" * 1532]
    bench.zero(60, 4)
    bench.index.zero(64 * BLOCK, 1536, len(bench.log), punch=False)
    assert [row[:4] for row in rows(bench.seal())] == [(KIND_ZERO, 0, 5, 60)]


def test_what_is_written_after_the_cut_is_not_in_the_draft() -> None:
    bench = Bench()
    address = bench.write(0, b"1" * BLOCK)
    bench.write(BLOCK + 5, b"p")
    draft = bench.cut()
    bench.write(0, b"2" * BLOCK)
    bench.write(BLOCK + 6, b"q")
    bench.zero(0, 32)
    job = bench.seal(draft)
    assert rows(job)[0] == (KIND_DATA, 0, 1, 0, address)
    assert job.fills == [bytes(5) + b"p" + bytes(BLOCK - 6)]


def test_an_epoch_without_changes_has_an_empty_table() -> None:
    job = Bench().seal()
    assert len(job.table) == 0
    assert len(job.chain_hash) == 32


def test_the_journal_is_read_in_few_large_pieces() -> None:
    bench = Bench(2048 * BLOCK)
    chance = random.Random(2)
    for block in chance.sample(range(2048), 1000):
        bench.write(block * BLOCK, chance.randbytes(BLOCK))
    job = bench.seal()
    assert len(job.table) == 1000
    assert len(bench.reads) <= 1000 * 4168 // READ_BYTES_MAX + 3
    contents = [bytes(bench.log[int(a) : int(a) + BLOCK]) for a in job.table["address"]]
    low, high = digests_of(contents)
    assert np.array_equal(job.table["digest_low"], low)
    assert np.array_equal(job.table["digest_high"], high)


def test_equal_content_gives_equal_hashes_however_it_was_written() -> None:
    hashes = set()
    data = random.Random(3).randbytes(2 * BLOCK)
    for style in range(3):
        bench = Bench()
        if style == 0:
            bench.write(0, data)
        elif style == 1:
            bench.write(0, data[:1000])
            bench.write(1000, data[1000:])
        else:
            bench.write(BLOCK, data[BLOCK:])
            bench.write(0, b"old" * 1000)
            bench.write(0, data[:BLOCK])
        job = bench.seal()
        draft = job.draft
        hashes.add(chain_hash(bytes(32), GENERATION, 1, 0, 0, job.table))
        assert draft.end_lsn > draft.first_lsn
    assert len(hashes) == 1


@pytest.mark.parametrize("length", [512, 1536, BLOCK])
def test_digests_of_many_equal_digests_of_one(length: int) -> None:
    contents = [bytes(length), b"a" * length]
    low, high = digests_of(contents)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [digest_of(c) for c in contents]
    assert digest_of(bytes(BLOCK)) == ZERO_DIGEST
