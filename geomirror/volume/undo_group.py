"""One group of an open undo pass: the before-images that one job saved, or a part of them.

```
 group header 80 │ table, 24 an entry │ chunk table, 16 │ chunks
```
A group names the one before it by its check and says how far the file was durable when it was
written, so that a torn end is told from damage. The format is in `docs/disk_format.md`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
import xxhash

from geomirror.errors import NotFoundError, StorageError
from geomirror.limits import MIB
from geomirror.volume.epoch_table import Table, empty_table
from geomirror.volume.store import File
from geomirror.volume.undo import DIRECTORY, OPEN_SUFFIX
from geomirror.volume.undo_chunks import CHUNK, ChunkMap, damage
from geomirror.volume.undo_file import (
    ENTRY,
    KIND_DATA,
    OPEN_EPOCH,
    PassInfo,
    PassLabel,
    UndoWriter,
)

__all__ = ["OPEN_EPOCH", "Group", "GroupTables", "GroupWriter"]

GROUP_BYTES_MAX = 4 * MIB
"""Old contents of one group; they wait in memory, compressed, for its tables to be written."""
GROUP_TABLES_MAX = 8192
"""Tables of entries that are collected for one group."""
_MAGIC = b"GMUNDOG\0"
_HEADER = struct.Struct("<8sQQQQIIQQQQ")
assert _HEADER.size == 80
_SEARCH_BYTES = 1 * MIB

_Array = npt.NDArray[np.void]


def open_name(number: int) -> str:
    """File of an open pass."""
    return f"{DIRECTORY}/{number:016x}.open"


def closed_name(number: int) -> str:
    """The same once it is closed."""
    return f"{DIRECTORY}/{number:016x}.und"


def reading(open_file: Callable[[str], File], name: str) -> File:
    """Open an undo file; of an open pass, also when it was closed meanwhile.

    :raises NotFoundError, StorageError: it is gone.
    """
    try:
        return open_file(name)
    except (NotFoundError, StorageError):
        if not name.endswith(OPEN_SUFFIX):
            raise
        # The groups lie where they lay.
        return open_file(name.removesuffix(OPEN_SUFFIX) + ".und")


@dataclass(frozen=True)
class Group:
    """One group as it lies in the file."""

    sequence: int
    start: int
    durable: int
    """Everything below was durable when this was written."""
    previous: int
    """Check of the group before, 0 for the first."""
    check: int
    body: int
    """Where the chunks begin."""
    end: int
    body_check: int
    table: _Array = field(repr=False)
    chunk_map: ChunkMap = field(repr=False)

    @property
    def chunks(self) -> _Array:
        """Rows of the chunk table."""
        return self.chunk_map.chunks

    @property
    def raw_bytes(self) -> int:
        """Old contents held, uncompressed."""
        return int(self.chunks["raw"].sum(dtype=np.int64))

    def info(self, label: PassLabel, name: str) -> PassInfo:
        """The group as a part of its pass."""
        fields = asdict(replace(label, to_epoch=OPEN_EPOCH))
        return PassInfo(
            **fields,
            name=name,
            raw_bytes=self.raw_bytes,
            stored_bytes=self.end - self.start,
            start=self.start,
        )

    def blocks(self) -> Table:
        """The blocks held, for a set of them."""
        table = empty_table(len(self.table))
        for name in ("volume", "count", "block"):
            table[name] = self.table[name]
        return table

    def moved(self, place: int) -> _Array:
        """The table with positions counted from `place` on."""
        table = self.table.copy()
        is_data = table["kind"] == KIND_DATA
        table["position"] = np.where(is_data, table["position"] + np.uint64(place), 0)
        return table

    def is_whole(self, file: File) -> bool:
        """Whether its contents are as they were written."""
        body = file.pread(self.end - self.body, self.body)
        return xxhash.xxh3_64_intdigest(body) == self.body_check


def read_group(file: File, name: str, start: int, size: int) -> Group:
    """Header and tables of the group at `start`; its contents are not looked at.

    :raises IntegrityError: there is none.
    """
    header = file.pread(_HEADER.size, start)
    magic, sequence, own, durable, previous, chunk_count, entry_count, stored, *checks = (
        _HEADER.unpack(header)
    )
    tables_check, body_check, check = checks
    if magic != _MAGIC or own != start or check != xxhash.xxh3_64_intdigest(header[:-8]):
        raise damage(name, f"has no group at {start}")
    entry_bytes, chunk_bytes = entry_count * ENTRY.itemsize, chunk_count * CHUNK.itemsize
    body = start + _HEADER.size + entry_bytes + chunk_bytes
    if body + stored > size:
        raise damage(name, "ends within a group")
    tables = file.pread(body - start - _HEADER.size, start + _HEADER.size)
    if xxhash.xxh3_64_intdigest(tables) != tables_check:
        raise damage(name, f"has a damaged group at {start}")
    chunks = np.frombuffer(tables[entry_bytes:], dtype=CHUNK)
    return Group(
        sequence,
        start,
        durable,
        previous,
        check,
        body,
        body + stored,
        body_check,
        np.frombuffer(tables[:entry_bytes], dtype=ENTRY),
        ChunkMap(name, chunks, body),
    )


def later_group(file: File, start: int, size: int) -> bool:
    """Whether a group lies behind `start` that knew the file durable beyond it.

    What follows a torn group may be whole: the kernel writes pages back in any order.
    """
    overlap = _HEADER.size - 1
    for at in range(start, size, _SEARCH_BYTES):
        data = file.pread(min(_SEARCH_BYTES + overlap, size - at), at)
        found = data.find(_MAGIC)
        while found >= 0:
            header = data[found : found + _HEADER.size]
            if len(header) == _HEADER.size:
                is_whole = xxhash.xxh3_64_intdigest(header[:-8]) == _HEADER.unpack(header)[-1]
                own, durable = _HEADER.unpack(header)[2:4]
                if is_whole and own == at + found and durable > start:
                    return True
            found = data.find(_MAGIC, found + 1)
    return False


class GroupWriter(UndoWriter):
    """Appends groups to an open pass; nothing is durable before the caller's fdatasync.

    :param last: the last group that is durable, if there is one; `end` is where it ends.
    """

    def __init__(self, file: File, name: str, last: Sequence[Group], end: int) -> None:
        super().__init__(file)
        self.groups: list[Group] = []
        self.end = end
        self._name = name
        self._durable = end
        self._sequence = last[0].sequence + 1 if last else 0
        self._previous = last[0].check if last else 0
        self._stored: list[bytes] = []
        self._raw_before = 0

    def _store(self, stored: bytes) -> None:
        self._stored.append(stored)

    def _added(self) -> None:
        """End the group when it is large enough."""
        is_large = self.raw_bytes - self._raw_before >= GROUP_BYTES_MAX
        if is_large or len(self._tables) >= GROUP_TABLES_MAX:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last group."""
        if not self._tables:
            return
        self._write_chunks(memoryview(self._pending))
        table, chunks = self._take_table(), np.array(self._chunks, dtype=CHUNK)
        tables, body = table.tobytes() + chunks.tobytes(), b"".join(self._stored)
        fields = (
            *(_MAGIC, self._sequence, self.end, self._durable, self._previous),
            *(len(chunks), len(table), len(body)),
            *(xxhash.xxh3_64_intdigest(tables), xxhash.xxh3_64_intdigest(body)),
        )
        check = xxhash.xxh3_64_intdigest(_HEADER.pack(*fields, 0)[:-8])
        self._file.pwritev([_HEADER.pack(*fields, check), tables, body], self.end)
        start = self.end
        self.end = start + _HEADER.size + len(tables) + len(body)
        self.groups.append(read_group(self._file, self._name, start, self.end))
        self._sequence, self._previous = self._sequence + 1, check
        self._tables, self._chunks, self._stored = [], [], []
        self._pending = bytearray()
        self._raw_before = self.raw_bytes


class GroupTables:
    """What a view needs of one group; the same shape as `PassTables`.

    :raises IntegrityError: it is damaged.
    """

    def __init__(self, file: File, info: PassInfo) -> None:
        group = read_group(file, info.name, info.start, info.start + info.stored_bytes)
        self.runs = group.table
        """The entries; of volumes that grew there are some when the pass is closed."""
        self.chunks = group.chunk_map
