"""Tries the paths to a peer and keeps the facts; what they mean is `diagnosis`'s."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator

from geomirror.environment import Clock, Entropy
from geomirror.errors import GeomirrorError, LinkError
from geomirror.tunnel.certificates import check_issued_by, load_certificate
from geomirror.tunnel.diagnosis import Failure, PathFacts, Stage
from geomirror.tunnel.driver import LINK_PROTOCOL
from geomirror.tunnel.enrollment import read_hello
from geomirror.tunnel.handover_io import connect_stream
from geomirror.tunnel.join_io import connect_join
from geomirror.tunnel.link_path import LinkPath, parse_path
from geomirror.tunnel.names import split_endpoint
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.path_io import WayOut, ask_proxy, open_path
from geomirror.tunnel.tcp_io import open_tcp
from geomirror.tunnel.tls_context_io import network_label, stranger_context
from geomirror.tunnel.tls_io import TlsDriver

STAGE_SECONDS = 3.0
"""For each stage: longer than a lost packet needs, shorter than patience."""


class _Ended(Exception):
    """An attempt ended at a stage."""

    def __init__(self, stage: Stage, failure: Failure, detail: str = "", status: int = 0) -> None:
        super().__init__(detail)
        self.stage, self.failure = stage, failure
        self.detail, self.status = detail, status


@contextlib.asynccontextmanager
async def _stage(stage: Stage) -> AsyncIterator[None]:
    """Whatever goes wrong inside went wrong at this stage."""
    try:
        async with asyncio.timeout(STAGE_SECONDS):
            yield
    except TimeoutError:
        raise _Ended(stage, "timeout", "no answer in time") from None
    except GeomirrorError as error:
        raise _Ended(stage, "nonsense", error.message) from None
    except socket.gaierror as error:
        raise _Ended("name", "not_found", error.strerror or str(error)) from None
    except OSError as error:
        kinds: dict[int | None, Failure] = {
            errno.ECONNREFUSED: "refused",
            errno.ETIMEDOUT: "timeout",
            errno.ECONNRESET: "closed",
        }
        reason = getattr(error, "reason", None) or error.strerror or str(error) or "closed"
        failure: Failure = kinds.get(error.errno, "unreachable")
        raise _Ended(stage, failure, str(reason)) from None


async def try_path(
    text: str, peer: str, state: NetworkState, way_out: WayOut, clock: Clock, entropy: Entropy
) -> PathFacts:
    """Go one path to a peer as far as it leads; nothing stays open."""
    path = parse_path(text)
    try:
        await _try_way(path, state, way_out, entropy)
        certificate = await _look(path, state, way_out, entropy)
    except _Ended as ended:
        return PathFacts(text, ended.stage, ended.failure, ended.detail, ended.status)
    driver = TlsDriver(state, clock, entropy)
    driver.way_out = way_out
    try:
        async with asyncio.timeout(2 * STAGE_SECONDS):
            transport, _ = await driver.dial(peer, text, asyncio.Protocol)
    except (GeomirrorError, TimeoutError) as error:
        _, is_answer, said = str(error).partition("refuses this node: ")
        stage: Stage = "peer" if is_answer else "certificate"
        return PathFacts(text, stage, detail=said or str(error), certificate=certificate)
    transport.abort()
    return PathFacts(text, "up")


async def _try_way(path: LinkPath, state: NetworkState, way_out: WayOut, entropy: Entropy) -> None:
    """Name, connection and proxy, each by itself, so that the cause is known."""
    host, port = split_endpoint(path.proxy) if path.proxy else (path.host, path.port)
    loop = asyncio.get_running_loop()
    async with _stage("name"):
        await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    async with _stage("connect"):
        (await open_tcp(host, port, state.limits.tcp_segment_bytes)).close()
    if not path.proxy:
        return
    async with _stage("proxy"):
        sock, answer = await ask_proxy(path, way_out, state.limits)
        sock.close()
    if not answer.is_connected:
        offered = ", ".join(answer.schemes) or "nothing"
        detail = f"wants a user name and a password; it offers {offered}"
        if way_out.credentials is not None:
            detail = "does not take the user name and password of links.proxy_credentials"
        raise _Ended("proxy", "status", detail, answer.status)


async def _look(path: LinkPath, state: NetworkState, way_out: WayOut, entropy: Entropy) -> bytes:
    """The certificate at the end, DER, as a stranger gets it: our own is not shown."""
    async with _stage("websocket" if path.scheme else "connect"):
        sock = await open_path(path, way_out, state.limits, entropy)
    async with _stage("handshake"):
        transport, _ = await connect_stream(
            asyncio.Protocol,
            sock,
            ssl=stranger_context(LINK_PROTOCOL),
            server_hostname=network_label(state.authority_hash),
            ssl_handshake_timeout=STAGE_SECONDS,
        )
    shown: ssl.SSLObject = transport.get_extra_info("ssl_object")
    certificate = shown.getpeercert(binary_form=True) or b""
    transport.abort()
    return certificate


async def authority_skew_ns(
    paths: list[str], state: NetworkState, way_out: WayOut, clock: Clock, entropy: Entropy
) -> int | None:
    """Our clock minus the authority's, by the first path on which it proves itself; else None."""
    for path in paths:
        with contextlib.suppress(GeomirrorError, TimeoutError):
            async with (
                asyncio.timeout(STAGE_SECONDS),
                connect_join(path, state.authority_hash, state.limits, way_out, entropy) as found,
            ):
                check_issued_by(load_certificate(found.leaf_der), state.authority_certificate)
                asked_ns = clock.wall_ns()
                hello = read_hello(await found.read_line())
                if hello.network != state.network:
                    raise LinkError("of another network")
                return (asked_ns + clock.wall_ns()) // 2 - hello.wall_ns
    return None
