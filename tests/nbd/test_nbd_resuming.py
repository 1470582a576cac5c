"""A disk whose server dies and comes back, as its users see it: real sockets on both sides."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from geomirror.environment import SECOND, SystemClock
from geomirror.errors import ChangedError, GeomirrorError, StorageError
from geomirror.limits import Limits
from geomirror.nbd import constants as c
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.resuming_export_io import ResumingExport
from geomirror.nbd.server_io import NbdServer
from tests.nbd.ram_export import RamExport

LIMITS = Limits(attach_retry_ns=SECOND // 200, attach_retry_ns_max=SECOND // 100)


class Rig:
    """A server that can be cut off and come back, the export in between, one user."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disk = RamExport(name="pg/0", size_bytes=8 << 20)
        self.server: NbdServer | None = None
        self.changed: ChangedError | None = None
        self.errors: list[tuple[int, int]] = []

    async def begin(self, timeout_ns: int | None) -> None:
        await self.up()
        self.export = ResumingExport(
            "pg/0",
            self.connect,
            clock=SystemClock(),
            limits=LIMITS,
            timeout_ns=timeout_ns,
            on_error=lambda command, number: self.errors.append((command, number)),
        )
        await self.export.start()
        self.running = asyncio.ensure_future(self.export.run())
        self.front = NbdServer(lambda: {"pg/0": self.export}, default="pg/0")
        ours, theirs = socket.socketpair()
        await self.front.serve(theirs)
        self.user = NbdClient("", depth=64, wants_structured=True)
        await asyncio.get_running_loop().create_connection(lambda: self.user, sock=ours)
        await self.user.attach()

    async def connect(self) -> NbdClient:
        client = await NbdClient.connect(f"nbd+unix:///pg/0?socket={self.path}")
        if self.changed is not None:
            client.abort()
            raise self.changed
        return client

    async def up(self) -> None:
        self.server = NbdServer(lambda: {"pg/0": self.disk})
        await self.server.start_unix(self.path)

    async def cut(self) -> None:
        """The server dies: what it holds is not answered any more."""
        server = self.server
        assert server is not None
        self.disk.held = None
        for connection in list(server._connections.values()):
            connection._transport.abort()
        await server.stop()
        self.server = None

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)

    async def end(self) -> None:
        await self.user.close()
        await self.front.stop()
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        if self.server is not None:
            await self.server.stop()
        assert self.disk.open_count == 0


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path / "n.sock")
    await found.begin(None)
    yield found
    await found.end()


async def test_data_and_what_the_server_is_pass_through(rig: Rig) -> None:
    assert rig.user.size_bytes == 8 << 20
    assert rig.user.export.is_multi_conn
    data = bytes(range(256)) * (5 << 12)
    await rig.user.write(100, data)
    assert await rig.user.read(100, len(data)) == data
    await rig.user.write(0, b"f", is_fua=True)
    await rig.user.trim(0, 4096)
    await rig.user.zero(4096, 4096, may_punch=False)
    await rig.user.flush()
    assert not any(rig.disk.data[:8192])
    assert (c.CMD_WRITE, c.CMD_FLAG_FUA) in rig.disk.flags_seen
    assert (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE) in rig.disk.flags_seen
    rig.disk.fail_errno = errno.ENOSPC
    with pytest.raises(GeomirrorError) as caught:
        await rig.user.write(0, b"x")
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert rig.errors == [(c.CMD_WRITE, errno.ENOSPC)]


async def test_users_wait_while_the_server_is_away_and_notice_nothing(rig: Rig) -> None:
    rig.disk.held = []
    writes = [rig.user.start_write(at * 4096, bytes([at]) * 4096) for at in range(1, 9)]
    flush = rig.user.start(c.CMD_FLUSH, 0, 0)
    await rig.until(lambda: len(rig.disk.held or ()) == 9)
    await rig.cut()
    await rig.until(lambda: rig.export.away_since_ns is not None)
    later = asyncio.ensure_future(rig.user.read(4096, 8 * 4096))
    await rig.until(lambda: rig.export.unanswered == 10)
    assert not any(future.done() for future in (*writes, flush, later))
    await rig.up()
    await asyncio.gather(*writes, flush)
    assert await later == b"".join(bytes([at]) * 4096 for at in range(1, 9))
    assert rig.export.replayed == 9
    assert (rig.export.reason, rig.export.away_since_ns, rig.errors) == (None, None, [])


