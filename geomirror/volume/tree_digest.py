"""Keyed digests of what a volume holds, in units of any size: contents are compared by them.

```
 node     XXH3-128 of the digests of its regions, one after the other        16 MiB
 region   XXH3-128 of its content                                            64 KiB
 block    XXH3-128 of its content                                             4 KiB
```
Equal digests count as equal contents, and then nothing is sent. XXH3 is no cryptographic hash: it
is keyed with 64 bits that nobody who writes to the volume can know, another key for each resync, so
that contents with equal digests cannot be prepared. Long holes cost neither reads nor hashing.
Deliberately not here: who asks whom for what (`wan_protocol/resync_plan.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import xxhash

from geomirror.limits import BLOCK_BYTES, MIB, REGION_BYTES
from geomirror.volume.store import Buffer

DIGEST_BYTES = 16
READ_BYTES_MAX = 1 * MIB
"""Contents in memory at once, for each volume that is read."""
REGION_BLOCKS = REGION_BYTES // BLOCK_BYTES


class Content(Protocol):
    """Where contents come from: an image, or what is sealed of a volume."""

    def data_ranges(
        self, offset: int, length: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The (offset, length) parts of a range that may hold anything but zeros, ascending."""

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly these bytes."""


def spans(content: Content, offset: int, stop: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of [offset, stop) that may hold anything but zeros.

    Ascending, disjoint, at most `READ_BYTES_MAX` each, cut at multiples of a unit from `offset`. Of
    a single region all may.
    """
    if stop - offset <= REGION_BYTES:
        # Reading it, be it a hole, costs less than to ask: a file system may go through all extents
        # up to the next hole.
        yield offset, stop
        return
    position = offset
    for start, length in content.data_ranges(offset, stop - offset):
        first = max(position, offset + (start - offset) // unit_bytes * unit_bytes)
        last = offset + -(-(start + length - offset) // unit_bytes) * unit_bytes
        last = min(last, stop)
        while first < last:
            end = min(first + READ_BYTES_MAX // unit_bytes * unit_bytes, last)
            yield first, end
            first = position = end


class TreeDigest:
    """Digests with one key. For one thread at a time.

    :param key: 64 bits.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._zeros: dict[int, bytes] = {}
        self.read_bytes = 0
        """Contents that were read so far."""

    def of(self, content: Buffer) -> bytes:
        """Digest of one content: 16 bytes."""
        return xxhash.xxh3_128_digest(content, seed=self._key)

    def of_zeros(self, length: int) -> bytes:
        """Digest of so many zeros: of a block, a region or a node."""
        found = self._zeros.get(length)
        if found is None:
            if length <= REGION_BYTES:
                found = self.of(bytes(length))
            else:
                whole, rest = divmod(length, REGION_BYTES)
                leaves = [self.of_zeros(REGION_BYTES)] * whole
                found = self.node([*leaves, self.of_zeros(rest)] if rest else leaves)
            self._zeros[length] = found
        return found

    def node(self, regions: Sequence[bytes]) -> bytes:
        """Digest of a node from those of its regions."""
        return self.of(b"".join(regions))

    def leaves(self, content: Content, offset: int, stop: int, unit_bytes: int) -> list[bytes]:
        """Digests of the units of [offset, stop); the last may be short. Blocking.

        :param unit_bytes: of a block or a region.
        :raises StorageError: reading failed.
        """
        count = -(-(stop - offset) // unit_bytes)
        found = [self.of_zeros(unit_bytes)] * count
        found[-1] = self.of_zeros(stop - offset - (count - 1) * unit_bytes)
        for start, end in spans(content, offset, stop, unit_bytes):
            data = memoryview(content.read(start, end - start))
            self.read_bytes += end - start
            at = (start - offset) // unit_bytes
            for inside in range(0, end - start, unit_bytes):
                found[at] = self.of(data[inside : inside + unit_bytes])
                at += 1
        return found
