"""One undo file: the old contents of every block that an apply pass changes.

```
 header 128 │ chunk │ chunk │ … │ table, 24 bytes an entry │ chunk table, 16 │ footer 32
```
Chunks are zstd frames of at most 256 KiB raw; a DATA entry of n blocks points at n × 4096 bytes in
the concatenation of all raw chunks, and may span chunks. The format is in `docs/disk_format.md`.
A file is written under a temporary name, synced, then renamed: under its final name it is complete,
so one that does not verify there is damage, never a torn write.
Deliberately not here: which files there are and what they mean together (`undo`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from geomirror.errors import IntegrityError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.arrays import joined, run_heads
from geomirror.volume.epoch_table import Table, empty_table
from geomirror.volume.merge import Keys, key_of, keys_of
from geomirror.volume.store import Buffer, File
from geomirror.volume.undo_chunks import CHUNK, CHUNK_BYTES, ChunkMap, damage
from geomirror.volume.undo_faults import flags_of
from geomirror.volume.undo_header import (
    FOOTER,
    FOOTER_MAGIC,
    HEADER_BYTES,
    VERSION,
    VERSION_GROUPS,
    pack_header,
    read_header,
)
from geomirror.volume.undo_label import OPEN_EPOCH, PassInfo, PassLabel
from geomirror.volume.zero_blocks import ZERO_BLOCK, with_holes, zero_mask

__all__ = ["HEADER_BYTES", "OPEN_EPOCH", "PassInfo", "PassLabel"]  # And everything below.

COMPRESSION_LEVEL = 1
KIND_DATA = 0
KIND_ZERO = 1
KIND_SIZE = 2
"""Not of a block: `position` is the size that the volume had before, 0 when it was not there."""
SIZE_BLOCK = (1 << 46) - 1
"""Where such an entry stands: behind every block of its volume."""
PLACE_BITS = 40
"""Of an `address` of `UndoReader.located`: 4 PiB of old contents in one file."""
ENTRY = np.dtype(
    [
        ("volume", "<u2"),
        ("kind", "u1"),
        ("reserved", "u1"),
        ("count", "<u4"),
        ("block", "<u8"),
        ("position", "<u8"),
    ]
)
assert ENTRY.itemsize == 24

_Array = npt.NDArray[np.void]


class UndoWriter:
    """Writes one undo file in bounded memory: entries ascending by (volume, block)."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
        self._pending = bytearray()
        self._chunks: list[tuple[int, int, int]] = []
        self._end = HEADER_BYTES
        self._tables: list[_Array] = []
        self._sizes: list[_Array] = []
        self.raw_bytes = 0
        """Old contents added, uncompressed; zeros count nothing."""
        self.entry_count = 0
        """Runs added: 24 bytes of memory each."""

    @property
    def stored_bytes(self) -> int:
        """Of the file so far, without its tables; what waits for a chunk counts as it is."""
        return self._end + len(self._pending)

    def add_blocks(
        self,
        volume: int,
        blocks: Keys,
        data: Buffer,
        are_holes: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Add the old contents of `blocks`; all-zero ones are noted as ZERO.

        :param data: 4096 bytes for each block, ascending; a short last one is padded.
        :param are_holes: which blocks are known to be zeros and are not in `data`.
        """
        if len(data) % BLOCK_BYTES:
            data = bytes(data) + bytes(-len(data) % BLOCK_BYTES)
        zero = zero_mask(data)
        are_zero = with_holes(zero, are_holes)
        assert len(blocks) == len(are_zero)
        entries = np.zeros(len(blocks), dtype=ENTRY)
        entries["volume"], entries["block"], entries["count"] = volume, blocks, 1
        entries["kind"] = are_zero  # KIND_ZERO is 1, KIND_DATA is 0.
        self._tables.append(_joined(entries))
        self.entry_count += len(self._tables[-1])
        if zero.any():
            rows = np.frombuffer(data, dtype=np.uint8).reshape(len(zero), BLOCK_BYTES)
            data = rows[~zero].tobytes()
        self._pending += data
        self.raw_bytes += len(data)
        if len(self._pending) >= CHUNK_BYTES:
            whole = len(self._pending) // CHUNK_BYTES * CHUNK_BYTES
            self._write_chunks(memoryview(self._pending)[:whole])
            self._pending = self._pending[whole:]
        self._added()

    def add_zero(self, volume: int, block: int, count: int) -> None:
        """Note that `count` blocks from `block` on read as zeros."""
        entry = np.zeros(1, dtype=ENTRY)
        entry[0] = (volume, KIND_ZERO, 0, count, block, 0)
        self._tables.append(entry)
        self.entry_count += 1
        self._added()

    def add_size(self, volume: int, size_bytes: int) -> None:
        """Note the size of a volume before the pass; at any time."""
        self._sizes.append(size_entries({volume: size_bytes}))

    def _added(self) -> None:
        """Called for each call that added blocks or zeros."""

    def _write_chunks(self, data: memoryview) -> None:
        for position in range(0, len(data), CHUNK_BYTES):
            raw = data[position : position + CHUNK_BYTES]
            stored = self._compressor.compress(raw)
            self._chunks.append((len(raw), len(stored), xxhash.xxh3_64_intdigest(raw)))
            self._store(stored)

    def _store(self, stored: bytes) -> None:
        self._file.pwritev([stored], self._end)
        self._end += len(stored)

    def _take_table(self) -> _Array:
        """All entries, joined, with their positions."""
        sizes = joined(self._sizes, ENTRY)
        table = self._tables[0] if len(self._tables) == 1 else _joined(joined(self._tables, ENTRY))
        is_data = table["kind"] == KIND_DATA
        held = table["count"][is_data].astype(np.uint64) * np.uint64(BLOCK_BYTES)
        table["position"][is_data] = held.cumsum() - held
        if len(sizes):
            # Blocks are ascending; only sizes have to find their place behind them.
            table = joined([table, sizes], ENTRY)
            table = table[keys_of(table).argsort(kind="stable")]
        return table

    def finish(self, label: PassLabel, *, fault: str = "", is_resync: bool = False) -> int:
        """Write what is pending, tables, footer and header, fdatasync; returns the size."""
        self._write_chunks(memoryview(self._pending))
        chunks = np.array(self._chunks, dtype=CHUNK)
        table = self._take_table()
        flags = flags_of(fault, is_resync=is_resync)
        size = write_end(self._file, self._end, label, table, chunks, VERSION, flags)
        self._file.fdatasync()
        return size


def write_end(
    file: File,
    end: int,
    label: PassLabel,
    table: _Array,
    chunks: _Array,
    version: int = VERSION_GROUPS,
    flags: int = 0,
) -> int:
    """Write both tables and the footer at `end`, then the header; nothing is durable yet.

    :returns: size of the file in bytes.
    """
    assert len(label.generation) == 16
    assert len(label.chain_hash) == 32
    assert label.from_epoch < label.to_epoch
    tables = table.tobytes() + chunks.tobytes()
    check = xxhash.xxh3_64_intdigest(tables)
    footer = FOOTER.pack(end, end + table.nbytes, check, FOOTER_MAGIC)
    size = end + len(tables) + len(footer)
    counts, raw_bytes = (len(chunks), len(table)), int(chunks["raw"].sum(dtype=np.int64))
    header = pack_header(label, version, flags, counts, raw_bytes, size)
    file.pwritev([tables, footer], end)
    file.pwritev([header], 0)
    return size


def _joined(entries: _Array) -> _Array:
    """Join adjacent entries of one kind (positions are not set yet); counts stay below 2**32."""
    if len(entries) < 2:
        return entries
    keys, kinds, counts = keys_of(entries), entries["kind"], entries["count"].astype(np.int64)
    breaks = keys[1:] != (keys + counts)[:-1]
    breaks |= kinds[1:] != kinds[:-1]
    heads = run_heads(breaks)
    # With 2**32 blocks (16 TiB) in them, nearly all in runs, they are left as they are.
    if len(heads) == len(entries) or int(counts.sum()) >= 1 << 32:
        return entries
    runs = entries[heads]
    runs["count"] = np.add.reduceat(counts, heads)
    return runs


class UndoReader:
    """Reads one undo file. The table (24 bytes a run) is in memory, chunks are read when asked.

    :raises IntegrityError: header, footer or tables are not as they were written.
    """

    def __init__(self, file: File, name: str) -> None:
        self._file = file
        self._name = name
        info, self._version, (chunk_count, entry_count), _ = read_header(file, name)
        size = info.stored_bytes
        if size < HEADER_BYTES + FOOTER.size:
            raise self._damaged("is too short")
        start, chunk_start, check, magic = FOOTER.unpack(
            file.pread(FOOTER.size, size - FOOTER.size)
        )
        end = size - FOOTER.size
        sizes = (entry_count * ENTRY.itemsize, chunk_count * CHUNK.itemsize)
        is_laid_out = start + sizes[0] == chunk_start and chunk_start + sizes[1] == end
        if magic != FOOTER_MAGIC or start < HEADER_BYTES or not is_laid_out:
            raise self._damaged("has a damaged footer")
        tables = file.pread(end - start, start)
        if xxhash.xxh3_64_intdigest(tables) != check:
            raise self._damaged("has a damaged table")
        self._table: _Array = np.frombuffer(tables[: sizes[0]], dtype=ENTRY)
        self._keys: Keys = keys_of(self._table)
        chunks: _Array = np.frombuffer(tables[sizes[0] :], dtype=CHUNK)
        stored = chunks["stored"].astype(np.int64)
        self.chunks = ChunkMap(name, chunks, HEADER_BYTES)
        raw_bytes = int(chunks["raw"].sum(dtype=np.int64))
        if HEADER_BYTES + int(stored.sum()) != start or not self._is_covered(raw_bytes):
            raise self._damaged("has tables that contradict each other")
        self.info = replace(info, raw_bytes=raw_bytes)

    def _is_covered(self, raw_bytes: int) -> bool:
        """Whether chunks have legal sizes and every DATA entry lies within them."""
        raw = self.chunks.chunks["raw"]
        if len(raw) and int(raw.max()) > CHUNK_BYTES:
            return False
        if self._version == VERSION_GROUPS:
            raw_bytes = len(raw) * CHUNK_BYTES
        elif (raw[:-1] != CHUNK_BYTES).any():
            return False
        is_data = self._table["kind"] == KIND_DATA
        start = self._table["position"][is_data]
        end = start + self._table["count"][is_data].astype(np.uint64) * np.uint64(BLOCK_BYTES)
        return not len(end) or int(end.max()) <= raw_bytes

    def verify(self, pause: Callable[[], None] = lambda: None) -> None:
        """Read and check every chunk.

        :param pause: called before each; what it raises ends this.
        :raises IntegrityError: a chunk is damaged.
        """
        for index in np.flatnonzero(self.chunks.chunks["raw"]).tolist():
            pause()
            self._chunk(index)

    def entries(self) -> list[tuple[int, int, int, int]]:
        """(volume, kind, first block, count) of each run, ascending."""
        found: list[tuple[int, int, int, int]]
        found = self._table[["volume", "kind", "block", "count"]].tolist()
        return found

    def located(self, number: int) -> Table:
        """The runs as a table for merging: DATA of one block each, ZERO as it is, sizes left out.

        :param number: of this file among others: `address` of a DATA entry is `number` << 40 and
            the block's place in the concatenation of all raw chunks, in blocks.
        """
        return located(self._table, number)

    @property
    def runs(self) -> _Array:
        """The entries as they lie in the file."""
        return self._table

    def read_block(self, volume: int, block: int) -> bytes | None:
        """The old content, 4096 bytes (a short last block padded), or None: not in this pass.

        :raises IntegrityError: the chunk that holds it is damaged.
        """
        if not len(self._keys):
            return None
        key = key_of(volume, block)
        at = int(self._keys.searchsorted(key, "right")) - 1
        if at < 0 or key >= int(self._keys[at]) + int(self._table[at]["count"]):
            return None
        entry = self._table[at]
        if entry["kind"] == KIND_ZERO:
            return ZERO_BLOCK
        position = int(entry["position"]) + (key - int(self._keys[at])) * BLOCK_BYTES
        # Chunks hold a whole number of blocks, so no block spans two.
        index, offset = divmod(position, CHUNK_BYTES)
        return self._chunk(index)[offset : offset + BLOCK_BYTES]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _chunk(self, index: int) -> bytes:
        return self.chunks.read(self._file, index)

    def _damaged(self, what: str) -> IntegrityError:
        return damage(self._name, what)


def size_entries(sizes: Mapping[int, int]) -> _Array:
    """Entries of the sizes that volumes had before a pass."""
    entries = np.zeros(len(sizes), dtype=ENTRY)
    for row, (volume, size_bytes) in enumerate(sorted(sizes.items())):
        entries[row] = (volume, KIND_SIZE, 0, 1, SIZE_BLOCK, size_bytes)
    return entries


def located(runs: _Array, number: int) -> Table:
    """See `UndoReader.located`, of the entries `runs`."""
    return located_each([(runs, number)])[0]


def located_each(passes: Sequence[tuple[_Array, int]]) -> list[Table]:
    """`located` of many (entries, number), at a fraction of its cost."""
    runs = joined([each for each, _ in passes], ENTRY)
    owner = np.arange(len(passes)).repeat([len(each) for each, _ in passes])
    is_size = runs["kind"] == KIND_SIZE
    if is_size.any():
        runs, owner = runs[~is_size], owner[~is_size]
    is_data = runs["kind"] == KIND_DATA
    counts = np.where(is_data, runs["count"], 1).astype(np.int64)
    rows = np.arange(len(runs)).repeat(counts)
    # Of a row its first block, so that what follows is the distance from it.
    step = (np.arange(len(rows)) - (counts.cumsum() - counts)[rows]).astype(np.uint64)
    table = empty_table(len(rows))
    for name in ("volume", "kind", "count", "block"):
        table[name] = runs[name][rows]
    table["block"] += step
    data = is_data[rows].nonzero()[0]
    table["count"][data] = 1
    numbers = np.array([number for _, number in passes], dtype=np.uint64) << np.uint64(PLACE_BITS)
    place = runs["position"][rows[data]] // np.uint64(BLOCK_BYTES) + step[data]
    table["address"][data] = place + numbers[owner[rows[data]]]
    ends = owner[rows].searchsorted(np.arange(len(passes) + 1)).tolist()
    return [table[first:end] for first, end in itertools.pairwise(ends)]


def old_sizes(passes: Sequence[_Array]) -> dict[int, int]:
    """Sizes before some passes, oldest first, of the volumes that they grew, by their entries; 0 of
    those that they added."""
    entries = joined(passes, ENTRY)
    sizes = entries[entries["kind"] == KIND_SIZE]
    pairs = zip(sizes["volume"].tolist(), sizes["position"].tolist(), strict=True)
    return dict(reversed(list(pairs)))
