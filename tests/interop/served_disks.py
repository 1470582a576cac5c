"""What real clients are pointed at: our server over a disk in RAM, and real daemons with a copy.

The disk in RAM shows what a client asked for, request by request. The daemons show that the engine
behind the same server gives back what was written, at the primary and at the copy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from geomirror.nbd import constants as c
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.server_io import NbdServer
from tests.nbd.ram_export import RamExport
from tests.system.support import Site, create, make_network, some_sites, wait_applied

SIZE = 16 << 20
NAME = "vol"


class Served:
    """A disk `vol/0` (`vol` for short) that can be written, and a read-only one `ro`."""

    description: str
    contexts: tuple[str, ...]
    names: tuple[str, ...]
    """Of exports in the list of one server."""
    tcp: str

    def uri(self, name: str = "vol/0") -> str:
        """Of an export; one that does not exist has a URI, too."""
        raise NotImplementedError

    async def content(self, name: str = "vol/0") -> bytes:
        """All that an export shows."""
        async with await NbdClient.connect(self.uri(name)) as client:
            return bytes(await client.read(0, SIZE))

    async def fill(self, data: bytes) -> None:
        """Write all of `vol/0`."""
        async with await NbdClient.connect(self.uri()) as client:
            await client.write(0, data)
            await client.flush()

    async def fill_read_only(self, data: bytes) -> None:
        """Let `ro` show this, and `vol/0` something else."""
        raise NotImplementedError

    async def judge_copy(self) -> None:
        """What else holds the content of `vol/0` holds it now."""

    def check_flushed(self) -> None:
        """Some client has asked for a flush; what one does is judged by power cuts."""

    def check_fua(self) -> None:
        """Some client has written with FUA."""


class RamServed(Served):
    """The front end alone."""

    description = "role: primary"
    contexts = ("base:allocation",)
    names = ("picky", "ro", "vol/0")

    def __init__(self, path: Path) -> None:
        self.disk = RamExport(name="vol/0", size_bytes=SIZE, description=self.description)
        self.read_only = RamExport(name="ro", size_bytes=SIZE, is_read_only=True)
        self.picky = RamExport(name="picky", size_bytes=SIZE, minimum_block=4096)
        self._path = path

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RamServed]:
        """Serve."""
        found = {"vol": self.disk, "vol/0": self.disk, "ro": self.read_only, "picky": self.picky}
        server = NbdServer(lambda: found, default="vol/0")
        await server.start_unix(self._path)
        host, port = await server.start_tcp("127.0.0.1", 0)
        self.tcp = f"nbd://{host}:{port}/vol/0"
        yield self
        await server.stop()
        assert self.disk.open_count == 0

    def uri(self, name: str = "vol/0") -> str:
        return f"nbd+unix:///{name}?socket={self._path}"

    async def fill_read_only(self, data: bytes) -> None:
        self.read_only.data[:] = data

    def check_flushed(self) -> None:
        assert self.disk.counts[c.CMD_FLUSH] >= 1

    def check_fua(self) -> None:
        seen = self.disk.flags_seen
        assert any(command == c.CMD_WRITE and flags & c.CMD_FLAG_FUA for command, flags in seen)


class DaemonServed(Served):
    """A resource whose primary is `east`; `ro` is its copy at `west`."""

    description = "primary of vol/0"
    contexts = (
        "base:allocation",
        "qemu:dirty-bitmap:unsynced-west-1",
        "x-geomirror:unsynced",
        "x-geomirror:pending",
    )
    names = ("vol/0",)

    def __init__(self, east: Site, west: Site) -> None:
        self.east, self.west = east, west
        self._uri, self._read_only_uri = east.uri(NAME), west.uri(NAME)
        self.tcp = str(east.status(NAME)["volumes"][0]["nbd_tcp_uri"])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[DaemonServed]:
        """The daemons run for all tests; what one leaves paused goes on."""
        await asyncio.to_thread(self.east.call, "resource.resume", name=NAME)
        yield self

    def uri(self, name: str = "vol/0") -> str:
        if name == "ro":
            return self._read_only_uri
        return self._uri.replace("/vol/0?", f"/{name}?")

    async def fill_read_only(self, data: bytes) -> None:
        await self.fill(data)
        await asyncio.to_thread(wait_applied, self.east, NAME)
        await asyncio.to_thread(self.east.call, "resource.pause", name=NAME)
        await self.fill(b"\xee" * SIZE)

    async def judge_copy(self) -> None:
        await asyncio.to_thread(self.east.call, "resource.resume", name=NAME)
        await asyncio.to_thread(wait_applied, self.east, NAME)
        assert await self.content("ro") == await self.content()


@contextlib.contextmanager
def daemons(root: Path) -> Iterator[DaemonServed]:
    """Two nodes with such a resource; nothing of them has crashed at the end."""
    with some_sites(root, "a", "b") as (east, west):
        make_network(east, west)
        config = east.data_dir / "geomirror.toml"
        config.write_text('[nbd]\ntcp_listen = "127.0.0.1:0"\n')
        config.chmod(0o600)
        east.stop()
        east.restart()
        create(east, NAME, size=str(SIZE))
        wait_applied(east, NAME)
        yield DaemonServed(east, west)
        assert east.crashes() == west.crashes() == []
