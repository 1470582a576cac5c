"""Applying sealed epochs to the image; on the primary this is called destage.

```
 epochs (d, e] ──merge──▶ table ──▶ 1 old blocks: image ──▶ undo file, durable       (I6)
                                ──▶ 2 new blocks: journal ──▶ image, ascending
                                ──▶ 3 fdatasync of the touched images
```
The caller moves the checkpoint afterwards. After a crash anywhere the same job is run again: it
finds the durable undo file and uses it, and writing the same blocks twice changes nothing.
Memory: slices of at most `_SLICE_BLOCKS` blocks, whatever the size of the pass.
Deliberately not here: which epochs are applied and when (`engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES, GIB, KIB, MIB, Limits
from geomirror.volume.arrays import run_heads, run_lengths, run_tails
from geomirror.volume.epoch_table import (
    FLAG_PUNCH,
    KIND_DATA,
    KIND_ZERO,
    Epoch,
    Table,
    empty_table,
)
from geomirror.volume.merge import Keys, merge_tables
from geomirror.volume.store import Buffer
from geomirror.volume.undo import UndoOverflowError, UndoStore
from geomirror.volume.undo_file import UndoWriter

__all__ = ["ApplyImage", "ApplyJob", "merge_tables"]

_SLICE_BLOCKS = 8 * MIB // BLOCK_BYTES
"""Blocks whose new contents are in memory at once."""
_READ_BYTES_MAX = 1 * MIB
"""One read, from the image or from the journal."""
_GAP_BYTES_MAX = 4 * KIB + 512
"""Journal bytes read and dropped rather than starting another read: copying a superseded block
costs 0.4 us, a read through the journal about 3 us. At most doubles what is read."""
_LONG_RUN_BLOCKS_MIN = 64
"""A zero run from here on is asked for its holes before it is read."""
_WINDOW_BYTES = 1 * GIB
"""Part of a zero run whose holes are listed at once."""


class ApplyImage(Protocol):
    """What applying needs of a volume's image (`image.Image`)."""

    @property
    def size_bytes(self) -> int:
        """Size of the volume; the last block may be short."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the backing device."""

    def data_ranges(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The (offset, length) parts that may hold anything but zeros, ascending."""

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        """A hint: reads from now on are (not) of scattered blocks."""

    def write_blocks(self, blocks: Sequence[tuple[int, Buffer]]) -> None:
        """Write (first block, one or more whole blocks), ascending; not durable yet."""

    def zero(self, first_block: int, count: int, *, punch: bool) -> None:
        """Make blocks read as zeros; with `punch`, free their space."""

    def fdatasync(self) -> None:
        """Make everything written durable."""


class ApplyJob:
    """Brings the images from `from_epoch` to `to_epoch`; blocking, for a worker thread.

    :param load: the epochs (from_epoch, to_epoch], ascending; called inside `run`.
    :param read: journal contents by (address, length).
    :param with_undo: False for a copy that has no consistent state to go back to (first sync,
        plain resync): no before-images are kept.
    """

    def __init__(
        self,
        from_epoch: int,
        to_epoch: int,
        load: Callable[[], Sequence[Epoch]],
        read: Callable[[int, int], bytes],
        images: Mapping[int, ApplyImage],
        undo: UndoStore,
        limits: Limits,
        *,
        with_undo: bool = True,
    ) -> None:
        assert from_epoch < to_epoch
        self.from_epoch = from_epoch
        self.to_epoch = to_epoch
        self.with_undo = with_undo
        self._load = load
        self._read = read
        self._images = images
        self._undo = undo
        self._limits = limits
        self.table: Table = empty_table()
        """After `run`: what was applied, newest version of each block."""
        self.chain_hash = b""
        """After `run`: H(to_epoch)."""
        self.bytes_written = 0
        """After `run`: data written to images; zeros count nothing."""
        self.undo_bytes = 0
        """After `run`: size of the undo file that covers the pass."""

    def run(self) -> None:
        """Apply; when this returns the images hold `to_epoch` durably.

        :raises StorageError: a device failed; the image may be half applied and the pass has to
            be run again (same epochs) before the image is read.
        """
        epochs = self._load()
        expected = self.from_epoch + 1
        for epoch in epochs:
            assert epoch.first_number == expected, "epochs must follow each other"
            expected = epoch.number + 1
        assert expected == self.to_epoch + 1
        self.table = merge_tables([epoch.table for epoch in epochs])
        self.chain_hash = epochs[-1].chain_hash
        if self.with_undo:
            self._save_old(epochs[-1].generation)
        for volume, entries in _by_volume(self.table):
            image = self._images[volume]
            for start in range(0, len(entries), _SLICE_BLOCKS):
                self._write_new(image, entries[start : start + _SLICE_BLOCKS])
        for volume, _ in _by_volume(self.table):
            self._images[volume].fdatasync()

    def _save_old(self, generation: bytes) -> None:
        pending = self._undo.pending_pass(self.from_epoch)
        assert pending in (None, (self.from_epoch, self.to_epoch)), "a half-applied pass is first"
        found = self._undo.find(self.from_epoch, self.to_epoch, generation)
        if found is None:
            found = self._undo.write(generation, self.from_epoch, self.to_epoch, self._fill_undo)
        self.undo_bytes = found.stored_bytes

    def _fill_undo(self, writer: UndoWriter) -> None:
        for volume, entries in _by_volume(self.table):
            image = self._images[volume]
            image.expect_scattered_reads(True)
            try:
                self._save_volume(writer, volume, image, entries)
            finally:
                image.expect_scattered_reads(False)

    def _save_volume(
        self, writer: UndoWriter, volume: int, image: ApplyImage, entries: Table
    ) -> None:
        is_long = (entries["kind"] == KIND_ZERO) & (entries["count"] >= _LONG_RUN_BLOCKS_MIN)
        bounds = [*np.flatnonzero(is_long).tolist(), len(entries)]
        start = 0
        for bound in bounds:
            for first in range(start, bound, _SLICE_BLOCKS):
                blocks = _expand(entries[first : min(first + _SLICE_BLOCKS, bound)])
                self._save_blocks(writer, volume, image, blocks)
            if bound < len(entries):
                entry = entries[bound]
                self._save_run(writer, volume, image, int(entry["block"]), int(entry["count"]))
            start = bound + 1

    def _save_blocks(
        self, writer: UndoWriter, volume: int, image: ApplyImage, blocks: Keys
    ) -> None:
        """Save single blocks, ascending; adjacent ones with one read."""
        step = _READ_BYTES_MAX // BLOCK_BYTES
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            heads = run_heads(part[1:] - part[:-1] != 1)
            counts = run_lengths(heads, len(part))
            pieces = [
                _read_blocks(image, block, count)
                for block, count in zip(part[heads].tolist(), counts.tolist(), strict=True)
            ]
            writer.add_blocks(volume, part, pieces[0] if len(pieces) == 1 else b"".join(pieces))
            self._check_room(writer)

    def _save_run(
        self, writer: UndoWriter, volume: int, image: ApplyImage, block: int, count: int
    ) -> None:
        """Save the old contents of a long zero run; holes cost one entry, not a read."""
        step = _READ_BYTES_MAX // BLOCK_BYTES

        def data_ranges(offset: int, length: int) -> list[tuple[int, int]]:
            return image.data_ranges(offset, min(length, image.size_bytes - offset))

        for first, blocks, is_data in data_blocks(data_ranges, block, count):
            if not is_data:
                writer.add_zero(volume, first, blocks)
                continue
            for start in range(first, first + blocks, step):
                part = np.arange(start, min(start + step, first + blocks), dtype=np.int64)
                writer.add_blocks(volume, part, _read_blocks(image, start, len(part)))
                self._check_room(writer)

    def _check_room(self, writer: UndoWriter) -> None:
        if writer.raw_bytes > self._limits.undo_pass_bytes_max:
            raise UndoOverflowError

    def _write_new(self, image: ApplyImage, entries: Table) -> None:
        """Write one slice of a volume's table."""
        is_data = entries["kind"] == KIND_DATA
        for entry in entries[~is_data]:
            punch = bool(entry["flags"] & FLAG_PUNCH)
            image.zero(int(entry["block"]), int(entry["count"]), punch=punch)
        data = entries[is_data]
        if not len(data):
            return
        blocks = data["block"].astype(np.int64)
        short = (int(blocks[-1]) + 1) * BLOCK_BYTES - image.size_bytes
        assert short < BLOCK_BYTES, "a block beyond the end of the volume"
        chunks, chunk, position = self._read_new(data["address"].astype(np.int64), max(short, 0))
        follows = (blocks[1:] - blocks[:-1] == 1) & (chunk[1:] == chunk[:-1])
        follows &= position[1:] - position[:-1] == BLOCK_BYTES
        heads = run_heads(~follows)
        sizes = run_lengths(heads, len(blocks)) * BLOCK_BYTES
        if short > 0:
            sizes[-1] -= short
        columns = (blocks[heads], chunk[heads], position[heads], sizes)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        image.write_blocks([(block, chunks[c][at : at + size]) for block, c, at, size in rows])
        self.bytes_written += int(sizes.sum())

    def _read_new(self, addresses: Keys, short: int) -> tuple[list[memoryview], Keys, Keys]:
        """Contents at `addresses`, in as few reads as are worth it.

        :param short: bytes that the last block lacks.
        :returns: chunks, and for each address the index of its chunk and the offset therein.
        """
        order = np.argsort(addresses, kind="stable")
        ordered = addresses[order]
        segment = ordered // self._limits.segment_bytes
        breaks = np.ones(len(ordered), dtype=bool)
        breaks[1:] = ordered[1:] - ordered[:-1] > BLOCK_BYTES + _GAP_BYTES_MAX
        breaks[1:] |= segment[1:] != segment[:-1]
        start = np.maximum.accumulate(np.where(breaks, ordered, 0))
        part = (ordered - start) // _READ_BYTES_MAX
        breaks[1:] |= part[1:] != part[:-1]
        heads = run_heads(breaks[1:])
        tails = run_tails(heads, len(ordered))
        starts = ordered[heads]
        ends = ordered[tails] + BLOCK_BYTES
        # The short block may be the last thing in the journal: nothing beyond it is there to read.
        ends -= np.where(ordered[tails] == addresses[-1], short, 0)
        chunks = [
            memoryview(self._read(first, end - first))
            for first, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        chunk = np.empty(len(addresses), dtype=np.int64)
        chunk[order] = np.cumsum(breaks) - 1
        return chunks, chunk, addresses - starts[chunk]


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


def _read_blocks(image: ApplyImage, block: int, count: int) -> bytes:
    """Adjacent blocks; the volume's short last block is as short as it is."""
    offset = block * BLOCK_BYTES
    length = min(count * BLOCK_BYTES, image.size_bytes - offset)
    assert length > (count - 1) * BLOCK_BYTES, "a block beyond the end of the volume"
    return image.read(offset, length)


def _by_volume(table: Table) -> Iterator[tuple[int, Table]]:
    if not len(table):
        return
    heads = run_heads(table["volume"][1:] != table["volume"][:-1]).tolist()
    for start, end in zip(heads, [*heads[1:], len(table)], strict=True):
        yield int(table["volume"][start]), table[start:end]


def _expand(entries: Table) -> npt.NDArray[np.int64]:
    """The single blocks of entries whose runs are short."""
    counts = entries["count"].astype(np.int64)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    blocks: npt.NDArray[np.int64] = np.repeat(entries["block"].astype(np.int64), counts)
    return blocks + np.arange(len(blocks)) - first
