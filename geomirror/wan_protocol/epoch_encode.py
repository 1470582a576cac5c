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
from collections.abc import Callable, Mapping, Sequence
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
        self._entries: list[bytes] = []
        self._parts: list[Buffer] = []

    def add_run(self, volume: int, block: int, contents: Sequence[Buffer]) -> None:
        """Add adjacent blocks, one content each: 4096 bytes, or less at a volume's end.

        Contents are kept until their frame is full.
        """
        at = 0
        while at < len(contents):
            room = RUN_BLOCKS_MAX - len(self._parts)
            if room == 0 or len(self._entries) >= ENTRIES_MAX:
                self.flush()
                continue
            taken = contents[at : at + room]
            self._entries.append(FRAME_ENTRY.pack(volume, KIND_DATA, 0, len(taken), block + at))
            self._parts += taken
            at += len(taken)

    def add_zero(self, volume: int, block: int, count: int, flags: int) -> None:
        """Add a run of `count` zero blocks."""
        while count > 0:
            part = min(count, RUN_COUNT_MAX)
            if len(self._entries) >= ENTRIES_MAX:
                self.flush()
            self._entries.append(FRAME_ENTRY.pack(volume, KIND_ZERO, flags, part, block))
            block += part
            count -= part

    def flush(self) -> None:
        """Close the frame being filled, if there is one."""
        if not self._entries:
            return
        data = b"".join(self._parts)
        entries = b"".join(self._entries)
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
        self._entries, self._parts = [], []


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
        order = np.argsort(entries["address"], kind="stable")
        starts = entries["address"][order].astype(np.int64)
        ends = starts + self._lengths(entries)[order]
        read_bytes = min(READ_BYTES_MAX, self._limits.segment_bytes)
        # One read per group: near each other, and none over a multiple of `read_bytes`, so that it
        # stays in one segment (a record never crosses from one to the next).
        is_cut = starts[1:] - ends[:-1] > READ_GAP_BYTES_MAX
        is_cut |= starts[1:] // read_bytes != starts[:-1] // read_bytes
        cuts = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(rows)]
        contents: list[Buffer] = [b""] * len(rows)
        for first, last in itertools.pairwise(cuts):
            if first == last:
                continue
            base = int(starts[first])
            view = memoryview(self._read(base, int(ends[last - 1]) - base))
            offsets = (starts[first:last] - base).tolist()
            stops = (ends[first:last] - base).tolist()
            for row, offset, stop in zip(order[first:last].tolist(), offsets, stops, strict=True):
                contents[row] = view[offset:stop]
        return contents

    def _lengths(self, entries: Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        lengths = np.full(len(entries), BLOCK_BYTES, dtype=np.int64)
        for volume, size in self._volume_bytes.items():
            mine = (entries["volume"] == volume) & (entries["block"] == size // BLOCK_BYTES)
            lengths[mine] = size % BLOCK_BYTES
        assert bool(np.all(lengths > 0))
        return lengths


def _add_window(builder: FrameBuilder, window: Table, contents: list[Buffer]) -> None:
    """Add the entries of a window run by run."""
    is_data = window["kind"] == KIND_DATA
    is_joined = is_data[1:] & is_data[:-1] & (window["volume"][1:] == window["volume"][:-1])
    is_joined &= window["block"][1:] == window["block"][:-1] + np.uint64(1)
    starts = np.concatenate(([0], np.flatnonzero(~is_joined) + 1))
    counts = np.diff(starts, append=len(window)).tolist()
    heads = window[starts][["volume", "kind", "flags", "count", "block"]].tolist()
    at = 0
    for (volume, kind, flags, zeros, block), count in zip(heads, counts, strict=True):
        if kind == KIND_DATA:
            builder.add_run(volume, block, contents[at : at + count])
            at += count
        else:
            builder.add_zero(volume, block, zeros, flags)


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
        parts = [view[at : at + BLOCK_BYTES] for at in range(0, len(view), BLOCK_BYTES)]
        numbered = enumerate(parts, first)
        for is_zero, run in itertools.groupby(
            numbered, lambda item: item[1] == zero[: len(item[1])]
        ):
            blocks = list(run)
            if is_zero:
                builder.add_zero(volume, blocks[0][0], len(blocks), 0)
            else:
                builder.add_run(volume, blocks[0][0], [part for _, part in blocks])
    builder.flush()
    return builder.frames
