"""Turns an epoch, a fold of several, or copied blocks into FRAME bodies (`docs/wire_format.md`).

```
 table, ascending            window (16 MiB of contents)         frames (≤ 64 KiB raw each)
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

from geomirror.limits import BLOCK_BYTES, KIB, MIB, PRODUCTION, Limits
from geomirror.volume.arrays import run_heads, run_tails
from geomirror.volume.epoch_table import HASH_ZERO, KIND_DATA, KIND_ZERO, Epoch, chain_hash
from geomirror.volume.merge import merge_tables
from geomirror.volume.store import Buffer
from geomirror.volume.volume_change import VolumeChange, merge_changes
from geomirror.wan_protocol.frame_layout import (
    ENTRIES_MAX,
    FRAME_ENTRY_TYPE,
    RUN_BLOCKS_MAX,
    WindowLayout,
)

CODEC_RAW = 0
CODEC_ZSTD = 1
CODEC_ZSTD_PREFIX = 2
KIND_SAME = 2
KIND_SIZE = 3
"""Of a volume: `block` is its size in bytes at the frame's epoch, count 0. First in a frame."""
RUN_COUNT_MAX = (1 << 32) - 1
RAW_FRACTION_MIN = 0.97
"""A frame that zstd does not bring below this part of its size is sent raw."""
WINDOW_BLOCKS = 16 * MIB // BLOCK_BYTES
"""A full epoch. The contents of a part of it lie scattered over all of the epoch's journal, and
what lies between them is read too: with 4 MiB, everything was read twice."""
READ_GAP_BYTES_MAX = 16 * KIB
"""Unwanted bytes between two contents that are read rather than skipped: one call is dearer."""
READ_BYTES_MAX = 1 * MIB

FRAME_HEADER = struct.Struct("<BBHIQQ")
FRAME_ENTRY = struct.Struct("<HBBIQ")
assert FRAME_HEADER.size == 24
assert FRAME_ENTRY.size == FRAME_ENTRY_TYPE.itemsize == 16

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
    changes: tuple[VolumeChange, ...] = ()
    """Volumes that grow or are added in it."""


def frame_hash(header: bytes, entries: Buffer, data: Buffer) -> int:
    """XXH3-64 over everything of a frame but the hash itself and the encoding of its data."""
    digest = xxhash.xxh3_64(header[:8])
    digest.update(header[16:24])
    digest.update(entries)
    digest.update(data)
    return int(digest.intdigest())


class FrameEncoder:
    """Makes frames and keeps them. One per job: compressors are bound to a thread."""

    def __init__(self, level: int) -> None:
        self.frames: list[bytes] = []
        self.raw_bytes = 0
        self._compressor = zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_dict_id=False
        )

    def add(self, entry_count: int, entries: bytes, data: Buffer) -> None:
        """Add a frame; nothing of `data` is kept."""
        size = len(data)
        codec, wire = CODEC_RAW, data
        if size:
            packed = self._compressor.compress(data)
            if len(packed) < RAW_FRACTION_MIN * size:
                codec, wire = CODEC_ZSTD, packed
        header = FRAME_HEADER.pack(codec, 0, entry_count, size, 0, 0)
        digest = frame_hash(header, entries, data)
        header = FRAME_HEADER.pack(codec, 0, entry_count, size, digest, 0)
        self.frames.append(b"".join((header, entries, wire)))
        self.raw_bytes += size


class FrameBuilder:
    """Collects ascending entries into frames."""

    def __init__(self, encoder: FrameEncoder) -> None:
        self._encoder = encoder
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
        self._encoder.add(len(self._entries), b"".join(self._entries), data)
        self._entries, self._parts = [], []


