"""Links between nodes of a network: they carry bytes, and only between the right nodes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from network_kit import HOUR, Collect, Site, free_endpoint, join_as, pair, token_of

from geomirror.environment import SeededEntropy
from geomirror.errors import AuthError, ConfigError, InUseError, LinkError
from geomirror.limits import MIB
from geomirror.tunnel.authority_io import rename_node, renew_own, revoke_node
from geomirror.tunnel.certificates import load_certificate
from geomirror.tunnel.driver import JOIN_PROTOCOL, LINK_PROTOCOL
from geomirror.tunnel.join_io import renew_by_join
from geomirror.tunnel.tls_context_io import network_label


async def dial_and_close(source: Site, peer: str, endpoint: str) -> None:
    transport, protocol = await source.driver.dial(peer, endpoint, Collect)
    transport.abort()
    await protocol.lost


def test_eight_mebibytes_go_through_a_link_and_come_back_on_both_loops(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def story() -> None:
        async with pair(tmp_path) as (east, west):
            for source, peer, target in ((west, "east-1", east), (east, "west-1", west)):
                transport, protocol = await source.driver.dial(peer, target.endpoint, Collect)
                assert target.accepted[-1].peer == source.state.node
                data = SeededEntropy(7).token_bytes(8 * MIB)
                for start in range(0, len(data), MIB):
                    transport.write(data[start : start + MIB])
                assert await protocol.wait(len(data)) == data
                transport.close()
                await protocol.lost
                await target.accepted[-1].lost

    runner.run(story())


class Greets(asyncio.Protocol):
    """Speaks first: its bytes arrive in one piece with the byte that accepts the link."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(b"g" * 100_000)

    def connection_lost(self, exc) -> None:
        self.lost.set_result(exc)


class CollectIntoBuffer(asyncio.BufferedProtocol):
    """A BufferedProtocol that dials."""

    def __init__(self) -> None:
        self.data = b""
        self.complete = asyncio.get_running_loop().create_future()
        self._view = memoryview(bytearray(5000))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self.data += bytes(self._view[:nbytes])
        if len(self.data) == 100_000:
            self.complete.set_result(None)


@pytest.mark.parametrize("is_buffered", [False, True])
def test_no_byte_is_lost_when_the_acceptor_speaks_first(
    runner: asyncio.Runner, tmp_path: Path, is_buffered: bool
) -> None:
    async def story() -> None:
        async with pair(tmp_path) as (east, west):
            accepted: list[Greets] = []

            def accept(peer: str) -> Greets:
                accepted.append(Greets(peer))
                return accepted[-1]

            listener = await east.driver.listen("127.0.0.1:0", accept)
            if is_buffered:
                transport, buffered = await west.driver.dial(
                    "east-1", listener.endpoint, CollectIntoBuffer
                )
                await buffered.complete
                assert buffered.data == b"g" * 100_000
            else:
                transport, plain = await west.driver.dial("east-1", listener.endpoint, Collect)
                assert await plain.wait(100_000) == b"g" * 100_000
            transport.abort()
            await listener.stop()
            await accepted[0].lost

    runner.run(story())


