"""A volume of a primary as an NBD export: the hot path of every write.

A batch of requests becomes one journal append. Plain writes are answered at once (*completed*),
FLUSH and FUA join the core's group commit. When the core holds writers back, the batch is copied,
the connections pause, and everything waits in order; nothing ever waits for a link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from geomirror.errors import GeomirrorError, JournalFullError, NoSpaceError, RefusedError
from geomirror.nbd.constants import (
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    STATE_HOLE,
    STATE_ZERO,
)
from geomirror.nbd.contexts import Answer
from geomirror.nbd.protocol import ReadAnswer, ReplySink, Request
from geomirror.node.status_contexts import StatusContexts
from geomirror.node.volume_reads import VolumeReader
from geomirror.volume.dirty_index import ZERO
from geomirror.volume.engine import Write
from geomirror.volume.engine_jobs import ReadJob
from geomirror.volume.record import RecordType
from geomirror.wan_protocol.primary import Primary

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner

_WRITE, _ZERO, _TRIM = int(RecordType.WRITE), int(RecordType.ZERO), int(RecordType.TRIM)
STATUS_PIECES_MAX = 4096
"""Extents of one block status answer; it may end early."""
STATUS_BYTES_MAX = 64 << 20
"""Of it while anything waits in the journal: 16,384 blocks are looked up on the loop."""


@dataclass(slots=True, eq=False)
class _Attached:
    """One connection."""

    sink: ReplySink


@dataclass(slots=True, eq=False)
class _Held:
    """A batch of writes that waits for room; payloads are copies."""

    attached: _Attached
    writes: list[Write]
    cookies: list[int]
    fua_cookies: list[int]


class FlushToken(msgspec.Struct, eq=False):
    """What a flush answers: these requests of this connection."""

    sink: ReplySink
    cookies: list[int]

    def answer(self, error: GeomirrorError | None) -> None:
        """Reply to all of them."""
        sink = self.sink
        if sink.is_closed:
            return
        if error is None:
            sink.reply_many(self.cookies)
            return
        for cookie in self.cookies:
            self.sink.reply(cookie, error.nbd_errno, error.message)


class HeldWriters:
    """Writers of one resource that the core holds back, in order of arrival."""

    def __init__(self) -> None:
        self.queue: deque[tuple[PrimaryExport, _Held]] = deque()
        """Batches that wait, with the export they came to."""
        self.no_space: NoSpaceError | None = None
        """Why the first of them waits, when the disk has no room for the journal to grow."""

    def __bool__(self) -> bool:
        return bool(self.queue)

    def add(self, export: PrimaryExport, held: _Held) -> None:
        """Queue a batch and pause its connection."""
        self.queue.append((export, held))
        held.attached.sink.pause_reading()

    def retry(self) -> None:
        """There is room: go on until there is none."""
        self.no_space = None
        while self.queue:
            export, held = self.queue[0]
            if not export.write_held(held):
                return
            self.queue.popleft()
            if all(other.attached is not held.attached for _, other in self.queue):
                held.attached.sink.resume_reading()

    def drop(self, attached: _Attached) -> None:
        """Its client is gone: what was not completed never happens."""
        self.queue = deque(item for item in self.queue if item[1].attached is not attached)

    def fail(self, error: GeomirrorError) -> None:
        """Answer everything with the error: fenced, or no space for too long."""
        self.no_space = None
        while self.queue:
            _, held = self.queue.popleft()
            FlushToken(held.attached.sink, [*held.cookies, *held.fua_cookies]).answer(error)
            held.attached.sink.resume_reading()


@dataclass
class PrimaryExport:
    """Implements `nbd.protocol.Export` over a `Primary`."""

    name: str
    volume: int
    runner: ReplicaRunner
    held: HeldWriters
    contexts: StatusContexts
    is_single_writer: bool = False
    description: str = ""
    is_read_only: bool = False
    is_multi_conn: bool = True
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = 32 << 20
    _attached: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        core = self.runner.core
        assert isinstance(core, Primary)
        self.core = core
        self.reader = VolumeReader(core.engine, self.volume)

    @property
    def size_bytes(self) -> int:
        """Size of the volume now."""
        return self.core.engine.sizes.now[self.volume]

    def open(self, sink: ReplySink) -> object:
        """Attach a connection. :raises RefusedError: fenced, or a second writer."""
        if self.core.fenced is not None:
            raise RefusedError(str(self.core.fenced))
        if self.is_single_writer and self._attached:
            raise RefusedError(f'"{self.name}" has a writer already')
        attached = _Attached(sink)
        self._attached.add(id(attached))
        return attached

    def close(self, handle: object) -> None:
        """Detach; its waiting writes never happen."""
        assert isinstance(handle, _Attached)
        self._attached.discard(id(handle))
        self.held.drop(handle)

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        """Take one batch: one journal append for all its writes."""
        assert isinstance(handle, _Attached)
        volume = self.volume
        writes: list[Write] = []
        cookies: list[int] = []
        fua: list[int] = []
        flushes: list[int] = []
        reads: list[Request] = []
        for request in requests:
            command = request.command
            if command == CMD_WRITE:
                writes.append((_WRITE, volume, request.offset, request.length, request.payload))
                if not request.flags:
                    cookies.append(request.cookie)
                    continue
            elif command == CMD_READ:
                reads.append(request)
                continue
            elif command == CMD_FLUSH:
                flushes.append(request.cookie)
                continue
            else:
                is_trim = command == CMD_TRIM or not request.flags & CMD_FLAG_NO_HOLE
                kind = _TRIM if is_trim else _ZERO
                writes.append((kind, volume, request.offset, request.length, None))
            (fua if request.flags & CMD_FLAG_FUA else cookies).append(request.cookie)
        if writes:
            self._write(handle, writes, cookies, fua)
        if flushes:
            self.runner.flush(FlushToken(sink, flushes), is_alone=len(self._attached) == 1)
        if reads:
            self._read_all(reads, sink)
        self.runner.wrote()

    def _write(
        self, attached: _Attached, writes: list[Write], cookies: list[int], fua: list[int]
    ) -> None:
        if not self.held.queue:
            try:
                self._completed(attached.sink, writes, cookies, fua)
                return
            except JournalFullError:
                pass
            except NoSpaceError as error:
                self.held.no_space = error
            except GeomirrorError as error:
                FlushToken(attached.sink, [*cookies, *fua]).answer(error)
                return
        copies: list[Write] = [
            (kind, volume, offset, length, None if payload is None else bytes(payload))
            for kind, volume, offset, length, payload in writes
        ]
        self.held.add(self, _Held(attached, copies, cookies, fua))

    def _completed(
        self, sink: ReplySink, writes: Sequence[Write], cookies: list[int], fua: list[int]
    ) -> None:
        clock = self.runner.clock
        self.core.write(writes, clock.now_ns(), clock.wall_ns())
        if cookies:
            sink.reply_many(cookies)
        if fua:
            self.runner.flush(FlushToken(sink, fua), is_alone=len(self._attached) == 1)

    def write_held(self, held: _Held) -> bool:
        """Try a batch again that was held back; False when it still has to wait."""
        sink = held.attached.sink
        try:
            self._completed(sink, held.writes, held.cookies, held.fua_cookies)
        except JournalFullError:
            return False
        except NoSpaceError as error:
            self.held.no_space = error
            return False
        except GeomirrorError as error:
            FlushToken(sink, [*held.cookies, *held.fua_cookies]).answer(error)
        return True

    def _read_all(self, requests: Sequence[Request], sink: ReplySink) -> None:
        if self.core.fenced is not None:
            for request in requests:
                sink.reply(request.cookie, self.core.fenced.nbd_errno)
            return
        answers: list[ReadAnswer] = []
        for request, data in zip(requests, self.reader.read_each(requests), strict=True):
            if data is None:
                self._read(request, sink)
            else:
                answers.append((request.cookie, request.offset, (data,)))
        if answers:
            sink.reply_reads(answers)

    def _read(self, request: Request, sink: ReplySink) -> None:
        cookie, offset = request.cookie, request.offset
        buffers = self.reader.read_now(offset, request.length)
        if buffers is not None:
            sink.reply_read(cookie, offset, buffers)
            return
        self.runner.run_read(
            self.reader.read_later(offset, request.length),
            partial(answer_read, sink, cookie, offset),
        )

    def context_names(self) -> list[str]:
        """Metadata contexts beside `base:allocation`."""
        return self.contexts.names()

    def describe(
        self, names: Sequence[str], offset: int, length: int, extents_max: int, answer: Answer
    ) -> None:
        """What those contexts say of a range."""
        self.contexts.describe(self.volume, names, offset, length, extents_max, answer)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Zero runs of the index and holes of the image; anything else is allocated."""
        if self.core.engine.indexes[self.volume].entry_count:
            # Looking up 4 GiB block by block would hold up everybody's writes for a third of a
            # second.
            length = min(length, STATUS_BYTES_MAX)
        hole = STATE_HOLE | STATE_ZERO
        extents: list[tuple[int, int]] = []
        for piece in self.core.engine.read_pieces(self.volume, offset, length)[:STATUS_PIECES_MAX]:
            if piece.source == ZERO:
                extents.append((piece.length, hole))
            elif piece.source > 0:
                extents.append((piece.length, 0))
            else:
                extents += self.reader.image_status(piece.offset, piece.length, hole)
        return merge_extents(extents)


def merge_extents(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbours of equal state."""
    merged: list[tuple[int, int]] = []
    for length, state in extents:
        if merged and merged[-1][1] == state:
            merged[-1] = (merged[-1][0] + length, state)
        else:
            merged.append((length, state))
    return merged


def answer_read(
    sink: ReplySink, cookie: int, offset: int, job: ReadJob, error: GeomirrorError | None
) -> None:
    """Reply to a read that was done on a worker thread."""
    if sink.is_closed:
        return
    if error is None:
        sink.reply_read(cookie, offset, job.buffers)
    else:
        sink.reply(cookie, error.nbd_errno)
