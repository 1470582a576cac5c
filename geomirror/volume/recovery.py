"""Recovery of a journal: which records count, and whether what is missing was ever promised.

```
 scan_lsn                     durable            X: first invalid
    ▼                            ▼                     ▼
    ├── kept where they are ─────┤── written again ────┤ void, whatever follows
```
At X the log is cut, unless anything proves that the log was durable beyond X: then it is damaged,
and the resource is fenced. Everything above the proven-durable LSN is written again into new
segments, since an fdatasync of pages whose write-back failed before the crash proves nothing.
Running it again after a crash in the middle gives the same records.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.environment import Entropy
from geomirror.errors import FencedError, IntegrityError, StorageError
from geomirror.limits import MIB, Limits
from geomirror.volume.journal import Journal
from geomirror.volume.journal_plan import LogEnd
from geomirror.volume.record import (
    CHECK,
    HEADER_BYTES,
    RecordInfo,
    find_durable_lsn,
    scan_records,
)
from geomirror.volume.rewrite import Rewriter
from geomirror.volume.segment import (
    DIRECTORY,
    SEGMENT_HEADER_BYTES,
    Segment,
    SegmentHeader,
    is_rewritten_name,
    parse_segment_header,
    segment_name,
    segment_numbers,
    spare_index,
    spare_name,
)
from geomirror.volume.store import File, Store

_FENCED_HINT = 'keep the files, see "geomirror status", and fail over to a peer'
_CHUNK_BYTES = 4 * MIB
"""Read at once while looking behind the log."""
_SCAN_BYTES = MIB
"""Read at once while scanning, so that it is in the processor's cache when it is checked; a longer
record is read whole."""


@dataclass
class Recovered:
    """What recovery found. All of it is durable.

    `records` are those from `scan_lsn` on, in log order, at their positions now. `moved` has
    (old LSN, new LSN) of those that were written again. Addresses inside EPOCH payloads are
    already translated; LSN ranges of epochs are history and stay as they were.
    """

    journal: Journal
    records: list[RecordInfo]
    moved: list[tuple[int, int]]


@dataclass
class _Span:
    """One segment of the log: records lie in [header.start_lsn, limit_lsn)."""

    header: SegmentHeader
    limit_lsn: int
    file: File


class _Log:
    """The files of a log, and those of its segments that are part of it from `scan_lsn` on."""

    def __init__(self, store: Store, limits: Limits, resource_id: bytes, scan_lsn: int) -> None:
        self.segment_bytes = limits.segment_bytes
        self.first_number = scan_lsn // limits.segment_bytes
        self.numbers = segment_numbers(store)
        self.files = {number: store.open(segment_name(number)) for number in self.numbers}
        self.spans: list[_Span] = []
        self.earlier: list[SegmentHeader] = []
        """Of segments below, as far as they can be read: nothing of them is needed to start."""
        # A segment is void when a higher one says that the log left the lower segments at or
        # before its start: an earlier recovery cut the log there.
        limit = 1 << 63
        for number in reversed(self.numbers):
            is_earlier = number < self.first_number
            try:
                data = self.files[number].pread(SEGMENT_HEADER_BYTES, 0)
            except StorageError:
                if not is_earlier:
                    raise
                continue
            header = parse_segment_header(data, number, limits.segment_bytes, resource_id)
            if header is None or header.start_lsn >= limit:
                continue
            if is_earlier:
                self.earlier.append(header)
            else:
                self.spans.insert(0, _Span(header, min(limit, header.end_lsn), self.files[number]))
            limit = min(limit, header.previous_end)

    def read(self, address: int, length: int) -> bytes:
        """Bytes at an address."""
        number, offset = divmod(address, self.segment_bytes)
        return self.files[number].pread(length, offset)

    def find_durable_lsn(self, lsn: int) -> int:
        """The highest durable LSN that any valid record behind `lsn` proves."""
        highest = 0
        for span in self.spans:
            position = max(lsn, span.header.start_lsn)
            while position < span.limit_lsn:
                size = min(_CHUNK_BYTES, span.limit_lsn - position)
                # A header may lie across the end of a chunk.
                data = self.read(position, min(size + HEADER_BYTES, span.limit_lsn - position))
                highest = max(highest, find_durable_lsn(data, position, span.header.salt))
                position += size
        return highest

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


class _Scan:
    """Follows the log from `scan_lsn` to X, the first position without a valid record."""

    def __init__(self, log: _Log, scan_lsn: int) -> None:
        self.records: list[RecordInfo] = []
        self.payload_checks: list[int] = []
        self.position = scan_lsn
        self._buffer = memoryview(bytearray(_SCAN_BYTES))
        self.check: int | None = None
        self.durable_lsn = scan_lsn
        self.empty_end = (scan_lsn, 0)
        """Where the log ends and the last check if it holds no record from `scan_lsn` on."""
        for span in log.spans:
            header = span.header
            if self.position < header.start_lsn:
                is_next = self.check is None or header.previous_check in (0, self.check)
                if header.previous_end > self.position or not is_next:
                    break
            if self.position <= header.start_lsn:
                if self.position == scan_lsn:
                    # Not where the scan begins, but where the log really ended: a recovery that
                    # began at an older checkpoint must come by the same way.
                    self.empty_end = (header.previous_end, header.previous_check)
                self.position = header.start_lsn
                self.check = header.previous_check
            self._scan_span(span)

    def _scan_span(self, span: _Span) -> None:
        base = span.header.number * span.header.segment_bytes
        size = _SCAN_BYTES
        while self.position < span.limit_lsn:
            length = min(size, span.limit_lsn - self.position)
            if length > len(self._buffer):
                self._buffer = memoryview(bytearray(length))
            # One buffer for all: the memory of a new one has to be made by the kernel each time.
            data = self._buffer[:length]
            span.file.pread_into(data, self.position - base)
            scan = scan_records(
                data,
                self.position,
                span.limit_lsn,
                span.header.salt,
                self.check,
                self.records,
                self.payload_checks,
            )
            self.position += scan.consumed
            self.check = scan.check
            self.durable_lsn = max(self.durable_lsn, scan.durable_lsn)
            if scan.missing == 0:
                return
            size = max(_SCAN_BYTES, scan.missing)


def recover_journal(
    store: Store,
    limits: Limits,
    entropy: Entropy,
    *,
    resource_id: bytes,
    journal_bytes: int,
    scan_lsn: int,
    known_durable_lsn: int,
) -> Recovered:
    """Find the log from `scan_lsn` on, make all of it durable, and give the journal. Blocking.

    Segments below `scan_lsn` are kept, for peers that need them, until the journal is trimmed.

    :param known_durable_lsn: the log was durable up to there, as the superblock says.
    :raises FencedError: durable records are missing or damaged; nothing was changed.
    :raises NoSpaceError: no room for the new segment; the old ones are still what counts.
    """
    assert scan_lsn >= limits.segment_bytes
    log = _Log(store, limits, resource_id, scan_lsn)
    try:
        scan = _scan(log, scan_lsn, resource_id)
        durable_lsn = _prove(log, scan, known_durable_lsn, resource_id)
        kept = len(scan.records)
        while kept and scan.records[kept - 1].end_lsn > durable_lsn:
            kept -= 1
        end = _kept_end(log, scan, kept, resource_id, durable_lsn)
        spares = _take_spares(store, limits)
        rewriter = Rewriter(store, entropy, end, durable_lsn, spares)
        new_end, segments = _rewrite(rewriter, scan, kept, log)
        old = _drop_void(store, log, end.end_lsn)
    except BaseException:
        log.close()
        raise
    journal = Journal(
        store,
        limits,
        entropy,
        resource_id=resource_id,
        journal_bytes=journal_bytes,
        segments=old + segments,
        headers=[*log.earlier, *(span.header for span in log.spans), *rewriter.headers],
        end=new_end,
        spares=spares,
    )
    return Recovered(journal, scan.records[:kept] + rewriter.records, rewriter.moved)


def _rewrite(rewriter: Rewriter, scan: _Scan, kept: int, log: _Log) -> tuple[LogEnd, list[Segment]]:
    """Write the records that are not proven durable again; the log's new end and segments."""
    try:
        for info, check in zip(scan.records[kept:], scan.payload_checks[kept:], strict=True):
            rewriter.add(info, check, log.read)
        return rewriter.commit()
    finally:
        rewriter.close()


