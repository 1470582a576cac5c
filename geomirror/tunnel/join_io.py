"""Joining a network, and renewing after a long absence: the dialling side of the join exchange."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from geomirror.environment import SECOND, Clock, Entropy
from geomirror.errors import (
    AuthError,
    LinkError,
    NotFoundError,
    RemoteProtocolError,
    UnreachableError,
)
from geomirror.limits import PRODUCTION, Limits
from geomirror.tunnel.authority_io import install_welcome
from geomirror.tunnel.certificates import check_issued_by, load_certificate, read_claims
from geomirror.tunnel.driver import JOIN_PROTOCOL
from geomirror.tunnel.enrollment import (
    Enrolled,
    Joiner,
    Renew,
    encode_line,
    read_hello,
    read_reply,
    renewal_proof,
)
from geomirror.tunnel.handover_io import open_streams
from geomirror.tunnel.identity import NodeIdentity
from geomirror.tunnel.key_files_io import read_file
from geomirror.tunnel.link_path import expand_paths, parse_path
from geomirror.tunnel.membership import Member
from geomirror.tunnel.names import (
    check_endpoints,
    check_name,
    join_endpoint,
    propose_name,
    split_endpoint,
)
from geomirror.tunnel.network_state_io import (
    NetworkState,
    check_unused,
    keep_identity,
    keep_network,
)
from geomirror.tunnel.path_io import WayOut, open_path
from geomirror.tunnel.tls_context_io import explain, joiner_context, network_label
from geomirror.tunnel.token import parse_token

_REPLY_FACTOR = 8
"""A welcome of a full network is longer than a line that a stranger may send."""


class JoinExchange:
    """One connection of the join protocol."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, endpoint: str
    ) -> None:
        self._reader = reader
        self.writer = writer
        ssl_object = writer.get_extra_info("ssl_object")
        if ssl_object.selected_alpn_protocol() != JOIN_PROTOCOL:
            raise AuthError(
                f"the server at {endpoint} is not of this network, or offers no join exchange",
                hint="check the address; a token works only in the network that made it",
            )
        self.leaf_der: bytes = ssl_object.getpeercert(binary_form=True)
        name = writer.get_extra_info("sockname")
        # Out of a WebSocket it has no address; the authority puts in the one that it sees.
        self.local_host: str = name[0] if isinstance(name, tuple) else "0.0.0.0"

    async def read_line(self) -> bytes:
        try:
            return await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            raise LinkError("the server closed the join exchange") from None
        except asyncio.LimitOverrunError:
            raise RemoteProtocolError("the server sent an endless line") from None


@contextlib.asynccontextmanager
async def connect_join(
    endpoint: str, authority_hash: bytes, limits: Limits, way_out: WayOut, entropy: Entropy
) -> AsyncIterator[JoinExchange]:
    """A connection of the join protocol, on a path (`link_path`); nobody is judged yet.

    :raises LinkError: nobody answers, the proxy does not let us out, or it takes too long.
    :raises AuthError: who answers has no join exchange.
    """
    path = parse_path(endpoint)
    try:
        async with asyncio.timeout(limits.join_exchange_ns_max / SECOND):
            sock = await open_path(path, way_out, limits, entropy)
            reader, writer = await open_streams(
                sock,
                _REPLY_FACTOR * limits.join_line_bytes_max,
                ssl=joiner_context(),
                server_hostname=network_label(authority_hash),
            )
            try:
                yield JoinExchange(reader, writer, endpoint)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        raise LinkError(f"the authority at {endpoint} does not answer in time") from None
    except OSError as error:
        raise explain(error, f"the authority at {endpoint}") from None


