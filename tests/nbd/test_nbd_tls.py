"""TLS on TCP listeners: who is let in, and that nothing crosses from the clear into it."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from geomirror.errors import ConfigError
from geomirror.limits import PRODUCTION
from geomirror.nbd import constants as c
from geomirror.nbd.negotiation import TlsMode
from geomirror.nbd.server_io import NbdServer
from geomirror.nbd.tls_io import load_server_tls
from tests.nbd.certificates import Authority
from tests.nbd.ram_export import RamExport

HELLO = b"NBDMAGICIHAVEOPT\0\3"
FLAGS = b"\0\0\0\3"
STARTTLS = struct.pack(">QII", c.OPTION_MAGIC, c.OPT_STARTTLS, 0)
GO = struct.pack(">QIIIH", c.OPTION_MAGIC, c.OPT_GO, 6, 0, 0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "foreign")


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    """Runs a story on either event loop."""
    if request.param == "asyncio":
        return asyncio.run
    return pytest.importorskip("uvloop").run


class Server:
    def __init__(self, authority: Authority, mode: TlsMode, **limits: int) -> None:
        self.disk = RamExport(name="ram", size_bytes=8 << 20)
        self.ended: list[Exception | None] = []
        self.server = NbdServer(
            lambda: {"ram": self.disk},
            limits=replace(PRODUCTION, **limits),
            default="ram",
            on_disconnect=lambda _, error: self.ended.append(error),
        )
        self.server.tls = load_server_tls(*authority.server, authority.ca, mode)
        self.port = 0

    async def until_ended(self, count: int = 1) -> None:
        async with asyncio.timeout(30):
            while len(self.ended) < count:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def served(
    authority: Authority, mode: TlsMode = TlsMode.REQUIRE, **limits: int
) -> AsyncIterator[Server]:
    found = Server(authority, mode, **limits)
    _, found.port = await found.server.start_tcp("127.0.0.1", 0)
    yield found
    await found.server.stop()
    assert found.disk.open_count == 0


def client_context(trusted: Authority, own: Authority | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=trusted.ca)
    if own is not None:
        context.load_cert_chain(*own.client)
    return context


async def plain(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.readexactly(18) == HELLO
    writer.write(FLAGS)
    return reader, writer


async def ask(reader, writer, option: bytes) -> int:
    """Send one option; the type of the first reply."""
    writer.write(option)
    _, _, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
    await reader.readexactly(length)
    return kind


async def encrypted(port: int, context: ssl.SSLContext):
    reader, writer = await plain(port)
    assert await ask(reader, writer, STARTTLS) == c.REP_ACK
    await writer.start_tls(context, server_hostname="localhost")
    return reader, writer


def test_data_passes_in_large_and_in_many_requests(authority: Authority, play) -> None:
    async def story() -> None:
        async with served(authority) as found:
            reader, writer = await encrypted(found.port, client_context(authority, authority))
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            assert await ask(reader, writer, GO) == c.REP_INFO
            await reader.readexactly(20)
            data = random.Random(1).randbytes(5 << 20)
            head = (c.REQUEST_MAGIC, 0, c.CMD_WRITE)
            writer.write(struct.pack(">IHHQQI", *head, 1, 4096, len(data)) + data)
            assert await reader.readexactly(16) == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 1)
            assert found.disk.data[4096 : 4096 + len(data)] == data
            for cookie in range(200):
                at = 4096 + cookie * 16384
                writer.write(
                    struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_READ, cookie, at, 16384)
                )
            for _ in range(200):
                _, error, cookie = struct.unpack(">IIQ", await reader.readexactly(16))
                assert not error
                read = await reader.readexactly(16384)
                assert read == data[cookie * 16384 :][:16384]
            writer.write(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_DISCONNECT, 0, 0, 0))
            assert await reader.read() == b""
            writer.close()
            await found.until_ended()
            assert found.ended == [None]

    play(story())


def test_what_is_held_back_goes_on_without_a_further_byte(authority: Authority, play) -> None:
    async def story() -> None:
        async with served(authority, nbd_requests_max=4) as found:
            reader, writer = await encrypted(found.port, client_context(authority, authority))
            assert await ask(reader, writer, GO) == c.REP_INFO
            await reader.readexactly(20)
            found.disk.held = []
            for cookie in range(300):
                head = (c.REQUEST_MAGIC, 0, c.CMD_WRITE, cookie, cookie * 4096, 4096)
                writer.write(struct.pack(">IHHQQI", *head) + bytes([cookie % 251]) * 4096)
            for _ in range(75):
                async with asyncio.timeout(20):
                    while len(found.disk.held) < 4:
                        await asyncio.sleep(0.001)
                assert len(found.disk.held) == 4
                found.disk.release()
            cookies = set()
            for _ in range(300):
                _, error, cookie = struct.unpack(">IIQ", await reader.readexactly(16))
                assert not error
                cookies.add(cookie)
            assert cookies == set(range(300))
            assert found.disk.data[299 * 4096 :][:4096] == bytes([299 % 251]) * 4096
            found.disk.held = None
            writer.close()

    play(story())


def test_nothing_is_told_in_the_clear_and_tls_comes_once(authority: Authority, play) -> None:
    async def story() -> None:
        async with served(authority) as found:
            reader, writer = await plain(found.port)
            for number in (c.OPT_LIST, c.OPT_GO, c.OPT_STRUCTURED_REPLY, c.OPT_CONFINE, 99):
                option = struct.pack(">QII", c.OPTION_MAGIC, number, 0)
                assert await ask(reader, writer, option) == c.REP_ERR_TLS_REQD
            writer.close()
            reader, writer = await encrypted(found.port, client_context(authority, authority))
            assert await ask(reader, writer, STARTTLS) == c.REP_ERR_INVALID
            assert await ask(reader, writer, GO) == c.REP_INFO
            writer.close()

    play(story())


def test_allow_serves_both_kinds(authority: Authority, play) -> None:
    async def story() -> None:
        async with served(authority, TlsMode.ALLOW) as found:
            for reader, writer in (
                await plain(found.port),
                await encrypted(found.port, client_context(authority, authority)),
            ):
                assert await ask(reader, writer, GO) == c.REP_INFO
                writer.close()

    play(story())


@pytest.mark.parametrize("own", [None, "foreign"])
def test_a_client_without_a_certificate_of_ours_never_attaches(
    authority: Authority, foreign: Authority, play, own: str | None
) -> None:
    async def story() -> None:
        async with served(authority) as found:
            context = client_context(authority, foreign if own else None)
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                # With TLS 1.3 a client hears of it only when it reads.
                reader, writer = await encrypted(found.port, context)
                try:
                    await ask(reader, writer, GO)
                finally:
                    writer.transport.abort()
            await found.until_ended()
            assert "no TLS with an NBD client" in str(found.ended[0])

    play(story())


@pytest.mark.parametrize("is_at_once", [True, False])
def test_bytes_in_the_clear_behind_starttls_end_the_connection(
    authority: Authority, play, is_at_once: bool
) -> None:
    async def story() -> None:
        async with served(authority) as found:
            reader, writer = await plain(found.port)
            writer.write(STARTTLS + GO if is_at_once else STARTTLS)
            if not is_at_once:
                await reader.readexactly(20)
                writer.write(GO)
            rest = b""
            with suppress(ConnectionError):
                rest = await reader.read()
            # At most an alert of TLS; no word of NBD.
            assert struct.pack(">Q", c.OPTION_REPLY_MAGIC) not in rest
            writer.transport.abort()
            await found.until_ended()
            assert found.ended[0] is not None

    play(story())


def test_what_comes_in_one_packet_with_the_handshakes_end_is_served(
    authority: Authority, play
) -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        async with served(authority) as found:
            with socket.create_connection(("127.0.0.1", found.port)) as sock:
                sock.setblocking(False)

                async def receive(count: int = 65536) -> bytes:
                    return await asyncio.wait_for(loop.sock_recv(sock, count), 20)

                hello = b""
                while len(hello) < 18:
                    hello += await receive()
                await loop.sock_sendall(sock, FLAGS + STARTTLS)
                ack = b""
                while len(ack) < 20:
                    ack += await receive(20 - len(ack))
                inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = client_context(authority, authority).wrap_bio(
                    inward, outward, server_hostname="localhost"
                )
                while True:
                    try:
                        tls.do_handshake()
                    except ssl.SSLWantReadError:
                        await loop.sock_sendall(sock, outward.read())
                        inward.write(await receive())
                    else:
                        break
                tls.write(GO)
                await loop.sock_sendall(sock, outward.read())
                told = b""
                while len(told) < 52:
                    inward.write(await receive())
                    try:
                        told += tls.read(65536)
                    except ssl.SSLWantReadError:
                        continue
                assert struct.unpack_from(">QIII", told)[1:3] == (c.OPT_GO, c.REP_INFO)

    play(story())


def test_a_client_that_never_shakes_hands_is_dropped(authority: Authority, play) -> None:
    async def story() -> None:
        async with served(authority, handshake_ns_max=200_000_000) as found:
            reader, writer = await plain(found.port)
            assert await ask(reader, writer, STARTTLS) == c.REP_ACK
            await found.until_ended()
            assert found.ended[0] is not None
            writer.transport.abort()

    play(story())


def test_a_stop_does_not_wait_for_a_handshake(authority: Authority, play) -> None:
    async def story() -> None:
        async with served(authority) as found:
            reader, writer = await plain(found.port)
            assert await ask(reader, writer, STARTTLS) == c.REP_ACK
            async with asyncio.timeout(4):
                await found.server.stop()
            assert len(found.ended) == 1
            writer.transport.abort()

    play(story())


def test_a_unix_socket_offers_no_tls(authority: Authority, play, tmp_path: Path) -> None:
    async def story() -> None:
        async with served(authority) as found:
            await found.server.start_unix(tmp_path / "s")
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            await reader.readexactly(18)
            writer.write(FLAGS)
            assert await ask(reader, writer, STARTTLS) == c.REP_ERR_UNSUP
            assert await ask(reader, writer, GO) == c.REP_INFO
            writer.close()

    play(story())


def test_old_versions_and_broken_files_are_refused(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.server
    found = load_server_tls(certificate, key, None, TlsMode.REQUIRE)
    assert found.context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert not found.is_proof
    assert load_server_tls(certificate, key, authority.ca, TlsMode.REQUIRE).is_proof
    assert not load_server_tls(certificate, key, authority.ca, TlsMode.ALLOW).is_proof
    noise = tmp_path / "noise.pem"
    noise.write_text("no certificate")
    noise.chmod(0o600)
    for files in (
        (tmp_path / "absent", key, None),
        (certificate, tmp_path / "absent", None),
        (noise, key, None),
        (certificate, noise, None),
        (certificate, authority.client[1], None),
        (certificate, key, noise),
        (certificate, key, tmp_path / "absent"),
    ):
        with pytest.raises(ConfigError):
            load_server_tls(*files, TlsMode.REQUIRE)
    noise.write_bytes(key.read_bytes())
    noise.chmod(0o644)
    with pytest.raises(ConfigError, match="others may use it"):
        load_server_tls(certificate, noise, None, TlsMode.REQUIRE)
