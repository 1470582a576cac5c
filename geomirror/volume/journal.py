"""The journal: an endless log of records in a bounded ring of segments.

```
 lowest pin                                        durable_lsn          end_lsn
     ▼                                                  ▼                  ▼
 ┌───────┐ ┌───────────────┐ ┌───────────────┐ ┌────────────────────────────┐   ┌───────┐
 │ n     │ │ n+1           │ │ n+2           │ │ n+3: the one being written │   │ spare │
 └───────┘ └───────────────┘ └───────────────┘ └────────────────────────────┘   └───────┘
```
Invariants: LSNs grow and are never reused; a record is durable only when its segment's data *and*
directory entry are; nothing at or above a pin is recycled; a failed batch leaves no trace.
Deliberately not here: what records mean (`engine`), reading a log after a crash (`recovery`).
"""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64

from geomirror.environment import Entropy
from geomirror.errors import IntegrityError, JournalFullError, StorageError
from geomirror.limits import Limits
from geomirror.volume.journal_jobs import Health, Pin, SpareJob, SparePool, SyncJob, TrimJob
from geomirror.volume.journal_plan import BatchPlan, LogEnd, PlanPart, Write
from geomirror.volume.record import (
    DATA_KINDS,
    HEADER_BYTES,
    RecordInfo,
    RecordType,
    parse_header,
    parse_record,
    record_bytes,
)
from geomirror.volume.segment import (
    DIRECTORY,
    SEGMENT_HEADER_BYTES,
    Segment,
    SegmentHeader,
    read_segment_header,
    segment_name,
    void_bytes,
)
from geomirror.volume.store import Buffer, File, Store

__all__ = ["Journal", "Pin", "SpareJob", "SyncJob", "TrimJob", "Write"]


