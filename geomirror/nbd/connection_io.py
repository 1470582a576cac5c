"""One client's connection: bytes from the event loop to the cores, replies back in batches.

Everything that one socket read brings is submitted in one call, and everything that is answered
meanwhile leaves in one write. Replies that come later are gathered until the next turn of the loop.
It runs on the standard event loop and on uvloop.

Reading stops while any hold is set: the export asked for it, the client does not take its replies,
too much is in flight, or the connection is ending.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterable, Sequence
from typing import cast

from geomirror.errors import AuthError, RefusedError, RemoteProtocolError
from geomirror.nbd import structured
from geomirror.nbd.asides import answer_aside
from geomirror.nbd.constants import CMD_BLOCK_STATUS
from geomirror.nbd.negotiation import BUFFER_BYTES, Negotiation, Phase, TlsMode
from geomirror.nbd.protocol import Buffer, Export, ReadAnswer, Request
from geomirror.nbd.registry import Registry
from geomirror.nbd.reply_output_io import write_replies
from geomirror.nbd.request_parser import RequestParser, buffer_bytes
from geomirror.nbd.socket_options_io import tune_socket
from geomirror.nbd.status_desk import StatusDesk
from geomirror.nbd.tls_io import ServerTls, upgrade

HANDSHAKE_S_MAX = 30.0
"""A client that has not attached by then is dropped: it holds one of the connection slots."""
DRAIN_S_MAX = 10.0
"""How long an ending connection waits for its replies to be made and to be taken."""
_STATUS_BYTES_MAX = 256 << 10
"""Block status replies of one turn of the loop; then they are written, or wait for the client."""

_HOLD_EXPORT, _HOLD_REPLIES, _HOLD_IN_FLIGHT, _HOLD_ENDING = 1, 2, 4, 8
"""Bits; numbers, because an operation of an enum's flags takes a microsecond."""


