"""Carries a byte stream inside a WebSocket; at each end it comes out as a socket.

```
 TLS of the link ── socket pair ── Inner ⇄ Outer ── [TLS of the front end] ── TCP ── front end …
```
The pair makes the carried stream a socket like any other: both event loops run TLS over it, and a
side that takes nothing stops the other one through it. It costs one more copy. What the kernel is
told and asked of a link reaches the TCP connection by `carrier_io`. The outer TLS is whoever's (a
reverse proxy, a firewall that inspects): it proves nothing and is not judged.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any, cast

from geomirror.environment import SECOND, Entropy
from geomirror.errors import GeomirrorError, LimitExceededError, LinkError, RefusedError
from geomirror.limits import Limits
from geomirror.tunnel.carrier_io import forget_carrier, set_carrier
from geomirror.tunnel.circuit_socket_io import hold_reading, tune_peer
from geomirror.tunnel.handover_io import connect_stream
from geomirror.tunnel.http_head import Head, HeadReader
from geomirror.tunnel.link_path import LinkPath
from geomirror.tunnel.websocket import (
    NOT_FOUND,
    WebSocketFrames,
    answer_upgrade,
    check_upgrade,
    new_key,
    upgrade_request,
)

BUFFER_BYTES = 256 * 1024
"""Written and not taken yet, on either side, before the other one is not read any more."""
EARLY_BYTES_MAX = 1024 * 1024
"""Behind a head that nobody has judged yet: two reads at most."""
PING_SECONDS = 20.0
"""Front ends end a connection that is silent for a minute; a circuit may be silent for hours."""
CLOSE_SECONDS = 5.0
"""For what was written to go out; then the connection is cut."""


class Outer(asyncio.Protocol):
    """The connection to the front end: one HTTP head, then frames."""

    def __init__(self, *, is_client: bool, entropy: Entropy) -> None:
        self.head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        """The transport is."""
        self._reader = HeadReader()
        self._frames = WebSocketFrames(is_client=is_client, entropy=entropy)
        self._inner: Inner | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_full = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected, and encrypted if it is to be."""
        self._transport = cast(asyncio.Transport, transport)
        tune_peer(transport.get_extra_info("socket"))
        self._transport.set_write_buffer_limits(high=BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        """A part of the head, or frames."""
        try:
            if self._inner is not None:
                self._carry(data)
            elif self.head.done():
                self._keep_early(data)
            elif (head := self._reader.receive(data)) is not None:
                # Not a byte more until somebody has judged it.
                self.hold(is_held=True)
                if not self.head.done():
                    self.head.set_result(head)
        except GeomirrorError as error:
            self._fail(error)

    def eof_received(self) -> bool:
        """The other side has closed."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self.gone.set()
        self._fail(LinkError(f"the connection was lost: {exc or 'closed by the other side'}"))

    def pause_writing(self) -> None:
        """The transport has enough."""
        self._is_full = True
        if self._inner is not None:
            self._inner.hold(is_held=True)

    def resume_writing(self) -> None:
        """The transport takes more."""
        self._is_full = False
        if self._inner is not None:
            self._inner.hold(is_held=False)

    # For its owner.

    async def splice(self) -> socket.socket:
        """The head is judged: carry bytes from now on, and give the end of the pair to use."""
        ours, theirs = socket.socketpair()
        try:
            for sock in (ours, theirs):
                sock.setblocking(False)
            inner = Inner(self)
            await connect_stream(lambda: inner, ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        self._inner = inner
        if self._transport is not None:
            inner.carried = set_carrier(theirs, self._transport.get_extra_info("socket"))
        if self._transport is None or self._transport.is_closing():
            inner.close()
        rest, self._reader.rest = self._reader.rest, b""
        if rest:
            self.data_received(rest)
        self.hold(is_held=False)
        self._keep()
        return theirs

    def write(self, data: bytes) -> None:
        """Send bytes of the head."""
        if self._transport is not None:
            self._transport.write(data)

    def send(self, data: bytes) -> None:
        """Send bytes of the stream."""
        self.write(self._frames.encode(data))

    def hold(self, is_held: bool) -> None:
        """Do not read for now, or read on."""
        hold_reading(self._transport, is_held)

    def close(self) -> None:
        """Close after what was written; cut it if that takes long."""
        self._stop_timer()
        if self._transport is None or self._transport.is_closing():
            return
        if self._inner is not None and not self._frames.is_ended:
            self.write(self._frames.close())
        self._transport.close()
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    def abort(self) -> None:
        """Cut it."""
        self._stop_timer()
        if not self.head.done():
            self.head.cancel()
        elif not self.head.cancelled():
            self.head.exception()  # looked at
        if self._transport is not None:
            self._transport.abort()

    def _carry(self, data: bytes) -> None:
        assert self._inner is not None
        for piece in self._frames.receive(data, self._reply):
            self._inner.write(piece)
        if self._frames.is_ended:
            self._fail(LinkError("the other side has closed"))

    def _keep_early(self, data: bytes) -> None:
        # What was read already when reading was stopped.
        self._reader.rest += data
        if len(self._reader.rest) > EARLY_BYTES_MAX:
            raise LimitExceededError("much too much behind a request for a WebSocket")

    def _reply(self, frame: bytes) -> None:
        # Who pings and reads nothing gets no answers, instead of filling our memory with them.
        if not self._is_full:
            self.write(frame)

    def _fail(self, error: GeomirrorError) -> None:
        self._stop_timer()
        if not self.head.done():
            self.head.set_exception(error)
        if self._inner is not None:
            self._inner.close()
        if self._transport is not None and not self._transport.is_closing():
            self.close()

    def _keep(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._reply(self._frames.ping())
            self._timer = asyncio.get_running_loop().call_later(PING_SECONDS, self._keep)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Inner(asyncio.Protocol):
    """Our end of the socket pair."""

    def __init__(self, outer: Outer) -> None:
        self.carried: int | None = None
        """The other end, as `carrier_io` knows it."""
        self._outer = outer
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Bytes to carry."""
        self._outer.send(data)

    def eof_received(self) -> bool:
        """The link has closed."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The link is over."""
        if self.carried is not None:
            forget_carrier(self.carried)
        self._outer.close()

    def pause_writing(self) -> None:
        """The link does not take what comes."""
        self._outer.hold(is_held=True)

    def resume_writing(self) -> None:
        """It takes more."""
        self._outer.hold(is_held=False)

    def write(self, data: bytes) -> None:
        """Hand over."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def hold(self, is_held: bool) -> None:
        """Do not read for now, or read on."""
        hold_reading(self._transport, is_held)

    def close(self) -> None:
        """Hand over what was written, then the end."""
        if self._transport is not None:
            self._transport.close()


def outer_client_context() -> ssl.SSLContext:
    """For dialling a front end, whoever it proves to be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Who is at the other end is proved inside. A certificate that is judged here would only shut
    # out those behind a firewall that inspects TLS.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


async def open_websocket(
    path: LinkPath, sock: socket.socket, limits: Limits, entropy: Entropy
) -> socket.socket:
    """Turn a connected socket into the stream that the WebSocket at its other end carries.

    :param sock: taken over.
    :raises LinkError: the server does not open a WebSocket there.
    :raises RemoteProtocolError: it sends nonsense.
    :raises OSError: TLS or the connection failed.
    """
    outer = Outer(is_client=True, entropy=entropy)
    options: dict[str, Any] = {}
    if path.scheme == "wss":
        options["ssl"] = outer_client_context()
        options["server_hostname"] = path.host
        options["ssl_handshake_timeout"] = limits.dial_ns_max / SECOND
        options["ssl_shutdown_timeout"] = CLOSE_SECONDS
    try:
        await connect_stream(lambda: outer, sock, **options)
        key = new_key(entropy)
        outer.write(upgrade_request(path.http_host, path.resource, key))
        check_upgrade(await outer.head, key)
        return await outer.splice()
    except BaseException:
        outer.abort()
        raise


async def accept_websocket(
    sock: socket.socket,
    resource: str,
    context: ssl.SSLContext | None,
    limits: Limits,
    entropy: Entropy,
) -> socket.socket:
    """Let a stranger's connection become a stream, within the time of a handshake.

    :param sock: taken over.
    :param resource: the path that he must ask for.
    :param context: None: no TLS here; a reverse proxy has it.
    :raises RefusedError: he asked for something else.
    :raises RemoteProtocolError: he sent nonsense.
    :raises LinkError: he took too long.
    :raises OSError: TLS or the connection failed.
    """
    outer = Outer(is_client=False, entropy=entropy)
    options: dict[str, Any] = {}
    if context is not None:
        options["ssl"] = context
        options["ssl_handshake_timeout"] = limits.handshake_ns_max / SECOND
        options["ssl_shutdown_timeout"] = CLOSE_SECONDS
    try:
        async with asyncio.timeout(limits.handshake_ns_max / SECOND):
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: outer, sock, **options)
            head = await outer.head
            try:
                outer.write(answer_upgrade(head, resource))
            except RefusedError:
                outer.write(NOT_FOUND)
                outer.close()
                await outer.gone.wait()  # until then he counts as one who is handled
                raise
            return await outer.splice()
    except TimeoutError:
        outer.abort()
        raise LinkError("a stranger took too long to ask the WebSocket listener") from None
    except BaseException:
        outer.abort()
        raise
