"""Turns an epoch, a fold of several, or copied blocks into FRAME bodies (`docs/wire_format.md`).

```
 table, ascending            window (4 MiB of contents)          frames (≤ 64 KiB raw each)
 DATA 7 ─┐ addresses in      read by ascending address,  ┌─▶ [7 8 9 | 12 | ZERO 20…99 | zstd]
 DATA 8  ├ journal order ──▶ laid out by block          ─┤
 DATA 9 ─┘                                               └─▶ [100 101 … | raw]
```
An `EncodeJob` is built on the loop and run on a worker thread. Memory beyond the result: one
window. Deliberately not here: which epochs to send, when, and what a peer already has.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
import zstandard

from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX, KIB, MIB, PRODUCTION, Limits
from geomirror.volume.epoch_table import HASH_ZERO, KIND_DATA, KIND_ZERO, Epoch, Table, chain_hash
from geomirror.volume.merge import merge_tables
from geomirror.volume.store import Buffer

CODEC_RAW = 0
CODEC_ZSTD = 1
CODEC_ZSTD_PREFIX = 2
KIND_SAME = 2
RUN_BLOCKS_MAX = FRAME_RAW_BYTES_MAX // BLOCK_BYTES
ENTRIES_MAX = 1000
"""Entries in one frame; 16 kB of them, what `FRAME_OVERHEAD_BYTES_MAX` has room for."""
RUN_COUNT_MAX = (1 << 32) - 1
RAW_FRACTION_MIN = 0.97
"""A frame that zstd does not bring below this part of its size is sent raw."""
WINDOW_BLOCKS = 4 * MIB // BLOCK_BYTES
READ_GAP_BYTES_MAX = 16 * KIB
"""Unwanted bytes between two contents that are read rather than skipped: one call is dearer."""
READ_BYTES_MAX = 1 * MIB

FRAME_HEADER = struct.Struct("<BBHIQQ")
FRAME_ENTRY = struct.Struct("<HBBIQ")
assert FRAME_HEADER.size == 24
assert FRAME_ENTRY.size == 16

Read = Callable[[int, int], bytes]
"""Journal address, length → bytes. Must be safe on a worker thread."""


@dataclass(frozen=True)
class EncodedEpoch:
    """What goes over the wire for the epochs [first_number, number]."""

    number: int
    first_number: int
    generation: bytes
    first_lsn: int
    end_lsn: int
    wall_ns: int
    chain_hash: bytes
    """H(number), for the commit."""
    table_hash: bytes
    """Folds only: `chain_hash` from 32 zero bytes over the fold's own table; else empty."""
    frames: list[bytes] = field(repr=False)
    entries: int
    raw_bytes: int
    """Contents before compression, bytes."""
    wire_bytes: int
    """Frame bodies, bytes."""
    is_mark: bool = False


def frame_hash(header: bytes, entries: Buffer, data: Buffer) -> int:
    """XXH3-64 over everything of a frame but the hash itself and the encoding of its data."""
    digest = xxhash.xxh3_64(header[:8])
    digest.update(header[16:24])
    digest.update(entries)
    digest.update(data)
    return int(digest.intdigest())