class NbdConnection(asyncio.BufferedProtocol):
    """Protocol of one client; also the `ReplySink` of its export."""

    def __init__(self, registry: Registry, tls: ServerTls | None = None) -> None:
        self._registry = registry
        self._tls = tls
        self._upgrading: asyncio.Task[None] | None = None
        self._limits = registry.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._negotiation: Negotiation | None = Negotiation(
            registry.resolve,
            registry.names,
            self._attach,
            registry.limits.nbd_payload_bytes_max,
            tls.mode if tls is not None else TlsMode.OFF,
        )
        self._handshake = memoryview(bytearray(BUFFER_BYTES))
        self._handshake_used = 0
        self._parser: RequestParser | None = None
        self._statuses: StatusDesk | None = None
        self._status_bytes = 0
        self._is_structured = False
        self._handle: object = None
        self._holds = 0
        self._in_flight = 0
        self._in_flight_max = registry.limits.nbd_requests_max
        self._read_bytes_max = registry.limits.nbd_queued_bytes_max // 2
        self._out: list[Buffer] = []
        self._is_batching = False
        self._is_scheduled = False
        self._error: Exception | None = None
        self.export: Export | None = None
        self.is_closed = False

    # ---- transport side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the hello, or turn the client away when there are too many."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._registry.connected(self):
            self._transport.abort()
            return
        tune_socket(transport.get_extra_info("socket"))
        self._transport.set_write_buffer_limits(high=self._limits.nbd_queued_bytes_max // 2)
        self._timer = self._loop.call_later(HANDSHAKE_S_MAX, self._transport.abort)
        self._negotiate()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._parser is not None:
            return self._parser.writable()
        return self._handshake[self._handshake_used :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived."""
        if self._parser is not None:
            self._parser.received(nbytes)
            self._process()
        else:
            self._handshake_used += nbytes
            # Right behind the handshake of TLS there may be bytes before we know its end.
            if self._upgrading is None:
                self._negotiate()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: nobody else notices."""
        if self.is_closed:
            return  # A failed TLS handshake is told by some event loops, and found out by us.
        self.is_closed = True
        self._out.clear()
        if self._timer is not None:
            self._timer.cancel()
        export, self._parser = self.export, None
        if self._statuses is not None:
            self._statuses.close()
        if export is not None:
            export.close(self._handle)
        self._registry.disconnected(self, self._error or exc)

    def pause_writing(self) -> None:
        """The client does not take its replies: take no more requests from it."""
        self._hold(_HOLD_REPLIES)

    def resume_writing(self) -> None:
        """The client takes its replies again."""
        self._release(_HOLD_REPLIES)
        self._schedule()  # Other holds may end only by replies that waited for this.

    # ---- handshake

    def _negotiate(self) -> None:
        negotiation, transport = self._negotiation, self._transport
        assert negotiation is not None
        assert transport is not None
        try:
            used = negotiation.receive(self._handshake[: self._handshake_used])
        except (RemoteProtocolError, RefusedError) as error:
            self._drop(error)
            return
        rest = bytes(self._handshake[used : self._handshake_used])
        self._handshake[: len(rest)] = rest
        self._handshake_used = len(rest)
        if negotiation.output:
            transport.write(bytes(negotiation.output))
            negotiation.output.clear()
        if negotiation.phase is Phase.CLOSED:
            transport.close()
        elif negotiation.phase is Phase.TRANSMISSION:
            self._begin_transmission(negotiation, rest)
        elif negotiation.phase is Phase.UPGRADING:
            # From here on no byte reaches us but through TLS.
            transport.pause_reading()
            self._upgrading = self._loop.create_task(self._upgrade(negotiation, transport))

    async def _upgrade(self, negotiation: Negotiation, plain: asyncio.Transport) -> None:
        assert self._tls is not None
        timeout_s = self._limits.handshake_ns_max / 1e9
        try:
            self._transport = await upgrade(plain, self, self._tls.context, timeout_s)
        except AuthError as error:
            self._error = error
            plain.abort()
            self.connection_lost(error)
            return
        self._upgrading = None
        if self.is_closed:
            return
        self._transport.set_write_buffer_limits(high=self._limits.nbd_queued_bytes_max // 2)
        negotiation.secured()
        self._negotiate()

    def _attach(self, export: Export) -> None:
        self._registry.admit(self, export)
        self._handle = export.open(self)
        self.export = export

    def _begin_transmission(self, negotiation: Negotiation, rest: bytes) -> None:
        export = negotiation.export
        assert export is not None
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None
        payload_bytes_max = min(export.maximum_payload, self._limits.nbd_payload_bytes_max)
        # Anonymous memory instead of a bytearray: pages that no request reaches cost nothing.
        memory = memoryview(mmap.mmap(-1, buffer_bytes(payload_bytes_max)))
        self._parser = RequestParser(
            memory,
            size_bytes=negotiation.size_bytes,
            payload_bytes_max=payload_bytes_max,
            minimum_block=export.minimum_block,
            is_read_only=export.is_read_only,
            is_structured=negotiation.is_structured,
            has_contexts=bool(negotiation.contexts),
        )
        self._statuses = StatusDesk(
            export, negotiation.contexts, self._may_answer_status, self._reply_status
        )
        self._is_structured = negotiation.is_structured
        self._negotiation = None
        self._handshake = memoryview(b"")
        if rest:
            self._parser.writable()[: len(rest)] = rest
            self._parser.received(len(rest))
            self._process()

    # ---- requests

    def _process(self) -> None:
        """Serve everything complete, as far as no hold is set."""
        parser, export = self._parser, self.export
        if parser is None or self._is_batching:
            return
        assert export is not None
        self._is_batching = True
        try:
            while not self._holds:
                requests = parser.take(self._read_bytes_max, self._in_flight_max - self._in_flight)
                is_taken = bool(requests or parser.asides)
                if parser.asides:
                    asides, parser.asides = parser.asides, []
                    for aside, error in asides:
                        self._answer_aside(aside, error, export)
                if requests:
                    self._in_flight += len(requests)
                    export.submit(self._handle, requests, self)
                is_full = self._in_flight >= self._in_flight_max
                if is_full or parser.read_bytes >= self._read_bytes_max:
                    # `_is_full`: only with room for more has `take` emptied the buffer.
                    self._hold(_HOLD_IN_FLIGHT)
                if self._out:
                    self._write_out()
                if not parser.has_rest or not is_taken:
                    break
        except RemoteProtocolError as error:
            self._drop(error)
        finally:
            self._is_batching = False
        if parser.is_disconnected:
            self.end()

    def _answer_aside(self, aside: Request, error: int, export: Export) -> None:
        if aside.command == CMD_BLOCK_STATUS and not error:
            assert self._statuses is not None
            self._in_flight += 1
            self._statuses.take(aside)
            self._statuses.pump()
        else:
            self._out.append(answer_aside(aside, error, export, self._is_structured))

    def _may_answer_status(self) -> bool:
        """Each may have half a MiB: few a turn of the loop, while the client takes them."""
        is_room = self._status_bytes < _STATUS_BYTES_MAX and not self._holds & _HOLD_REPLIES
        return is_room and not self.is_closed

    def _reply_status(self, data: bytes) -> None:
        self._in_flight -= 1
        if self._parser is None:
            return
        self._out.append(data)
        self._status_bytes += len(data)
        self._schedule()

    def _is_full(self) -> bool:
        parser = self._parser
        return self._in_flight >= self._in_flight_max or (
            parser is not None and parser.read_bytes >= self._read_bytes_max
        )

    # ---- replies (ReplySink)

    def reply(self, request_cookie: int, error: int = 0, message: str = "") -> None:
        """Answer a request; a READ only with an error."""
        self._in_flight -= 1
        assert self._in_flight >= 0, "a request was answered twice"
        parser = self._parser
        if parser is None:
            return
        if error:
            parser.finish_read(request_cookie)
            refusal = structured.error_chunk(request_cookie, error, message)
            if not self._is_structured:
                refusal = structured.simple_error(request_cookie, error)
            self._out.append(refusal)
        else:
            assert request_cookie not in parser.reads, "a READ was answered without its data"
            self._out.append(structured.success_reply(request_cookie))
        if not self._is_batching and not self._is_scheduled:
            self._schedule()

    def reply_many(self, cookies: Sequence[int]) -> None:
        """Answer many requests that are no READs with success."""
        self._in_flight -= len(cookies)
        assert self._in_flight >= 0, "a request was answered twice"
        if self._parser is None or not cookies:
            return
        self._out.append(structured.success_replies(cookies))
        if not self._is_batching and not self._is_scheduled:
            self._schedule()

    def reply_read(
        self, cookie: int, offset: int, buffers: Sequence[Buffer], error: int = 0
    ) -> None:
        """Answer a READ with all its bytes, or with an error."""
        if error:
            self.reply(cookie, error)
        else:
            self.reply_reads([(cookie, offset, buffers)])

    def reply_reads(self, answers: Iterable[ReadAnswer]) -> None:
        """Answer READs with all their bytes."""
        parser, out = self._parser, self._out
        header = structured.data_header if self._is_structured else structured.simple_header
        for cookie, offset, buffers in answers:
            self._in_flight -= 1
            if parser is None:
                continue
            length = parser.finish_read(cookie)
            found = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
            assert length == found, "not the bytes that were asked for"
            out.append(header(cookie, offset, length))
            out += buffers
        if not self._is_batching and not self._is_scheduled:
            self._schedule()

    def pause_reading(self) -> None:
        """The export asks for no further requests."""
        self._hold(_HOLD_EXPORT)

    def resume_reading(self) -> None:
        """The export takes requests again."""
        self._release(_HOLD_EXPORT)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._later)

    def _later(self) -> None:
        """The turn after replies were made outside a batch, or after a hold was released."""
        self._is_scheduled = False
        if self.is_closed:
            return
        if self._out:
            self._write_out()
        self._status_bytes = 0
        if self._statuses is not None:
            self._statuses.pump()
        if self._holds & _HOLD_IN_FLIGHT and not self._is_full():
            self._release(_HOLD_IN_FLIGHT)
        if self._holds & _HOLD_ENDING:
            self._close_when_answered()
        else:
            self._process()

    def _write_out(self) -> None:
        """Hand all gathered replies to the transport."""
        assert self._transport is not None
        out, self._out = self._out, []
        write_replies(self._transport, out)

    # ---- holds and the end

    def _hold(self, reason: int) -> None:
        was, self._holds = self._holds, self._holds | reason
        if not was and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _release(self, reason: int) -> None:
        was, self._holds = self._holds, self._holds & ~reason
        if not was or self._holds or self.is_closed:
            return
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.resume_reading()
        # Requests that are already in the buffer would wait for the next received byte.
        self._schedule()

    def end(self) -> None:
        """Take no further requests, finish those in flight, then close. Safe to call again."""
        if self.is_closed or self._holds & _HOLD_ENDING:
            return
        assert self._transport is not None
        self._hold(_HOLD_ENDING)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(DRAIN_S_MAX, self._transport.abort)
        self._close_when_answered()

    def _close_when_answered(self) -> None:
        if self._in_flight == 0 and not self._out and self._transport is not None:
            self._transport.close()

    def _drop(self, error: Exception) -> None:
        """The client broke the protocol, or cannot be told why it is refused."""
        self._error = error
        assert self._transport is not None
        self._transport.abort()
