"""Real bytes through the emulator. Small and quick, but by the clock."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from geomirror.lab.emulator_io import Emulator, Link
from geomirror.lab.scenario import LinkSettings, parse_settings

pytestmark = pytest.mark.system

TIMEOUT_S = 10


class Lane:
    """One emulated link with an echo server behind it, and connections to it."""

    def __init__(self, emulator: Emulator, link: Link, port: int) -> None:
        self.emulator = emulator
        self.link = link
        self.port = port
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def ping(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        writer.write(b"ping")
        assert await asyncio.wait_for(reader.readexactly(4), TIMEOUT_S) == b"ping"
        return loop.time() - begin


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def lane(settings: str) -> AsyncIterator[Lane]:
    emulator = Emulator(seed=1)
    link = emulator.add_link("a", "b", parse_settings(settings, LinkSettings()))
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = await emulator.open_port("a", "b", server.sockets[0].getsockname()[:2])
    made = Lane(emulator, link, port)
    try:
        yield made
    finally:
        for writer in made.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await emulator.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.02)


async def test_a_round_trip_takes_the_delay_of_both_directions() -> None:
    async with lane("rtt=100ms") as made:
        connection = await made.connect()
        assert await made.ping(*connection) >= 0.19  # the handshake costs one more round trip
        for _ in range(3):
            assert 0.095 <= await made.ping(*connection) <= 0.25


async def test_the_rate_is_kept_within_a_tenth_and_bytes_come_back_whole() -> None:
    async with lane("rate=80mbit") as made:
        connections = [await made.connect() for _ in range(3)]
        for connection in connections:
            await made.ping(*connection)
        payload = bytes(range(256)) * (1_000_000 // 256)

        async def both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(payload)
            received = await asyncio.wait_for(reader.readexactly(len(payload)), TIMEOUT_S)
            assert received == payload

        loop = asyncio.get_running_loop()
        begin = loop.time()
        await asyncio.gather(*(both_ways(*connection) for connection in connections))
        rate = 3 * len(payload) * 8 / (loop.time() - begin)
        assert 72e6 * 0.85 <= rate <= 88e6  # the echo adds one queue of delay to the last byte
        counters = made.link.to_json()["directions"][0]
        assert counters["bytes_delivered"] == 3 * (len(payload) + 4)


async def test_a_black_hole_keeps_old_connections_and_lets_new_ones_pass_first() -> None:
    async with lane("rtt=20ms") as made:
        old = await made.connect()
        await made.ping(*old)
        made.link.down()
        waiting = asyncio.ensure_future(made.ping(*old))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        made.link.up()
        new = await made.connect()
        assert await made.ping(*new) < 0.4
        assert not waiting.done()  # its next try comes later: it has backed off
        assert 1.2 <= await waiting <= 3.0
        assert made.link.flaps == 1


async def test_a_connection_made_while_the_link_is_down_hangs_until_it_is_up() -> None:
    async with lane("rtt=10ms") as made:
        made.link.down()
        connection = await made.connect()
        waiting = asyncio.ensure_future(made.ping(*connection))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        made.link.up()
        assert 0.9 <= await waiting <= 1.5  # the connection request is repeated after a second


async def test_a_dialler_that_gives_up_while_the_link_is_down_is_forgotten() -> None:
    async with lane("rtt=10ms") as made:
        made.link.down()
        _, writer = await made.connect()
        await asyncio.sleep(0.05)
        assert len(made.link.connections) == 1
        writer.close()
        await asyncio.sleep(0.05)
        assert not made.link.connections


async def test_reset_mode_breaks_connections_instead() -> None:
    async with lane("rtt=10ms,down=reset") as made:
        reader, writer = await made.connect()
        await made.ping(reader, writer)
        made.link.down()
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.readexactly(1), TIMEOUT_S)
        new_reader, _ = await made.connect()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(new_reader.readexactly(1), TIMEOUT_S)


async def test_one_direction_alone_can_be_down() -> None:
    async with lane("rtt=10ms") as made:
        reader, writer = await made.connect()
        await made.ping(reader, writer)
        made.link.down(source="b")
        waiting = asyncio.ensure_future(made.ping(reader, writer))
        await asyncio.sleep(0.1)
        there, back = made.link.to_json()["directions"]
        assert there["bytes_delivered"] == 8
        assert back["bytes_delivered"] == 4
        made.link.up()
        await waiting


async def test_a_sender_is_held_back_when_the_link_stands_still() -> None:
    async with lane("rtt=10ms,window=64KiB") as made:
        reader, writer = await made.connect()
        await made.ping(reader, writer)
        made.link.down()
        writer.write(bytes(32 << 20))
        await asyncio.sleep(0.3)
        under_way = made.link.to_json()["directions"][0]["bytes_under_way"]
        assert 64 * 1024 <= under_way <= 256 * 1024
        writer.transport.abort()


async def test_a_partition_cuts_all_links_of_one_node() -> None:
    emulator = Emulator(seed=1)
    links = {pair: emulator.add_link(*pair, LinkSettings()) for pair in ("ab", "ac", "bc")}
    emulator.partition("a", is_up=False)
    assert [link.is_up for link in links.values()] == [False, False, True]
    emulator.partition("a", is_up=True)
    assert all(link.is_up for link in links.values())
    await emulator.close()


async def test_a_flap_schedule_takes_the_link_down_as_often_as_asked() -> None:
    async with lane("rtt=2ms") as made:
        made.emulator.flap(made.link, down_s=0.05, period_s=0.1, count=3)
        await asyncio.sleep(0.6)
        assert made.link.flaps == 3
        assert made.link.is_up


async def test_the_end_of_a_connection_crosses_the_link() -> None:
    async with lane("rtt=40ms") as made:
        reader, writer = await made.connect()
        writer.write(b"last words")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b"last words"
        await asyncio.sleep(0.1)
        assert not made.link.connections
