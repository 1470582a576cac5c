"""The `tls` link driver: mutual TLS 1.3 streams, without root and without a TUN device.

They go over TCP, through an HTTP proxy, or inside a WebSocket (`path_io`): each time the same bytes
between the same two nodes. Contexts and what OpenSSL checks: `tls_context_io`. The byte that
accepts a link: `tls_preface_io`.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.serialization import Encoding

from geomirror.environment import SECOND, Clock, Entropy
from geomirror.errors import (
    AuthError,
    GeomirrorError,
    LinkError,
    RefusedError,
    RemoteProtocolError,
)
from geomirror.tunnel.certificates import Claims, check_dates, load_certificate, read_claims
from geomirror.tunnel.door_io import Door, Handle
from geomirror.tunnel.driver import CIRCUIT_PROTOCOL, LINK_PROTOCOL
from geomirror.tunnel.handover_io import connect_stream
from geomirror.tunnel.join_server_io import Joined, JoinService, Refused
from geomirror.tunnel.link_path import parse_path
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.path_io import WayOut, open_path
from geomirror.tunnel.tcp_io import bind_tcp
from geomirror.tunnel.tls_context_io import (
    client_context,
    explain,
    load_own,
    network_label,
    server_context,
)
from geomirror.tunnel.tls_preface_io import AcceptPreface, DialPreface
from geomirror.tunnel.websocket_io import accept_websocket

CIRCUIT_GRACE_NS = 60 * SECOND
"""A renewed certificate is learnt from the link, which is cut when the old one ends and is made
anew; so long circuits outlive it meanwhile."""
SHUTDOWN_SECONDS = 1.0
"""How long a closing connection waits for the other side's close."""


def no_circuits(peer: str) -> asyncio.BaseProtocol:
    """What a driver says that nobody has told what to do with circuits."""
    raise RefusedError("circuits are not served here")


@dataclass
class _Live:
    transport: asyncio.Transport
    claims: Claims
    is_circuit: bool
    """Lasts for as long as its key has a certificate, not for as long as that certificate: an
    application cannot be made to connect anew every day."""


