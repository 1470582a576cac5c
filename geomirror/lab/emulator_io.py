"""The link emulator: one listening port per (dialling node, dialled node), one link per node pair.

    dialler --connect--> 127.0.0.1:port(dialler, target) ==[ link, two directions ]==> target's port

The port says who dials, so nothing has to be parsed and TLS passes end to end. User space only: no
root, no namespaces, no netem.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from geomirror.environment import SECOND, Clock, Entropy, SeededEntropy, SystemClock
from geomirror.errors import NotFoundError
from geomirror.lab.emulated_stream_io import END, RESET, Direction, Pump, reset_transport
from geomirror.lab.link_model import CONNECT_RETRY_NS, next_try_ns
from geomirror.lab.scenario import LinkSettings
from geomirror.tunnel.handover_io import connect_stream

SOCKET_BUFFER_BYTES = 128 * 1024
"""Receive buffer of the emulator's sockets: the kernel's hidden part of the emulated queue."""
READ_BYTES = 64 * 1024
"""One read; also bounds how far a resumed sender overshoots the queue."""
CONNECTIONS_MAX = 4096
"""Connections of one link, dead ones that wait for the link included."""


class Side(asyncio.BufferedProtocol):
    """One socket of a connection: feeds a pump with what it reads."""

    def __init__(self, connection: Connection, outgoing: Pump, incoming: Pump) -> None:
        self.transport: asyncio.Transport | None = None
        self._connection = connection
        self._outgoing = outgoing
        self._incoming = incoming
        self._buffer = memoryview(bytearray(READ_BYTES))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        # A cast, not a check: uvloop's transports are no subclasses of asyncio's.
        self.transport = self._outgoing.source = self._incoming.sink = cast(
            asyncio.Transport, transport
        )
        self._connection.side_opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came from the socket."""
        self._outgoing.receive(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:
        """The other end closed its half; keep ours open until the end has crossed back."""
        self._outgoing.receive(END)
        self._connection.side_ended(self)
        return True

    def pause_writing(self) -> None:
        """The receiver's socket is full."""
        self._incoming.sink_full(True)

    def resume_writing(self) -> None:
        """The receiver's socket takes bytes again."""
        self._incoming.sink_full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed, by us or by a reset."""
        if exc is not None:
            self._outgoing.receive(RESET)
        self._connection.side_closed(self)


class Connection:
    """One emulated TCP connection: two sides, two pumps."""

    def __init__(self, link: Link, forward: Direction, back: Direction, port: Port) -> None:
        self.link = link
        self._port = port
        self._directions = (forward, back)
        self._accepted_ns = link.clock.now_ns()
        self._dial_timer: asyncio.TimerHandle | None = None
        self._dial_task: asyncio.Task[None] | None = None
        self._ended = 0
        self._forward = Pump(forward, self._forward_end)
        self._back = Pump(back, self._back_end)
        self.near = Side(self, self._forward, self._back)
        self.far = Side(self, self._back, self._forward)

    def side_opened(self, side: Side) -> None:
        """The dialler's side: start the handshake. The far side: let bytes pass."""
        if side is self.near:
            self.dial()
            return
        self._back.release()
        # The dialler learns of the open connection half a round trip later, and sends only then.
        loop = asyncio.get_running_loop()
        delay_ns = self._directions[1].model.settings.delay_ns
        self._dial_timer = loop.call_later(delay_ns / SECOND, self._forward.release)

    def dial(self) -> None:
        """Send the connection request across, now or at its next retry; not while down."""
        if self.far.transport is not None or self._dial_task is not None:
            return
        if self._dial_timer is not None:
            self._dial_timer.cancel()
        if not self.link.is_up:
            return
        now_ns = self.link.clock.now_ns()
        wait_ns = next_try_ns(self._accepted_ns, now_ns, CONNECT_RETRY_NS) - now_ns
        if now_ns - self._accepted_ns < CONNECT_RETRY_NS // 100:
            wait_ns = 0
        wait_ns += self._directions[0].model.settings.delay_ns
        loop = asyncio.get_running_loop()
        self._dial_timer = loop.call_later(wait_ns / SECOND, self._start_dial)

    def side_ended(self, side: Side) -> None:
        """A dialler that gives up while the link is down is forgotten at once."""
        if side is self.near and self.far.transport is None and not self.link.is_up:
            self.close()

    def side_closed(self, side: Side) -> None:
        """One socket is gone; the pump that starts at it may still have bytes under way."""
        (self._back if side is self.near else self._forward).sink = None
        other = self.far if side is self.near else self.near
        if other.transport is None or other.transport.is_closing():
            self.close()

    def close(self, *, is_reset: bool = False) -> None:
        """Close both sides now and forget what is under way."""
        if self._dial_timer is not None:
            self._dial_timer.cancel()
        if self._dial_task is not None and self.far.transport is None:
            self._dial_task.cancel()
        self._forward.close()
        self._back.close()
        for side in (self.near, self.far):
            if side.transport is not None:
                if is_reset:
                    reset_transport(side.transport)
                else:
                    side.transport.close()
        self.link.connections.discard(self)

    def _start_dial(self) -> None:
        self._dial_timer = None
        if self.link.is_up:
            self._dial_task = asyncio.get_running_loop().create_task(self._dial_target())

    async def _dial_target(self) -> None:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            await loop.sock_connect(connection, self._port.target_address)
            await connect_stream(lambda: self.far, connection)
        except OSError:
            connection.close()
            self.close(is_reset=True)
        except asyncio.CancelledError:
            connection.close()
            raise

    def _forward_end(self, kind: bytes) -> None:
        self._end(self.far, kind)

    def _back_end(self, kind: bytes) -> None:
        self._end(self.near, kind)

    def _end(self, side: Side, kind: bytes) -> None:
        self._ended += 1
        if kind is RESET:
            self.close(is_reset=True)
        elif self._ended == 2:
            self.close()
        elif side.transport is not None and not side.transport.is_closing():
            side.transport.write_eof()


class Port:
    """Where one node dials another."""

    def __init__(self, link: Link, source: str, target: str, address: tuple[str, int]) -> None:
        self.link = link
        self.source = source
        self.target = target
        self.target_address = address
        self.number = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen on a free loopback port."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Set before listen: accepted sockets inherit it, and the window is agreed with it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        self.number = listener.getsockname()[1]
        loop = asyncio.get_running_loop()
        factory = self._accept
        self._server = await loop.create_server(factory, sock=listener, backlog=256)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    def _accept(self) -> asyncio.BaseProtocol:
        return self.link.accept(self)


class _Refuse(asyncio.Protocol):
    """Resets a connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        reset_transport(cast(asyncio.Transport, transport))


class Link:
    """Two directions between two nodes and the connections on them."""

    def __init__(
        self, first: str, second: str, settings: LinkSettings, clock: Clock, entropy: Entropy
    ) -> None:
        self.nodes = (first, second)
        self.name = f"{first}-{second}"
        self.clock = clock
        self.directions = {
            (a, b): Direction(f"{a}>{b}", settings, clock, entropy)
            for a, b in ((first, second), (second, first))
        }
        self.connections: set[Connection] = set()
        self.flaps = 0
        self._update_rtt()

    @property
    def is_up(self) -> bool:
        """Whether both directions pass bytes."""
        return all(direction.model.is_up for direction in self.directions.values())

    def accept(self, port: Port) -> asyncio.BaseProtocol:
        """Protocol of a connection that arrived at `port`."""
        forward = self.directions[port.source, port.target]
        back = self.directions[port.target, port.source]
        is_reset = not self.is_up and forward.model.settings.down_mode == "reset"
        if is_reset or len(self.connections) >= CONNECTIONS_MAX:
            return _Refuse()
        connection = Connection(self, forward, back, port)
        self.connections.add(connection)
        return connection.near

    def change(self, settings: LinkSettings, source: str | None = None) -> None:
        """New settings for both directions, or only for the one out of `source`."""
        for (origin, _), direction in self.directions.items():
            if source in (None, origin):
                direction.model.change(settings)
        self._update_rtt()

    def down(self, source: str | None = None) -> None:
        """Take both directions down, or only the one out of `source`."""
        if self.is_up:
            self.flaps += 1
        for (origin, _), direction in self.directions.items():
            if source in (None, origin):
                direction.take_down()
                if direction.model.settings.down_mode == "reset":
                    self.reset()

    def up(self) -> None:
        """Bring both directions up."""
        if self.is_up:
            return
        for direction in self.directions.values():
            direction.bring_up()
        for connection in list(self.connections):
            connection.dial()

    def reset(self) -> None:
        """Reset every connection, as a middlebox that lost its state does."""
        for connection in list(self.connections):
            connection.close(is_reset=True)

    def to_json(self) -> dict[str, object]:
        """State and counters of both directions."""
        return {
            "name": self.name,
            "nodes": list(self.nodes),
            "is_up": self.is_up,
            "flaps": self.flaps,
            "connections": len(self.connections),
            "directions": [direction.to_json() for direction in self.directions.values()],
        }

    def _update_rtt(self) -> None:
        models = [direction.model for direction in self.directions.values()]
        rtt_ns = sum(model.settings.delay_ns for model in models)
        for model in models:
            model.rtt_ns = rtt_ns


class Emulator:
    """All links of a lab. Every chance comes from `seed`."""

    def __init__(self, seed: int = 1, clock: Clock | None = None) -> None:
        self.links: dict[frozenset[str], Link] = {}
        self._seed = seed
        self._clock = clock or SystemClock()
        self._ports: list[Port] = []
        self._flaps: dict[str, asyncio.Task[None]] = {}

    def add_link(self, first: str, second: str, settings: LinkSettings) -> Link:
        """A link that is up. Its name is `first-second`."""
        entropy = SeededEntropy(f"{self._seed}/{first}/{second}")
        link = Link(first, second, settings, self._clock, entropy)
        self.links[frozenset((first, second))] = link
        return link

    async def open_port(self, source: str, target: str, address: tuple[str, int]) -> int:
        """Listen for `source` dialling `target`, whose daemon listens at `address`; the port."""
        port = Port(self.link(source, target), source, target, address)
        await port.open()
        self._ports.append(port)
        return port.number

    def link(self, first: str, second: str) -> Link:
        """The link of two nodes; NotFoundError when there is none."""
        found = self.links.get(frozenset((first, second)))
        if found is None:
            raise NotFoundError(f"there is no link between {first} and {second}")
        return found

    def partition(self, node: str, *, is_up: bool) -> None:
        """Take all links of a node down, or bring them up."""
        for link in self.links.values():
            if node in link.nodes:
                (link.up if is_up else link.down)()

    def flap(self, link: Link, *, down_s: float, period_s: float, count: int) -> None:
        """Take the link down for about `down_s` once in every `period_s`, `count` times.

        Both are spread by ±20 %, seeded; a new schedule replaces the link's old one.
        """
        self.stop_flap(link)
        entropy = SeededEntropy(f"{self._seed}/flap/{link.name}/{link.flaps}")

        async def run() -> None:
            for _ in range(count):
                down = down_s * entropy.uniform(0.8, 1.2)
                await asyncio.sleep(max(0.0, period_s * entropy.uniform(0.8, 1.2) - down))
                link.down()
                try:
                    await asyncio.sleep(down)
                finally:
                    link.up()

        self._flaps[link.name] = asyncio.get_running_loop().create_task(run())

    def stop_flap(self, link: Link) -> None:
        """End the link's flap schedule and bring it up."""
        task = self._flaps.pop(link.name, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Close every port and connection."""
        tasks = list(self._flaps.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for port in self._ports:
            port.close()
        for link in self.links.values():
            for connection in list(link.connections):
                connection.close(is_reset=True)
            for direction in link.directions.values():
                direction.close()
        # One turn of the loop lets closed transports release their sockets.
        await asyncio.sleep(0)

    def to_json(self) -> list[dict[str, object]]:
        """Every link."""
        return [link.to_json() for link in self.links.values()]