def _scan(log: _Log, scan_lsn: int, resource_id: bytes) -> _Scan:
    try:
        return _Scan(log, scan_lsn)
    except IntegrityError as error:
        raise FencedError(
            f"journal of resource {resource_id.hex()}: {error.message}",
            hint="install the version of geomirror that wrote it",
        ) from error


def _prove(log: _Log, scan: _Scan, known_durable_lsn: int, resource_id: bytes) -> int:
    """The LSN up to which the log is proven durable. :raises FencedError: it lies beyond X."""
    start_lsn = log.first_number * log.segment_bytes + SEGMENT_HEADER_BYTES
    if not log.spans and known_durable_lsn >= start_lsn:
        # X is not below what was durable then; but an empty log has a segment, too.
        raise FencedError(
            f"journal of resource {resource_id.hex()} is damaged: "
            f"{segment_name(log.first_number)} and all after it are missing or not readable",
            hint=_FENCED_HINT,
        )
    proofs = [known_durable_lsn, scan.durable_lsn, log.find_durable_lsn(scan.position)]
    proofs += [span.header.durable_lsn for span in log.spans]
    durable_lsn = max(proofs)
    last = (durable_lsn - 1) // log.segment_bytes
    if durable_lsn > scan.position and last not in log.files:
        raise FencedError(
            f"journal of resource {resource_id.hex()} is damaged: {segment_name(last)} is missing; "
            f"the log ends at LSN {scan.position}, but was durable up to LSN {durable_lsn}",
            hint=_FENCED_HINT,
        )
    if durable_lsn > scan.position:
        number, offset = divmod(scan.position, log.segment_bytes)
        raise FencedError(
            f"journal of resource {resource_id.hex()} is damaged: {segment_name(number)} has no "
            f"valid record at offset {offset} (LSN {scan.position}), "
            f"but the log was durable up to LSN {durable_lsn}",
            hint=_FENCED_HINT,
        )
    return durable_lsn


