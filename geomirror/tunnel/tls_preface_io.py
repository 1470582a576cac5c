"""The first byte of a link, in both directions of dialling, and the hand-over to the real protocol.

After the handshake the accepting side says whether it takes the link:

    0x00                      accepted; the link's own bytes follow
    0x01, UTF-8 text, close   refused, and why (revoked, expired, itself)

In TLS 1.3 the client is done before the server has judged it. With this byte `dial` returns only
links that both sides agreed on, and a revoked node learns that it is revoked.

asyncio builds a protocol before the handshake; these stand in until the name is known. The dialling
one reads exactly one byte, so that whatever follows stays in the TLS object for the real protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from geomirror.errors import AuthError, GeomirrorError, LinkError
from geomirror.tunnel.certificates import Claims
from geomirror.tunnel.driver import CIRCUIT_PROTOCOL, JOIN_PROTOCOL, LINK_PROTOCOL
from geomirror.tunnel.join_server_io import JoinService, Refused
from geomirror.tunnel.tls_context_io import explain

ACCEPTED = b"\x00"
REFUSED = b"\x01"
REASON_BYTES_MAX = 1024

Link = tuple[asyncio.Transport, asyncio.BaseProtocol]


class Judge(Protocol):
    """What the stand-ins need of the driver."""

    join_service: JoinService
    refused: Refused
    accept_circuit: Callable[[str], asyncio.BaseProtocol]

    @property
    def own_der(self) -> bytes:
        """The certificate that our side shows."""

    def admit(self, transport: asyncio.Transport) -> Claims:
        """Judge the other side. :raises AuthError: it is not to be linked with."""


class AcceptPreface(asyncio.Protocol):
    """Stands in on an accepted connection until the handshake says who it is."""

    def __init__(
        self,
        driver: Judge,
        factory: Callable[[str], asyncio.BaseProtocol],
        source: str,
    ) -> None:
        self._driver = driver
        self._factory = factory
        self._source = source
        self._own_der = driver.own_der

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is complete: a link, a join exchange, or nothing."""
        transport = cast(asyncio.Transport, transport)
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        if chosen == JOIN_PROTOCOL:
            self._driver.join_service.serve(transport, self._source, self._own_der)
        elif chosen == LINK_PROTOCOL:
            self._take(transport, self._factory)
        elif chosen == CIRCUIT_PROTOCOL:
            self._take(transport, self._driver.accept_circuit)
        else:
            self._driver.refused(self._source, AuthError("a stranger asked for no known protocol"))
            transport.abort()

    def _take(
        self, transport: asyncio.Transport, factory: Callable[[str], asyncio.BaseProtocol]
    ) -> None:
        try:
            claims = self._driver.admit(transport)
            protocol = factory(claims.name)
        except GeomirrorError as error:
            self._driver.refused(self._source, error)
            if not transport.get_extra_info("ssl_object").getpeercert(binary_form=True):
                transport.abort()  # not one of ours: it gets no explanation
                return
            transport.write(REFUSED + str(error).encode("utf-8")[: REASON_BYTES_MAX - 1])
            transport.close()
            return
        transport.write(ACCEPTED)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class DialPreface(asyncio.BufferedProtocol):
    """Stands in on a dialled connection until the other side is judged and has accepted us."""

    def __init__(
        self,
        driver: Judge,
        peer: str,
        who: str,
        protocol: str,
        factory: Callable[[], asyncio.BaseProtocol],
        ready: asyncio.Future[Link],
    ) -> None:
        self.ready = ready
        self._driver = driver
        self._peer = peer
        self._who = who
        self._protocol = protocol
        self._factory = factory
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(REASON_BYTES_MAX)
        self._reason: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is complete: is it the peer that was asked for?"""
        self._transport = cast(asyncio.Transport, transport)
        try:
            chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
            if chosen != self._protocol:
                raise LinkError(f"{self._who} does not speak {self._protocol}")
            claims = self._driver.admit(self._transport)
            if claims.name != self._peer:
                raise AuthError(
                    f'{self._who} is the node "{claims.name}", not "{self._peer}"',
                    hint='check the endpoints with "geomirror node list"',
                )
        except GeomirrorError as error:
            self._fail(error)

    def get_buffer(self, sizehint: int) -> memoryview:
        """One byte until it has come, then room for a whole reason."""
        view = memoryview(self._buffer)
        return view[:1] if self._reason is None else view

    def buffer_updated(self, nbytes: int) -> None:
        """A verdict, or a part of the reason."""
        data = bytes(self._buffer[:nbytes])
        if self.ready.done():
            return
        if self._reason is not None:
            self._reason = (self._reason + data)[:REASON_BYTES_MAX]
        elif data == ACCEPTED:
            self._hand_over()
        elif data == REFUSED:
            self._reason = b""
        else:
            self._fail(LinkError(f"{self._who} does not speak {self._protocol}"))

    def _hand_over(self) -> None:
        assert self._transport is not None
        protocol = self._factory()
        self._transport.set_protocol(protocol)
        self.ready.set_result((self._transport, protocol))
        protocol.connection_made(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ended before the link was accepted."""
        if self._reason is not None:
            text = self._reason.decode("utf-8", "replace")
            text = "".join(c if c.isprintable() else "?" for c in text)
            self._fail(AuthError(f"{self._who} refuses this node: {text}"))
        elif isinstance(exc, OSError):
            self._fail(explain(exc, self._who))
        else:
            self._fail(LinkError(f"{self._who} closed the connection before accepting it"))

    def _fail(self, error: GeomirrorError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
        if self._transport is not None:
            self._transport.abort()

    def end(self, *, is_taken: bool) -> None:
        """The dialler returns: with the link, or without it, and then nothing stays open."""
        if not self.ready.done():
            self.ready.cancel()
        elif not self.ready.cancelled():
            self.ready.exception()  # looked at, also where the dialler was cancelled meanwhile
        if not is_taken and self._transport is not None:
            self._transport.abort()
