"""Digests of contents: known answers, holes, short ends, and the same through either source."""

from __future__ import annotations

import itertools

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.limits import BLOCK_BYTES, REGION_BYTES
from geomirror.volume.dirty_index import IMAGE, ZERO, DirtyIndex
from geomirror.volume.image import Image
from geomirror.volume.sealed_content import SPARSE_INDEX_ENTRIES, pieces_of
from geomirror.volume.tree_digest import READ_BYTES_MAX, TreeDigest, spans
from tests.sim.disk import SimStore

SIZE = 40 * REGION_BYTES + 3 * BLOCK_BYTES + 512


def image_of(writes: list[tuple[int, bytes]], size: int = SIZE) -> Image:
    file = SimStore("digest").create("image", size)
    for offset, data in writes:
        file.pwritev([data], offset)
    return Image(0, "0", size, file)


def test_known_answers() -> None:
    """Part of the wire format: another node computes the same."""
    digest = TreeDigest(0x0123_4567_89AB_CDEF)
    block = bytes(range(256)) * 16
    assert digest.of(block).hex() == "c2058a82535fd0e8f54d91c36c358756"
    assert digest.of_zeros(BLOCK_BYTES).hex() == "e2c651a17cda426d22ce630f38bf6769"
    assert digest.of_zeros(3 * REGION_BYTES + 512).hex() == "72b5e334d0206eacb8687d21f96f0066"
    assert TreeDigest(1).of(block) != digest.of(block) != xxhash.xxh3_128_digest(block)


@pytest.mark.parametrize("unit_bytes", [BLOCK_BYTES, REGION_BYTES])
def test_leaves_are_of_the_content_whatever_is_a_hole(unit_bytes: int) -> None:
    noise = bytes(range(1, 251)) * 200
    image = image_of([(5 * BLOCK_BYTES + 100, noise), (SIZE - 512, b"x" * 512)])
    digest = TreeDigest(7)
    content = image.read(0, SIZE)
    expected = [digest.of(content[at : at + unit_bytes]) for at in range(0, SIZE, unit_bytes)]
    assert digest.leaves(image, 0, SIZE, unit_bytes) == expected
    assert digest.read_bytes < 4 * REGION_BYTES, "holes are not read"
    for start in (unit_bytes, 3 * unit_bytes):
        assert digest.leaves(image, start, SIZE, unit_bytes) == expected[start // unit_bytes :]


def test_a_node_of_zeros_is_known_without_reading() -> None:
    digest = TreeDigest(9)
    for length in (2 * REGION_BYTES, 5 * REGION_BYTES, SIZE):
        leaves = digest.leaves(image_of([], length), 0, length, REGION_BYTES)
        assert digest.of_zeros(length) == digest.node(leaves)
    assert digest.read_bytes == 0


ranges = st.lists(st.tuples(st.integers(0, 3 << 20), st.integers(1, 1 << 20)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(ranges, st.sampled_from([BLOCK_BYTES, REGION_BYTES]))
def test_spans_cover_all_data_once(found: list[tuple[int, int]], unit: int) -> None:
    stop, ordered, at = 5 << 20, [], 0
    for gap, length in found:
        start = at + gap % 200_000
        if start + length <= stop:
            ordered.append((start, length))
            at = start + length

    class Listed:
        def data_ranges(self, *where: object) -> list[tuple[int, int]]:
            return ordered

    covered = list(spans(Listed(), 0, stop, unit))  # type: ignore[arg-type]
    assert all(start % unit == 0 for start, _ in covered)
    assert all(0 < end - start <= READ_BYTES_MAX for start, end in covered)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(covered))
    for start, length in ordered:
        inside = sum(max(0, min(end, start + length) - max(low, start)) for low, end in covered)
        assert inside == length


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 400), st.integers(1, 9), st.integers(0, 3000)),
        max_size=5,
    ),
    st.integers(0, 300),
    st.integers(1, 401),
)
def test_a_sparse_lookup_finds_what_the_index_finds(
    writes: list[tuple[bool, int, int, int]], first: int, count: int
) -> None:
    index = DirtyIndex(400 * BLOCK_BYTES + 512, 4)
    for at, (is_zero, block, blocks, inside) in enumerate(writes, 1):
        offset = block * BLOCK_BYTES + inside // 512 * 512
        length = min(blocks * BLOCK_BYTES, index.size_bytes - offset)
        if length <= 0:
            continue
        if is_zero:
            index.zero(offset, length, at * 8, punch=True)
        else:
            index.write(offset, length, at << 24)
    offset = first * BLOCK_BYTES
    length = min(count * BLOCK_BYTES, index.size_bytes - offset)
    assert index.entry_count < SPARSE_INDEX_ENTRIES

    def sources(pieces: list[tuple[int, int, int]]) -> list[int]:
        return [
            source + at if source not in (ZERO, IMAGE) else source
            for _, size, source in pieces
            for at in range(0, size, 512)
        ]

    found = pieces_of(index, offset, length)
    assert sources(found) == sources(index.lookup(offset, length))  # type: ignore[arg-type]
    assert sum(piece.length for piece in found) == length
