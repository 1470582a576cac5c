"""Planning reads of the journal: everything once, in bounded buffers, in few calls."""

from __future__ import annotations

import random

import numpy as np
import pytest

from geomirror.limits import BLOCK_BYTES, KIB, MIB
from geomirror.volume import new_contents
from geomirror.volume.image import WRITE_RUN_BYTES_MAX
from geomirror.volume.merge import Keys
from geomirror.volume.new_contents import plan_chunks, write_runs

SEGMENT = 256 * KIB


def scattered(seed: int, count: int) -> tuple[bytes, Keys, Keys]:
    """A journal, and addresses and sizes of contents in it in no order."""
    rng = random.Random(seed)
    addresses, at = [], 72
    for _ in range(count):
        at += rng.choice((0, 72, 72, 4168, 20_000))
        if at // SEGMENT != (at + BLOCK_BYTES - 1) // SEGMENT:
            at = (at // SEGMENT + 1) * SEGMENT + 4096
        addresses.append(at)
        at += BLOCK_BYTES
    rng.shuffle(addresses)
    sizes = np.full(count, BLOCK_BYTES)
    sizes[rng.randrange(count)] = 512
    return rng.randbytes(at), np.array(addresses), sizes


@pytest.mark.parametrize("bytes_max", [8 * KIB, 40 * KIB, 1 * MIB])
@pytest.mark.parametrize("seed", range(6))
def test_all_contents_are_read_once_into_bounded_buffers(
    seed: int, bytes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_contents, "READ_BYTES_MAX", 24 * KIB)
    journal, addresses, sizes = scattered(seed, 1 + 60 * seed)
    seen: list[int] = []
    for chunk in plan_chunks(addresses, sizes, SEGMENT, bytes_max):
        assert chunk.size_bytes <= bytes_max
        buffer = bytearray(chunk.size_bytes)
        for address, position, length in chunk.reads:
            assert 0 < length <= 24 * KIB
            assert address // SEGMENT == (address + length - 1) // SEGMENT
            assert position + length <= chunk.size_bytes
            buffer[position : position + length] = journal[address : address + length]
        assert chunk.rows.tolist() == sorted(chunk.rows.tolist())
        for row, position in zip(chunk.rows.tolist(), chunk.positions.tolist(), strict=True):
            address, size = int(addresses[row]), int(sizes[row])
            assert buffer[position : position + size] == journal[address : address + size]
        seen += chunk.rows.tolist()
    assert sorted(seen) == list(range(len(addresses)))


def test_near_contents_share_a_read_and_far_ones_do_not() -> None:
    step = BLOCK_BYTES + new_contents.GAP_BYTES_MAX
    addresses = np.array([72, 72 + step, 72 + 2 * step + 1])
    sizes = np.full(3, BLOCK_BYTES)
    (chunk,) = plan_chunks(addresses, sizes, 1 * MIB, 1 * MIB)
    assert [length for _, _, length in chunk.reads] == [step + BLOCK_BYTES, BLOCK_BYTES]
    assert chunk.size_bytes == step + 2 * BLOCK_BYTES


def test_the_short_block_at_the_end_of_the_journal_is_read_to_its_end_only() -> None:
    sizes = np.array([512, BLOCK_BYTES])
    (chunk,) = plan_chunks(np.array([8264, 4096]), sizes, 1 * MIB, 1 * MIB)
    assert chunk.reads == [(4096, 0, 8264 + 512 - 4096)]


def test_adjacent_blocks_are_one_run_of_as_few_pieces_as_there_are() -> None:
    buffer = memoryview(bytes(range(256)) * (256 * KIB // 256))
    blocks = np.array([3, 4, 5, 9])
    positions = np.array([0, BLOCK_BYTES, 20_000, 40_000])
    sizes = np.array([BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES, 512])
    runs = write_runs(blocks, positions, sizes, buffer)
    assert [(offset, [len(part) for part in parts]) for offset, parts in runs] == [
        (3 * BLOCK_BYTES, [2 * BLOCK_BYTES, BLOCK_BYTES]),
        (9 * BLOCK_BYTES, [512]),
    ]
    assert runs[0][1][1] == buffer[20_000 : 20_000 + BLOCK_BYTES]


def test_a_run_ends_with_its_window_of_the_image() -> None:
    window = WRITE_RUN_BYTES_MAX // BLOCK_BYTES
    blocks = np.arange(window - 2, window + 2)
    positions = np.arange(4) * (BLOCK_BYTES + 72)
    sizes = np.full(4, BLOCK_BYTES)
    runs = write_runs(blocks, positions, sizes, memoryview(bytes(5 * BLOCK_BYTES)))
    assert [(offset, len(parts)) for offset, parts in runs] == [
        ((window - 2) * BLOCK_BYTES, 2),
        (WRITE_RUN_BYTES_MAX, 2),
    ]
