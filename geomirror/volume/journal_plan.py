"""Lays a batch of records out over segments, without touching any file.

A plan is thrown away when writing it fails, so that a failed batch leaves the journal's state as it
was. What a failed batch left in a file behind the log's end cannot come back either: the next
record's chain check does not match it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import msgspec
from xxhash import xxh3_64_intdigest

from geomirror.environment import Entropy
from geomirror.volume.record import (
    BATCH_FIELDS,
    BATCH_KIND,
    BATCH_SIZES,
    CHECK,
    HEADER_BYTES,
    MAGIC,
    PADS,
    RecordInfo,
    pack_header,
    record_bytes,
)
from geomirror.volume.segment import SEGMENT_HEADER_BYTES, SegmentHeader
from geomirror.volume.store import Buffer

Write = tuple[int, int, int, int, Buffer | None]
"""(record type, volume, offset, length, payload) of a WRITE, ZERO or TRIM."""


class PlanPart(msgspec.Struct, eq=False):
    """What goes into one segment at `offset`; `header` is set when it opens that segment."""

    number: int
    offset: int
    salt: int
    header: SegmentHeader | None
    buffers: list[Buffer] = []


class LogEnd(msgspec.Struct, gc=False):
    """Where a log goes on.

    `number` and `salt` are of the segment being written, `end_lsn` is the position of the next
    record, `check` the header check of the last one, `number_next` the next segment's number.
    """

    segment_bytes: int
    resource_id: bytes
    number: int
    salt: int
    end_lsn: int
    check: int
    number_next: int


class BatchPlan:
    """The layout of one batch behind `end`; `end` itself is not changed."""

    def __init__(self, end: LogEnd, durable_lsn: int, entropy: Entropy) -> None:
        self.end = copy(end)
        self.durable_lsn = durable_lsn
        self._entropy = entropy
        offset = end.end_lsn - end.number * end.segment_bytes
        self.parts = [PlanPart(end.number, offset, end.salt, None)]

    def open_segment(self) -> PlanPart:
        """Leave the current segment for a new one."""
        end = self.end
        salt = int.from_bytes(self._entropy.token_bytes(8), "little")
        header = SegmentHeader(
            end.number_next,
            end.segment_bytes,
            salt,
            end.resource_id,
            end.check,
            self.durable_lsn,
            end.end_lsn,
        )
        part = PlanPart(header.number, SEGMENT_HEADER_BYTES, salt, header)
        self.parts.append(part)
        end.number, end.salt, end.end_lsn = header.number, salt, header.start_lsn
        end.number_next += 1
        return part

    def add_writes(
        self, writes: Sequence[Write], wall_ns: int, payload_max: int, flags: int = 0
    ) -> list[int]:
        """Add client writes and return their LSNs. The hot path."""
        end_of_log, part = self.end, self.parts[-1]
        position, check, salt = end_of_log.end_lsn, end_of_log.check, end_of_log.salt
        limit = (end_of_log.number + 1) * end_of_log.segment_bytes
        add, durable = part.buffers.append, self.durable_lsn
        pack, pack_check, digest = BATCH_FIELDS.pack, CHECK.pack, xxh3_64_intdigest
        lsns: list[int] = []
        like_kind = like_volume = like_length = -1
        for kind, volume, offset, length, payload in writes:
            if length != like_length or kind != like_kind or volume != like_volume:
                # What neighbours have in common, as nearly all of a batch, is packed once.
                like_kind, like_volume, like_length = kind, volume, length
                size = 0 if payload is None else length
                assert size <= payload_max
                needed = HEADER_BYTES + size + (-size & 7)
                first = BATCH_KIND.pack(MAGIC, kind, flags, volume)
                middle = BATCH_SIZES.pack(length, wall_ns, durable, size)
            end = position + needed
            if end > limit:
                end_of_log.end_lsn, end_of_log.check = position, check
                part = self.open_segment()
                add, salt, position = part.buffers.append, part.salt, end_of_log.end_lsn
                limit = (part.number + 1) * end_of_log.segment_bytes
                end = position + needed
            content_check = digest(payload) if size else 0  # type: ignore[arg-type]
            fields = pack(first, position, offset, middle, check & 0xFFFFFFFF, content_check)
            check = digest(fields, salt)
            add(fields + pack_check(check))
            if size:
                add(payload)  # type: ignore[arg-type]
                if size & 7:
                    add(PADS[-size & 7])
            lsns.append(position)
            position = end
        end_of_log.end_lsn, end_of_log.check = position, check
        return lsns

    def add_record(self, info: RecordInfo, payload_check: int, payload: Sequence[Buffer]) -> int:
        """Add one record with its payload and return its LSN; `info.lsn` is ignored."""
        end = self.end
        needed = record_bytes(info.payload_length)
        assert needed <= end.segment_bytes - SEGMENT_HEADER_BYTES
        if end.end_lsn + needed > (end.number + 1) * end.segment_bytes:
            self.open_segment()
        part, lsn = self.parts[-1], end.end_lsn
        header, end.check = pack_header(
            info,
            lsn=lsn,
            durable_lsn=self.durable_lsn,
            previous=end.check,
            payload_check=payload_check,
            salt=end.salt,
        )
        part.buffers += [header, *payload, PADS[-info.payload_length & 7]]
        end.end_lsn = lsn + needed
        return lsn
