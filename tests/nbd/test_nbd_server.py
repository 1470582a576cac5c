"""Server and client over real sockets, in one event loop: stories, no sleeping."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from geomirror.errors import (
    FencedError,
    GeomirrorError,
    InUseError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
    UnreachableError,
    UsageError,
)
from geomirror.limits import PRODUCTION
from geomirror.nbd import connection_io
from geomirror.nbd import constants as c
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.server_io import NbdServer
from tests.nbd.ram_export import RamExport


class Harness:
    """A server with one RAM disk on a Unix socket."""

    def __init__(self, path: Path, disk: RamExport, **limits: int) -> None:
        self.disk = disk
        self.ended: list[tuple[str, Exception | None]] = []
        self.path = path / "n.sock"
        self.exports = {disk.name: disk}
        self.server = NbdServer(
            lambda: self.exports,
            limits=replace(PRODUCTION, **limits),
            default=disk.name,
            on_disconnect=lambda name, error: self.ended.append((name, error)),
        )

    def uri(self, name: str = "ram") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

    async def connect(self, name: str = "ram", **options) -> NbdClient:
        return await NbdClient.connect(self.uri(name), **options)

    async def __aenter__(self) -> Harness:
        await self.server.start_unix(self.path)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.disk.held is not None:
            self.disk.release()
            self.disk.held = None
        await self.server.stop()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something is so; the test's timeout bounds it."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def attach(cls, path: Path, name: bytes = b"ram", *, structured: bool = False) -> Raw:
        reader, writer = await asyncio.open_unix_connection(path)
        assert (await reader.readexactly(18)).startswith(b"NBDMAGIC")
        writer.write(struct.pack(">I", 3))
        if structured:
            writer.write(struct.pack(">QII", c.OPTION_MAGIC, c.OPT_STRUCTURED_REPLY, 0))
            await reader.readexactly(20)
        body = struct.pack(">I", len(name)) + name + b"\0\0"
        writer.write(struct.pack(">QII", c.OPTION_MAGIC, c.OPT_GO, len(body)) + body)
        await reader.readexactly(20 + 12 + 20)
        return cls(reader, writer)

    def send(self, command: int, cookie: int, offset=0, length=0, payload=b"", flags=0) -> None:
        head = struct.pack(">IHHQQI", c.REQUEST_MAGIC, flags, command, cookie, offset, length)
        self.writer.write(head + payload)

    async def reply(self) -> tuple[int, int]:
        magic, error, cookie = struct.unpack(">IIQ", await self.reader.readexactly(16))
        assert magic == c.SIMPLE_REPLY_MAGIC
        return cookie, error

    async def close(self) -> None:
        await hang_up(self.writer)


@pytest.mark.parametrize("wants_structured", [True, False])
async def test_any_offset_and_length_can_be_written_and_read_back(
    tmp_path: Path, wants_structured: bool
) -> None:
    chance = random.Random(1)
    disk = RamExport(size_bytes=(3 << 20) + 512)
    mirror = bytearray(disk.size_bytes)
    async with Harness(tmp_path, disk) as server:
        client = await server.connect(wants_structured=wants_structured)
        async with client:
            assert client.size_bytes == disk.size_bytes
            for _ in range(150):
                length = chance.choice([1, 511, 4096, 70_000, 1 << 20])
                offset = chance.randrange(disk.size_bytes - length + 1)
                kind = chance.randrange(4)
                if kind == 0:
                    await client.zero(offset, length, may_punch=chance.random() < 0.5)
                    mirror[offset : offset + length] = bytes(length)
                elif kind == 1:
                    assert await client.read(offset, length) == mirror[offset : offset + length]
                else:
                    data = chance.randbytes(length)
                    await client.write(offset, data, is_fua=kind == 2)
                    mirror[offset : offset + length] = data
            await client.flush()
            await client.trim(0, 8192)
            mirror[:8192] = bytes(8192)
            read = b"".join([bytes(data) async for _, data in client.chunks(chunk_bytes=100_000)])
    assert read == disk.data == mirror
    assert server.ended == [("ram", None)]


async def test_payloads_over_the_limit_are_split_by_the_client(tmp_path: Path) -> None:
    disk = RamExport(size_bytes=4 << 20, maximum_payload=1 << 20)
    async with Harness(tmp_path, disk) as server, await server.connect(depth=2) as client:
        data = os.urandom((3 << 20) + 77)
        await client.write(5, data)
        assert await client.read(5, len(data)) == data
        assert disk.counts[c.CMD_WRITE] == 4


async def test_a_32_mib_request_passes_whole(tmp_path: Path) -> None:
    disk = RamExport(size_bytes=33 << 20)
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        data = os.urandom(1 << 20) * 32
        await client.write(1, data)
        assert disk.counts[c.CMD_WRITE] == 1
        assert await client.read(1, len(data)) == data


async def test_requests_sent_together_are_one_batch_and_one_reply_write(tmp_path: Path) -> None:
    disk = RamExport(batches=[])
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        await asyncio.gather(*(client.write(at * 4096, b"x" * 4096) for at in range(20)))
        assert sum(disk.batches) == 20
        assert max(disk.batches) >= 10


async def test_errors_of_the_export_reach_the_client_typed(tmp_path: Path) -> None:
    disk = RamExport()
    async with Harness(tmp_path, disk) as server:
        for structured in (True, False):
            async with await server.connect(wants_structured=structured) as client:
                for number, kind in ((errno.EIO, StorageError), (errno.ENOSPC, NoSpaceError)):
                    disk.fail_errno = number
                    with pytest.raises(kind):
                        await client.write(0, b"x")
                    with pytest.raises(kind):
                        await client.read(0, 10)
                    with pytest.raises(kind):
                        await client.flush()
                disk.fail_errno = 0
                assert await client.read(0, 3) == bytes(3)


async def test_the_reason_of_an_error_reaches_clients_with_structured_replies(
    tmp_path: Path,
) -> None:
    disk = RamExport(fail_errno=errno.ESHUTDOWN, fail_message="fenced: token 7, peer has 9")
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        with pytest.raises(FencedError, match="token 7, peer has 9"):
            await client.read(0, 10)
        with pytest.raises(UsageError, match='"ram" refuses command 0'):
            await client.read(1 << 20, 10)


async def test_failed_reads_give_their_room_back(tmp_path: Path) -> None:
    disk = RamExport(fail_errno=errno.EIO)
    async with Harness(tmp_path, disk, nbd_queued_bytes_max=2 << 20) as server:
        client = await server.connect()
        for _ in range(10):
            with pytest.raises(StorageError):
                await client.read(0, 1 << 20)
        disk.fail_errno = 0
        assert await client.read(0, 1 << 20) == bytes(1 << 20)
        await client.close()


async def test_the_announced_payload_is_the_one_that_is_taken(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport(), nbd_payload_bytes_max=65536) as server:
        client = await server.connect()
        assert client.export.maximum_payload == 65536
        await client.write(0, bytes(65536))
        with pytest.raises(UsageError):
            await client.start_write(0, bytes(65537))
        assert await client.read(0, 100_000) == bytes(100_000)
        await client.close()


async def test_a_client_that_does_not_negotiate_is_dropped_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_io, "HANDSHAKE_S_MAX", 0.02)
    async with Harness(tmp_path, RamExport()) as server:
        attached = await server.connect()
        reader, writer = await asyncio.open_unix_connection(server.path)
        with contextlib.suppress(ConnectionResetError):
            assert len(await reader.read()) == 18
        await hang_up(writer)
        await attached.write(0, b"the deadline is for the handshake only")
        await attached.close()


async def test_an_end_is_not_held_up_by_an_export_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_io, "DRAIN_S_MAX", 0.02)
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server:
        client = await server.connect()
        write = client.start_write(0, b"never answered")
        await until(lambda: disk.held)
        server.server.disconnect_export("ram")
        with pytest.raises(UnreachableError):
            await write
        await until(lambda: disk.open_count == 0)


async def test_refused_requests_leave_the_connection_in_step(tmp_path: Path) -> None:
    disk = RamExport()
    async with Harness(tmp_path, disk) as server:
        raw = await Raw.attach(server.path)
        raw.send(c.CMD_WRITE, 1, disk.size_bytes - 2, 4, b"over")
        raw.send(c.CMD_WRITE, 2, 0, 4, b"fine")
        raw.send(c.CMD_READ, 3, disk.size_bytes, 1)
        raw.send(77, 4)
        raw.send(c.CMD_CACHE, 5, 0, 4096)
        raw.send(c.CMD_WRITE, 6, 9, 0)
        raw.send(c.CMD_READ, 7, 9, 0)
        found = dict([await raw.reply() for _ in range(7)])
        assert found == {1: 28, 2: 0, 3: 22, 4: 22, 5: 0, 6: 0, 7: 0}
        assert disk.data[:4] == b"fine"
        assert disk.data[-2:] == bytes(2)
        await raw.close()


async def test_structured_reads_stay_structured_even_when_refused(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport()) as server:
        raw = await Raw.attach(server.path, structured=True)
        raw.send(c.CMD_READ, 1, 1 << 40, 1)
        raw.send(c.CMD_READ, 2, 0, 0)
        raw.send(c.CMD_READ, 3, 0, 2, flags=c.CMD_FLAG_DF)
        kinds = []
        for _ in range(3):
            head = await raw.reader.readexactly(20)
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", head)
            assert (magic, flags) == (c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE)
            await raw.reader.readexactly(length)
            kinds.append((cookie, kind))
        assert sorted(kinds) == [(1, c.REPLY_ERROR), (2, c.REPLY_NONE), (3, c.REPLY_OFFSET_DATA)]
        await raw.close()


async def test_block_status(tmp_path: Path) -> None:
    disk = RamExport(size_bytes=65536)
    disk.data[8192:8200] = b"somedata"
    async with Harness(tmp_path, disk) as server:
        async with await server.connect() as client:
            both = c.STATE_HOLE | c.STATE_ZERO
            expected = [(8192, both), (4096, 0), (53248, both)]
            assert await client.block_status(0, 65536) == expected
            assert await client.block_status(8190, 4) == [(2, both), (2, 0)]
            one = await client.start(c.CMD_BLOCK_STATUS, 0, 65536, c.CMD_FLAG_REQ_ONE)
            assert one.extents == {1: [(8192, both)]}
            disk.fail_errno = 1
            with pytest.raises(RefusedError, match="no status"):
                await client.block_status(0, 10)
        async with await server.connect(wants_structured=False) as client:
            with pytest.raises(RefusedError):
                await client.block_status(0, 10)


async def test_flags_of_every_command_reach_the_export(tmp_path: Path) -> None:
    disk = RamExport()
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        await client.write(0, b"x", is_fua=True)
        await client.trim(0, 10, is_fua=True)
        await client.zero(0, 10, is_fua=True, may_punch=False)
        await client.start(c.CMD_WRITE_ZEROES, 0, 10, c.CMD_FLAG_FAST_ZERO)
        await client.start(c.CMD_FLUSH, 0, 0, c.CMD_FLAG_FUA)
    assert disk.flags_seen == {
        (c.CMD_WRITE, c.CMD_FLAG_FUA),
        (c.CMD_TRIM, c.CMD_FLAG_FUA),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_FAST_ZERO),
        (c.CMD_FLUSH, c.CMD_FLAG_FUA),
    }


async def test_read_only_exports_refuse_writes(tmp_path: Path) -> None:
    disk = RamExport(is_read_only=True)
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        assert client.export.is_read_only
        for attempt in (client.write(0, b"x"), client.trim(0, 1), client.zero(0, 1)):
            with pytest.raises(RefusedError):
                await attempt
        await client.flush()


async def test_a_single_writer_export_tells_the_second_one_why(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport(is_single_writer=True)) as server:
        first = await server.connect()
        with pytest.raises(RefusedError, match="has a writer already"):
            await server.connect()
        await first.close()
        await until(lambda: server.disk.open_count == 0)
        async with await server.connect() as third:
            await third.write(0, b"x")


async def test_names_aliases_and_the_default_export(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport(name="pg/0")) as server:
        server.exports["pg"] = server.disk
        for name in ("pg/0", "pg", ""):
            async with await server.connect(name) as client:
                assert client.export.name == "pg/0"
        with pytest.raises(NotFoundError, match="nope"):
            await server.connect("nope")
        assert server.server.names() == [("pg/0", "a disk in RAM")]


async def test_replies_may_come_late_and_in_any_order(tmp_path: Path) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        writes = [client.start_write(at * 10, b"%010d" % at) for at in range(10)]
        target = bytearray(10)
        read = client.start_read(50, memoryview(target))
        await until(lambda: len(disk.held or []) == 11)
        assert not any(future.done() for future in (*writes, read))
        disk.release()
        await asyncio.gather(*writes, read)
        assert bytes(disk.data[:100]) == b"".join(b"%010d" % at for at in range(10))
        # Newest first: the read was served before the write of the same place.
        assert target == bytes(10)


async def test_a_client_that_vanishes_with_replies_in_flight_disturbs_nobody(
    tmp_path: Path,
) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server:
        dying, living = await server.connect(), await server.connect()
        futures = [dying.start_write(0, b"x" * 4096) for _ in range(20)]
        futures += [dying.start_read(0, memoryview(bytearray(4096))) for _ in range(20)]
        await until(lambda: len(disk.held or []) == 40)
        kept = living.start_write(8192, b"alive")
        await until(lambda: len(disk.held or []) == 41)
        dying.abort()
        await until(lambda: disk.open_count == 1)
        disk.release()
        await kept
        assert disk.data[8192:8197] == b"alive"
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(result, UnreachableError) for result in results)
        await asyncio.gather(living.close(), until(lambda: disk.held == []))


async def test_disc_finishes_what_is_outstanding_before_closing(tmp_path: Path) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server:
        raw = await Raw.attach(server.path)
        raw.send(c.CMD_WRITE, 1, 0, 4, b"late")
        raw.send(c.CMD_DISCONNECT, 2)
        raw.send(c.CMD_WRITE, 3, 0, 4, b"lost")
        await until(lambda: disk.held)
        assert disk.open_count == 1
        disk.release()
        assert await raw.reply() == (1, 0)
        assert await raw.reader.read() == b""
        assert disk.data[:4] == b"late"
        await raw.close()


async def test_disconnecting_an_export_finishes_requests_and_shows_the_new_size(
    tmp_path: Path,
) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server:
        client = await server.connect()
        write = client.start_write(0, b"before")
        await until(lambda: disk.held)
        assert server.server.disconnect_export("other") == 0
        assert server.server.disconnect_export("ram") == 1
        late = client.start_write(100, b"after")
        disk.release()
        await write
        with pytest.raises(UnreachableError):
            await late
        assert disk.data[:6] == b"before"
        disk.data.extend(bytes(4096))
        disk.size_bytes += 4096
        disk.held = None
        async with await server.connect() as client:
            assert client.size_bytes == (1 << 20) + 4096
            await client.write(1 << 20, b"grown")


async def test_the_size_of_a_connection_is_the_one_it_was_told(tmp_path: Path) -> None:
    disk = RamExport()
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        disk.size_bytes = 4096
        assert (await client.read((1 << 20) - 1, 1)) == b"\0"
        with pytest.raises(UsageError):
            await client.read(1 << 20, 1)


async def test_stopping_finishes_requests_and_removes_the_socket(tmp_path: Path) -> None:
    disk = RamExport(held=[])
    harness = Harness(tmp_path, disk)
    await harness.server.start_unix(harness.path)
    client = await harness.connect()
    write = client.start_write(0, b"last")
    await until(lambda: disk.held)
    stopping = asyncio.create_task(harness.server.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    disk.release()
    await write
    await stopping
    assert not harness.path.exists()
    with pytest.raises(UnreachableError):
        await harness.connect()
    with pytest.raises(UnreachableError):
        await client.flush()


async def test_too_many_clients_of_one_export_are_refused(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport(), nbd_connections_max=3) as server:
        clients = [await server.connect() for _ in range(3)]
        with pytest.raises(RefusedError, match="3 clients already"):
            await server.connect()
        assert server.server.connection_count("ram") == 3
        for client in clients:
            await client.close()


async def test_clients_that_never_negotiate_do_not_take_the_slots_of_others(
    tmp_path: Path,
) -> None:
    async with Harness(tmp_path, RamExport(), nbd_connections_max=4) as server:
        attached = await server.connect()
        idle = [await asyncio.open_unix_connection(server.path) for _ in range(5)]
        # The fifth idle one is turned away, without a word.
        assert await idle[4][0].read() == b""
        await attached.write(0, b"x")
        for _, writer in idle:
            await hang_up(writer)
        await attached.close()


async def test_in_flight_requests_are_bounded_and_all_are_served(tmp_path: Path) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk, nbd_requests_max=8) as server:
        client = await server.connect(depth=100)
        writes = [client.start_write(at, b"x") for at in range(50)]
        await until(lambda: len(disk.held or []) == 8)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(disk.held or []) == 8
        while any(not future.done() for future in writes):
            disk.release(1)
            assert len(disk.held or []) <= 8
            await asyncio.sleep(0)
        await asyncio.gather(*writes)
        assert disk.data[:50] == b"x" * 50
        await client.close()


async def test_a_flood_waits_in_the_socket_not_in_memory(tmp_path: Path) -> None:
    disk = RamExport(held=[])
    bounds = {"nbd_requests_max": 8, "nbd_payload_bytes_max": 65536}
    async with Harness(tmp_path, disk, **bounds) as server:
        raw = await Raw.attach(server.path)
        for cookie in range(500):  # 31 MiB; the server's buffer has 5
            raw.send(c.CMD_WRITE, cookie, 0, 65536, bytes([cookie % 256]) * 65536)
        await until(lambda: len(disk.held or []) == 8)
        await asyncio.sleep(0.05)
        assert len(disk.held or []) == 8
        assert raw.writer.transport.get_write_buffer_size() > 20 << 20
        found = []
        while len(found) < 500:
            disk.release()
            found.append(await raw.reply())
        assert sorted(found) == [(cookie, 0) for cookie in range(500)]
        await raw.close()


async def test_replies_that_nobody_takes_stop_the_reading(tmp_path: Path) -> None:
    disk = RamExport(size_bytes=4 << 20)
    async with Harness(tmp_path, disk, nbd_queued_bytes_max=8 << 20) as server:
        raw = await Raw.attach(server.path)
        for cookie in range(300):
            raw.send(c.CMD_READ, cookie, 0, 1 << 20)
        other = await server.connect()
        await other.write(0, b"others are served")
        served = disk.counts[c.CMD_READ]
        # Half the bound waits in the socket's queue, and at most half of it plus one read is made.
        assert 1 <= served <= 12
        await other.flush()
        assert disk.counts[c.CMD_READ] == served
        for _ in range(300):
            await raw.reply()
            await raw.reader.readexactly(1 << 20)
        assert disk.counts[c.CMD_READ] == 300
        await raw.close()
        await other.close()


async def test_an_export_can_hold_its_clients_back(tmp_path: Path) -> None:
    class Full(RamExport):
        sink = None

        def open(self, sink):
            self.sink = sink
            return super().open(sink)

    disk = Full(batches=[])
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        disk.sink.pause_reading()
        write = client.start_write(0, b"x" * 100_000)
        for _ in range(50):
            await asyncio.sleep(0)
        assert disk.batches == []
        disk.sink.resume_reading()
        await write
        assert disk.batches == [1]


REFUSED_READ = struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_READ, 1, 1 << 40, 1)


@pytest.mark.parametrize("before", [b"", REFUSED_READ], ids=["alone", "after a refusal"])
async def test_garbage_ends_only_its_own_connection(tmp_path: Path, before: bytes) -> None:
    disk = RamExport()
    async with Harness(tmp_path, disk) as server, await server.connect() as client:
        raw = await Raw.attach(server.path)
        raw.writer.write(before + b"\0" * 28)
        await until(lambda: server.ended)
        assert isinstance(server.ended[0][1], RemoteProtocolError)
        await raw.close()
        _, writer = await asyncio.open_unix_connection(server.path)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: len(server.ended) == 2)
        await hang_up(writer)
        await client.write(0, b"unharmed")


@pytest.mark.parametrize("seed", range(5))
async def test_clients_that_die_anywhere_leave_a_working_server(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    disk = RamExport(size_bytes=1 << 20)
    stream = struct.pack(">I", 3)
    body = struct.pack(">I", 3) + b"ram\0\0"
    stream += struct.pack(">QII", c.OPTION_MAGIC, c.OPT_GO, len(body)) + body
    for cookie in range(30):
        head = struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, cookie % 2, cookie, 0, 5000)
        stream += head + bytes(5000 if cookie % 2 else 0)
    gone: list[asyncio.StreamWriter] = []
    async with Harness(tmp_path, disk) as server:
        for _ in range(25):
            _, writer = await asyncio.open_unix_connection(server.path)
            writer.write(stream[: chance.randrange(len(stream))])
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()
            gone.append(writer)
        async with await server.connect() as client:
            await client.write(0, b"fine")
        for writer in gone:
            await hang_up(writer)
        await until(lambda: len(server.ended) == 26)
    assert disk.open_count == 0


async def test_the_socket_is_private_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "n.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with Harness(tmp_path, RamExport()) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        second = NbdServer(dict)
        with pytest.raises(InUseError, match="another process listens"):
            await second.start_unix(path)
        async with await server.connect() as client:
            await client.flush()
    path.write_text("precious")
    with pytest.raises(InUseError, match="not a socket"):
        await second.start_unix(path)
    assert path.read_text() == "precious"
    with pytest.raises(StorageError):
        await second.start_unix(tmp_path / "missing" / "n.sock")


async def test_a_socket_path_must_fit_its_address(tmp_path: Path) -> None:
    server = NbdServer(dict)
    room = 107 - len(os.fsencode(tmp_path)) - 1
    with pytest.raises(UsageError, match="107 bytes"):
        await server.start_unix(tmp_path / ("x" * (room + 1)))
    await server.start_unix(tmp_path / ("x" * room))
    await server.stop()


async def test_tcp_serves_the_same_exports(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport()) as server:
        host, port = await server.server.start_tcp("127.0.0.1", 0)
        async with await NbdClient.connect(f"nbd://{host}:{port}/ram") as client:
            await client.write(0, b"tcp")
            assert await client.read(0, 3) == b"tcp"
        with pytest.raises(UnreachableError, match="cannot listen"):
            await server.server.start_tcp(host, port)


async def test_the_client_reports_a_server_that_is_not_there_or_silent(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError):
        await NbdClient.connect(f"nbd+unix:///x?socket={tmp_path}/none")
    accepted: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_unix_server(lambda _, w: accepted.append(w), tmp_path / "silent")
    with pytest.raises(UnreachableError):
        await NbdClient.connect(f"nbd+unix:///x?socket={tmp_path}/silent", timeout_s=0.05)
    silent.close()
    await silent.wait_closed()
    for writer in accepted:
        await hang_up(writer)


async def test_requests_may_follow_go_without_waiting_for_its_answer(tmp_path: Path) -> None:
    async with Harness(tmp_path, RamExport()) as server:
        reader, writer = await asyncio.open_unix_connection(server.path)
        name = struct.pack(">I", 3) + b"ram\0\0"
        hello = struct.pack(">IQII", 3, c.OPTION_MAGIC, c.OPT_GO, len(name)) + name
        head = struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1, 0, 5)
        writer.write(hello + head + b"eager")
        replies = await reader.readexactly(18 + 32 + 20 + 16)
        assert struct.unpack(">IIQ", replies[-16:]) == (c.SIMPLE_REPLY_MAGIC, 0, 1)
        assert server.disk.data[:5] == b"eager"
        await hang_up(writer)


async def test_the_window_bounds_what_is_in_flight_and_waiters_go_on_in_order(
    tmp_path: Path,
) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server, await server.connect(depth=4) as client:
        order: list[int] = []

        async def write(number: int) -> None:
            await client.write(number, b"x")
            order.append(number)

        tasks = [asyncio.create_task(write(number)) for number in range(12)]
        await until(lambda: len(disk.held or []) == 4)
        assert client.in_flight == 4
        assert client.room() == 0
        tasks[5].cancel()
        while not all(task.done() for task in tasks):
            disk.release()
            await asyncio.sleep(0)
        assert sorted(order) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
        disk.held = None


async def test_waiting_callers_fail_with_the_connection(tmp_path: Path) -> None:
    disk = RamExport(held=[])
    async with Harness(tmp_path, disk) as server:
        client = await server.connect(depth=1)
        tasks = [asyncio.create_task(client.write(at, b"x")) for at in range(5)]
        await until(lambda: disk.held)
        client.abort()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, UnreachableError) for result in results)
        with pytest.raises(GeomirrorError):
            client.room()
        await client.close()


def test_everything_works_on_uvloop_too(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def story() -> None:
        disk = RamExport(size_bytes=8 << 20)
        async with Harness(tmp_path, disk, nbd_queued_bytes_max=4 << 20) as server:
            async with await server.connect() as client:
                data = os.urandom(8 << 20)
                await client.write(0, data)
                read = b"".join([bytes(part) async for _, part in client.chunks()])
                assert read == data
                await client.flush()
            dying = await server.connect()
            dying.start_write(0, b"x" * 4096)
            dying.abort()
            await until(lambda: disk.open_count == 0)

    uvloop.run(story())


async def test_requests_answered_before_a_bad_answer_are_answered_and_the_others_fail(
    tmp_path: Path,
):
    """One read brings a good answer and nonsense behind it: nobody waits for ever."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack(">QQH", c.HELLO_MAGIC, c.OPTION_MAGIC, 3))
        await reader.readexactly(4)
        _magic, option, length = struct.unpack(">QII", await reader.readexactly(16))
        await reader.readexactly(length)
        info = struct.pack(">HQH", c.INFO_EXPORT, 1 << 20, c.EXPORT_HAS_FLAGS)
        for kind, body in ((c.REP_INFO, info), (c.REP_ACK, b"")):
            writer.write(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, option, kind, len(body)) + body)
        cookies = [(await reader.readexactly(28))[8:16] for _ in range(2)]
        writer.write(struct.pack(">II", c.SIMPLE_REPLY_MAGIC, 0) + cookies[0] + b"n" * 16)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    uri = f"nbd+unix:///x?socket={tmp_path / 's'}"
    client = await NbdClient.connect(uri, wants_structured=False)
    async with asyncio.timeout(5):
        waiters = [client.flush(), client.flush()]
        results = await asyncio.gather(*waiters, return_exceptions=True)
        await client.close()
    assert results[0] is None
    assert isinstance(results[1], RemoteProtocolError)
    server.close()