async def join(
    data_dir: Path,
    token: str,
    *,
    listen: str | None,
    clock: Clock,
    entropy: Entropy,
    node: str | None = None,
    proxy: str | None = None,
    way_out: WayOut | None = None,
    more_endpoints: Sequence[str] = (),
    limits: Limits = PRODUCTION,
) -> NetworkState:
    """Enrol this data directory in the network of a token.

    The endpoints of the token are tried in turn; who answers must prove to be the authority before
    the secret is sent. The node key is stored first: if the answer is lost, join may be repeated.

    :param listen: `HOST:PORT` where others will dial this node; None if it only dials out.
    :param proxy: `HOST:PORT` of an HTTP proxy, tried where no endpoint answers directly.
    :param more_endpoints: tried besides the token's, like the URL of a WebSocket.
    :param node: name to propose where the token leaves it open; else made of the host name.
    :raises TokenError: malformed, unknown, expired or used.
    :raises RefusedError: the data directory belongs to a network, or the name is taken.
    :raises AuthError: the server is not the token's authority; the secret was not sent.
    :raises UnreachableError: no endpoint of the token answers.
    """
    parsed = parse_token(token, limits)
    check_unused(data_dir)
    if listen is not None:
        split_endpoint(listen)
    proposed = propose_name(socket.gethostname()) if node is None else check_name(node, "node")
    identity = _load_or_create_identity(data_dir, entropy)
    failures: list[str] = []
    for endpoint in expand_paths([*parsed.endpoints, *more_endpoints], proxy):
        joiner = Joiner(parsed, identity, node=proposed, limits=limits)
        try:
            told = (parsed.authority_hash, limits, way_out or WayOut(), entropy)
            async with connect_join(endpoint, *told) as exchange:
                enrolled = await _enroll(exchange, joiner, listen, clock)
        except LinkError as error:
            failures.append(error.message)
            continue
        return keep_network(
            data_dir, enrolled, identity, listen=listen, authority=None, limits=limits
        )
    raise UnreachableError(
        f"no endpoint of the join token answers: {'; '.join(failures)}",
        hint='start "geomirror node run" there, or make a token with another endpoint',
    )


async def _enroll(
    exchange: JoinExchange, joiner: Joiner, listen: str | None, clock: Clock
) -> Enrolled:
    endpoints = own_endpoints(listen, exchange.local_host)
    hello = await exchange.read_line()
    request = joiner.receive_hello(hello, exchange.leaf_der, endpoints, clock.wall_ns())
    exchange.writer.write(request)
    return joiner.receive_reply(await exchange.read_line(), clock.wall_ns())


def _load_or_create_identity(data_dir: Path, entropy: Entropy) -> NodeIdentity:
    path = data_dir / "identity" / "node.key"
    try:
        return NodeIdentity.from_pem(read_file(path), name=str(path))
    except NotFoundError:
        identity = NodeIdentity.create(entropy)
        keep_identity(data_dir, identity)
        return identity


def own_endpoints(listen: str | None, local_host: str) -> tuple[str, ...]:
    """What to tell others of a listening endpoint: "any address" becomes `local_host`."""
    if listen is None:
        return ()
    host, port = split_endpoint(listen)
    return check_endpoints([join_endpoint(local_host if host in _ANY else host, port)])


_ANY = ("0.0.0.0", "::")


async def renew_by_join(
    state: NetworkState,
    *,
    clock: Clock,
    entropy: Entropy,
    paths_of: Callable[[Member], Sequence[str]] = lambda member: member.endpoints,
    way_out: WayOut | None = None,
) -> None:
    """Renew our certificate at the authority's join endpoint; works with an expired one too.

    :param paths_of: on which a node is dialled.
    :raises UnreachableError: no authority node answers at the endpoints that we know.
    :raises AuthError: revoked, not a member, or the server is not an authority of this network.
    """
    failures: list[str] = []
    names = state.authority_names()
    members = [member for name in names if (member := state.membership.find(name)) is not None]
    for endpoint in [path for member in members for path in paths_of(member)]:
        try:
            async with connect_join(
                endpoint, state.authority_hash, state.limits, way_out or WayOut(), entropy
            ) as exchange:
                line = await exchange.read_line()
                exchange.writer.write(_renewal_line(state, line, exchange.leaf_der))
                welcome = read_reply(await exchange.read_line())
        except LinkError as error:
            failures.append(error.message)
            continue
        install_welcome(state, welcome, wall_ns=clock.wall_ns())
        return
    raise UnreachableError(
        f"no authority answers to renew the certificate: {'; '.join(failures) or 'none is known'}",
        hint=f"start the daemon of {', '.join(names) or 'the authority'}",
    )


def _renewal_line(state: NetworkState, line: bytes, leaf_der: bytes) -> bytes:
    hello = read_hello(line)
    leaf = load_certificate(leaf_der)
    check_issued_by(leaf, state.authority_certificate)
    if "authority" not in read_claims(leaf).roles:
        raise AuthError("the server is not an authority of this network")
    request = state.identity.request_pem()
    proof = state.identity.sign(renewal_proof(hello.nonce, leaf_der, request))
    return encode_line(Renew(request=request, proof=proof))
