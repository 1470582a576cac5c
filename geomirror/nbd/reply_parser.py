"""Transmission phase of the client: bytes from the server in, finished requests out.

Headers are received into a small buffer; what belongs to a READ is received straight into the
reader's own memory, so a pipelined 1 MiB read is copied once, by the kernel.

Every length is compared with what was asked for before a byte of it is taken.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from typing import Any

from geomirror.errors import (
    FencedError,
    GeomirrorError,
    NoSpaceError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
    UsageError,
)
from geomirror.nbd import constants as c

_BUFFER_BYTES = 256 << 10
_CONTROL_BYTES_MAX = 4 + 8 * (1 << 20)
"""Payload of a chunk that is no data: 2^20 extents are the protocol's own limit."""

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_ERROR = struct.Struct(">IH")

_ERROR_CLASSES: dict[int, type[GeomirrorError]] = {
    errno.EPERM: RefusedError,
    errno.EINVAL: UsageError,
    errno.ENOSPC: NoSpaceError,
    errno.ESHUTDOWN: FencedError,
}


@dataclass(slots=True)
class Pending:
    """A request that is sent and not yet answered."""

    command: int
    offset: int
    length: int
    waiter: Any
    """The shell's; not touched here."""
    target: memoryview | None = None
    """Where a READ's `length` bytes go."""
    error: int = 0
    message: str = ""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Of a BLOCK_STATUS: (length, flags), by context id."""

    def to_error(self) -> GeomirrorError:
        """The typed error; its `__cause__` is an `OSError` with the server's errno."""
        verb = {c.CMD_READ: "read", c.CMD_WRITE: "write", c.CMD_FLUSH: "flush"}.get(
            self.command, f"request {self.command}"
        )
        name = errno.errorcode.get(self.error, str(self.error))
        text = self.message or name
        kind = _ERROR_CLASSES.get(self.error, StorageError)
        raised = kind(f"NBD {verb} at {self.offset}+{self.length}: {text} (errno {self.error})")
        raised.__cause__ = OSError(self.error, name)
        return raised


