"""Attacks on the join exchange: somebody in the middle, and strangers at the port."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from network_kit import Collect, Site, authority, everything_stored, found, join_as, pair, token_of

from geomirror.environment import MS, SeededEntropy
from geomirror.errors import AuthError, RefusedError, RemoteProtocolError
from geomirror.limits import PRODUCTION
from geomirror.tunnel.authority import certificate_pem
from geomirror.tunnel.authority_io import enroll, list_tokens
from geomirror.tunnel.certificates import load_certificate, public_key_of, read_claims
from geomirror.tunnel.driver import JOIN_PROTOCOL
from geomirror.tunnel.enrollment import Hello, Join, encode_line
from geomirror.tunnel.identity import NodeIdentity
from geomirror.tunnel.network_io import load_network
from geomirror.tunnel.tls_context_io import joiner_context, network_label
from geomirror.tunnel.token import parse_token

# -- somebody in the middle -------------------------------------------------------------------


class FakeAuthority:
    """A server that answers with `hello` and keeps every byte that it is sent."""

    def __init__(self, hello: bytes, context: ssl.SSLContext) -> None:
        self._hello = hello
        self._context = context
        self.received = b""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._hello)
        self.received += await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await server.wait_closed()


def server_of(site: Site) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([JOIN_PROTOCOL])
    context.load_cert_chain(site.state.certificate_path, site.state.key_path)
    return context


def hello_of(site: Site) -> bytes:
    return encode_line(
        Hello(
            version=1,
            network=site.state.network,
            authority=certificate_pem(site.state.authority_certificate),
            nonce=bytes(32),
            wall_ns=site.clock.wall_ns(),
        )
    )


@pytest.mark.parametrize("attack", ["other authority", "stolen hello", "plain member", "nonsense"])
async def test_the_secret_never_reaches_anybody_but_the_authority(
    tmp_path: Path, attack: str
) -> None:
    """The attacker stands at the token's endpoint and knows all that is public."""
    async with pair(tmp_path) as (east, west):
        evil = found(tmp_path / "evil", east.clock, network="acme")
        fake = {
            # Its own authority, complete and consistent.
            "other authority": FakeAuthority(hello_of(evil), server_of(evil)),
            # The true authority's certificate, which is public, but not a key signed by it.
            "stolen hello": FakeAuthority(hello_of(east), server_of(evil)),
            # A member of the network without the role `authority`.
            "plain member": FakeAuthority(hello_of(east), server_of(west)),
            "nonsense": FakeAuthority(b'{"type":"hello"}\n', server_of(evil)),
        }[attack]
        async with fake.running() as endpoint:
            token = token_of(east, "colo-1", endpoints=[endpoint])
            expected = RemoteProtocolError if attack == "nonsense" else AuthError
            with pytest.raises(expected):
                await join_as(tmp_path / "colo", token, east.clock)
        assert fake.received == b""
        assert not (tmp_path / "colo" / "network").exists()


async def test_a_token_shown_to_another_network_stays_unused(tmp_path: Path) -> None:
    async with authority(tmp_path / "one") as east, authority(tmp_path / "two") as other:
        token = token_of(east, endpoints=[other.endpoint])
        with pytest.raises(AuthError, match="not of this network"):
            await join_as(tmp_path / "w", token, east.clock)
        assert all(record.used_ns is None for record in list_tokens(east.state))


async def test_a_join_at_a_node_without_the_authority_key_says_where_to_go(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        token = token_of(east, "colo-1", endpoints=[west.endpoint])
        with pytest.raises(RefusedError, match=r'west-1" does not hold.*"east-1"'):
            await join_as(tmp_path / "colo", token, east.clock)


# -- strangers at the join endpoint -----------------------------------------------------------


async def talk_join(east: Site, *lines: bytes) -> list[dict]:
    """Send lines under the join protocol; what the authority says."""
    host, port = east.endpoint.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(
        host,
        int(port),
        ssl=joiner_context(),
        server_hostname=network_label(east.state.authority_hash),
    )
    writer.write(b"".join(lines))
    async with asyncio.timeout(8):
        said = [json.loads(await reader.readuntil(b"\n")) for _ in range(2)]
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return said


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"\xff\xfe\n",
        b'{"type":"welcome"}\n',
        b'{"type":"join","token_id":"../../etc/passwd","secret":"","request":"","node":null,'
        b'"endpoints":[]}\n',
        b"[" * 60_000 + b"\n",
        b'{"type":"join","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}\n",
        b"x" * 70_000 + b"\n",
    ],
)
async def test_nonsense_at_the_join_endpoint_is_refused_and_changes_nothing(
    tmp_path: Path, line: bytes
) -> None:
    async with authority(tmp_path) as east:
        before = everything_stored(tmp_path)
        hello, answer = await talk_join(east, line)
        assert hello["type"] == "hello"
        assert answer["type"] == "refuse"
        assert answer["code"] in (RemoteProtocolError.wire_code, 22)
        assert everything_stored(tmp_path) == before
        await join_as(tmp_path / "w", token_of(east), east.clock)


