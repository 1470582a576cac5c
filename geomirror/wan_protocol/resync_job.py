"""Reads one step of a resync: what we hold is compared with what the peer said of its own.

A step works on a snapshot of where sealed content lies, which is taken on the loop; blocks whose
newest record is not sealed are left to their epoch (I3). While it runs, the journal is pinned and
images change only by applying epochs after the base of the resync, all of which are streamed to the
peer afterwards, so that a mix of old and new inside one block is always overwritten.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from geomirror.limits import BLOCK_BYTES, REGION_BYTES
from geomirror.volume.sealed_content import SealedContent
from geomirror.volume.tree_digest import DIGEST_BYTES, REGION_BLOCKS, TreeDigest, spans
from geomirror.wan_protocol.epoch_encode import encode_blocks
from geomirror.wan_protocol.resync_plan import ZEROS, Differing, Part

Ranges = list[tuple[int, int, memoryview]]
"""(volume, first block, content)."""


@dataclass
class Item:
    """A part, or as much of it as one step may read, with our content of it."""

    part: Part
    blocks: int
    """At most those of the part."""
    content: SealedContent
    stop: int
    """Offset of its end: the volume's last block may be short."""
    unsealed: frozenset[int]
    """Blocks that are left to their epoch."""

    @property
    def offset(self) -> int:
        """Of its first byte."""
        return self.part.first * BLOCK_BYTES

    def bytes_from(self, block: int, blocks: int) -> tuple[int, int]:
        """(start, stop) of some of its blocks."""
        return block * BLOCK_BYTES, min((block + blocks) * BLOCK_BYTES, self.stop)


