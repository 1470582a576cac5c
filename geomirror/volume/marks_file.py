"""The file `marks` of a resource: its mark table, twice, so that one rotten copy costs nothing.

```
 copy: magic 8 │ version u32 │ body length u32 │ XXH3-128 16 │ body, JSON      at 0 and once more
```
It is replaced as a whole, before a checkpoint lets recovery skip the MARK records that it stands
for; what came later is in the journal.
"""

from __future__ import annotations

import struct

import msgspec
from xxhash import xxh3_128_digest

from geomirror.errors import IntegrityError
from geomirror.volume.marks import Mark, MarkTable
from geomirror.volume.store import Store

NAME = "marks"
FORMAT_VERSION = 1
_TEMPORARY = "marks.new"
_MAGIC = b"GMMARKS\0"
_HEADER = struct.Struct("<8sII16s")
_COVERED = struct.Struct("<II")
"""Version and body length: the part of the header that the digest covers."""
_ALIGNMENT = 4096
_BODY_BYTES_MAX = 64 << 20


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    marks: list[tuple[str, str, int, int, bool]]
    """Name, generation (hex), epoch, wall clock (ns), quiesced; ascending by epoch."""
    boundaries: list[int]


def pack_marks(table: MarkTable) -> bytes:
    """The content of the file."""
    marks = [
        (mark.name, mark.generation.hex(), mark.epoch, mark.wall_ns, mark.is_quiesced)
        for mark in table.marks()
    ]
    body = msgspec.json.encode(_Body(marks, list(table.saved_boundaries())))
    digest = xxh3_128_digest(_COVERED.pack(FORMAT_VERSION, len(body)) + body)
    copy = _HEADER.pack(_MAGIC, FORMAT_VERSION, len(body), digest) + body
    return copy + bytes(-len(copy) % _ALIGNMENT) + copy


def _parse_copy(data: bytes) -> MarkTable | None:
    if len(data) < _HEADER.size:
        return None
    magic, version, length, digest = _HEADER.unpack_from(data)
    body = data[_HEADER.size : _HEADER.size + length]
    if magic != _MAGIC or len(body) != length:
        return None
    if xxh3_128_digest(_COVERED.pack(version, length) + body) != digest:
        return None
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"file of marks has format version {version}, this software knows {FORMAT_VERSION}",
            hint="install the version of geomirror that wrote it",
        )
    try:
        found = msgspec.json.decode(body, type=_Body)
        marks = [Mark(row[0], bytes.fromhex(row[1]), *row[2:]) for row in found.marks]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return MarkTable(marks, found.boundaries)


def parse_marks(data: bytes) -> MarkTable | None:
    """The table of the first valid copy, None when there is none.

    :raises IntegrityError: it is of another format version.
    """
    table = _parse_copy(data)
    if table is not None:
        return table
    # Where the second copy begins is only known from the first one's length, which may be damaged.
    for at in range(_ALIGNMENT, len(data), _ALIGNMENT):
        if data.startswith(_MAGIC, at):
            table = _parse_copy(data[at:])
            if table is not None:
                return table
    return None


def load_marks(store: Store) -> MarkTable:
    """The table as it was saved last; empty when it never was. Blocking.

    :raises IntegrityError: both copies are damaged, so that names would be lost.
    """
    store.unlink(_TEMPORARY)
    if not store.exists(NAME):
        return MarkTable()
    file = store.open(NAME)
    try:
        table = parse_marks(file.pread(min(file.size(), _BODY_BYTES_MAX), 0))
        if table is None:
            raise IntegrityError(
                f"both copies in {file.name} are damaged: the names of marks are lost",
                hint="take the file away to go on without them; they come back from the primary",
            )
    finally:
        file.close()
    return table


class SaveMarksJob:
    """Makes one version of the table durable."""

    def __init__(self, store: Store, table: MarkTable) -> None:
        self.version = table.version
        self._store = store
        self._data = pack_marks(table)

    def run(self) -> None:
        """Blocking, on any thread. :raises StorageError: the file is as before."""
        store = self._store
        store.unlink(_TEMPORARY)
        file = store.create(_TEMPORARY, len(self._data))
        try:
            file.pwritev([self._data], 0)
            file.fdatasync()
        finally:
            file.close()
        store.rename(_TEMPORARY, NAME)
        store.sync_directory()