def test_dialling_another_node_than_the_one_asked_for_is_an_auth_error(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def story() -> None:
        async with pair(tmp_path) as (east, west):
            with pytest.raises(AuthError, match='is the node "east-1", not "colo-1"'):
                await west.driver.dial("colo-1", east.endpoint, Collect)

    runner.run(story())


def test_a_node_of_another_network_is_refused_and_told_so(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def story() -> None:
        async with pair(tmp_path / "one") as (east, _), pair(tmp_path / "two") as (_, other_west):
            with pytest.raises(AuthError, match="not of this network"):
                await other_west.driver.dial("east-1", east.endpoint, Collect)
            assert east.accepted == []

    runner.run(story())


def test_a_certificate_of_another_network_is_refused_even_with_our_label(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def story() -> None:
        async with pair(tmp_path / "one") as (east, _), pair(tmp_path / "two") as (_, other):
            context = stranger_context(LINK_PROTOCOL)
            context.load_cert_chain(other.state.certificate_path, other.state.key_path)
            assert await talk(east, context) == b""
            assert east.accepted == []
            assert "verify failed" in str(east.refusals[-1]).lower()

    runner.run(story())


def stranger_context(*protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


async def talk(
    site: Site, context: ssl.SSLContext, *, label: str | None = None, peek: bool = False
) -> bytes:
    """Connect as a stranger who knows the network's label.

    :returns: what comes until the end; with `peek` the certificate that the server shows.
    """
    host, port = site.endpoint.rsplit(":", 1)
    name = label or network_label(site.state.authority_hash)
    async with asyncio.timeout(8):
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname=name
        )
        try:
            received = await reader.read()
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return shown if peek else received
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def test_a_stranger_without_a_certificate_gets_nothing_under_the_link_protocol(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (east, _):
        assert await talk(east, stranger_context(LINK_PROTOCOL)) == b""
        assert east.accepted == []
        assert "without a certificate" in str(east.refusals[-1])


@pytest.mark.parametrize("protocols", [(), ("h2", "http/1.1"), ("geomirror/2",)])
async def test_a_stranger_who_asks_for_another_protocol_gets_nothing(
    tmp_path: Path, protocols: tuple[str, ...]
) -> None:
    async with pair(tmp_path) as (east, _):
        assert await talk(east, stranger_context(*protocols)) == b""
        assert east.accepted == []


async def test_a_scanner_that_does_not_know_the_network_sees_no_certificate(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, _):
        for protocol in (LINK_PROTOCOL, JOIN_PROTOCOL):
            shown = await talk(east, stranger_context(protocol), label="example.org", peek=True)
            text = load_certificate(shown).public_bytes(Encoding.DER)
            assert load_certificate(shown).subject.rfc4514_string() == "CN=nobody"
            assert b"acme" not in text and b"east" not in text


async def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, _):
        context = stranger_context(LINK_PROTOCOL)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError):
            await talk(east, context)
        assert "protocol" in str(east.refusals[-1]).lower()


async def test_no_session_ticket_is_given_so_nothing_can_be_resumed(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        transport, protocol = await west.driver.dial("east-1", east.endpoint, Collect)
        transport.write(b"x")
        await protocol.wait(1)  # tickets would have come with this
        assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        session = transport.get_extra_info("ssl_object").session
        assert session is None or not session.has_ticket
        transport.abort()
        await protocol.lost


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 300, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff"]
)
async def test_garbage_at_the_port_disturbs_nobody(tmp_path: Path, garbage: bytes) -> None:
    async with pair(tmp_path) as (east, west):
        host, port = east.endpoint.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        await dial_and_close(west, "east-1", east.endpoint)
        assert [echo.peer for echo in east.accepted] == ["west-1"]


async def test_too_many_silent_strangers_push_out_the_oldest_and_a_node_still_gets_in(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (east, west):
        host, port = east.endpoint.rsplit(":", 1)
        streams = [
            await asyncio.open_connection(host, int(port))
            for _ in range(east.state.limits.handshakes_max + 1)
        ]
        await dial_and_close(west, "east-1", east.endpoint)
        assert await streams[0][0].read() == b""  # ended: it was the oldest
        for _, writer in streams:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def test_a_revoked_node_is_cut_and_told_and_stays_out(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def story() -> None:
        async with pair(tmp_path) as (east, west):
            _, protocol = await west.driver.dial("east-1", east.endpoint, Collect)
            assert east.driver.enforce() == []
            revoke_node(east.state, "west-1", wall_ns=east.clock.wall_ns())
            assert east.state.membership.revoked_names() == ["west-1"]
            assert east.driver.enforce() == ["west-1"]
            await protocol.lost
            with pytest.raises(AuthError, match='refuses this node: the node "west-1" is revoked'):
                await west.driver.dial("east-1", east.endpoint, Collect)
            with pytest.raises(AuthError, match="is revoked"):
                await east.driver.dial("west-1", west.endpoint, Collect)
            with pytest.raises(AuthError, match="is revoked"):
                await renew_by_join(west.state, clock=west.clock, entropy=west.entropy)

    runner.run(story())


async def test_a_node_does_not_link_with_itself_or_a_copy_of_itself(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, _):
        with pytest.raises(AuthError, match="own key"):
            await east.driver.dial("east-1", east.endpoint, Collect)


async def test_an_expired_certificate_is_told_apart_from_a_wrong_clock(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        west.clock.shift_ns = 25 * HOUR  # both sites share this clock
        with pytest.raises(AuthError, match=r"expired 36\d\d s ago.*clock skew"):
            await west.driver.dial("east-1", east.endpoint, Collect)
        west.clock.shift_ns = 80 * HOUR
        with pytest.raises(AuthError, match="expired") as caught:
            await west.driver.dial("east-1", east.endpoint, Collect)
        assert "clock" not in str(caught.value)
        west.clock.shift_ns = -1 * HOUR
        with pytest.raises(AuthError, match=r"valid only in.*clock skew"):
            await west.driver.dial("east-1", east.endpoint, Collect)


async def test_a_live_link_ends_when_its_certificate_does(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        _, protocol = await west.driver.dial("east-1", east.endpoint, Collect)
        west.clock.shift_ns = 23 * HOUR
        assert east.driver.enforce() == []
        west.clock.shift_ns = 25 * HOUR
        assert east.driver.enforce() == ["west-1"]
        await protocol.lost


async def test_renewed_certificates_are_used_at_once_and_old_links_stay(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        _, protocol = await west.driver.dial("east-1", east.endpoint, Collect)
        west.clock.shift_ns = 13 * HOUR
        old = west.state.claims
        assert west.state.is_renewal_due(west.clock.wall_ns())
        renew_own(east.state, wall_ns=east.clock.wall_ns(), entropy=east.entropy)
        await renew_by_join(west.state, clock=west.clock, entropy=west.entropy)
        assert not west.state.is_renewal_due(west.clock.wall_ns())
        assert west.state.claims.serial != old.serial
        assert west.state.claims.not_after_ns >= old.not_after_ns + 12 * HOUR
        west.clock.shift_ns = 25 * HOUR  # the first certificates are over now
        await dial_and_close(west, "east-1", east.endpoint)
        await dial_and_close(east, "west-1", west.endpoint)
        protocol.transport.write(b"still here")
        assert await protocol.wait(10) == b"still here"
        protocol.transport.abort()
        await protocol.lost


async def test_a_node_that_was_away_for_days_renews_with_its_key(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        west.clock.shift_ns = 100 * HOUR
        renew_own(east.state, wall_ns=east.clock.wall_ns(), entropy=east.entropy)
        await renew_by_join(west.state, clock=west.clock, entropy=west.entropy)
        await dial_and_close(west, "east-1", east.endpoint)


async def test_a_renamed_node_is_reached_by_its_new_name_after_renewal(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        rename_node(east.state, "west-1", "west-9")
        assert west.state.apply_updates(east.state.export_updates())
        assert west.state.node == "west-9"
        assert west.state.is_renewal_due(west.clock.wall_ns())
        await renew_by_join(west.state, clock=west.clock, entropy=west.entropy)
        await dial_and_close(east, "west-9", west.endpoint)
        with pytest.raises(AuthError, match='is the node "west-9"'):
            await east.driver.dial("west-1", west.endpoint, Collect)


async def test_nobody_there_is_a_link_error(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, west):
        with pytest.raises(LinkError, match="cannot be reached"):
            await west.driver.dial("east-1", free_endpoint(), Collect)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
async def test_another_program_at_the_endpoint_is_a_link_error(
    tmp_path: Path, answer: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async with pair(tmp_path) as (_, west):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(LinkError):
            await west.driver.dial("east-1", f"127.0.0.1:{port}", Collect)
        server.close()
        await server.wait_closed()


async def test_a_dialler_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, west):
        accepted = asyncio.get_running_loop().create_future()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(None)
            assert await reader.read() != b""  # the whole hello, then the end
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        dialling = asyncio.create_task(west.driver.dial("east-1", f"127.0.0.1:{port}", Collect))
        await accepted
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
        server.close()
        await server.wait_closed()


async def test_listening_where_another_process_listens_is_an_in_use_error(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        with pytest.raises(InUseError, match="cannot listen"):
            await west.driver.listen(east.endpoint, west.accept)
        with pytest.raises(ConfigError, match="address of this machine"):
            await west.driver.listen("192.0.2.1:7701", west.accept)
        with pytest.raises(ConfigError, match="HOST:PORT"):
            await west.driver.listen("7701", west.accept)


async def test_the_third_node_links_with_the_second_which_never_heard_of_it(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        token = token_of(east, node=None, site="colo")
        colo = await join_as(tmp_path / "colo", token, east.clock, node="colo-1", listen=None)
        assert west.state.membership.find("colo-1") is None
        await dial_and_close(colo, "west-1", west.endpoint)
        assert west.accepted[-1].peer == "colo-1"
        assert west.state.apply_updates(colo.state.export_updates())
        assert west.state.membership.find("colo-1").endpoints == ()


async def test_a_refusal_by_the_factory_reaches_the_dialler(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):

        def refuse(peer: str) -> Collect:
            raise LinkError(f'"{peer}" is not expected here')

        listener = await east.driver.listen("127.0.0.1:0", refuse)
        with pytest.raises(AuthError, match='"west-1" is not expected here'):
            await west.driver.dial("east-1", listener.endpoint, Collect)
        await listener.stop()