async def test_a_request_that_asks_for_more_gets_what_the_token_says(tmp_path: Path) -> None:
    """The request names itself authority, CA and another node; the token says west-1, member."""
    async with authority(tmp_path) as east:
        parsed = parse_token(token_of(east), PRODUCTION)
        key = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
        names = ["geomirror://acme/east-1", "geomirror://acme/east-1/role/authority"]
        greedy = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "east-1")]))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(n) for n in names]),
                critical=False,
            )
            .sign(key, None)
        )
        request = Join(
            token_id=parsed.token_id,
            secret=parsed.secret.reveal(),
            request=greedy.public_bytes(Encoding.PEM).decode(),
            node="east-1",
            endpoints=[],
        )
        welcome = enroll(
            east.state,
            request,
            observed_host="127.0.0.1",
            wall_ns=east.clock.wall_ns(),
            entropy=east.entropy,
        )
        certificate = load_certificate(welcome.certificate.encode())
        claims = read_claims(certificate)
        assert (claims.name, claims.site, claims.roles) == ("west-1", "west", ("member",))
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.value.ca is False
        assert public_key_of(certificate) == key.public_key()


def request_of(east: Site, pem: str) -> Join:
    parsed = parse_token(token_of(east), PRODUCTION)
    return Join(
        token_id=parsed.token_id,
        secret=parsed.secret.reveal(),
        request=pem,
        node=None,
        endpoints=[],
    )


async def test_a_request_not_signed_by_its_key_is_refused_and_the_token_stays(
    tmp_path: Path,
) -> None:
    async with authority(tmp_path) as east:
        pem = NodeIdentity.create(SeededEntropy(3)).request_pem()
        der = bytearray(base64.b64decode("".join(pem.splitlines()[1:-1])))
        der[-1] ^= 1
        body = base64.b64encode(der).decode()
        broken = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"
        for text in (broken, "", "-----BEGIN CERTIFICATE REQUEST-----", pem.replace("M", "é")):
            with pytest.raises(AuthError, match="certificate request"):
                enroll(
                    east.state,
                    request_of(east, text),
                    observed_host="127.0.0.1",
                    wall_ns=east.clock.wall_ns(),
                    entropy=east.entropy,
                )
        assert all(record.used_ns is None for record in list_tokens(east.state))


async def test_too_many_joins_at_a_time_are_refused(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        host, port = east.endpoint.rsplit(":", 1)
        label = network_label(east.state.authority_hash)
        streams = []
        for _ in range(PRODUCTION.join_connections_max):
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=joiner_context(), server_hostname=label
            )
            assert json.loads(await reader.readuntil(b"\n"))["type"] == "hello"
            streams.append(writer)
        with pytest.raises(RefusedError, match="too many nodes are joining"):
            await join_as(tmp_path / "w", token_of(east), east.clock)
        for writer in streams:
            writer.transport.abort()


async def test_a_joiner_reaches_only_the_join_exchange(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, _):
        count = len(east.accepted)
        answers = await talk_join(east, b'{"type":"renew","request":"x","proof":""}\n')
        assert answers[1]["code"] == AuthError.wire_code
        assert len(east.accepted) == count


async def test_announced_endpoints_cannot_send_members_to_a_metadata_service(
    tmp_path: Path,
) -> None:
    async with authority(tmp_path) as east:
        request = request_of(east, NodeIdentity.create(SeededEntropy(5)).request_pem())
        request.endpoints = ["169.254.169.254:80", "[fe80::1]:80", "224.0.0.1:9", "192.0.2.7:7701"]
        request.endpoints.append("[::ffff:169.254.169.254]:80")
        enroll(
            east.state,
            request,
            observed_host="127.0.0.1",
            wall_ns=east.clock.wall_ns(),
            entropy=east.entropy,
        )
        member = load_network(tmp_path / "east").membership.find("west-1")
        assert member is not None
        assert member.endpoints == ("192.0.2.7:7701",)


@pytest.mark.parametrize("host", ["2852039166", "0xa9fea9fe", "169.254.43518", "169.254.0xa9fe"])
async def test_an_address_that_is_spelt_like_a_name_is_refused(tmp_path: Path, host: str) -> None:
    async with authority(tmp_path) as east:
        request = request_of(east, NodeIdentity.create(SeededEntropy(5)).request_pem())
        request.endpoints = [f"{host}:80"]
        options = {"wall_ns": east.clock.wall_ns(), "entropy": east.entropy}
        with pytest.raises(RefusedError, match="not written as usual"):
            enroll(east.state, request, observed_host="127.0.0.1", **options)
        assert load_network(tmp_path / "east").membership.find("west-1") is None


async def test_a_silent_stranger_is_dropped_in_the_handshake_and_in_the_join_exchange(
    tmp_path: Path,
) -> None:
    async with authority(tmp_path) as east:
        east.state.limits = replace(
            PRODUCTION, handshake_ns_max=300 * MS, join_exchange_ns_max=300 * MS
        )
        host, port = east.endpoint.rsplit(":", 1)
        label = network_label(east.state.authority_hash)
        for options in ({}, {"ssl": joiner_context(), "server_hostname": label}):
            reader, writer = await asyncio.open_connection(host, int(port), **options)
            async with asyncio.timeout(5):
                with suppress(OSError):
                    await reader.read()  # returns: the other side has ended it
            writer.transport.abort()
        east.state.limits = PRODUCTION
        await join_as(tmp_path / "w", token_of(east), east.clock)


async def test_links_between_members_live_without_the_authority(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        colo = await join_as(tmp_path / "colo", token_of(east, "colo-1"), east.clock, listen=None)
        assert east.listener is not None
        await east.listener.stop()
        transport, protocol = await colo.driver.dial("west-1", west.endpoint, Collect)
        transport.write(b"alone")
        assert await protocol.wait(5) == b"alone"
        transport.abort()
        await protocol.lost
