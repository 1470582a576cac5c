"""Writes the unproven end of a log again, into new segments that appear all at once.

The new segments have a temporary name until they are durable. The rename of the first one is what
makes all of them part of the log, and what is above its `previous_end` in older segments void.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from geomirror.environment import Entropy
from geomirror.errors import IntegrityError
from geomirror.limits import MIB
from geomirror.volume.epoch_record import decode_epoch, encode_epoch
from geomirror.volume.epoch_table import ENTRY, KIND_DATA
from geomirror.volume.journal_plan import BatchPlan, LogEnd
from geomirror.volume.record import HEADER_BYTES, RecordInfo, RecordType
from geomirror.volume.segment import (
    DIRECTORY,
    Segment,
    SegmentHeader,
    rewritten_name,
    segment_name,
)
from geomirror.volume.store import File, Store

_BATCH_BYTES = 4 * MIB
"""Payload held in memory before it is written."""

Read = Callable[[int, int], bytes]
"""(address, length) → bytes of the old segments."""


class Rewriter:
    """Collects records in log order, then `commit`s them."""

    def __init__(
        self, store: Store, entropy: Entropy, end: LogEnd, durable_lsn: int, spares: list[str]
    ) -> None:
        """:param end: the log's proven end; `number_next` is the first new segment's number.

        :param spares: names of spare segments; those that are used are taken out of the list.
        """
        self.moved: list[tuple[int, int]] = []
        self.records: list[RecordInfo] = []
        self.headers: list[SegmentHeader] = []
        self._old_lsns: list[int] = []
        self._boundary = end.end_lsn
        self._store = store
        self._entropy = entropy
        self._durable_lsn = durable_lsn
        self._spares = spares
        self._files: dict[int, File] = {}
        self._pending_bytes = 0
        self._plan = BatchPlan(end, durable_lsn, entropy)
        self._plan.open_segment()

    def add(self, old: RecordInfo, payload_check: int, read: Read) -> None:
        """Append a record that lay at `old.lsn`. Blocking.

        :raises IntegrityError: an EPOCH payload cannot be translated.
        """
        payload = read(old.address, old.payload_length) if old.payload_length else b""
        if old.kind is RecordType.EPOCH:
            payload = self._translate(payload, payload_check)
            payload_check = xxh3_64_intdigest(payload)
        # Other payloads keep the check they had: should this second read of the payload differ
        # from the verified one, the new record is invalid, not silently wrong.
        lsn = self._plan.add_record(old, payload_check, [payload])
        self.records.append(msgspec.structs.replace(old, lsn=lsn))
        self.moved.append((old.lsn, lsn))
        self._old_lsns.append(old.lsn)
        self._pending_bytes += len(payload)
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def commit(self) -> tuple[LogEnd, list[Segment]]:
        """Make everything durable and part of the log. Blocking.

        :returns: the log's new end and the new segments, ascending.
        """
        self._flush()
        first, *others = sorted(self._files)
        # Once it has its name, all of this is durable, and the next recovery may know it. Only in
        # the first header: the others have their names before the whole is in force.
        self.headers[0] = replace(self.headers[0], durable_lsn=self._plan.end.end_lsn)
        self._files[first].pwritev([self.headers[0].pack()], 0)
        for file in self._files.values():
            file.fdatasync()
        for number in others:
            self._store.rename(rewritten_name(number), segment_name(number))
        if others:
            self._store.sync_directory(DIRECTORY)
        self._store.rename(rewritten_name(first), segment_name(first))
        self._store.sync_directory(DIRECTORY)
        self.close()
        segments = [
            Segment(number, self._store.open(segment_name(number))) for number in [first, *others]
        ]
        return self._plan.end, segments

    def close(self) -> None:
        """Close the new files; without `commit` they stay void."""
        for file in self._files.values():
            file.close()

    def _flush(self) -> None:
        for part in self._plan.parts:
            if part.header is not None:
                self.headers.append(part.header)
                file = self._files[part.number] = self._create(part.number)
                file.pwritev([part.header.pack(), *part.buffers], 0)
            elif part.buffers:
                self._files[part.number].pwritev(part.buffers, part.offset)
        self._plan = BatchPlan(self._plan.end, self._durable_lsn, self._entropy)
        self._pending_bytes = 0

    def _create(self, number: int) -> File:
        name = rewritten_name(number)
        if self._spares:
            self._store.rename(self._spares.pop(), name)
            return self._store.open(name)
        return self._store.create(name, self._plan.end.segment_bytes)

    def _translate(self, payload: bytes, payload_check: int) -> bytes:
        """The EPOCH payload with every address of a moved record replaced."""
        if xxh3_64_intdigest(payload) != payload_check:
            raise IntegrityError("an epoch record changed while the journal was recovered")
        epoch, previous_lsn = decode_epoch(payload, entries_max=len(payload) // ENTRY.itemsize)
        table = epoch.table
        chosen = (table["kind"] == KIND_DATA) & (table["address"] >= np.uint64(self._boundary))
        if bool(np.any(chosen)):
            table["address"][chosen] = self._translated(
                table["address"][chosen].astype(np.int64), epoch.number
            )
        if previous_lsn >= self._boundary:
            index = bisect_right(self._old_lsns, previous_lsn) - 1
            if index < 0 or self._old_lsns[index] != previous_lsn:
                raise IntegrityError(f"epoch {epoch.number} names no epoch record before it")
            previous_lsn = self.moved[index][1]
        return encode_epoch(epoch, previous_lsn)

    def _translated(
        self, addresses: np.ndarray[tuple[int], np.dtype[np.int64]], number: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        old = np.array([old_lsn for old_lsn, _ in self.moved], dtype=np.int64)
        new = np.array([new_lsn for _, new_lsn in self.moved], dtype=np.int64)
        sizes = np.array([one.payload_length for one in self.records], dtype=np.int64)
        index = np.searchsorted(old, addresses, side="right") - 1
        inside = addresses - old[index] - HEADER_BYTES if len(old) else addresses
        if bool(np.any(index < 0)) or bool(np.any((inside < 0) | (inside >= sizes[index]))):
            raise IntegrityError(f"epoch {number} points at an address that no record holds")
        return new[index] + HEADER_BYTES + inside