@dataclass
class ResyncReadJob:
    """Encodes what the peer lacks of `items`, up to `bytes_max` of data, into frames."""

    items: list[Item]
    key: TreeDigest
    bytes_max: int
    level: int
    frames: list[bytes] = field(default_factory=list)
    """After `run`."""
    done: list[int] = field(default_factory=list)
    """After `run`: blocks of each item that were looked at."""
    data_bytes: int = 0
    """After `run`: of contents that the frames have."""

    def run(self) -> None:
        """Read, compare, find zeros, encode. Raises StorageError, IntegrityError."""
        ranges: Ranges = []
        holes: list[tuple[int, int, int]] = []
        if len(self.items) > 1:  # A long one is read from end to end, or has holes.
            for item in self.items:
                item.content.expect_reads(item.offset, item.stop - item.offset)
        for item in self.items:
            done = self._read(item, ranges, holes)
            self.done.append(done)
            if done < item.blocks:
                break
        self.done += [0] * (len(self.items) - len(self.done))
        self.frames = encode_blocks(ranges, holes, level=self.level)

    def _read(self, item: Item, ranges: Ranges, holes: list[tuple[int, int, int]]) -> int:
        """Cover `item` as far as the byte bound allows; returns the blocks covered."""
        first, end = item.part.first, item.part.first + item.blocks
        position = first
        for start, stop in spans(item.content, item.offset, item.stop, BLOCK_BYTES):
            self._hole(item, position, start // BLOCK_BYTES, holes)
            position = start // BLOCK_BYTES
            data = memoryview(item.content.read(start, stop - start))
            reached = self._solid(item, position, data, ranges)
            position += reached
            if reached * BLOCK_BYTES < len(data):
                return position - first
        self._hole(item, position, end, holes)
        return item.blocks

    def _solid(self, item: Item, first: int, data: memoryview, ranges: Ranges) -> int:
        """Compare blocks that may hold data; returns how many, fewer at the byte bound."""
        count = -(-len(data) // BLOCK_BYTES)
        run = 0  # Adjacent blocks just before `at` that are to be sent.
        for at in range(count + 1):
            view = data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]
            is_full = at < count and self.data_bytes + len(view) > self.bytes_max
            is_sent = at < count and not is_full and self._differs(item, first + at, view)
            if is_sent:
                run += 1
                self.data_bytes += len(view)
                continue
            if run:
                content = data[(at - run) * BLOCK_BYTES : at * BLOCK_BYTES]
                if run < count:
                    # Else a single block would keep all of its region in memory, and each read of
                    # the step would need pages that the kernel has to clear first.
                    content = memoryview(bytes(content))
                ranges.append((item.part.volume, first + at - run, content))
                run = 0
            if is_full:
                return at
        return count

    def _differs(self, item: Item, block: int, content: memoryview) -> bool:
        if block in item.unsealed:
            return False
        theirs = item.part.theirs
        if theirs is None:
            return True
        if theirs == ZEROS:
            expected = self.key.of_zeros(len(content))
        else:
            at = (block - item.part.first) * DIGEST_BYTES
            expected = theirs[at : at + DIGEST_BYTES]
        return self.key.of(content) != expected

    def _hole(self, item: Item, first: int, end: int, holes: list[tuple[int, int, int]]) -> None:
        """Blocks that hold nothing but zeros here: which does the peer lack?"""
        part = item.part
        if first >= end or part.theirs == ZEROS:
            return
        if part.theirs is None:
            cuts = [first - 1, *sorted(b for b in item.unsealed if first <= b < end), end]
            for low, high in itertools.pairwise(cuts):
                if high > low + 1:
                    holes.append((part.volume, low + 1, high - low - 1))
            return
        zero = self.key.of_zeros(BLOCK_BYTES)
        for block in range(first, end):
            at = (block - part.first) * DIGEST_BYTES
            if (block + 1) * BLOCK_BYTES > item.stop:
                zero = self.key.of_zeros(item.stop - block * BLOCK_BYTES)
            if part.theirs[at : at + DIGEST_BYTES] != zero and block not in item.unsealed:
                volume, start, count = holes[-1] if holes else (-1, 0, 0)
                if (volume, start + count) == (part.volume, block):
                    holes[-1] = (volume, start, count + 1)
                else:
                    holes.append((part.volume, block, 1))


@dataclass
class CompareJob:
    """Compares nodes with the digests of the peer's, about `bytes_max` of reading."""

    item: Item
    key: TreeDigest
    bytes_max: int
    done: int = 0
    """After `run`: blocks of the item that were compared."""
    zeros: list[Part] = field(default_factory=list)
    """After `run`: nodes that are zeros there and not here."""
    differing: list[Differing] = field(default_factory=list)
    """After `run`."""
    equal: list[tuple[int, int]] = field(default_factory=list)
    """After `run`: (first block, end) of each node that is equal."""

    def run(self) -> None:
        """Raises StorageError, IntegrityError."""
        part, began = self.item.part, self.key.read_bytes
        assert part.theirs
        for at in range(0, self.item.blocks, part.unit_blocks):
            if self.key.read_bytes - began >= self.bytes_max:
                return
            blocks = min(part.unit_blocks, self.item.blocks - at)
            index = at // part.unit_blocks * DIGEST_BYTES
            self._compare(part.first + at, blocks, part.theirs[index : index + DIGEST_BYTES])
            self.done += blocks

    def _compare(self, first: int, blocks: int, theirs: bytes) -> None:
        item, volume = self.item, self.item.part.volume
        start, stop = item.bytes_from(first, blocks)
        regions = range(0, blocks, REGION_BLOCKS)
        unsealed = {
            (block - first) // REGION_BLOCKS
            for block in item.unsealed
            if first <= block < first + blocks
        }
        if theirs == self.key.of_zeros(stop - start):
            if unsealed or item.content.data_ranges(start, stop - start, 1):
                self.zeros.append(Part(volume, first, blocks, ZEROS))
            else:
                self.equal.append((first, first + blocks))
            return
        ours = self.key.leaves(item.content, start, stop, REGION_BYTES)
        assert len(ours) == len(regions)
        if not unsealed and self.key.node(ours) == theirs:
            self.equal.append((first, first + blocks))
            return
        for region in unsealed:
            ours[region] = b""
        self.differing.append(Differing(volume, first, blocks, ours))
