"""The open undo pass of a resync: saved once, torn ends, damage, and what becomes of it."""

from __future__ import annotations

import errno
import random
from contextlib import closing

import numpy as np
import pytest

from geomirror.errors import FencedError, NoSpaceError
from geomirror.limits import SIMULATION
from geomirror.volume.epoch_table import Table, empty_table
from geomirror.volume.image import Image
from geomirror.volume.saved_blocks import PAGE_BLOCKS, SavedBlocks
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import OPEN_EPOCH, PassLabel, UndoReader
from geomirror.volume.undo_open import OpenPass
from tests.sim.disk import SimStore
from tests.volume.hexdump import VECTORS, dump, load

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK - 1024
GENERATION, HASH = bytes(range(16)), bytes(range(32))


def table_of(*runs: tuple[int, int]) -> Table:
    table = empty_table(len(runs))
    for row, (block, count) in enumerate(runs):
        table[row] = (0, 1, 0, count, block, 0, 0, 0)
    return table


class Rig:
    """A volume with noise in its first half, and a pass that began at epoch 5."""

    def __init__(self, bytes_max: int = 1 << 30) -> None:
        self.store = SimStore(7)
        self.bytes_max = bytes_max
        file = self.store.create("volumes/0.img", SIZE)
        self.before = random.Random(1).randbytes(SIZE // 2).ljust(SIZE, b"\0")
        file.pwritev([self.before], 0)
        file.fdatasync()
        file.close()
        self.store.sync_directory("volumes")
        self.begin()

    def begin(self) -> None:
        self.images = {0: Image(0, "0", SIZE, self.store.open("volumes/0.img"))}
        self.undo = UndoStore(self.store, SIMULATION, 1, 1)
        label = PassLabel(GENERATION, 5, OPEN_EPOCH, 55, HASH)
        self.open = OpenPass(self.store, self.undo, 1, label, self.bytes_max)
        self.open.load()

    def overwrite(self, block: int, count: int, fill: bytes = b"n") -> None:
        self.open.save(table_of((block, count)), self.images)
        length = min(count * BLOCK, SIZE - block * BLOCK)
        self.images[0].write_runs([(block * BLOCK, [fill * length])])
        self.images[0].fdatasync()

    def restored(self) -> bytes:
        self.open.restore(self.images)
        return self.images[0].read(0, SIZE)


def test_each_block_is_saved_once_and_all_come_back() -> None:
    rig = Rig()
    rig.overwrite(3, 4)
    size = rig.open.stored_bytes
    rig.overwrite(4, 2, b"m")
    assert rig.open.stored_bytes == size
    rig.overwrite(5, 59, b"x")
    assert rig.restored() == rig.before
    assert rig.restored() == rig.before, "it may be repeated"


@pytest.mark.parametrize("seed", range(20))
def test_after_a_crash_at_any_point_the_state_from_before_is_there(seed: int) -> None:
    chance = random.Random(seed)
    rig = Rig()
    rig.store.random.seed(seed)
    left = chance.randrange(60)

    class Stop(BaseException):
        pass

    def count(operation: str, name: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    rig.store.on_operation = count
    try:
        while True:
            block = chance.randrange(BLOCKS - 8)
            rig.overwrite(block, chance.randrange(1, 8), bytes([chance.randrange(256)]))
    except Stop:
        rig.store.on_operation = None
    rig.store.crash()
    rig.begin()
    rig.overwrite(0, 3, b"z")
    assert rig.restored() == rig.before


def test_a_closed_pass_is_an_ordinary_one() -> None:
    rig = Rig()
    rig.overwrite(40, 8)
    rig.overwrite(3, 4)
    rig.overwrite(28, 6)
    label = PassLabel(GENERATION, 5, 9, 99, HASH)
    info = rig.open.close(label, {})
    rig.undo.show_open([], info)
    with closing(UndoReader(rig.store.open(info.name), info.name)) as reader:
        reader.verify()
        assert reader.info == info
        for block in (3, 6, 28, 31, 33, 40):
            expected = rig.before[block * BLOCK : (block + 1) * BLOCK]
            assert reader.read_block(0, block) == expected
        assert reader.read_block(0, 7) is None
    assert UndoStore(rig.store, SIMULATION).passes() == [info]
    # The superblock does not say so yet: it is taken for open again, and goes on.
    rig.begin()
    rig.overwrite(50, 3)
    assert rig.restored() == rig.before


def test_a_damaged_group_that_was_durable_is_noticed() -> None:
    rig = Rig()
    rig.overwrite(3, 4)
    rig.overwrite(10, 4)
    rig.store.flip_bit("undo/0000000000000001.open", 8 * 140)
    with pytest.raises(FencedError, match="epoch 5"):
        rig.begin()


def test_what_does_not_fit_is_refused_before_anything_is_overwritten() -> None:
    rig = Rig(bytes_max=30_000)
    rig.overwrite(3, 4)
    with pytest.raises(NoSpaceError, match="stays at epoch 5"):
        rig.overwrite(10, 10)
    rig.store.fail("pwritev", "undo/*", error=errno.ENOSPC)
    with pytest.raises(NoSpaceError):
        rig.overwrite(9, 1)
    rig.overwrite(9, 1)
    assert rig.restored() == rig.before


def test_the_golden_file_of_an_open_pass_reads_as_documented() -> None:
    rig = Rig()
    content = load((VECTORS / "undo_open_v1.hex").read_text())
    with closing(rig.store.create("undo/0000000000000001.open", 0)) as file:
        file.pwritev([content], 0)
    image = rig.images[0]
    image.write_runs([(0, [b"q" * SIZE])])
    rig.begin()
    found = rig.restored()
    assert found[3 * BLOCK : 5 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    assert found[9 * BLOCK : 11 * BLOCK] == bytes(2 * BLOCK)
    assert found[63 * BLOCK :] == b"c" * (SIZE - 63 * BLOCK)
    assert dump(content) == dump(golden())


def golden() -> bytes:
    """Two groups: blocks 3 and 4; blocks 9 and 10, zeros, and the short last one."""
    rig = Rig()
    rig.images[0].write_runs(
        [
            (3 * BLOCK, [b"a" * BLOCK, b"b" * BLOCK]),
            (9 * BLOCK, [bytes(2 * BLOCK)]),
            (63 * BLOCK, [b"c" * (SIZE - 63 * BLOCK)]),
        ]
    )
    rig.open.save(table_of((3, 2)), rig.images)
    rig.open.save(table_of((9, 2), (63, 1)), rig.images)
    return rig.store.content("undo/0000000000000001.open")


def test_the_set_of_saved_blocks_spans_pages() -> None:
    saved = SavedBlocks()
    start = PAGE_BLOCKS - 2
    saved.add(table_of((start, 3)))
    missing = saved.missing(table_of((start - 1, 6), (3 * PAGE_BLOCKS, PAGE_BLOCKS)))
    runs = np.stack([missing["block"], missing["count"]], axis=1).tolist()
    assert runs == [
        [start - 1, 1],
        [PAGE_BLOCKS + 1, 2],
        [3 * PAGE_BLOCKS, PAGE_BLOCKS],
    ]
