"""The overlay of a writable view: what was written, over what the view has."""

from __future__ import annotations

import contextlib
import random

import pytest

from geomirror.errors import IntegrityError, NoSpaceError
from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.volume.scratch import Scratch, map_name
from tests.sim.disk import SimStore

SIZES = {0: 64 * BLOCK_BYTES + 512, 3: 20 * BLOCK_BYTES}
QUOTA = 1 << 30


class Model:
    """A base, an overlay over it, and what both together hold."""

    def __init__(self, seed: int, quota_bytes: int = QUOTA) -> None:
        self.random = random.Random(seed)
        self.store = SimStore()
        self.base = {volume: self.random.randbytes(size) for volume, size in SIZES.items()}
        self.content = {volume: bytearray(base) for volume, base in self.base.items()}
        self.scratch = Scratch.create(self.store, "v1", SIZES, 7, quota_bytes)
        self.store.sync_directory("views")
        self.store.sync_directory()

    def read_base(self, volume: int, offset: int, length: int) -> bytes:
        return self.base[volume][offset : offset + length]

    def reopen(self) -> None:
        self.scratch.close()
        self.scratch = Scratch.open(self.store, "v1", QUOTA)

    def any_range(self) -> tuple[int, int, int]:
        volume = self.random.choice(sorted(SIZES))
        size = SIZES[volume]
        offset = self.random.randrange(size)
        length = min(self.random.choice((1, 100, 512, BLOCK_BYTES, 5 * BLOCK_BYTES)), size - offset)
        if self.random.random() < 0.4:
            offset -= offset % BLOCK_BYTES
            length = min(BLOCK_BYTES * self.random.randrange(1, 9), size - offset)
        return volume, offset, length

    def change(self) -> tuple[int, int, int]:
        volume, offset, length = self.any_range()
        is_zero = self.random.random() < 0.25
        data = bytes(length) if is_zero else self.random.randbytes(length)
        self.content[volume][offset : offset + length] = data
        if is_zero:
            self.scratch.zero(volume, offset, length, self.read_base)
        else:
            self.scratch.write(volume, offset, data, self.read_base)
        return volume, offset, length

    def check(self) -> None:
        for volume, content in self.content.items():
            assert self.scratch.read(volume, 0, len(content), self.read_base) == content
        volume, offset, length = self.any_range()
        found = self.scratch.read(volume, offset, length, self.read_base)
        assert found == self.content[volume][offset : offset + length]


@pytest.mark.parametrize("seed", range(6))
def test_any_writes_of_any_alignment_read_back_over_the_view(seed: int) -> None:
    model = Model(seed)
    model.check()
    assert model.scratch.used_bytes == 0
    for number in range(60):
        model.change()
        model.check()
        if number % 20 == 19:
            model.scratch.flush()
            model.reopen()
            model.check()


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_at_any_moment_keeps_what_was_flushed(seed: int) -> None:
    """Each sector is as it was at the flush, or as some later write would have left it."""
    for stop_at in range(1, 60, 2):
        model = Model(seed)
        for _ in range(10):
            model.change()
        model.scratch.flush()
        versions = {v: [bytes(content)] for v, content in model.content.items()}
        count = 0

        def crash(operation: str, name: str, stop_at: int = stop_at) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt

        model.store.on_operation = crash
        is_flushed = False
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(8):
                try:
                    model.change()
                finally:
                    for volume, content in model.content.items():
                        versions[volume].append(bytes(content))
            model.scratch.flush()
            is_flushed = True
        model.store.on_operation = None
        model.store.crash()
        again = Scratch.open(model.store, "v1", QUOTA)
        for volume, size in SIZES.items():
            found = bytes(again.read(volume, 0, size, model.read_base))
            if is_flushed:
                assert found == versions[volume][-1]
            for at in range(0, size, 512):
                sectors = {version[at : at + 512] for version in versions[volume]}
                assert found[at : at + 512] in sectors


def test_the_quota_is_a_bound_and_nothing_changes_beyond_it() -> None:
    model = Model(1, quota_bytes=4 * BLOCK_BYTES)
    model.scratch.write(0, 0, bytes(range(256)) * 64, model.read_base)
    assert model.scratch.used_bytes == 4 * BLOCK_BYTES
    model.scratch.write(0, 100, b"again", model.read_base)
    for action in (
        lambda: model.scratch.write(0, 9 * BLOCK_BYTES, b"x", model.read_base),
        lambda: model.scratch.zero(3, 0, 512, model.read_base),
    ):
        with pytest.raises(NoSpaceError, match="quota of 16384 bytes is used up"):
            action()
    assert model.scratch.read(3, 0, 512, model.read_base) == model.base[3][:512]
    assert model.scratch.used_bytes == 4 * BLOCK_BYTES


def test_a_damaged_map_is_an_error() -> None:
    model = Model(2)
    model.change()
    model.scratch.flush()
    for bit in (8 * 20, 8 * (4096 + 20)):
        model.store.flip_bit(map_name("v1"), bit)
    with pytest.raises(IntegrityError):
        Scratch.open(model.store, "v1", MIB)
