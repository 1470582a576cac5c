"""A volume of a view as an NBD export.

Requests of one view are served in the order of their arrival, a batch at a time on a worker thread:
a write of part of a block must not overlap with another one of the same block.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from geomirror.errors import GeomirrorError, RefusedError
from geomirror.nbd.constants import CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_WRITE
from geomirror.nbd.protocol import ReplySink, Request
from geomirror.volume.scratch import Scratch
from geomirror.volume.store import Buffer

_BATCH_BYTES_MAX = 16 << 20
"""Reads of one batch: replies are held until it is done."""


@dataclass(slots=True)
class _Waiting:
    """A request with its payload copied."""

    sink: ReplySink
    volume: int
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes | None


@dataclass(slots=True)
class _Answer:
    """What a worker thread found."""

    error: GeomirrorError | None = None
    content: Buffer = b""


class Viewed(Protocol):
    """The volumes as they were at some moment: `View` or `BranchView`."""

    def read(self, volume: int, offset: int, length: int) -> bytes:
        """The bytes of a range. Blocking, on any thread."""


class ViewQueue:
    """The requests of one view, all of its volumes and connections together."""

    def __init__(self, view: Viewed, scratch: Scratch | None, executor: Executor) -> None:
        self.view = view
        self.scratch = scratch
        self.closed_because = ""
        """Why nothing is served any more."""
        self._executor = executor
        self._waiting: list[_Waiting] = []
        self._running: asyncio.Future[list[_Answer]] | None = None

    def submit(self, volume: int, requests: list[Request], sink: ReplySink) -> None:
        """Serve later."""
        for each in requests:
            payload = None if each.payload is None else bytes(each.payload)
            fields = (each.command, each.flags, each.cookie, each.offset, each.length, payload)
            self._waiting.append(_Waiting(sink, volume, *fields))
        self._next()

    async def stop(self, reason: str) -> None:
        """Serve nothing more; what runs is waited for, what waits gets EIO."""
        self.closed_because = reason
        if self._running is not None:
            await asyncio.wait([self._running])
        self._next()
        if self.scratch is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, self.scratch.close)

    def _next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        if self.closed_because:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                if not each.sink.is_closed:
                    each.sink.reply(each.cookie, errno.EIO, self.closed_because)
            return
        count = size = 0
        for each in self._waiting:
            size += each.length
            count += 1
            if size >= _BATCH_BYTES_MAX:
                break
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(self._executor, self._serve, batch)
        self._running.add_done_callback(lambda future: self._served(batch, future.result()))

    def _served(self, batch: list[_Waiting], answers: list[_Answer]) -> None:
        self._running = None
        for each, answer in zip(batch, answers, strict=True):
            if each.sink.is_closed:
                continue
            if answer.error is not None:
                each.sink.reply(each.cookie, answer.error.nbd_errno, answer.error.message)
            elif each.command == CMD_READ:
                each.sink.reply_read(each.cookie, each.offset, [answer.content])
            else:
                each.sink.reply(each.cookie)
        self._next()

    def _serve(self, batch: list[_Waiting]) -> list[_Answer]:
        """On a worker thread."""
        answers = []
        for each in batch:
            try:
                answers.append(_Answer(content=self._one(each)))
            except GeomirrorError as error:
                answers.append(_Answer(error))
        return answers

    def _one(self, each: _Waiting) -> Buffer:
        view, scratch = self.view, self.scratch
        if each.command == CMD_READ:
            if scratch is None:
                return view.read(each.volume, each.offset, each.length)
            return scratch.read(each.volume, each.offset, each.length, view.read)
        if scratch is None:
            return b""  # A flush of what nobody can change.
        if each.command == CMD_WRITE:
            assert each.payload is not None
            scratch.write(each.volume, each.offset, each.payload, view.read)
        elif each.command != CMD_FLUSH:
            scratch.zero(each.volume, each.offset, each.length, view.read)
        if each.command == CMD_FLUSH or each.flags & CMD_FLAG_FUA:
            scratch.flush()
        return b""


@dataclass
class ViewExport:
    """Implements `nbd.protocol.Export` for one volume of a view."""

    name: str
    volume: int
    size_bytes: int
    queue: ViewQueue
    description: str
    is_read_only: bool
    on_attach: Callable[[int], None]
    """Called with 1 and -1 as connections come and go."""
    is_multi_conn: bool = True
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = field(default=8 << 20)

    def open(self, sink: ReplySink) -> object:
        """Attach a connection. :raises RefusedError: the view is closed."""
        if self.queue.closed_because:
            raise RefusedError(f'"{self.name}" is closed: {self.queue.closed_because}')
        self.on_attach(1)
        return self

    def close(self, handle: object) -> None:
        """Detach."""
        self.on_attach(-1)

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        """Take one batch."""
        self.queue.submit(self.volume, requests, sink)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Everything counts as allocated: finding out would cost as much as reading."""
        return [(length, 0)]
