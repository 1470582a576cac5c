"""What the blocks of an apply pass held before it, read from the images for the undo.

```
 table of a volume ──▶ single blocks ──▶ holes of the image: a zero, not a read
                                    └──▶ the rest, 1 MiB at a time: one read for adjacent blocks
                   └─▶ long zero runs ──▶ the same, block ranges instead of blocks
```
Invariant: nothing is read twice and nothing is written here.
Deliberately not here: the undo file (`undo_file`), what replaces these contents (`new_contents`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES, GIB, MIB
from geomirror.volume.arrays import run_heads, run_lengths
from geomirror.volume.epoch_table import KIND_ZERO, Table
from geomirror.volume.merge import Keys
from geomirror.volume.store import Buffer
from geomirror.volume.undo import UndoOverflowError

_READ_BLOCKS_MAX = 1 * MIB // BLOCK_BYTES
"""Old contents in memory at once."""
_EXPAND_ENTRIES_MAX = 8 * MIB // BLOCK_BYTES
"""Entries whose blocks are listed at once; each has fewer than `_LONG_RUN_BLOCKS_MIN`."""
_LONG_RUN_BLOCKS_MIN = 64
"""A zero run from here on is asked for its holes before it is read."""
_WINDOW_BYTES = 1 * GIB
"""Part of a zero run whose holes are listed at once."""
_BLOCKS_PER_RANGE_MIN = 16
"""Fewer blocks than this for every stretch of data in the image: reading is cheaper than asking.
Finding a stretch takes two seeks, which cost about as much as reading one block of a hole
(`bench costs`). So asking in vain adds at most a sixteenth of a read to each block."""


class OldImage(Protocol):
    """What saving the old contents needs of a volume's image (`image.Image`)."""

    @property
    def size_bytes(self) -> int:
        """Size of the volume; the last block may be short."""

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of many (offset, length), ascending."""

    def data_ranges(
        self, offset: int, length: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The (offset, length) parts that may hold anything but zeros, ascending.

        With `count_max`, no more than that are looked for, and the rest counts as one more.
        """

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        """A hint: reads from now on are (not) of scattered blocks."""


