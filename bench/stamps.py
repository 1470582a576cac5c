"""A stream of writes whose every block says which write it is of, and the judge of a copy.

Write number n covers one block or sixteen; each of its blocks has n in its first and last 8 bytes.
One write is completed before the next is issued, so there is one order, and a copy is *usable*, a
state that the disk had at some moment, when it holds exactly the writes 1…n, of which the last may
be there in part. Write 0 is what was there before.

The writes go to regions of a volume whose other parts nobody touches; within them a few blocks get
most of the writes, as in a database. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES, KIB

REGION_BYTES = 512 * KIB
REGION_BLOCKS = REGION_BYTES // BLOCK_BYTES
GROUP_BLOCKS = 16
"""Of a large write; it lies on a multiple of its size."""
LARGE_PART = 0.1
SKEW = 3.0
"""Half of the writes go to an eighth of the blocks."""
RANDOM_BYTES = 1024
"""Of a compressible block, repeated: it shrinks to a quarter."""
Numbers = npt.NDArray[np.int64]


def is_compressible(write: int) -> bool:
    """Every other write is, its number says which."""
    return write % 2 == 0


def content(write: int, blocks: int, random: bytes) -> bytes:
    """What a write writes. `random` are at least `blocks` × 4096 bytes."""
    stamp = write.to_bytes(8, "little")
    parts = []
    for number in range(blocks):
        at = number * BLOCK_BYTES
        body = random[at : at + BLOCK_BYTES]
        if is_compressible(write):
            body = body[:RANDOM_BYTES] * (BLOCK_BYTES // RANDOM_BYTES)
        parts.append(stamp + body[8:-8] + stamp)
    return b"".join(parts)


@dataclass(frozen=True)
class Stamps:
    """The number at the beginning and at the end of each block of the regions."""

    heads: Numbers
    tails: Numbers

    @classmethod
    def of(cls, data: bytes | bytearray) -> Stamps:
        """From the content of all regions, one after another."""
        words = np.frombuffer(data, dtype="<i8").reshape(-1, BLOCK_BYTES // 8)
        return cls(words[:, 0].copy(), words[:, -1].copy())


@dataclass(frozen=True)
class Plan:
    """All writes; equal arguments make equal plans."""

    volume_bytes: int
    regions: int
    count: int
    seed: int

    def region_offsets(self) -> list[int]:
        """Spread evenly over the volume."""
        step = self.volume_bytes // self.regions // REGION_BYTES * REGION_BYTES
        return [number * step for number in range(self.regions)]

    @cached_property
    def _choices(self) -> tuple[Numbers, Numbers]:
        chance = np.random.default_rng(self.seed)
        groups = self.regions * REGION_BLOCKS // GROUP_BLOCKS
        rank = (groups * chance.random(self.count) ** SKEW).astype(np.int64)
        first = chance.permutation(groups)[rank] * GROUP_BLOCKS
        is_large = chance.random(self.count) < LARGE_PART
        within = chance.integers(0, GROUP_BLOCKS, self.count)
        return np.where(is_large, first, first + within), np.where(is_large, GROUP_BLOCKS, 1)

    def write(self, number: int) -> tuple[int, int]:
        """Offset in the volume and blocks of a write, 1 … count."""
        first, blocks = (int(values[number - 1]) for values in self._choices)
        region, block = divmod(first, REGION_BLOCKS)
        return self.region_offsets()[region] + block * BLOCK_BYTES, blocks

    @cached_property
    def entries(self) -> tuple[Numbers, Numbers]:
        """Write number and block (counted over the regions) of every block ever written."""
        first, blocks = self._choices
        numbers = np.repeat(np.arange(1, self.count + 1), blocks)
        ends = np.cumsum(blocks)
        within = np.arange(len(numbers)) - np.repeat(ends - blocks, blocks)
        return numbers, np.repeat(first, blocks) + within

    def entries_through(self, number: int) -> int:
        """How many entries the writes 1 … number have."""
        return int(np.searchsorted(self.entries[0], number, side="right"))

    def bytes_through(self, number: int) -> int:
        """Logical bytes of the writes 1 … number."""
        return self.entries_through(number) * BLOCK_BYTES

    def state(self, number: int) -> Numbers:
        """The write that each block is of after the writes 1 … number."""
        numbers, blocks = self.entries
        found = np.zeros(self.regions * REGION_BLOCKS, dtype=np.int64)
        end = self.entries_through(number)
        np.maximum.at(found, blocks[:end], numbers[:end])
        return found

    def is_usable(self, stamps: Stamps) -> bool:
        """Whether the copy is a state that the disk had."""
        if not np.array_equal(stamps.heads, stamps.tails):
            return False
        newest = int(stamps.heads.max())
        if newest > self.count:
            return False
        found = (stamps.heads == self.state(newest)) | (stamps.heads == self.state(newest - 1))
        return bool(found.all())

    def is_held(self, stamps: Stamps, entries: Numbers) -> npt.NDArray[np.bool_]:
        """Which of the entries the copy has, or has something newer of."""
        numbers, blocks = (values[entries] for values in self.entries)
        held = np.minimum(stamps.heads, stamps.tails)[blocks] >= numbers
        return np.asarray(held, dtype=np.bool_)


def background(volume_bytes: int, plan: Plan, random: bytes) -> list[tuple[int, bytes]]:
    """What is on the volume before: (offset, content) by region size; the rest is never written.

    Half of the volume: a quarter that does not compress, a quarter that shrinks to a quarter. The
    regions of the plan are all there, of write 0.
    """
    regions = set(plan.region_offsets())
    found = []
    for number, offset in enumerate(range(0, volume_bytes - REGION_BYTES + 1, REGION_BYTES)):
        if offset in regions:
            found.append((offset, content(0, REGION_BLOCKS, random)))
        elif number % 4 < 2:
            start = number % 64 * BLOCK_BYTES
            rolled = random[start:REGION_BYTES] + random[:start]
            found.append((offset, content(number % 4, REGION_BLOCKS, rolled)))
    return found