class Journal:
    """One resource's journal. All methods but `read*` belong to one thread (the loop)."""

    def __init__(
        self,
        store: Store,
        limits: Limits,
        entropy: Entropy,
        *,
        resource_id: bytes,
        journal_bytes: int,
        segments: Sequence[Segment],
        headers: Sequence[SegmentHeader],
        end: LogEnd,
        spares: Sequence[str] = (),
    ) -> None:
        """Take over an existing log whose every byte below `end.end_lsn` is durable.

        Use `create` or `recovery.recover_journal`. The last segment is the one to go on in.

        :param headers: of the segments whose header is known.
        """
        assert journal_bytes >= 4 * limits.segment_bytes
        assert len(resource_id) == 16
        assert segments[-1].number == end.number
        self._end = end
        self.end_lsn = end.end_lsn
        """Behind the last record; the next one lies here or opens a new segment."""
        self.durable_lsn = end.end_lsn
        self.bytes_total = journal_bytes
        self.resource_id = resource_id
        self._store = store
        self._entropy = entropy
        self._segment_bytes = limits.segment_bytes
        self._payload_bytes_max = limits.record_payload_bytes_max
        self._waste_bytes = record_bytes(limits.record_payload_bytes_max)
        """What may stay empty at the end of a segment."""
        self._segments_max = journal_bytes // limits.segment_bytes
        # Replaced, never changed: readers on other threads look segments up without a lock.
        self._segments = {segment.number: segment for segment in segments}
        self._headers = {header.number: header for header in headers}
        self._current = segments[-1]
        self._spares = SparePool(store, limits, spares, current=end.number)
        self._is_trimming = False
        self._unsynced: dict[int, File] = {}
        self._is_directory_unsynced = False
        self._syncing: list[SyncJob] = []
        self._pins: dict[int, Pin] = {}
        self._health = Health()

    @classmethod
    def create(
        cls,
        store: Store,
        limits: Limits,
        entropy: Entropy,
        *,
        resource_id: bytes,
        journal_bytes: int,
        first_segment: int = 1,
    ) -> Journal:
        """Make an empty journal, durable on return. Blocking.

        :raises StorageError: no space, or a journal is there already.
        """
        assert first_segment >= 1
        base = first_segment * limits.segment_bytes
        salt = int.from_bytes(entropy.token_bytes(8), "little")
        header = SegmentHeader(
            first_segment, limits.segment_bytes, salt, resource_id, 0, base, base
        )
        file = store.create(segment_name(first_segment), limits.segment_bytes, zeroed=True)
        file.pwritev([header.pack()], 0)
        file.fdatasync()
        store.sync_directory(DIRECTORY)
        return cls(
            store,
            limits,
            entropy,
            resource_id=resource_id,
            journal_bytes=journal_bytes,
            segments=[Segment(first_segment, file)],
            headers=[header],
            end=LogEnd(
                limits.segment_bytes,
                resource_id,
                number=first_segment,
                salt=salt,
                end_lsn=header.start_lsn,
                check=0,
                number_next=first_segment + 1,
            ),
        )

    def holds(self, address: int) -> bool:
        """Whether the segment of an address is there. A crash within a trim may leave any of the
        segments that were being removed, so holding one says nothing of its neighbours."""
        return address // self._segment_bytes in self._segments

    @property
    def bytes_used(self) -> int:
        """Bytes of the segments that the log holds, up to `end_lsn`."""
        return len(self._segments) * self._segment_bytes - self._segment_limit() + self.end_lsn

    def void_bytes(self, lsn: int) -> int:
        """Bytes above a record that none takes: headers, and what a restart leaves of a segment."""
        return void_bytes(tuple(self._headers.values()), lsn, self.end_lsn)

    @property
    def first_segment(self) -> int:
        """Number of the lowest segment that is still there."""
        return min(self._segments)

    @property
    def failure(self) -> str:
        """Why the journal refuses all use, "" while it does not."""
        return self._health.failure

    def room_bytes(self) -> int:
        """Payload and header bytes that `append` surely takes now, in any split into records."""
        current = self._segment_limit() - self._end.end_lsn - self._waste_bytes
        usable = self._segment_bytes - SEGMENT_HEADER_BYTES - self._waste_bytes
        others = max(0, self._segments_free(is_data=True)) * usable
        return others + current if current > 0 else others

    def append(self, writes: Sequence[Write], wall_ns: int, *, flags: int = 0) -> list[int]:
        """Append a batch and return its LSNs. Not durable before a sync past the last of them.

        One `pwritev` per segment touched. Payloads are not kept after the call.

        :param writes: payloads of at most `limits.record_payload_bytes_max` bytes; WRITE only.
        :param wall_ns: Unix time in ns, for rewind points only.
        :param flags: of every record: low byte of the cut number.
        :raises JournalFullError: no segment is free. :raises NoSpaceError: the disk is full.
            In all cases of error nothing changed.
        """
        if self._health.failure:
            self._health.require()
        plan = BatchPlan(self._end, self.durable_lsn, self._entropy)
        lsns = plan.add_writes(writes, wall_ns, self._payload_bytes_max, flags)
        self._commit(plan, is_data=True)
        return lsns

    def append_record(
        self,
        kind: RecordType,
        parts: Sequence[Buffer],
        *,
        volume: int = 0,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        wall_ns: int,
    ) -> int:
        """Append one record whose payload is all parts, and return its LSN; as `append` otherwise.

        Kinds that do not carry user data (EPOCH, FILL, MARK, …) may use two segments more than
        `append`: an epoch must be sealed before a full journal can be trimmed.
        """
        self._health.require()
        digest = xxh3_64()
        size = 0
        for buffer in parts:
            digest.update(buffer)
            size += len(buffer)
        info = RecordInfo(kind, flags, volume, 0, offset, length, wall_ns, size)
        plan = BatchPlan(self._end, self.durable_lsn, self._entropy)
        lsn = plan.add_record(info, digest.intdigest() if size else 0, parts)
        self._commit(plan, is_data=kind in DATA_KINDS)
        return lsn

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes of one record's payload; on any thread, for what a pin holds."""
        return self._file_at(address, length).pread(length, address % self._segment_bytes)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Like `read`, into memory that is there already."""
        self._file_at(address, len(buffer)).pread_into(buffer, address % self._segment_bytes)

    def try_read(self, address: int, length: int) -> bytes | bytearray | None:
        """Like `read` if that needs no waiting for a disk, else None."""
        return self._file_at(address, length).try_read(length, address % self._segment_bytes)

    def _file_at(self, address: int, length: int) -> File:
        number, offset = divmod(address, self._segment_bytes)
        assert number in self._segments, f"address {address} is not pinned"
        assert offset + length <= self._segment_bytes
        return self._segments[number].file

    def read_record(self, lsn: int) -> tuple[RecordInfo, bytes]:
        """The record at `lsn` and its payload, verified; on any thread, for what a pin holds.

        :raises IntegrityError: no valid record lies there.
        """
        number, offset = divmod(lsn, self._segment_bytes)
        salt = self._salt_of(number)
        info = parse_header(self.read(lsn, HEADER_BYTES), lsn, salt)
        if info is not None and offset + record_bytes(info.payload_length) <= self._segment_bytes:
            data = self.read(lsn, record_bytes(info.payload_length))
            info = parse_record(data, lsn, lsn + len(data), salt)
            if info is not None:
                return info, data[HEADER_BYTES : HEADER_BYTES + info.payload_length]
        raise IntegrityError(f"no valid record at offset {offset} of {segment_name(number)}")

    def begin_sync(self) -> SyncJob:
        """A job that makes everything appended so far durable; appending may go on meanwhile."""
        if self._health.failure:
            self._health.require()
        self._spares.before_sync(self._current, self.end_lsn)
        files, directory = [*self._unsynced.values()], self._is_directory_unsynced
        for running in self._syncing:  # It vouches for nothing yet: this one covers its files, too.
            files += [file for file in running.files if file not in files]
            directory |= running.directory
        job = SyncJob(self._store, self._health, self.end_lsn, files, directory=directory)
        self._unsynced = {}
        self._is_directory_unsynced = False
        self._syncing.append(job)
        return job

    def complete_sync(self, job: SyncJob) -> None:
        """Take note that `job` ran: `durable_lsn` is at least `job.lsn`.

        :raises StorageError: it failed; the journal refuses all use.
        """
        self._health.require()
        assert job.is_done
        self._syncing.remove(job)
        self.durable_lsn = max(self.durable_lsn, job.lsn)

    def pin(self, lsn: int, owner: str) -> Pin:
        """Keep everything at or above `lsn`. While there is no pin at all, nothing is trimmed."""
        return Pin(self._pins, lsn, owner)

    def trim_job(self) -> TrimJob | None:
        """A job that recycles what lies wholly below the lowest pin; None when there is nothing."""
        self._health.require()
        if self._is_trimming:
            return None
        surplus = self._spares.take_surplus(len(self._segments) - self._segments_max)
        items: list[tuple[Segment, str]] = []
        lowest = min([pin.lsn for pin in self._pins.values()], default=0)
        if not surplus and (self.first_segment + 1) * self._segment_bytes > lowest:
            return None  # As nearly always when it is asked.
        for number in sorted(self._segments):
            segment = self._segments[number]
            is_needed = (number + 1) * self._segment_bytes > lowest or segment is self._current
            if is_needed or self._is_syncing(segment):
                break
            items.append((segment, self._spares.new_name(len(items))))
        if not items and not surplus:
            return None
        self._is_trimming = True
        return TrimJob(self._store, items, surplus)

    def complete_trim(self, job: TrimJob) -> None:
        """Forget the segments that `job` took out, also when it failed half-way."""
        self._is_trimming = False
        gone = {segment.number for segment, _ in job.done}
        self._segments = {n: s for n, s in self._segments.items() if n not in gone}
        for segment, spare in job.done:
            self._headers.pop(segment.number, None)
            segment.file.close()
            if spare:
                self._spares.names.append(spare)

    def spare_job(self) -> SpareJob | None:
        """A job that makes a zeroed spare; None when none is wanted or the journal is full."""
        self._health.require()
        return self._spares.job(self._segments_max - len(self._segments))

    def complete_spare(self, job: SpareJob) -> None:
        """Take the spare over; after a failed job another one may be asked for."""
        self._spares.complete(job)

    def close(self) -> None:
        """Close all files; nothing is synced."""
        for segment in self._segments.values():
            segment.file.close()
        self._segments = {}

    def _segment_limit(self) -> int:
        return (self._current.number + 1) * self._segment_bytes

    def _segments_free(self, *, is_data: bool) -> int:
        # Data leaves one, bookkeeping may go one over.
        return self._segments_max - len(self._segments) + (-1 if is_data else 1)

    def _commit(self, plan: BatchPlan, *, is_data: bool) -> None:
        """Write a batch, the part in the current segment last: nothing has changed before that."""
        first, others = plan.parts[0], plan.parts[1:]
        opened: list[Segment] = []
        if others:
            self._require_free(len(others), is_data=is_data)
        try:
            for part in others:
                opened.append(self._open_segment(part.number))
                assert part.header is not None
                opened[-1].file.pwritev([part.header.pack(), *part.buffers], 0)
            if first.buffers:
                self._current.file.pwritev(first.buffers, first.offset)
        except StorageError:
            self._discard(opened)
            raise
        if first.buffers:
            self._unsynced[first.number] = self._current.file
        if opened:
            self._adopt(opened, others)
        self._end = plan.end
        self.end_lsn = plan.end.end_lsn

    def _require_free(self, count: int, *, is_data: bool) -> None:
        if count > self._segments_free(is_data=is_data):
            raise JournalFullError(
                f"journal of resource {self.resource_id.hex()} is full: "
                f"{self.bytes_used} of {self.bytes_total} bytes are still needed"
            )

    def _open_segment(self, number: int) -> Segment:
        # A number whose file could not be written is not used again.
        self._end.number_next = number + 1
        self._is_directory_unsynced = True
        return self._spares.open_segment(number)

    def _adopt(self, opened: list[Segment], parts: list[PlanPart]) -> None:
        self._spares.segment_opened()
        self._segments = {**self._segments, **{segment.number: segment for segment in opened}}
        for segment, part in zip(opened, parts, strict=True):
            assert part.header is not None
            self._unsynced[segment.number] = segment.file
            self._headers[segment.number] = part.header
        self._current = opened[-1]

    def _discard(self, opened: list[Segment]) -> None:
        """Remove segments of a failed batch: their headers would cut the log at its old end."""
        for segment in opened:
            segment.file.close()
            try:
                self._store.unlink(segment_name(segment.number))
            except StorageError as error:
                self._health.failure = f"journal stopped: {error.message}"

    def _is_syncing(self, segment: Segment) -> bool:
        is_begun = any(segment.file in job.files for job in self._syncing)
        return is_begun or segment.number in self._unsynced

    def _salt_of(self, number: int) -> int:
        header = self._headers.get(number)
        if header is None:
            file = self._file_at(number * self._segment_bytes, SEGMENT_HEADER_BYTES)
            header = read_segment_header(file, number, self._segment_bytes, self.resource_id)
            self._headers[number] = header
        return header.salt