def _kept_end(log: _Log, scan: _Scan, kept: int, resource_id: bytes, durable_lsn: int) -> LogEnd:
    """Where the log is left for a new segment: behind the last record that stays in place."""
    end_lsn, check = scan.empty_end
    if kept:
        last = scan.records[kept - 1]
        end_lsn = last.end_lsn
        check = CHECK.unpack(log.read(last.lsn + HEADER_BYTES - CHECK.size, CHECK.size))[0]
    highest = max([*log.numbers, log.first_number, durable_lsn // log.segment_bytes])
    return LogEnd(
        log.segment_bytes,
        resource_id,
        number=end_lsn // log.segment_bytes,
        salt=0,
        end_lsn=end_lsn,
        check=check,
        number_next=highest + 1,
    )


def _take_spares(store: Store, limits: Limits) -> list[str]:
    """Remove leftovers of an earlier recovery; names of the spares that can be used."""
    spares: list[str] = []
    for name in store.list(DIRECTORY):
        path = f"{DIRECTORY}/{name}"
        index = spare_index(name)
        if is_rewritten_name(name):
            store.unlink(path)
        elif index is not None and path == spare_name(index):
            file = store.open(path)
            size = file.size()
            file.close()
            if size == limits.segment_bytes and len(spares) < limits.spare_segments_max:
                spares.append(path)
            else:
                store.unlink(path)
    return spares


def _drop_void(store: Store, log: _Log, end_lsn: int) -> list[Segment]:
    """Unlink segments that are not part of the log; the others, ascending."""
    part_of_log = {span.header.number for span in log.spans}
    old: list[Segment] = []
    is_changed = False
    for number, file in log.files.items():
        is_before = number * log.segment_bytes + SEGMENT_HEADER_BYTES < end_lsn
        if is_before and (number <= log.first_number or number in part_of_log):
            old.append(Segment(number, file))
            continue
        file.close()
        store.unlink(segment_name(number))
        is_changed = True
    if is_changed:
        store.sync_directory(DIRECTORY)
    return old