async def test_many_deaths_under_load_lose_nothing(rig: Rig) -> None:
    """At the end every block is its last answered write."""
    newest: dict[int, int] = {}

    async def write(first: int) -> None:
        for version in range(1, 200):
            block = first + version % 3
            await rig.user.write(block * 4096, version.to_bytes(4, "little") * 1024)
            newest[block] = version

    load = [asyncio.ensure_future(write(first * 3)) for first in range(8)]
    deaths = 0
    while not all(task.done() for task in load):
        await asyncio.sleep(0.005)
        await rig.cut()
        await rig.up()
        deaths += 1
    await asyncio.gather(*load)
    for block, version in newest.items():
        assert await rig.user.read(block * 4096, 4) == version.to_bytes(4, "little")
    assert deaths > 3
    assert rig.errors == []


async def test_another_disk_under_the_same_name_gets_nothing(rig: Rig) -> None:
    rig.disk.held = []
    write = rig.user.start_write(0, b"not for you")
    await rig.until(lambda: rig.disk.held)
    rig.changed = ChangedError("it is of another generation")
    await rig.cut()
    await rig.up()
    with pytest.raises(StorageError, match="another generation"):
        await write
    with pytest.raises(StorageError, match="another generation"):
        await rig.user.read(0, 1)
    assert rig.export.is_over
    assert not any(rig.disk.data)
    await rig.running


async def test_giving_up_fails_what_waits(rig: Rig) -> None:
    await rig.cut()
    write = rig.user.start_write(0, b"x")
    await rig.until(lambda: rig.export.unanswered == 1)
    rig.export.give_up()
    with pytest.raises(StorageError):
        await write
    await rig.up()
    with pytest.raises(StorageError):
        await rig.user.flush()


async def test_waiting_is_bounded_and_the_server_is_welcome_afterwards(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "n.sock")
    await rig.begin(SECOND // 5)
    await rig.cut()
    with pytest.raises(StorageError):
        await rig.user.write(0, b"too long")
    with pytest.raises(StorageError):
        await rig.user.flush()
    assert rig.errors == [(c.CMD_WRITE, errno.EIO), (c.CMD_FLUSH, errno.EIO)]
    await rig.up()
    await rig.until(lambda: rig.export.away_since_ns is None)
    await rig.user.write(0, b"again")
    assert rig.disk.data[:8] == b"again\0\0\0"
    await rig.end()


async def test_memory_for_waiting_writes_is_bounded(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "n.sock")
    await rig.begin(None)
    rig.export._limits = Limits(nbd_queued_bytes_max=1 << 20)
    await rig.cut()
    futures = [rig.user.start_write(at << 18, bytes(1 << 18)) for at in range(32)]
    await rig.until(lambda: rig.export._queue.payload_bytes > 1 << 20)
    await asyncio.sleep(0.05)
    # What one socket read brings is taken; nothing after it.
    assert rig.export._queue.payload_bytes < 4 << 20
    await rig.up()
    await asyncio.gather(*futures)
    assert rig.export._queue.payload_bytes == 0
    await rig.end()


async def test_a_user_that_leaves_is_forgotten(rig: Rig) -> None:
    await rig.cut()
    ours, theirs = socket.socketpair()
    await rig.front.serve(theirs)
    other = NbdClient("", depth=4, wants_structured=False)
    await asyncio.get_running_loop().create_connection(lambda: other, sock=ours)
    await other.attach()
    other.start_write(0, b"never")
    await rig.until(lambda: rig.export.unanswered == 1)
    other.abort()
    await rig.until(lambda: rig.export.unanswered == 0)
    await rig.up()
    await rig.until(lambda: rig.export.away_since_ns is None)
    assert not any(rig.disk.data[:5])
