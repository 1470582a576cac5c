"""The connection of the NBD client: handshake, requests in flight, the end.

Requests started in one turn of the loop leave in one write. What is in flight is bounded by `depth`
and by what the server takes; the callers wait in order.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import cast

from geomirror.errors import GeomirrorError, RemoteProtocolError, UnreachableError
from geomirror.nbd import constants as c
from geomirror.nbd.client_handshake import ServerExport, handshake
from geomirror.nbd.protocol import Buffer
from geomirror.nbd.reply_parser import Pending, ReplyParser

CLOSE_S_MAX = 10.0
"""How long `close` waits for the server to finish what is in flight."""
_REQUEST = struct.Struct(">IHHQQI")
_GATHER_BYTES_MAX = 256 << 10
_JOIN_BYTES_MAX = 64 << 10
_SEND_BUFFER_BYTES_MAX = 8 << 20


class ClientConnection(asyncio.BufferedProtocol):
    """Protocol of one connection to a server; `NbdClient` adds the requests."""

    def __init__(
        self,
        name: str,
        *,
        depth: int,
        wants_structured: bool,
        contexts: Sequence[str] = (c.ALLOCATION_CONTEXT,),
    ) -> None:
        assert depth >= 1
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._dialogue = handshake(name, wants_structured=wants_structured, contexts=contexts)
        self._input = bytearray()
        self._wanted = 0
        self._scratch = memoryview(bytearray(4096))
        self._attached: asyncio.Future[ServerExport] = self._loop.create_future()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._parser: ReplyParser | None = None
        self._depth = depth
        self._cookie = 0
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._is_write_paused = False
        self._error: GeomirrorError | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.export = ServerExport(name)
        """What the server told at the handshake."""

    async def attach(self) -> None:
        """Wait for the handshake that began with the connection.

        :raises RefusedError, NotFoundError, UnreachableError, RemoteProtocolError: its outcome.
        """
        self.export = await self._attached

    @property
    def size_bytes(self) -> int:
        """Size of the export as told at the handshake."""
        return self.export.size_bytes

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        return len(self._parser.pending) if self._parser is not None else 0

    # ---- requests without a coroutine, for load generators

    def room(self) -> int:
        """Requests that `start_*` takes now; 0 while the connection takes no more."""
        if self._error is not None:
            raise self._error
        return 0 if self._is_write_paused else max(0, self._depth - self.in_flight)

    async def wait_for_room(self) -> int:
        """Wait until a request can be started; returns `room()`."""
        while not self.room():
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # The room that was meant for this caller goes to the next one.
                raise
        return self.room()

    def start_read(self, offset: int, target: memoryview) -> asyncio.Future[Pending]:
        """Begin to read `len(target)` bytes into `target`."""
        return self.start(c.CMD_READ, offset, len(target), target=target)

    def start_write(
        self, offset: int, data: Buffer, *, is_fua: bool = False
    ) -> asyncio.Future[Pending]:
        """Begin to write `data`, which must not change until the future is done."""
        flags = c.CMD_FLAG_FUA if is_fua else 0
        return self.start(c.CMD_WRITE, offset, len(data), flags, payload=data)

    def start(
        self,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        *,
        payload: Buffer | None = None,
        target: memoryview | None = None,
    ) -> asyncio.Future[Pending]:
        """Begin any request; it is sent in this turn of the loop, together with its neighbours."""
        if self._error is not None:
            raise self._error
        parser = self._parser
        assert parser is not None, "not attached"
        cookie = self._cookie = (self._cookie + 1) & 0xFFFFFFFFFFFFFFFF
        future: asyncio.Future[Pending] = self._loop.create_future()
        parser.pending[cookie] = Pending(command, offset, length, future, target)
        if not self._out:
            self._loop.call_soon(self._write_out)
        self._out.append(_REQUEST.pack(c.REQUEST_MAGIC, flags, command, cookie, offset, length))
        if payload is not None:
            self._out.append(payload)
            self._out_bytes += length
            if self._out_bytes >= _GATHER_BYTES_MAX:
                self._write_out()
        return future

    # ---- the end

    async def close(self) -> None:
        """Let the server finish what is in flight, disconnect, and wait for it."""
        transport = self._transport
        if transport is None or self._lost.done():
            return
        if self._error is None and self._parser is not None:
            head = _REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISCONNECT, 0, 0, 0)
            self._out.append(head)
            self._write_out()
            try:
                async with asyncio.timeout(CLOSE_S_MAX):
                    await asyncio.shield(self._lost)
            except TimeoutError:
                transport.abort()
        else:
            transport.abort()
        await self._lost

    async def wait_closed(self) -> None:
        """Wait until the connection is over, whoever ended it."""
        await asyncio.shield(self._lost)

    def abort(self) -> None:
        """Cut the connection, as a dying client would."""
        if self._transport is not None:
            self._transport.abort()

    # ---- protocol side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_SEND_BUFFER_BYTES_MAX)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, self._wanted = next(self._dialogue)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._parser.writable() if self._parser is not None else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived."""
        try:
            if self._parser is None:
                self._input += self._scratch[:nbytes]
                self._negotiate()
            else:
                self._finish(self._parser.received(nbytes))
                if self._parser.failure is not None:
                    raise self._parser.failure
        except GeomirrorError as error:
            self._fail(error)
            self.abort()

    def eof_received(self) -> None:
        """The server has closed: `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail everything that still waits."""
        self._fail(
            UnreachableError(f"the NBD connection was lost: {exc or 'closed by the server'}")
        )
        self._dialogue.close()
        if not self._lost.done():
            self._lost.set_result(None)

    def pause_writing(self) -> None:
        """The server takes no more bytes for now."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """The server takes bytes again."""
        self._is_write_paused = False
        self._wake()

    # ---- inside

    def _negotiate(self) -> None:
        assert self._transport is not None
        while len(self._input) >= self._wanted:
            part = bytes(self._input[: self._wanted])
            del self._input[: self._wanted]
            try:
                send, self._wanted = self._dialogue.send(part)
            except StopIteration as attached:
                self._parser = ReplyParser()
                if self._input:
                    raise RemoteProtocolError("the server talks unasked") from None
                if not self._attached.done():
                    self._attached.set_result(attached.value)
                return
            if send:
                self._transport.write(send)

    def _finish(self, done: list[Pending]) -> None:
        for request in done:
            if request.waiter.done():
                continue  # The caller gave up waiting.
            if request.error:
                request.waiter.set_exception(request.to_error())
            else:
                request.waiter.set_result(request)
        self._wake()

    def _wake(self) -> None:
        """Let as many waiting callers go on as there is room; all of them to their error."""
        room = len(self._waiting) if self._error is not None else self.room()
        while self._waiting and room > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1

    def _fail(self, error: GeomirrorError) -> None:
        """No request can be answered any more."""
        if self._error is not None:
            return
        self._error = error
        if not self._attached.done():
            self._attached.set_exception(error)
        if self._parser is not None:
            for request in self._parser.pending.values():
                if not request.waiter.done():
                    request.waiter.set_exception(error)
                    # A load generator may have given up on some futures: that is no warning.
                    request.waiter.exception()
            self._parser.pending.clear()
        self._wake()

    def _write_out(self) -> None:
        """Send all gathered requests."""
        out, self._out, self._out_bytes = self._out, [], 0
        if not out or self._transport is None or self._error is not None:
            return
        last = out.pop() if len(out[-1]) >= _JOIN_BYTES_MAX else b""
        self._transport.write(b"".join(out))
        if last:
            self._transport.write(last)
