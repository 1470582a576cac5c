"""Images: blocks of 4 KiB over a backing file, the last one as short as the volume makes it."""

from __future__ import annotations

import pytest

from geomirror.volume.image import WRITE_RUN_BYTES_MAX, Image
from tests.sim.disk import SimStore

BLOCK = 4096


def make_image(size: int) -> tuple[Image, SimStore, list[tuple[str, str]]]:
    store = SimStore()
    image = Image(0, "0", size, store.create("volumes/0.img", size))
    calls: list[tuple[str, str]] = []
    store.on_operation = lambda operation, name: calls.append((operation, name))
    return image, store, calls


def test_adjacent_blocks_go_out_in_one_call() -> None:
    image, _, calls = make_image(20 * BLOCK)
    contents = [bytes([i]) * BLOCK for i in range(5)]
    image.write_blocks([(2, contents[0]), (3, contents[1] + contents[2]), (9, contents[3])])
    assert [name for name, _ in calls] == ["pwritev", "pwritev"]
    assert image.read(2 * BLOCK, 3 * BLOCK) == b"".join(contents[:3])
    assert image.read_block(9) == contents[3]
    assert image.read_block(5) == bytes(BLOCK)


def test_a_run_is_bounded() -> None:
    blocks = WRITE_RUN_BYTES_MAX // BLOCK
    image, _, calls = make_image(2 * blocks * BLOCK)
    image.write_blocks([(i, b"x" * BLOCK) for i in range(blocks + 1)])
    assert len(calls) == 2
    assert image.read_block(blocks) == b"x" * BLOCK


def test_the_last_block_is_as_short_as_the_volume_makes_it() -> None:
    image, store, _ = make_image(3 * BLOCK + 512)
    assert image.block_count == 4
    assert image.block_bytes(3) == 512
    image.write_blocks([(2, b"a" * BLOCK), (3, b"b" * 512)])
    assert image.read_block(3) == b"b" * 512
    image.zero(2, 2, punch=True)
    assert store.content("volumes/0.img") == bytes(3 * BLOCK + 512)


def test_blocks_out_of_order_are_refused() -> None:
    image, _, _ = make_image(8 * BLOCK)
    with pytest.raises(AssertionError):
        image.write_blocks([(4, bytes(BLOCK)), (3, bytes(BLOCK))])


def test_ranges_beyond_the_end_are_refused() -> None:
    image, _, _ = make_image(2 * BLOCK)
    with pytest.raises(AssertionError):
        image.read(BLOCK, BLOCK + 1)
    with pytest.raises(AssertionError):
        image.zero(1, 2, punch=False)


def test_data_ranges_name_only_what_was_written() -> None:
    image, _, _ = make_image(1 << 30)
    image.write_blocks([(5, b"x" * BLOCK)])
    assert image.data_ranges(0, 1 << 30) == [(5 * BLOCK, BLOCK)]
