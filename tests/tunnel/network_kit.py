"""A network on loopback in one process, with a settable clock and seeded keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from geomirror.environment import SECOND, SeededEntropy, SystemClock
from geomirror.errors import GeomirrorError
from geomirror.lab.ports_io import free_port
from geomirror.tunnel.network_io import NetworkState, create_network, create_token, join
from geomirror.tunnel.tls_io import TlsDriver, TlsListener

HOUR = 3600 * SECOND


class ShiftedClock:
    """The machine's clock, moved by `shift_ns`."""

    def __init__(self) -> None:
        self.shift_ns = 0
        self._real = SystemClock()

    def now_ns(self) -> int:
        return self._real.now_ns() + self.shift_ns

    def wall_ns(self) -> int:
        return self._real.wall_ns() + self.shift_ns


class Echo(asyncio.BufferedProtocol):
    """Sends back what comes; the name of the peer is kept."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.lost = asyncio.get_running_loop().create_future()
        self._view = memoryview(bytearray(1 << 16))

    def connection_made(self, transport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(self._view[:nbytes]))

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, exc) -> None:
        if not self.lost.done():
            self.lost.set_result(exc)


class Collect(asyncio.Protocol):
    """Keeps what comes; `wait(n)` returns when n bytes are there, `lost` when it is over."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = asyncio.get_running_loop().create_future()
        self._wanted: tuple[int, asyncio.Future[None]] | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self._wanted and len(self.data) >= self._wanted[0] and not self._wanted[1].done():
            self._wanted[1].set_result(None)

    def connection_lost(self, exc) -> None:
        self.lost.set_result(exc)
        if self._wanted and not self._wanted[1].done():
            self._wanted[1].set_exception(ConnectionError("lost"))

    async def wait(self, count: int) -> bytes:
        if len(self.data) < count:
            self._wanted = (count, asyncio.get_running_loop().create_future())
            await self._wanted[1]
        return bytes(self.data)


class Site:
    """One running node: state, driver, listener, and what it accepted and refused."""

    def __init__(self, state: NetworkState, clock: ShiftedClock) -> None:
        self.state = state
        self.clock = clock
        self.entropy = SeededEntropy(state.node)
        self.refusals: list[GeomirrorError] = []
        self.joined: list[str] = []
        self.accepted: list[Echo] = []
        self.driver = TlsDriver(
            state,
            clock,
            self.entropy,
            refused=lambda source, error: self.refusals.append(error),
            joined=self.joined.append,
        )
        self.listener: TlsListener | None = None

    def accept(self, peer: str) -> Echo:
        echo = Echo(peer)
        self.accepted.append(echo)
        return echo

    async def start(self) -> str:
        assert self.state.listen is not None
        self.listener = await self.driver.listen(self.state.listen, self.accept)
        return self.listener.endpoint

    @property
    def endpoint(self) -> str:
        assert self.listener is not None
        return self.listener.endpoint

    async def stop(self) -> None:
        if self.listener is not None:
            await self.listener.stop()
        for echo in self.accepted:
            echo.transport.abort()
            await echo.lost


def free_endpoint() -> str:
    return f"127.0.0.1:{free_port()}"


def found(root: Path, clock: ShiftedClock, *, network: str = "acme") -> Site:
    """A new network with the node east-1."""
    state = create_network(
        root,
        network=network,
        site="east",
        node="east-1",
        listen=free_endpoint(),
        cidr=None,
        clock=clock,
        entropy=SeededEntropy(f"{network}-{root}"),
    )
    return Site(state, clock)


def token_of(authority: Site, node: str | None = "west-1", **options) -> str:
    options = {
        "site": "west",
        "expires_seconds": 600,
        "wall_ns": authority.clock.wall_ns(),
        **options,
    }
    return create_token(authority.state, node=node, **options)


async def join_as(root: Path, token: str, clock: ShiftedClock, **options) -> Site:
    options = {
        "listen": free_endpoint(),
        "clock": clock,
        "entropy": SeededEntropy(str(root)),
    } | options
    return Site(await join(root, token, **options), clock)


@asynccontextmanager
async def pair(root: Path) -> AsyncIterator[tuple[Site, Site]]:
    """east-1 (the authority) and west-1, both listening."""
    clock = ShiftedClock()
    east = found(root / "east", clock)
    await east.start()
    west = await join_as(root / "west", token_of(east), clock)
    await west.start()
    try:
        yield east, west
    finally:
        await east.stop()
        await west.stop()


@asynccontextmanager
async def authority(root: Path, **options) -> AsyncIterator[Site]:
    east = found(root / "east", ShiftedClock(), **options)
    await east.start()
    try:
        yield east
    finally:
        await east.stop()


def everything_stored(root: Path) -> bytes:
    return b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())


def all_paths(root: Path) -> list[Path]:
    return list(root.rglob("*"))