class EncodeJob:
    """Encodes one epoch, or folds several adjacent ones of a generation (newest version wins).

    :param epochs: ascending and adjacent, or a function that loads them on the worker thread.
    :param read: journal reader; every address of the epochs' tables must be retained (pinned).
    :param level: zstd level.
    :param volume_bytes: size of each volume, by index: the last block of one may be short.
    :param declared: volumes whose size every frame names: the peer may know another one.
    :param limits: `segment_bytes`: no read crosses a segment.
    """

    def __init__(
        self,
        epochs: Sequence[Epoch] | Callable[[], Sequence[Epoch]],
        read: Read,
        level: int = 1,
        *,
        volume_bytes: Mapping[int, int],
        declared: Iterable[int] = (),
        limits: Limits = PRODUCTION,
    ) -> None:
        self._epochs = epochs
        self._read = read
        self._volume_bytes = dict(volume_bytes)
        self._level = level
        self._declared = [
            FRAME_ENTRY.pack(volume, KIND_SIZE, 0, 0, volume_bytes[volume])
            for volume in sorted(declared)
        ]
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
        changes = merge_changes(each for epoch in epochs for each in epoch.changes)
        table_hash = b""
        if first.first_number < last.number:
            lsns = first.first_lsn, last.end_lsn
            table_hash = chain_hash(HASH_ZERO, last.generation, last.number, *lsns, table, changes)
        encoder = FrameEncoder(self._level)
        declared, declared_count = b"".join(self._declared), len(self._declared)
        for start in range(0, len(table), WINDOW_BLOCKS):
            window = table[start : start + WINDOW_BLOCKS]
            layout = WindowLayout(window, self._volume_bytes, ENTRIES_MAX - declared_count)
            contents = self._contents(layout)
            for frame in layout.frames():
                data = contents[frame.start : frame.stop]
                count = declared_count + frame.entry_count
                encoder.add(count, declared + frame.entries, data)
        self._result = EncodedEpoch(
            number=last.number,
            first_number=first.first_number,
            generation=last.generation,
            first_lsn=first.first_lsn,
            end_lsn=last.end_lsn,
            wall_ns=last.wall_ns,
            chain_hash=last.chain_hash,
            table_hash=table_hash,
            frames=encoder.frames,
            entries=len(table),
            raw_bytes=encoder.raw_bytes,
            wire_bytes=sum(map(len, encoder.frames)),
            is_mark=last.is_mark,
            changes=changes,
        )

    def _contents(self, layout: WindowLayout) -> memoryview:
        """The contents of the window's DATA entries, laid out in the window's order."""
        addresses, lengths, places = layout.data_places()
        # Not zeroed: all of it is written.
        contents = np.empty(layout.data_bytes, dtype=np.uint8).data
        if len(addresses) == 0:
            return contents
        order = np.argsort(addresses, kind="stable")
        starts, places = addresses[order], places[order]
        ends = starts + lengths[order]
        read_bytes = min(READ_BYTES_MAX, self._limits.segment_bytes)
        # One read per group: near each other, and none over a multiple of `read_bytes`, so that it
        # stays in one segment (a record never crosses from one to the next).
        is_cut = starts[1:] - ends[:-1] > READ_GAP_BYTES_MAX
        is_cut |= starts[1:] // read_bytes != starts[:-1] // read_bytes
        cuts = [*run_heads(is_cut).tolist(), len(order)]
        # What is adjacent in the journal and in the window is copied as one piece.
        is_piece = is_cut | (starts[1:] != ends[:-1])
        is_piece |= places[1:] - places[:-1] != ends[:-1] - starts[:-1]
        heads = run_heads(is_piece)
        tails = run_tails(heads, len(order))
        bounds = np.searchsorted(heads, cuts).tolist()
        pieces = list(
            zip(starts[heads].tolist(), ends[tails].tolist(), places[heads].tolist(), strict=True)
        )
        for first, last in itertools.pairwise(bounds):
            base, end = pieces[first][0], pieces[last - 1][1]
            found = memoryview(self._read(base, end - base))
            for start, stop, place in pieces[first:last]:
                contents[place : place + stop - start] = found[start - base : stop - base]
        return contents


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
    encoder = FrameEncoder(level)
    builder = FrameBuilder(encoder)
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
    return encoder.frames
