"""Journal segments: names, header, and the plan of which segments form the log.

```
 0           4096                                                 segment_bytes
 ┌───────────┬────────┬────────┬─────┬────────┬──────────────────┐
 │ header ×2 │ record │ record │  …  │ record │ too short: a hole │
 └───────────┴────────┴────────┴─────┴────────┴──────────────────┘
```
The log leaves one segment for the next at the next one's `previous_end`: all that lies at or above
it in lower segments is void. So a recovery cuts a log by adding a segment, not by changing one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from geomirror.errors import IntegrityError
from geomirror.volume.store import Buffer, File, Store

DIRECTORY = "journal"
SEGMENT_HEADER_BYTES = 4096
SEGMENT_MAGIC = b"GMSEGv1\0"
FORMAT_VERSION = 1

_HEADER = struct.Struct("<8sIIQQQ16sQQQ")
_CHECK = struct.Struct("<Q")
_COPY_OFFSET = 2048
assert _HEADER.size == 80


@dataclass(frozen=True)
class SegmentHeader:
    """First 4096 bytes of a segment.

    `previous_check` is the check of the last record before this segment, 0 if it is not known;
    `previous_end` the LSN behind that record; `durable_lsn` what was known durable at opening.
    """

    number: int
    segment_bytes: int
    salt: int
    resource_id: bytes
    previous_check: int
    durable_lsn: int
    previous_end: int

    @property
    def start_lsn(self) -> int:
        """Where the first record lies."""
        return self.number * self.segment_bytes + SEGMENT_HEADER_BYTES

    @property
    def end_lsn(self) -> int:
        """Behind the last byte of the segment."""
        return (self.number + 1) * self.segment_bytes

    def pack(self) -> bytes:
        """The 4096 bytes; the header is there twice, in different sectors.

        A single bad sector must not hide a segment of durable records.
        """
        fields = _HEADER.pack(
            SEGMENT_MAGIC,
            FORMAT_VERSION,
            0,
            self.number,
            self.segment_bytes,
            self.salt,
            self.resource_id,
            self.previous_check,
            self.durable_lsn,
            self.previous_end,
        )
        one = fields + _CHECK.pack(xxh3_64_intdigest(fields))
        pad = bytes(_COPY_OFFSET - len(one))
        return one + pad + one + pad


def parse_segment_header(
    data: Buffer, number: int, segment_bytes: int, resource_id: bytes
) -> SegmentHeader | None:
    """The header if one of its copies is valid and belongs to this resource and number."""
    for offset in (0, _COPY_OFFSET):
        if len(data) < offset + _HEADER.size + _CHECK.size:
            return None
        fields = _HEADER.unpack_from(data, offset)
        head = memoryview(data)[offset : offset + _HEADER.size]
        check = _CHECK.unpack_from(data, offset + _HEADER.size)[0]
        if fields[0] != SEGMENT_MAGIC or xxh3_64_intdigest(head) != check:
            continue
        if (fields[1], fields[3], fields[4], fields[6]) != (
            FORMAT_VERSION,
            number,
            segment_bytes,
            resource_id,
        ):
            continue
        return SegmentHeader(
            number, segment_bytes, fields[5], fields[6], fields[7], fields[8], fields[9]
        )
    return None


def read_segment_header(
    file: File, number: int, segment_bytes: int, resource_id: bytes
) -> SegmentHeader:
    """The header of an open segment. Blocking. :raises IntegrityError: it has no valid one."""
    data = file.pread(SEGMENT_HEADER_BYTES, 0)
    header = parse_segment_header(data, number, segment_bytes, resource_id)
    if header is None:
        raise IntegrityError(f"{segment_name(number)} has no valid header")
    return header


def void_bytes(headers: Iterable[SegmentHeader], begin_lsn: int, end_lsn: int) -> int:
    """Bytes between two ends of records that no record takes, by the headers of the segments."""
    found, limit = 0, end_lsn
    for header in sorted(headers, key=lambda each: each.number, reverse=True):
        if header.start_lsn <= begin_lsn:
            break
        # Above the limit the log has left the segment for a higher one, and its header is void too.
        if header.start_lsn <= limit:
            found += header.start_lsn - max(header.previous_end, begin_lsn)
            limit = header.previous_end
    return found


def segment_name(number: int) -> str:
    """Name of a segment in the store."""
    return f"{DIRECTORY}/{number:016x}.seg"


def spare_name(index: int) -> str:
    """Name of a spare segment in the store."""
    return f"{DIRECTORY}/spare-{index}.seg"


def rewritten_name(number: int) -> str:
    """Name of a segment that recovery is still writing; void until it is renamed."""
    return f"{DIRECTORY}/{number:016x}.new"


def is_rewritten_name(name: str) -> bool:
    """Whether a file name (without the directory) is one of `rewritten_name`."""
    return name.endswith(".new")


def segment_number(name: str) -> int | None:
    """The number in a segment's file name (without the directory), None for any other file."""
    stem, dot, suffix = name.partition(".")
    if dot == "" or suffix != "seg" or len(stem) != 16:
        return None
    if any(letter not in "0123456789abcdef" for letter in stem):
        return None
    return int(stem, 16)


def spare_index(name: str) -> int | None:
    """The index in a spare's file name (without the directory), None for any other file."""
    if not (name.startswith("spare-") and name.endswith(".seg")):
        return None
    digits = name[len("spare-") : -len(".seg")]
    return int(digits) if digits.isascii() and digits.isdigit() else None


@dataclass(frozen=True)
class Segment:
    """An open segment of the journal."""

    number: int
    file: File


def segment_numbers(store: Store) -> list[int]:
    """Numbers of all segments there, ascending."""
    numbers = [segment_number(name) for name in store.list(DIRECTORY)]
    return sorted(number for number in numbers if number is not None)