class ReplyParser:
    """Matches a server's byte stream with the requests in flight."""

    def __init__(self) -> None:
        self.pending: dict[int, Pending] = {}
        """Requests in flight by cookie; the shell adds them."""
        self.failure: RemoteProtocolError | None = None
        """Why the stream makes no sense any more; look after each call of `received`."""
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._start = 0
        self._end = 0
        # While a payload is being received: where the rest of it goes, and whose it is.
        self._rest: memoryview | None = None
        self._owner: Pending | None = None
        self._chunk: tuple[int, bytearray] | None = None
        self._finishes: int | None = None

    def writable(self) -> memoryview:
        """Where the next received bytes go; never empty."""
        if self._rest is not None:
            return self._rest
        return self._view[self._end :]

    def received(self, count: int) -> list[Pending]:
        """`count` bytes of `writable()` have been filled; returns the requests now finished.

        :raises RemoteProtocolError: this is not an answer to anything we asked. When requests were
            finished before it, they are returned, and the error is only in `failure`.
        """
        done: list[Pending] = []
        try:
            self._receive(count, done)
        except RemoteProtocolError as error:
            self.failure = error
            if not done:
                raise
        return done

    def _receive(self, count: int, done: list[Pending]) -> None:
        if self._rest is not None:
            self._rest = self._rest[count:]
            if len(self._rest):
                return
            self._end_payload(done)
        else:
            self._end += count
        while self._rest is None and self._end - self._start >= _SIMPLE.size:
            magic, error, cookie = _SIMPLE.unpack_from(self._view, self._start)
            if magic == c.SIMPLE_REPLY_MAGIC:
                self._start += _SIMPLE.size
                self._simple(cookie, error, done)
            elif magic != c.STRUCTURED_REPLY_MAGIC:
                raise RemoteProtocolError(f"NBD reply magic is {magic:#x}")
            elif not self._structured(done):
                break
        rest = self._end - self._start
        if rest:
            self._view[:rest] = bytes(self._view[self._start : self._end])
        self._start, self._end = 0, rest

    def _request(self, cookie: int) -> Pending:
        request = self.pending.get(cookie)
        if request is None:
            raise RemoteProtocolError(f"NBD reply to unknown cookie {cookie:#x}")
        return request

    def _simple(self, cookie: int, error: int, done: list[Pending]) -> None:
        request = self._request(cookie)
        request.error = error
        if request.command == c.CMD_READ and not error:
            assert request.target is not None
            self._begin_payload(request, request.target, cookie, done)
        else:
            done.append(self.pending.pop(cookie))

    def _structured(self, done: list[Pending]) -> bool:
        """One chunk; False when its header is not complete yet."""
        have = self._end - self._start
        if have < _CHUNK.size:
            return False
        _, flags, kind, cookie, length = _CHUNK.unpack_from(self._view, self._start)
        request = self._request(cookie)
        finishes = cookie if flags & c.REPLY_FLAG_DONE else None
        at = self._start + _CHUNK.size
        if kind == c.REPLY_OFFSET_DATA:
            if have < _CHUNK.size + 8:
                return False
            offset = int.from_bytes(self._view[at : at + 8], "big")
            self._start = at + 8
            target = self._slice(request, offset, length - 8)
            self._begin_payload(request, target, finishes, done)
            return True
        if length > _CONTROL_BYTES_MAX:
            raise RemoteProtocolError(f"NBD reply chunk {kind} announces {length} bytes")
        body = bytearray(length)
        self._chunk = (kind, body)
        self._start = at
        self._begin_payload(request, memoryview(body), finishes, done)
        return True

    def _slice(self, request: Pending, offset: int, length: int) -> memoryview:
        """The part of a READ's target that a chunk fills."""
        start = offset - request.offset
        if request.target is None or start < 0 or length < 0 or start + length > request.length:
            raise RemoteProtocolError(
                f"NBD reply covers {offset}+{length}, which was not asked for"
            )
        return request.target[start : start + length]

    def _begin_payload(
        self, owner: Pending, target: memoryview, finishes: int | None, done: list[Pending]
    ) -> None:
        here = min(len(target), self._end - self._start)
        target[:here] = self._view[self._start : self._start + here]
        self._start += here
        self._owner, self._finishes = owner, finishes
        if here < len(target):
            self._rest = target[here:]
        else:
            self._end_payload(done)

    def _end_payload(self, done: list[Pending]) -> None:
        owner, chunk, finishes = self._owner, self._chunk, self._finishes
        self._rest = self._owner = self._chunk = self._finishes = None
        assert owner is not None
        if chunk is not None:
            self._control(owner, chunk[0], bytes(chunk[1]))
        if finishes is not None:
            done.append(self.pending.pop(finishes))

    def _control(self, request: Pending, kind: int, body: bytes) -> None:
        """A complete chunk that is not data."""
        if kind & c.REPLY_ERROR_BIT and len(body) >= _ERROR.size:
            number, length = _ERROR.unpack_from(body)
            request.error = number or errno.EIO
            request.message = body[_ERROR.size : _ERROR.size + length].decode(errors="replace")
        elif kind == c.REPLY_OFFSET_HOLE and len(body) == 12:
            offset, length = struct.unpack(">QI", body)
            self._slice(request, offset, length)[:] = bytes(min(length, request.length))
        elif kind == c.REPLY_BLOCK_STATUS and len(body) >= 12 and len(body) % 8 == 4:
            context = int.from_bytes(body[:4], "big")
            if context in request.extents:
                raise RemoteProtocolError(f"NBD block status tells context {context} twice")
            request.extents[context] = list(struct.iter_unpack(">II", body[4:]))
        elif kind != c.REPLY_NONE or body:
            raise RemoteProtocolError(f"NBD reply chunk {kind} of {len(body)} bytes is malformed")
