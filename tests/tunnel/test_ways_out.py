"""Links through an HTTP proxy and inside WebSockets: the same links, whoever stands between."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from network_kit import (
    Collect,
    ShiftedClock,
    Site,
    found,
    free_endpoint,
    join_as,
    pair,
    token_of,
)

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import AuthError, GeomirrorError, LinkError, RemoteProtocolError
from geomirror.limits import MIB
from geomirror.tunnel.authority_io import revoke_node
from geomirror.tunnel.connect_proxy import parse_credentials
from geomirror.tunnel.join_io import renew_by_join
from geomirror.tunnel.path_io import WayOut
from geomirror.tunnel.tls_io import TlsListener
from geomirror.tunnel.websocket import WebSocketFrames, new_key, upgrade_request
from geomirror.wan_protocol.stream_socket_io import read_progress, set_pace, tune
from tests.ways_out import Inspector, Proxy, self_signed


@asynccontextmanager
async def websocket(site: Site, *, tls: Path | None = None) -> AsyncIterator[str]:
    """The site accepts WebSockets; the URL."""
    scheme = "ws"
    if tls is not None:
        site.driver.websocket_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        site.driver.websocket_tls.load_cert_chain(*self_signed(tls))
        scheme = "wss"
    listener = await site.driver.listen(f"{scheme}://127.0.0.1:0/gm", site.accept)
    try:
        yield f"{scheme}://{listener.endpoint}/gm"
    finally:
        await listener.stop()


async def carries(source: Site, path: str, target: Site, size: int = 3 * MIB) -> None:
    transport, protocol = await source.driver.dial("east-1", path, Collect)
    assert target.accepted[-1].peer == source.state.node
    data = SeededEntropy(7).token_bytes(size)
    for start in range(0, len(data), 300_000):
        transport.write(data[start : start + 300_000])
    assert await protocol.wait(len(data)) == data
    transport.close()
    await protocol.lost
    await target.accepted[-1].lost


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2].partition("/")[0])


def test_a_link_goes_through_a_proxy(runner: asyncio.Runner, tmp_path: Path) -> None:
    async def story() -> None:
        async with pair(tmp_path) as (east, west):
            with Proxy({"east.example:443": port_of(east.endpoint)}) as proxy:
                await carries(west, f"east.example:443 via {proxy.endpoint}", east)
                assert len(proxy.requests) == 1
                assert b"Authorization" not in proxy.requests[0]

    runner.run(story())


def test_a_link_goes_through_a_websocket(runner: asyncio.Runner, tmp_path: Path) -> None:
    async def story() -> None:
        async with pair(tmp_path) as (east, west):
            for tls in (None, tmp_path / "tls"):
                async with websocket(east, tls=tls) as url:
                    await carries(west, url, east)

    runner.run(story())


def test_rate_and_progress_of_a_link_are_those_of_the_connection_below_its_websocket(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    size, rate = 2 * MIB, 8 * MIB

    async def story() -> None:
        async with pair(tmp_path) as (east, west), websocket(east, tls=tmp_path / "tls") as url:
            transport, protocol = await west.driver.dial("east-1", url, Collect)
            sock = transport.get_extra_info("socket")
            assert sock.family == socket.AF_UNIX, "TLS runs over one end of a pair"
            assert tune(sock, is_data=True) in ("bbr", "cubic", "reno")
            set_pace(sock, rate)
            began = time.monotonic()
            data = SeededEntropy(7).token_bytes(size)
            transport.write(data)
            assert await protocol.wait(size) == data
            assert time.monotonic() - began > 0.8 * size / rate
            reading = read_progress(sock)
            assert reading is not None and reading.acked_bytes > size and reading.rtt_ns > 0
            transport.close()
            await protocol.lost
            await east.accepted[-1].lost
            assert read_progress(sock) is None, "gone, and nobody else's"

    runner.run(story())


def test_a_link_goes_through_a_websocket_and_a_proxy_and_an_inspector(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def story() -> None:
        certificate = self_signed(tmp_path / "firewall", "firewall.example")
        async with pair(tmp_path) as (east, west), websocket(east, tls=tmp_path / "tls") as url:
            with (
                Inspector(*certificate, inside=port_of(url.removeprefix("wss://"))) as inspector,
                Proxy({"east.example:443": inspector.port}) as proxy,
            ):
                await carries(west, f"wss://east.example/gm via {proxy.endpoint}", east)
                # What it decrypted was another TLS, which it cannot open: a direct link is refused.
                with pytest.raises(GeomirrorError):
                    await west.driver.dial(
                        "east-1", f"east.example:443 via {proxy.endpoint}", Collect
                    )

    runner.run(story())


async def test_a_proxy_that_wants_credentials_gets_them_from_a_file(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        with Proxy({east.endpoint: port_of(east.endpoint)}, credentials="me:s3cret") as proxy:
            path = f"{east.endpoint} via {proxy.endpoint}"
            with pytest.raises(LinkError, match=r"wants a user name .*407; it offers basic"):
                await west.driver.dial("east-1", path, Collect)
            west.driver.way_out = WayOut(parse_credentials(b"me:wrong", "file"))
            with pytest.raises(LinkError, match="407") as caught:
                await west.driver.dial("east-1", path, Collect)
            assert "wrong" not in str(caught.value)
            west.driver.way_out = WayOut(parse_credentials(b"me:s3cret\n", "file"))
            await carries(west, path, east, 1000)


async def test_what_a_proxy_can_do_wrong_is_said_in_words(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        with Proxy({}) as proxy:
            path = f"{east.endpoint} via {proxy.endpoint}"

            async def fails(words: str, kind: type[GeomirrorError] = LinkError) -> None:
                with pytest.raises(kind, match=words):
                    await west.driver.dial("east-1", path, Collect)

            await fails("refuses a connection to .* \\(403\\)")
            proxy.routes[east.endpoint] = port_of(free_endpoint())
            await fails("cannot reach .* itself \\(502\\)")
            proxy.answer = b"SSH-2.0-x\r\n\r\n"
            await fails("does not speak HTTP", RemoteProtocolError)
            proxy.answer = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000
            await fails("over 8192 bytes", RemoteProtocolError)
            proxy.answer = b"HTTP/1.1 200 OK\r\n\r\n\x15\x03"
            await fails("bytes of its own", RemoteProtocolError)
            proxy.answer = b""
            west.state.limits = replace(west.state.limits, dial_ns_max=SECOND // 4)
            await fails("does not answer in time")
            proxy.drip_s = 0.01
            await fails("does not answer in time")
        await fails("the proxy .* cannot be reached: Connection refused")


async def test_what_a_web_server_can_do_wrong_is_said_in_words(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west), websocket(east) as url:
        with pytest.raises(LinkError, match="answers 404 instead"):
            await west.driver.dial("east-1", url + "x", Collect)
        with pytest.raises(GeomirrorError):  # TLS to a listener without
            await west.driver.dial("east-1", url.replace("ws://", "wss://"), Collect)
        with pytest.raises(GeomirrorError):  # HTTP to the port of the links
            await west.driver.dial("east-1", f"ws://{east.endpoint}/gm", Collect)
        assert len(east.refusals) >= 2


async def test_inside_a_websocket_the_same_nodes_are_refused(tmp_path: Path) -> None:
    async with (
        pair(tmp_path / "one") as (east, west),
        pair(tmp_path / "two") as (_, other),
        websocket(east) as url,
    ):
        with pytest.raises(AuthError, match="not of this network"):
            await other.driver.dial("east-1", url, Collect)
        with pytest.raises(AuthError, match='is the node "east-1", not "colo-1"'):
            await west.driver.dial("colo-1", url, Collect)
        transport, protocol = await west.driver.dial("east-1", url, Collect)
        revoke_node(east.state, "west-1", wall_ns=east.clock.wall_ns())
        assert east.driver.enforce() == ["west-1"]
        async with asyncio.timeout(10):
            await protocol.lost
        with pytest.raises(AuthError, match="revoked"):
            await west.driver.dial("east-1", url, Collect)
        assert transport.is_closing()


@asynccontextmanager
async def front_end(url: str) -> AsyncIterator[str]:
    """A reverse proxy made with somebody else's WebSocket code, which builds messages anew."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        ours = web.WebSocketResponse(compress=False)
        await ours.prepare(request)

        async def pump(source, target) -> None:
            async for message in source:
                assert message.type is aiohttp.WSMsgType.BINARY
                await target.send_bytes(message.data)
            await target.close()

        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, compress=0, autoping=True) as theirs,
        ):
            await asyncio.gather(pump(ours, theirs), pump(theirs, ours))
        return ours

    app = web.Application()
    app.router.add_get("/link", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"ws://127.0.0.1:{port}/link"
    finally:
        await runner.cleanup()


async def test_a_reverse_proxy_of_others_carries_links(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west), websocket(east) as url, front_end(url) as front:
        await carries(west, front, east, 2 * MIB)


async def open_raw(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket opened by a stranger."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url.removeprefix("ws://")))
    writer.write(upgrade_request("x", "/gm", new_key(SeededEntropy(1))))
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


@pytest.mark.parametrize(
    "frame",
    [
        b"\x81\x85\x00\x00\x00\x00hello",  # text
        b"\x82\x05hello",  # without a mask
        b"\x82\xff" + b"\xff" * 8 + b"\x00" * 4,  # giant
        b"\x82\xff" + (8 * MIB).to_bytes(8, "big") + b"\x00" * 4 + b"not TLS" * 100,
        b"\x89\x80\x00\x00\x00\x00" * 100 + b"\x82\x85\x00\x00\x00\x00hello",
        b"\x88\x80\x00\x00\x00\x00",
    ],
)
async def test_a_stranger_inside_a_websocket_is_cut_off(tmp_path: Path, frame: bytes) -> None:
    async with pair(tmp_path) as (east, _), websocket(east) as url:
        reader, writer = await open_raw(url)
        writer.write(frame)
        async with asyncio.timeout(4):  # sooner than a silent one
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        assert east.accepted == []


async def test_strangers_that_say_nothing_are_ended_and_bounded(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        east.state.limits = replace(
            east.state.limits, handshakes_max=8, handshake_ns_max=SECOND // 2
        )
        async with websocket(east) as url:
            port = port_of(url.removeprefix("ws://"))
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
            upgraded = [await open_raw(url) for _ in range(4)]
            dripping = await asyncio.open_connection("127.0.0.1", port)
            dripping[1].write(b"GET /gm HTTP/1.1\r\nX: ")
            await carries(west, url, east, 1000)
            async with asyncio.timeout(5):
                for reader, writer in (*silent, *upgraded, dripping):
                    with contextlib.suppress(ConnectionError):
                        await reader.read()
                    writer.close()
            assert len(east.refusals) >= 5
            await carries(west, url, east, 1000)


async def test_pings_of_one_who_reads_nothing_fill_no_memory(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, _), websocket(east) as url:
        _, writer = await open_raw(url)
        frames = WebSocketFrames(is_client=True, entropy=SeededEntropy(1))
        ping = frames.ping().replace(b"\x89\x80", b"\x89\xfd", 1) + b"x" * 125
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(3):
                while sent < 8 * MIB:
                    writer.write(ping * 500)
                    sent += len(ping) * 500
                    await writer.drain()
        writer.transport.abort()
        assert sent >= 4 * MIB  # it was read, and answered only as far as there was room


async def test_a_sleeping_reader_stops_the_other_side_and_not_the_memory(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west), websocket(east) as url:
        transport, protocol = await west.driver.dial("east-1", url, Collect)
        transport.pause_reading()
        echo = east.accepted[-1]
        written = 0
        while written < 64 * MIB and transport.get_write_buffer_size() < MIB:
            transport.write(bytes(MIB // 4))
            written += MIB // 4
            await asyncio.sleep(0.01)
        assert written < 64 * MIB  # the echo is not taken: it stops somewhere on the way
        transport.resume_reading()
        assert len(await protocol.wait(written)) == written
        transport.abort()
        await protocol.lost
        await echo.lost


async def test_a_node_joins_through_a_proxy_or_a_websocket(tmp_path: Path) -> None:
    east = found(tmp_path / "east", ShiftedClock())  # nobody listens where the token says
    listener = await east.driver.listen("127.0.0.1:0", east.accept)
    try:
        with Proxy({east.state.listen or "": port_of(listener.endpoint)}) as proxy:
            west = await join_as(
                tmp_path / "west", token_of(east), east.clock, proxy=proxy.endpoint
            )
            assert proxy.requests
        async with websocket(east, tls=tmp_path / "tls") as url:
            colo = await join_as(
                *(tmp_path / "colo", token_of(east, "colo-1"), east.clock),
                listen="0.0.0.0:7701",
                more_endpoints=[url],
            )
            paths = {"paths_of": lambda member: [url], "clock": east.clock}
            await renew_by_join(colo.state, entropy=SeededEntropy(3), **paths)
    finally:
        await listener.stop()
    assert [west.state.node, colo.state.node] == ["west-1", "colo-1"]
    member = east.state.membership.find("colo-1")
    assert member is not None and member.endpoints == ("127.0.0.1:7701",)


async def test_both_listeners_are_listeners(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west), websocket(east) as url:
        assert isinstance(east.listener, TlsListener)
        third = await join_as(tmp_path / "third", token_of(east, "colo-1"), east.clock)
        for source in (west, third):
            await carries(source, url, east, 1000)
            await carries(source, east.endpoint, east, 1000)