class ContentsWriter(Protocol):
    """What contents are added to (`UndoWriter`), ascending by (volume, block)."""

    @property
    def raw_bytes(self) -> int:
        """Contents so far, without zeros."""

    def add_blocks(
        self,
        volume: int,
        blocks: Keys,
        data: Buffer,
        are_holes: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """See `UndoWriter.add_blocks`."""

    def add_zero(self, volume: int, block: int, count: int) -> None:
        """See `UndoWriter.add_zero`."""


class BeforeImages:
    """Adds the old contents of one volume's blocks to an undo file."""

    def __init__(
        self,
        writer: ContentsWriter,
        volume: int,
        image: OldImage,
        raw_bytes_max: int,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        """:param on_progress: called for each MiB, and each run of zeros; may raise."""
        self._writer = writer
        self._volume = volume
        self._image = image
        self._raw_bytes_max = raw_bytes_max
        self._on_progress = on_progress

    def save(self, entries: Table) -> None:
        """Save what the entries of the volume's table will change.

        :raises UndoOverflowError: it is more than `raw_bytes_max`.
        """
        # What lies behind the end of a volume that grows is not there before the pass.
        end = -(-self._image.size_bytes // BLOCK_BYTES)
        entries = entries[entries["block"] < end].copy()
        if not len(entries):
            return
        entries["count"] = np.minimum(entries["count"], end - entries["block"])
        self._image.expect_scattered_reads(True)
        try:
            self._save(entries)
        finally:
            self._image.expect_scattered_reads(False)

    def _save(self, entries: Table) -> None:
        is_long = (entries["kind"] == KIND_ZERO) & (entries["count"] >= _LONG_RUN_BLOCKS_MIN)
        ranges = self._data_ranges(entries[~is_long])
        bounds = [*is_long.nonzero()[0].tolist(), len(entries)]
        start = 0
        for bound in bounds:
            for first in range(start, bound, _EXPAND_ENTRIES_MAX):
                blocks = _expand(entries[first : min(first + _EXPAND_ENTRIES_MAX, bound)])
                self._save_blocks(blocks, _are_holes(blocks, ranges))
            if bound < len(entries):
                entry = entries[bound]
                self._save_run(int(entry["block"]), int(entry["count"]))
            start = bound + 1

    def _data_ranges(self, entries: Table) -> npt.NDArray[np.int64]:
        """Where the image may hold data, (start, end) rows over all the entries' blocks."""
        ranges_max = int(entries["count"].sum(dtype=np.int64)) // _BLOCKS_PER_RANGE_MIN
        size = self._image.size_bytes
        found = [(0, size)]
        if ranges_max:
            start = int(entries["block"][0]) * BLOCK_BYTES
            end = (int(entries["block"][-1]) + int(entries["count"][-1])) * BLOCK_BYTES
            found = self._image.data_ranges(start, min(end, size) - start, ranges_max)
        ranges = np.array(found, dtype=np.int64).reshape(len(found), 2)
        ranges[:, 1] += ranges[:, 0]
        return ranges

    def _save_blocks(self, blocks: Keys, are_holes: npt.NDArray[np.bool_]) -> None:
        """Save single blocks, ascending; adjacent ones with one read."""
        for start in range(0, len(blocks), _READ_BLOCKS_MAX):
            part = blocks[start : start + _READ_BLOCKS_MAX]
            holes = are_holes[start : start + _READ_BLOCKS_MAX]
            self._writer.add_blocks(self._volume, part, self._read(part[~holes]), holes)
            self._check_room()

    def _save_run(self, block: int, count: int) -> None:
        """Save the old contents of a long zero run; holes cost one entry, not a read."""
        image = self._image

        def data_ranges(offset: int, length: int) -> list[tuple[int, int]]:
            return image.data_ranges(offset, min(length, image.size_bytes - offset))

        for first, blocks, is_data in data_blocks(data_ranges, block, count):
            if is_data:
                for start in range(first, first + blocks, _READ_BLOCKS_MAX):
                    end = min(start + _READ_BLOCKS_MAX, first + blocks)
                    part = np.arange(start, end, dtype=np.int64)
                    self._writer.add_blocks(self._volume, part, self._read(part))
                    self._check_room()
            else:
                self._writer.add_zero(self._volume, first, blocks)
                self._check_room()

    def _read(self, blocks: Keys) -> bytes:
        """Contents of ascending blocks; the volume's short last block is as short as it is."""
        if not len(blocks):
            return b""
        heads = run_heads(blocks[1:] - blocks[:-1] != 1)
        offsets = blocks[heads] * BLOCK_BYTES
        lengths = run_lengths(heads, len(blocks)) * BLOCK_BYTES
        short = int(offsets[-1]) + int(lengths[-1]) - self._image.size_bytes
        assert short < BLOCK_BYTES, "a block beyond the end of the volume"
        lengths[-1] -= max(short, 0)
        found = self._image.read_each(list(zip(offsets.tolist(), lengths.tolist(), strict=True)))
        return found[0] if len(found) == 1 else b"".join(found)

    def _check_room(self) -> None:
        if self._writer.raw_bytes > self._raw_bytes_max:
            raise UndoOverflowError
        if self._on_progress is not None:
            self._on_progress()


def data_blocks(
    data_ranges: Callable[[int, int], list[tuple[int, int]]], block: int, count: int
) -> Iterator[tuple[int, int, bool]]:
    """(first block, count, may hold data) over a range, ascending, in bounded windows.

    :param data_ranges: the (offset, length) parts of (offset, length) that may hold data.
    """
    window = _WINDOW_BYTES // BLOCK_BYTES
    for start in range(block, block + count, window):
        end = min(start + window, block + count)
        done = start
        for offset, length in data_ranges(start * BLOCK_BYTES, (end - start) * BLOCK_BYTES):
            low = max(offset // BLOCK_BYTES, done)
            high = min(-(-(offset + length) // BLOCK_BYTES), end)
            if high <= low:
                continue
            if low > done:
                yield done, low - done, False
            yield low, high - low, True
            done = high
        if done < end:
            yield done, end - done, False


def _expand(entries: Table) -> npt.NDArray[np.int64]:
    """The single blocks of entries whose runs are short."""
    counts, blocks = entries["count"].astype(np.int64), entries["block"].astype(np.int64)
    ends: Keys = counts.cumsum()
    if not len(ends) or int(ends[-1]) == len(blocks):
        return blocks
    starts: Keys = ends - counts
    expanded: Keys = (blocks - starts).repeat(counts)
    return expanded + np.arange(len(expanded))


def _are_holes(blocks: Keys, ranges: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which blocks lie outside of all ranges, ascending (start, end) rows in bytes."""
    starts = blocks * BLOCK_BYTES
    if not len(ranges):
        return np.ones(len(blocks), dtype=bool)
    # A block is touched by the first range that ends behind its start, or by none.
    at = ranges[:, 1].searchsorted(starts, "right")
    next_starts = np.empty(len(ranges) + 1, dtype=np.int64)
    next_starts[:-1], next_starts[-1] = ranges[:, 0], np.iinfo(np.int64).max
    next_start = next_starts[at]
    holes: npt.NDArray[np.bool_] = next_start >= starts + BLOCK_BYTES
    return holes
