"""Header and footer of an undo file: what pass it is of, how large it is, and whether that is true.

```
 header 128 │ chunks … │ table, chunk table │ footer 32        format: docs/disk_format.md
```
The header says how long the file is and how much it holds, so that a start, which meets thousands,
reads nothing else of most of them. Files of earlier builds do not say so (0).
Deliberately not here: tables and contents (`undo_file`, `undo_tables`).
"""

from __future__ import annotations

import struct

import xxhash

from geomirror.errors import IntegrityError
from geomirror.volume.store import File
from geomirror.volume.undo_chunks import damage
from geomirror.volume.undo_faults import DAMAGED, FLAG_RESYNC, fault_of, flags_of
from geomirror.volume.undo_label import PassInfo, PassLabel

VERSION = 2
VERSION_GROUPS = 3
"""Made of the groups of an open pass: chunks may be short, areas are skipped."""
FOOTER = struct.Struct("<QQQ8s")
"""Where the table and the chunk table begin, check of both, `FOOTER_MAGIC`."""
FOOTER_MAGIC = b"GMUNDOE\0"

_MAGIC = b"GMUNDO1\0"
_HEADER = struct.Struct("<8sII16sQQIIQ32sQQ8xQ")
_VERSION_AT = struct.Struct("<8sI")
HEADER_BYTES = _HEADER.size
assert HEADER_BYTES == 128
assert FOOTER.size == 32


def pack_header(
    label: PassLabel, version: int, flags: int, counts: tuple[int, int], raw_bytes: int, size: int
) -> bytes:
    """A header.

    :param counts: of chunks and of entries. :param raw_bytes: old contents, uncompressed.
    :param size: of the whole file.
    """
    fields = (
        *(_MAGIC, version, flags, label.generation, label.from_epoch, label.to_epoch),
        *(*counts, label.wall_ns, label.chain_hash, raw_bytes, size),
    )
    return _HEADER.pack(*fields, xxhash.xxh3_64_intdigest(_HEADER.pack(*fields, 0)[:-8]))


def read_header(file: File, name: str) -> tuple[PassInfo, int, tuple[int, int], int]:
    """What pass the file is of, its version, how many chunks and entries it has, and the size that
    it was given (0: it does not say); nothing beyond its header is looked at.

    :raises IntegrityError: the header is damaged.
    """
    header = file.pread(HEADER_BYTES, 0)
    magic, version = _VERSION_AT.unpack_from(header)
    if magic != _MAGIC or version not in (VERSION, VERSION_GROUPS):
        raise damage(name, "has an unknown header")
    fields = _HEADER.unpack(header)
    flags, generation, from_epoch, to_epoch, *counts = fields[2:8]
    wall_ns, chain_hash, raw_bytes, size, check = fields[8:]
    if check != xxhash.xxh3_64_intdigest(header[:-8]) or from_epoch >= to_epoch:
        raise damage(name, "has a damaged header")
    is_resync = version == VERSION_GROUPS or bool(flags & FLAG_RESYNC)
    info = PassInfo(
        *(generation, from_epoch, to_epoch, wall_ns, chain_hash, name),
        *(fault_of(flags), is_resync, raw_bytes, file.size()),
    )
    return info, version, (counts[0], counts[1]), size


def mark_damaged(file: File, name: str) -> None:
    """Let a file's header say that it is damaged, durably; nothing else of it changes.

    :raises StorageError: it may say so or not; torn, it counts as damaged all the same.
    """
    try:
        read_header(file, name)
    except IntegrityError:
        return  # It says so.
    fields = list(_HEADER.unpack(file.pread(HEADER_BYTES, 0)))
    fields[2] |= flags_of(DAMAGED, is_resync=False)
    fields[-1] = xxhash.xxh3_64_intdigest(_HEADER.pack(*fields[:-1], 0)[:-8])
    file.pwritev([_HEADER.pack(*fields)], 0)
    file.fdatasync()