class FrameBuilder:
    """Collects ascending entries into frames. One per job: compressors are bound to a thread."""

    def __init__(self, level: int) -> None:
        self.frames: list[bytes] = []
        self.raw_bytes = 0
        self._compressor = zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_dict_id=False
        )
        self._entries: list[tuple[int, int, int, int, int]] = []
        self._parts: list[Buffer] = []
        self._data_bytes = 0

    def add_data(self, volume: int, block: int, content: Buffer) -> None:
        """Add one block; `content` is 1 to 4096 bytes and is kept until the frame is full."""
        length = len(content)
        assert 0 < length <= BLOCK_BYTES
        is_full = self._data_bytes + length > FRAME_RAW_BYTES_MAX
        last = self._entries[-1] if self._entries else None
        is_run = last is not None and last[:3] == (volume, KIND_DATA, 0)
        if last is not None and is_run and last[4] + last[3] == block and not is_full:
            self._entries[-1] = (volume, KIND_DATA, 0, last[3] + 1, last[4])
        else:
            if is_full or len(self._entries) >= ENTRIES_MAX:
                self.flush()
            self._entries.append((volume, KIND_DATA, 0, 1, block))
        self._parts.append(content)
        self._data_bytes += length

    def add_zero(self, volume: int, block: int, count: int, flags: int) -> None:
        """Add a run of `count` zero blocks."""
        while count > 0:
            part = min(count, RUN_COUNT_MAX)
            if len(self._entries) >= ENTRIES_MAX:
                self.flush()
            self._entries.append((volume, KIND_ZERO, flags, part, block))
            block += part
            count -= part

    def flush(self) -> None:
        """Close the frame being filled, if there is one."""
        if not self._entries:
            return
        data = b"".join(self._parts)
        entries = b"".join(FRAME_ENTRY.pack(*entry) for entry in self._entries)
        codec, wire = CODEC_RAW, data
        if data:
            packed = self._compressor.compress(data)
            if len(packed) < RAW_FRACTION_MIN * len(data):
                codec, wire = CODEC_ZSTD, packed
        header = FRAME_HEADER.pack(codec, 0, len(self._entries), len(data), 0, 0)
        digest = frame_hash(header, entries, data)
        header = FRAME_HEADER.pack(codec, 0, len(self._entries), len(data), digest, 0)
        self.frames.append(b"".join((header, entries, wire)))
        self.raw_bytes += len(data)
        self._entries, self._parts, self._data_bytes = [], [], 0


