"""The relay between one client and a server: what passes, how it ends, what is refused."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from geomirror.errors import NotFoundError, RefusedError, UnreachableError
from geomirror.nbd import constants as c
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.relay_io import DescriptorChannel, SocketChannel, relay
from geomirror.nbd.server_io import NbdServer
from tests.nbd.ram_export import RamExport


@dataclass
class Served:
    disk: RamExport
    other: RamExport
    server: NbdServer
    path: str


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    disk, other = RamExport(name="pg/0", size_bytes=8 << 20), RamExport(name="secret/0")
    exports = {"pg/0": disk, "pg": disk, "secret/0": other}
    server = NbdServer(lambda: exports)
    await server.start_unix(tmp_path / "n.sock")
    yield Served(disk, other, server, str(tmp_path / "n.sock"))
    await server.stop()
    assert disk.open_count == other.open_count == 0


async def attach(ours: socket.socket, name: str = "") -> NbdClient:
    client = NbdClient(name, depth=64, wants_structured=True)
    await asyncio.get_running_loop().create_connection(lambda: client, sock=ours)
    await client.attach()
    return client


def start(served: Served, export: str = "pg") -> tuple[socket.socket, asyncio.Future[None]]:
    """A relay over a pair of sockets: the client's end, and the relay's outcome."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            relay(SocketChannel(theirs), served.path, export)

    return ours, asyncio.ensure_future(asyncio.to_thread(run))


async def test_the_empty_name_is_the_volume_and_data_passes_both_ways(served: Served) -> None:
    ours, outcome = start(served)
    client = await attach(ours)
    assert client.export.name == "pg/0"
    data = random.Random(1).randbytes(6 << 20)
    await client.write(0, data)
    assert served.disk.data[: len(data)] == data
    assert await client.read(0, len(data)) == data
    assert await client.block_status(7 << 20, 4096) == [(4096, c.STATE_HOLE | c.STATE_ZERO)]
    await client.close()
    await outcome


async def test_other_volumes_are_not_there(served: Served) -> None:
    ours, outcome = start(served)
    with pytest.raises(NotFoundError):
        await attach(ours, "secret/0")
    await outcome
    assert served.other.open_count == 0


async def test_a_volume_that_is_not_served_is_said_to_the_operator(served: Served) -> None:
    ours, outcome = start(served, "nope")
    with pytest.raises((UnreachableError, OSError)):
        await attach(ours)
    with pytest.raises(NotFoundError, match='"nope" is not served'):
        await outcome


async def test_an_old_client_without_fixed_newstyle_is_served(served: Served) -> None:
    ours, outcome = start(served)
    reader, writer = await asyncio.open_connection(sock=ours)
    assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\0\3"
    writer.write(bytes(4) + struct.pack(">QII", c.OPTION_MAGIC, c.OPT_EXPORT_NAME, 0))
    size, flags = struct.unpack(">QH", (await reader.readexactly(10 + 124))[:10])
    assert (size, flags & c.EXPORT_HAS_FLAGS) == (8 << 20, 1)
    # In the middle of a request: the end of the client is an end like any other.
    writer.write(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1, 0, 4096) + b"half")
    await writer.drain()
    writer.close()
    await outcome


@pytest.mark.parametrize("said", [b"", b"\0\0"])
async def test_a_client_that_leaves_at_once_is_no_error(served: Served, said: bytes) -> None:
    ours, outcome = start(served)
    ours.sendall(said)
    ours.close()
    await outcome


async def test_the_end_of_the_server_ends_the_client(served: Served) -> None:
    ours, outcome = start(served)
    client = await attach(ours)
    await client.read(0, 4096)
    served.server.disconnect_export("pg/0")
    await outcome
    with pytest.raises(UnreachableError):
        await client.read(0, 4096)
    client.abort()


async def test_no_server_is_said(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(UnreachableError, match="no daemon answers"):
        relay(SocketChannel(theirs), str(tmp_path / "nothing"), "pg")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (c.REP_ERR_UNSUP, RefusedError),
        (c.REP_ERR_UNKNOWN, NotFoundError),
        (c.REP_ERR_POLICY, RefusedError),
        (None, UnreachableError),
    ],
)
async def test_what_the_server_says_becomes_an_error(
    tmp_path: Path, kind: int | None, error: type[Exception]
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        outcome = asyncio.ensure_future(
            asyncio.to_thread(relay, SocketChannel(theirs), str(tmp_path / "s"), "pg")
        )
        server = (await asyncio.to_thread(listener.accept))[0]
        with server:
            server.sendall(b"NBDMAGICIHAVEOPT\0\3")
            ours.sendall(b"\0\0\0\2")
            told = await asyncio.to_thread(server.recv, 4 + 16 + 2, socket.MSG_WAITALL)
            assert (
                told == b"\0\0\0\3" + struct.pack(">QII", c.OPTION_MAGIC, c.OPT_CONFINE, 2) + b"pg"
            )
            if kind is not None:
                head = struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_CONFINE, kind, 2)
                server.sendall(head + b"no")
        with pytest.raises(error):
            await outcome


async def test_pipes_serve_as_well_as_sockets(served: Served) -> None:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    outcome = asyncio.ensure_future(
        asyncio.to_thread(relay, DescriptorChannel(theirs_in, theirs_out), served.path, "pg/0")
    )
    read = os.fdopen(ours_in, "rb", buffering=0)
    data = os.urandom(1 << 20)

    def talk() -> bytes:
        assert read.read(18)
        go = struct.pack(">IH", 0, 0)
        os.write(ours_out, b"\0\0\0\3" + struct.pack(">QII", c.OPTION_MAGIC, c.OPT_GO, 6) + go)
        assert len(_exactly(read, 20 + 12 + 20)) == 52
        send = struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, 1, 0, len(data)) + data
        send += struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_DISCONNECT, 2, 0, 0)
        while send:
            send = send[os.write(ours_out, send) :]
        return _exactly(read, 16)

    assert await asyncio.to_thread(talk) == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 1)
    # DISC ends the connection, though the client's pipe is open.
    await outcome
    assert served.disk.data[: len(data)] == data
    os.close(ours_out)
    os.close(theirs_out)
    read.close()
    os.close(theirs_in)


def _exactly(file, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = file.read(count - len(found))
        assert part
        found += part
    return found