class TlsDriver:
    """Dials and accepts mutual TLS links for one node."""

    name = "tls"

    def __init__(
        self,
        state: NetworkState,
        clock: Clock,
        entropy: Entropy,
        *,
        refused: Refused = lambda source, error: None,
        joined: Joined = lambda name: None,
    ) -> None:
        self.state = state
        self.clock = clock
        self.entropy = entropy
        self.refused = refused
        self.way_out = WayOut()
        self.websocket_tls: ssl.SSLContext | None = None
        """What a `wss://` listener shows; links prove themselves inside of it."""
        self.join_service = JoinService(state, clock, entropy, refused=refused, joined=joined)
        self.accept_circuit: Callable[[str], asyncio.BaseProtocol] = no_circuits
        """Called with the name of a peer that opens a circuit; makes its protocol, as the
        listener's factory does for links."""
        self._clients = {
            protocol: client_context(state, protocol)
            for protocol in (LINK_PROTOCOL, CIRCUIT_PROTOCOL)
        }
        self._server = server_context(state, entropy)
        self._loaded = state.certificate
        self._live: list[_Live] = []
        self._newest: dict[str, Claims] = {}
        """Node id -> its certificate that lasts longest; of members, so there are few."""

    @property
    def own_der(self) -> bytes:
        """The certificate that the contexts show now."""
        return self._loaded.public_bytes(Encoding.DER)

    @property
    def server(self) -> ssl.SSLContext:
        """The accepting context, with our newest certificate."""
        self._reload()
        return self._server

    def _reload(self) -> None:
        if self._loaded is not self.state.certificate:
            for context in (*self._clients.values(), self._server):
                load_own(context, self.state)
            self._loaded = self.state.certificate

    def admit(self, transport: asyncio.Transport) -> Claims:
        """Judge the other side of a finished handshake and keep it under `enforce`.

        :raises AuthError: no certificate, expired, revoked, or our own key.
        """
        der = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if not der:
            raise AuthError("a stranger without a certificate asked for a link")
        claims = read_claims(load_certificate(der))
        if claims.network != self.state.network:
            raise AuthError(f'"{claims.name}" is of the network "{claims.network}"')
        self._judge(claims)
        if claims.node_id == self.state.identity.node_id:
            raise AuthError(
                "the other side has this node's own key",
                hint="it is this node itself, or a copy of its data directory; join the copy anew",
            )
        self._live = [live for live in self._live if not live.transport.is_closing()]
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        self._live.append(_Live(transport, claims, is_circuit=chosen == CIRCUIT_PROTOCOL))
        known = self._newest.setdefault(claims.node_id, claims)
        if known.not_after_ns < claims.not_after_ns:
            self._newest[claims.node_id] = claims
        return claims

    def _judge(self, claims: Claims) -> None:
        if self.state.membership.is_revoked(claims.node_id):
            raise AuthError(f'the node "{claims.name}" is revoked')
        check_dates(claims, self.clock.wall_ns())

    def _judge_again(self, live: _Live) -> None:
        claims = live.claims
        if live.is_circuit and not self.state.membership.is_revoked(claims.node_id):
            ends_ns = self._newest[claims.node_id].not_after_ns + CIRCUIT_GRACE_NS
            if self.clock.wall_ns() < ends_ns:
                return
        self._judge(claims)

    def certificate_ends_ns(self, node_id: str) -> int | None:
        """When the newest certificate ends that a node has shown; None: none since the start."""
        claims = self._newest.get(node_id)
        return claims.not_after_ns if claims is not None else None

    def enforce(self) -> list[str]:
        """Cut live links of revoked keys and of expired certificates; call it each second.

        A peer whose certificate only ran out reconnects at once with its renewed one; its circuits
        stay if it has one.

        :returns: the names cut, for the log.
        """
        cut: list[str] = []
        kept: list[_Live] = []
        for live in self._live:
            if live.transport.is_closing():
                continue
            try:
                self._judge_again(live)
            except AuthError:
                live.transport.abort()
                cut.append(live.claims.name)
            else:
                kept.append(live)
        self._live = kept
        return cut

    async def dial(
        self,
        peer: str,
        endpoint: str,
        factory: Callable[[], asyncio.BaseProtocol],
        connected: Callable[[], None] = lambda: None,
        protocol: str = LINK_PROTOCOL,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """See `LinkDriver.dial`; `protocol`: LINK_PROTOCOL or CIRCUIT_PROTOCOL."""
        path = parse_path(endpoint)
        self._reload()
        loop = asyncio.get_running_loop()
        who = f'"{peer}" at {endpoint}'
        preface = DialPreface(self, peer, who, protocol, factory, loop.create_future())
        limits = self.state.limits
        link = None
        try:
            async with asyncio.timeout(limits.dial_ns_max / SECOND):
                sock = await open_path(path, self.way_out, limits, self.entropy, connected)
                await connect_stream(
                    lambda: preface,
                    sock,
                    ssl=self._clients[protocol],
                    server_hostname=network_label(self.state.authority_hash),
                    ssl_handshake_timeout=limits.dial_ns_max / SECOND,
                    ssl_shutdown_timeout=SHUTDOWN_SECONDS,
                )
                link = await preface.ready
                return link
        except TimeoutError:
            raise LinkError(f"{who} does not answer in time") from None
        except OSError as error:
            raise explain(error, who) from None
        finally:
            preface.end(is_taken=link is not None)

    async def listen(
        self, endpoint: str, factory: Callable[[str], asyncio.BaseProtocol]
    ) -> TlsListener:
        """See `LinkDriver.listen`; `ws://` and `wss://HOST:PORT/PATH` accept WebSockets.

        A `wss` one has the certificate `websocket_tls`.
        """
        path = parse_path(endpoint)
        sockets = await bind_tcp(path.host, path.port, self.state.limits.tcp_segment_bytes)
        handle: Handle = functools.partial(self._authenticate, factory)
        if path.scheme:
            context = self.websocket_tls if path.scheme == "wss" else None
            handle = functools.partial(self._unwrap, factory, path.resource, context)
        listener = TlsListener(self, sockets, handle)
        listener.start()
        return listener

    async def _authenticate(
        self,
        factory: Callable[[str], asyncio.BaseProtocol],
        connection: socket.socket,
        source: str,
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: AcceptPreface(self, factory, source),
                connection,
                ssl=self.server,
                ssl_handshake_timeout=self.state.limits.handshake_ns_max / SECOND,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
        except OSError as error:
            cause = error.strerror or str(error) or "the connection was closed"
            self.refused(source, RemoteProtocolError(f"a handshake failed: {cause}"))

    async def _unwrap(
        self,
        factory: Callable[[str], asyncio.BaseProtocol],
        resource: str,
        context: ssl.SSLContext | None,
        connection: socket.socket,
        source: str,
    ) -> None:
        limits = self.state.limits
        try:
            stream = await accept_websocket(connection, resource, context, limits, self.entropy)
        except GeomirrorError as error:
            self.refused(source, error)
        except OSError as error:
            cause = error.strerror or str(error) or "the connection was closed"
            self.refused(source, RemoteProtocolError(f"an HTTPS handshake failed: {cause}"))
        else:
            await self._authenticate(factory, stream, source)


class TlsListener(Door):
    """Accepts links, circuits and join exchanges."""

    def __init__(self, driver: TlsDriver, sockets: list[socket.socket], handle: Handle) -> None:
        super().__init__(sockets, handle, driver.refused, driver.state.limits.handshakes_max)
        self._join_service = driver.join_service

    async def stop(self) -> None:
        """See `Listener.stop`; join exchanges end too."""
        await super().stop()
        await self._join_service.stop()