class EncodeJob:
    """Encodes one epoch, or folds several adjacent ones of a generation (newest version wins).

    :param epochs: ascending and adjacent, or a function that loads them on the worker thread.
    :param read: journal reader; every address of the epochs' tables must be retained (pinned).
    :param level: zstd level. 1 is right up to about 1 Gbit/s a core.
    :param volume_bytes: size of each volume, by index: the last block of one may be short.
    :param limits: `segment_bytes`: no read crosses a segment.
    """

    def __init__(
        self,
        epochs: Sequence[Epoch] | Callable[[], Sequence[Epoch]],
        read: Read,
        level: int = 1,
        *,
        volume_bytes: Mapping[int, int],
        limits: Limits = PRODUCTION,
    ) -> None:
        self._epochs = epochs
        self._read = read
        self._volume_bytes = dict(volume_bytes)
        self._level = level
        self._limits = limits
        self._result: EncodedEpoch | None = None

    @property
    def result(self) -> EncodedEpoch:
        """What was encoded; only after `run`."""
        assert self._result is not None
        return self._result

    def run(self) -> None:
        """Read, compress and hash everything; fills `result`. Blocks for tens of ms.

        :raises StorageError: a journal read failed.
        """
        epochs = self._epochs() if callable(self._epochs) else self._epochs
        assert epochs
        first, last = epochs[0], epochs[-1]
        for older, newer in itertools.pairwise(epochs):
            assert newer.first_number == older.number + 1
            assert newer.generation == older.generation
        table = last.table if len(epochs) == 1 else merge_tables([e.table for e in epochs])
        table_hash = b""
        if first.first_number < last.number:
            table_hash = chain_hash(
                HASH_ZERO, last.generation, last.number, first.first_lsn, last.end_lsn, table
            )
        builder = FrameBuilder(self._level)
        for start in range(0, len(table), WINDOW_BLOCKS):
            window = table[start : start + WINDOW_BLOCKS]
            _add_window(builder, window, self._contents(window))
        builder.flush()
        self._result = EncodedEpoch(
            number=last.number,
            first_number=first.first_number,
            generation=last.generation,
            first_lsn=first.first_lsn,
            end_lsn=last.end_lsn,
            wall_ns=last.wall_ns,
            chain_hash=last.chain_hash,
            table_hash=table_hash,
            frames=builder.frames,
            entries=len(table),
            raw_bytes=builder.raw_bytes,
            wire_bytes=sum(map(len, builder.frames)),
            is_mark=last.is_mark,
        )

    def _contents(self, window: Table) -> list[Buffer]:
        """Content of each DATA entry of the window, in the window's order."""
        rows = np.flatnonzero(window["kind"] == KIND_DATA)
        entries = window[rows]
        addresses = entries["address"].astype(np.int64)
        lengths = self._lengths(entries)
        contents: list[Buffer] = [b""] * len(rows)
        order = np.argsort(addresses, kind="stable")
        for span in _spans(addresses, lengths, order, self._limits.segment_bytes):
            start = int(addresses[span[0]])
            end = int(addresses[span[-1]] + lengths[span[-1]])
            view = memoryview(self._read(start, end - start))
            for row in span:
                offset = int(addresses[row]) - start
                contents[row] = view[offset : offset + int(lengths[row])]
        return contents

    def _lengths(self, entries: Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        lengths = np.full(len(entries), BLOCK_BYTES, dtype=np.int64)
        for volume, size in self._volume_bytes.items():
            mine = (entries["volume"] == volume) & (entries["block"] == size // BLOCK_BYTES)
            lengths[mine] = size % BLOCK_BYTES
        assert bool(np.all(lengths > 0))
        return lengths


def _add_window(builder: FrameBuilder, window: Table, contents: list[Buffer]) -> None:
    at = 0
    for volume, kind, flags, count, block in window[
        ["volume", "kind", "flags", "count", "block"]
    ].tolist():
        if kind == KIND_DATA:
            builder.add_data(volume, block, contents[at])
            at += 1
        else:
            builder.add_zero(volume, block, count, flags)


def _spans(
    addresses: np.ndarray[tuple[int], np.dtype[np.int64]],
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
    order: np.ndarray[tuple[int], np.dtype[np.int64]],
    segment_bytes: int,
) -> Iterable[list[int]]:
    """Rows grouped so that each group is one read: near, in one segment, bounded."""
    span: list[int] = []
    start = end = 0
    for row in order.tolist():
        address, length = int(addresses[row]), int(lengths[row])
        is_near = address - end <= READ_GAP_BYTES_MAX and address + length - start <= READ_BYTES_MAX
        if span and is_near and address // segment_bytes == start // segment_bytes:
            span.append(row)
        else:
            if span:
                yield span
            span, start = [row], address
        end = max(end, address + length)
    if span:
        yield span


def encode_blocks(
    ranges: Sequence[tuple[int, int, Buffer]],
    zero_runs: Sequence[tuple[int, int, int]] = (),
    *,
    level: int = 1,
) -> list[bytes]:
    """FRAME bodies for copied content (resync), all-zero blocks found and sent as runs.

    :param ranges: (volume, first block, content); the content is whole blocks, but the last block
        of a volume may be short. Not overlapping, in any order.
    :param zero_runs: (volume, first block, count of blocks) known to be zero.
    """
    builder = FrameBuilder(level)
    items: list[tuple[int, int, Buffer | int]] = [*ranges, *zero_runs]
    zero = bytes(BLOCK_BYTES)
    for volume, first, content in sorted(items, key=lambda item: item[:2]):
        if isinstance(content, int):
            builder.add_zero(volume, first, content, 0)
            continue
        view = memoryview(content)
        run = 0
        for number in range((len(view) + BLOCK_BYTES - 1) // BLOCK_BYTES):
            part = view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            if part == zero[: len(part)]:
                run += 1
                continue
            builder.add_zero(volume, first + number - run, run, 0)
            run = 0
            builder.add_data(volume, first + number, part)
        count = (len(view) + BLOCK_BYTES - 1) // BLOCK_BYTES
        builder.add_zero(volume, first + count - run, run, 0)
    builder.flush()
    return builder.frames
