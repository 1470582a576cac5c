"""Journal records: the 72-byte header, its checks, and the scanner that trusts nothing.

```
  0    magic GMRC │ type u8 │ flags u8 │ volume u16 │ LSN u64
 16    offset u64 │ length u64 │ wall clock u64 │ LSN known durable u64
 48    payload length u32 │ previous check u32 │ payload check u64 │ check u64
 72    payload, zero padding to a multiple of 8
```
The check is seeded with the segment's salt and covers the LSN, so that a record of an earlier use
of the file, or a guest's copy of a record in its data, is never taken for a record of this log.
Deliberately not here: files and segments (`segment`, `journal`), what an invalid record means
(`recovery`).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from geomirror.errors import IntegrityError
from geomirror.volume.store import Buffer

HEADER_BYTES = 72
ALIGNMENT = 8
MAGIC = b"GMRC"

FIELDS = struct.Struct("<4sBBHQQQQQIIQ")
"""The first 64 bytes of a header; the check of them follows."""
BATCH_KIND = struct.Struct("<4sBBH")
BATCH_SIZES = struct.Struct("<QQQI")
BATCH_FIELDS = struct.Struct("<8sQQ28sIQ")
"""`FIELDS` in pieces, of which the two first are of many records: packing a field costs as much as
hashing 200 bytes."""
assert BATCH_KIND.size == 8
assert BATCH_SIZES.size == 28
assert BATCH_FIELDS.size == FIELDS.size
CHECK = struct.Struct("<Q")
_HEADER = struct.Struct("<4sBBHQQQQQIIQQ")
"""Both at once."""
assert FIELDS.size + CHECK.size == HEADER_BYTES

PADS = tuple(bytes(length) for length in range(ALIGNMENT))
"""Zero padding by length."""


class RecordType(IntEnum):
    """What a record says; `docs/disk_format.md` has the payloads."""

    WRITE = 1
    ZERO = 2
    TRIM = 3
    BLOCKS = 4
    FILL = 5
    EPOCH = 6
    MARK = 7
    RESIZE = 8
    GENERATION = 9


DATA_KINDS = frozenset(
    (
        RecordType.WRITE,
        RecordType.ZERO,
        RecordType.TRIM,
        RecordType.BLOCKS,
        RecordType.RESIZE,
    )
)
"""Records that clients and peers ask for: not those that seal what was taken in."""

_KINDS = {int(kind): kind for kind in RecordType}


class RecordInfo(msgspec.Struct, frozen=True, gc=False):
    """A record without its payload. Lengths and offsets in bytes."""

    kind: RecordType
    flags: int
    volume: int
    lsn: int
    offset: int
    length: int
    wall_ns: int
    payload_length: int

    @property
    def address(self) -> int:
        """Where the payload starts."""
        return self.lsn + HEADER_BYTES

    @property
    def end_lsn(self) -> int:
        """Where the next record of the segment starts, if there is one."""
        return self.lsn + record_bytes(self.payload_length)


def record_bytes(payload_length: int) -> int:
    """Bytes that a record with such a payload takes in its segment."""
    return HEADER_BYTES + payload_length + (-payload_length & (ALIGNMENT - 1))


def pack_header(
    info: RecordInfo, *, lsn: int, durable_lsn: int, previous: int, payload_check: int, salt: int
) -> tuple[bytes, int]:
    """A record's header and its check; the record goes to `lsn`, whatever `info.lsn` says.

    `BatchPlan.add_writes` does the same without a `RecordInfo`: it is the hot path.

    :param previous: check of the record before this one in the log.
    """
    fields = FIELDS.pack(
        MAGIC,
        info.kind,
        info.flags,
        info.volume,
        lsn,
        info.offset,
        info.length,
        info.wall_ns,
        durable_lsn,
        info.payload_length,
        previous & 0xFFFFFFFF,
        payload_check,
    )
    check = xxh3_64_intdigest(fields, salt)
    return fields + CHECK.pack(check), check


class Scan(NamedTuple):
    """Where a scan of one buffer stopped.

    `consumed` bytes held valid records. `missing` is 0 when the next record is invalid, otherwise
    how many bytes from `consumed` on are wanted to judge it.
    """

    consumed: int
    missing: int
    check: int | None
    durable_lsn: int


def scan_records(
    data: memoryview,
    lsn: int,
    limit_lsn: int,
    salt: int,
    check: int | None,
    found: list[RecordInfo],
    checks: list[int],
) -> Scan:
    """Append every valid record of `data` to `found` until the first invalid or incomplete one.

    :param lsn: position of `data[0]`.
    :param limit_lsn: no record may end beyond it (end of the segment, or where the log leaves it).
    :param check: header check of the record before; None accepts any for the first record.
    :param checks: receives the payload check of each record found.
    :raises IntegrityError: a record with valid checks is of an unknown type: newer software.
    """
    position, size = 0, len(data)
    durable_lsn = 0
    unpack, digest = _HEADER.unpack_from, xxh3_64_intdigest
    while True:
        body = position + HEADER_BYTES
        if lsn + body > limit_lsn:
            return Scan(position, 0, check, durable_lsn)
        if body > size:
            return Scan(position, HEADER_BYTES, check, durable_lsn)
        fields = unpack(data, position)
        own, length = fields[12], fields[9]
        if (
            fields[0] != MAGIC
            or fields[4] != lsn + position
            or (check is not None and fields[10] != check & 0xFFFFFFFF)
            or digest(data[position : position + 64], salt) != own
        ):
            return Scan(position, 0, check, durable_lsn)
        end = body + length + (-length & 7)
        if lsn + end > limit_lsn:
            return Scan(position, 0, check, durable_lsn)
        if end > size:
            return Scan(position, end - position, check, durable_lsn)
        if length and digest(data[body : body + length]) != fields[11]:
            return Scan(position, 0, check, durable_lsn)
        found.append(_info(fields))
        checks.append(fields[11])
        check = own
        if fields[8] > durable_lsn:
            durable_lsn = fields[8]
        position = end


def _info(fields: tuple[Any, ...]) -> RecordInfo:
    _, number, flags, volume, lsn, offset, length, wall_ns, _, payload_length, *_ = fields
    kind = _KINDS.get(number)
    if kind is None:
        raise IntegrityError(f"record at LSN {lsn} has the unknown type {number}")
    return RecordInfo(kind, flags, volume, lsn, offset, length, wall_ns, payload_length)


def parse_record(data: Buffer, lsn: int, limit_lsn: int, salt: int) -> RecordInfo | None:
    """The record at the start of `data` if header and payload are valid, else None."""
    found: list[RecordInfo] = []
    view = memoryview(data)
    scan_records(view, lsn, limit_lsn, salt, None, found, [])
    return found[0] if found else None


def parse_header(data: Buffer, lsn: int, salt: int) -> RecordInfo | None:
    """The header at the start of `data` if its check is valid; the payload is not looked at."""
    fields = FIELDS.unpack_from(data)
    if fields[0] != MAGIC or fields[4] != lsn:
        return None
    if xxh3_64_intdigest(memoryview(data)[:64], salt) != CHECK.unpack_from(data, 64)[0]:
        return None
    return _info(fields)


def find_durable_lsn(data: bytes, lsn: int, salt: int) -> int:
    """The highest "known durable" LSN of any valid header in `data`, 0 if there is none.

    Used behind the first invalid record: one later header is enough to prove that what is missing
    was durable. Headers lie at multiples of 8, like `lsn`.
    """
    highest = 0
    view = memoryview(data)
    position = data.find(MAGIC)
    while 0 <= position <= len(data) - HEADER_BYTES:
        if position % ALIGNMENT == 0:
            fields = FIELDS.unpack_from(data, position)
            if fields[4] == lsn + position and fields[8] > highest:
                own = CHECK.unpack_from(data, position + 64)[0]
                if xxh3_64_intdigest(view[position : position + 64], salt) == own:
                    highest = fields[8]
        position = data.find(MAGIC, position + 1)
    return highest
