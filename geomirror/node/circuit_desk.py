"""The circuits of this node: opens them with the peers, watches over them, counts.

Whoever dialled the link dials the circuit's connection, too, beside the question whether it may
be: a question costs one round trip, a connection three, so the answer is there first.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import msgspec

from geomirror.environment import MS, SECOND
from geomirror.errors import GeomirrorError, LinkError, RefusedError, UnreachableError, UsageError
from geomirror.node.calls import Caller, Parameters, Result
from geomirror.node.context import NodeContext
from geomirror.tunnel.circuit_io import PeerSide, Splice
from geomirror.tunnel.circuit_socket_io import arm_reset
from geomirror.tunnel.circuit_table import CircuitEntry, CircuitTable, Tally
from geomirror.tunnel.driver import CIRCUIT_PROTOCOL
from geomirror.tunnel.service_rules import Exposure, Forward, Holder
from geomirror.tunnel.tcp_io import open_tcp
from geomirror.tunnel.tls_io import TlsDriver

LOOK_S = 1.0
"""Between two looks at links and at connections that are not read."""
STOPPING = "this node stops"


class OpenCircuit(Parameters, frozen=True):
    """`circuit.open`"""

    service: str
    number: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    is_dialling: bool


@dataclass
class CircuitDesk:
    """On the event loop.

    :param exposed: what a peer reaches under a name; raises `GeomirrorError` if nothing.
    """

    context: NodeContext
    driver: TlsDriver
    exposed: Callable[[str, str], Exposure]
    """(service, peer)"""
    _splices: dict[CircuitEntry, Splice] = field(default_factory=dict)
    _arrivals: dict[CircuitEntry, asyncio.Future[PeerSide]] = field(default_factory=dict)
    """Circuits whose connection the peer dials."""
    _ungreeted: dict[str, set[PeerSide]] = field(default_factory=dict)
    _tallies: dict[str, Tally] = field(default_factory=dict)
    _asking: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _joining: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.table = CircuitTable(self.context.limits)
        self.circuits_max: Callable[[], int] = lambda: self.context.limits.circuits_max
        """How many there may be now: sockets must not take the files of journals."""

    def tally(self, key: str) -> Tally:
        """Of an exposure (by its name) or a forward (by its endpoint)."""
        return self._tallies.setdefault(key, Tally())

    def forget_tally(self, key: str) -> None:
        """It is not exposed, or forwarded, any more."""
        self._tallies.pop(key, None)

    def live(self) -> list[CircuitEntry]:
        """All circuits, oldest first, with what they have carried."""
        for entry, splice in self._splices.items():
            entry.bytes_sent = splice.circuit.bytes_sent
            entry.bytes_received = splice.circuit.bytes_received
        return self.table.entries()

    def by_peer(self) -> dict[str, list[Splice]]:
        """The circuits that carry bytes."""
        found: dict[str, list[Splice]] = {}
        for entry, splice in self._splices.items():
            found.setdefault(entry.peer, []).append(splice)
        return found

    # The side of the application.

    async def carry(self, forward: Forward, holder: Holder, sock: socket.socket) -> None:
        """Open a circuit to this holder, and give it the application's connection.

        :raises GeomirrorError: it cannot be; `sock` is still the caller's.
        """
        status = self.context.links.state(holder.node)
        entry = self._entry(holder.node, forward.name, forward.listen, is_forwarded=True)
        self.table.open(entry, self.circuits_max())
        seconds = self.context.limits.circuit_open_ns_max / SECOND
        try:
            async with self._turn(holder.node), asyncio.timeout(seconds):
                ask = partial(self._ask, entry, is_dialling=status.is_dialled)
                if status.is_dialled:
                    side, _ = await self._dial_beside(entry, status.endpoint, ask())
                else:
                    side = await self._wait_beside(entry, ask())
        except BaseException as error:
            self.table.close(entry)
            if isinstance(error, TimeoutError):
                raise UnreachableError(
                    f'"{holder.node}" did not open the circuit within {seconds:g} s'
                ) from None
            raise
        await self._start(entry, side, sock, forward.listen)

    def _turn(self, peer: str) -> asyncio.Semaphore:
        most = self.context.limits.circuits_opening_max
        return self._asking.setdefault(peer, asyncio.Semaphore(most))

    async def _ask(self, entry: CircuitEntry, *, is_dialling: bool) -> None:
        limits, links = self.context.limits, self.context.links
        parameters = {
            "service": entry.service,
            "number": entry.number.hex(),
            "is_dialling": is_dialling,
        }
        seconds = limits.circuit_open_ns_max / SECOND
        await links.call(entry.peer, "circuit.open", parameters, seconds)

    async def _wait_beside(self, entry: CircuitEntry, asked: Awaitable[None]) -> PeerSide:
        """The connection that the peer dials, once it says that all is well."""
        arrival: asyncio.Future[PeerSide] = asyncio.get_running_loop().create_future()
        self._arrivals[entry] = arrival
        try:
            await asked
            return await arrival
        except BaseException:
            if arrival.done() and not arrival.cancelled():
                arrival.result().reset()
            raise
        finally:
            del self._arrivals[entry]

    # The side of the service.

    async def open_here(self, caller: Caller, request: OpenCircuit) -> Result:
        """A peer asks for a circuit to one of our services.

        :raises NotFoundError, RefusedError: not exposed, or not to this node; too many circuits.
        :raises UnreachableError: the service does not answer, or the peer cannot be dialled.
        """
        if caller.peer is None:
            raise UsageError("only a node opens circuits")
        exposure = self.exposed(request.service, caller.peer)
        number = bytes.fromhex(request.number)
        entry = self._entry(
            caller.peer, exposure.name, exposure.target, is_forwarded=False, number=number
        )
        self.table.open(entry, self.circuits_max())
        try:
            await self._serve(entry, exposure, request)
        except BaseException as error:
            self.table.close(entry)
            if isinstance(error, GeomirrorError):
                self.failed(exposure.name, error)
            raise
        return {}

    async def _serve(self, entry: CircuitEntry, exposure: Exposure, request: OpenCircuit) -> None:
        if request.is_dialling:
            sock = await self._connect(exposure)
            self._arrivals[entry] = asyncio.get_running_loop().create_future()
            self._run(self._join(entry, sock, exposure.name))
            return
        status = self.context.links.state(entry.peer)
        if not status.is_dialled:
            raise UnreachableError("the connections of the link are being changed; try again")
        asked = self._connect(exposure)
        side, sock = await self._dial_beside(entry, status.endpoint, asked)
        await self._start(entry, side, sock, exposure.name)

    async def _connect(self, exposure: Exposure) -> socket.socket:
        seconds = self.context.limits.circuit_connect_ns_max / SECOND
        what = f'the service "{exposure.name}" at {exposure.target} of "{self.context.name}"'
        try:
            async with asyncio.timeout(seconds):
                return await open_tcp(exposure.host, exposure.port, 0)
        except TimeoutError:
            raise UnreachableError(f"{what} does not answer within {seconds:g} s") from None
        except OSError as error:
            cause = error.strerror or str(error)
            raise UnreachableError(f"{what}: {cause}", hint="is it running there?") from None

    async def _join(self, entry: CircuitEntry, sock: socket.socket, key: str) -> None:
        """Wait for the connection that the peer dials."""
        try:
            async with asyncio.timeout(self.context.limits.circuit_open_ns_max / SECOND):
                side = await self._arrivals[entry]
        except TimeoutError:
            self.table.close(entry)
            reset_socket(sock)
            self.failed(key, LinkError(f'"{entry.peer}" asked for a circuit and did not dial it'))
            return
        except BaseException:
            self.table.close(entry)
            reset_socket(sock)
            raise
        finally:
            del self._arrivals[entry]
        await self._start(entry, side, sock, key)

    # Both sides.

    def accept(self, peer: str) -> PeerSide:
        """A peer has dialled a connection for a circuit; it says next which one.

        :raises RefusedError: too many of them have not said so.
        """
        found = self._ungreeted.setdefault(peer, set())
        if len(found) >= self.context.limits.circuits_ungreeted_max:
            raise RefusedError(f"{len(found)} circuits of this node are being opened already")
        side = PeerSide(self.context.limits, partial(self._greeted, peer), found.discard)
        found.add(side)
        return side

    def _greeted(self, peer: str, side: PeerSide, number: bytes) -> None:
        self._ungreeted[peer].discard(side)
        entry = self.table.claim(peer, number)
        arrival = self._arrivals.get(entry) if entry is not None else None
        if arrival is None or arrival.done():
            side.reset()
        else:
            arrival.set_result(side)

    async def _dial_beside(
        self, entry: CircuitEntry, endpoint: str, asked: Awaitable[Any]
    ) -> tuple[PeerSide, Any]:
        """Dial the peer while the question is asked; the number is said when all is well."""
        limits = self.context.limits
        entry.is_joined = True  # no connection of the peer may claim it
        dialling = asyncio.ensure_future(
            self.driver.dial(
                entry.peer, endpoint, lambda: PeerSide(limits), protocol=CIRCUIT_PROTOCOL
            )
        )
        answer: Any = None
        try:
            answer = await asked
            _, side = await dialling
            if not self.table.has(entry):
                raise RefusedError(f'the service "{entry.service}" is not exposed any more')
        except BaseException:
            await _abandon(dialling)
            if isinstance(answer, socket.socket):
                reset_socket(answer)
            raise
        assert isinstance(side, PeerSide)
        side.write(entry.number)
        return side, answer

    async def _start(
        self, entry: CircuitEntry, side: PeerSide, sock: socket.socket, key: str
    ) -> None:
        """From here on the circuit ends itself."""
        self.tally(key).circuits += 1
        splice = Splice(self.context.limits, side, partial(self._ended, entry, key))
        self._splices[entry] = splice
        if not self.table.has(entry):
            splice.reset("not allowed any more")
            reset_socket(sock)
            return
        try:
            await splice.start(sock)
        except OSError as error:
            splice.reset(f"the application: {error}")

    def _ended(self, entry: CircuitEntry, key: str, reason: str) -> None:
        splice = self._splices.pop(entry)
        self.table.close(entry)
        tally = self._tallies.get(key)
        if tally is None:
            return
        tally.bytes_sent += splice.circuit.bytes_sent
        tally.bytes_received += splice.circuit.bytes_received
        if reason:
            tally.reset += 1
            self._note(tally, f'circuit with "{entry.peer}" reset: {reason}')

    def failed(self, key: str, error: GeomirrorError) -> None:
        """A circuit did not come to be."""
        tally = self.tally(key)
        tally.refused += 1
        self._note(tally, str(error))

    def _note(self, tally: Tally, text: str) -> None:
        tally.last_error, tally.last_error_wall_ns = text, self.context.clock.wall_ns()

    def _entry(
        self, peer: str, service: str, place: str, *, is_forwarded: bool, number: bytes = b""
    ) -> CircuitEntry:
        return CircuitEntry(
            number=number or self.context.entropy.token_bytes(16),
            peer=peer,
            service=service,
            is_forwarded=is_forwarded,
            place=place,
            opened_ns=self.context.clock.now_ns(),
            incarnation=self.context.links.state(peer).incarnation,
        )

    # Watching.

    def reset(self, which: Callable[[CircuitEntry], bool], reason: str) -> None:
        """Reset circuits; those being opened do not come to be."""
        for entry in self.table.entries():
            if which(entry):
                self.table.close(entry)
                if entry in self._splices:
                    self._splices[entry].reset(reason)

    async def watch(self) -> None:
        """Reset circuits of links and applications that are gone, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            now_ns = self.context.clock.now_ns()
            for entry, splice in list(self._splices.items()):
                if reason := self._orphaned(entry, now_ns):
                    splice.reset(reason)
                else:
                    splice.look()

    def _orphaned(self, entry: CircuitEntry, now_ns: int) -> str:
        status = self.context.links.state(entry.peer)
        if status.is_established:
            return "" if status.incarnation == entry.incarnation else "the peer was restarted"
        down_ns = now_ns - status.since_ns
        if down_ns < self.context.limits.circuit_orphan_ns_max:
            return ""
        return f"the link is down for {down_ns // MS} ms: {status.last_error or 'not reached'}"

    async def stop(self) -> None:
        """Reset everything."""
        tasks = list(self._joining)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.reset(lambda entry: True, STOPPING)
        for sides in self._ungreeted.values():
            for side in list(sides):
                side.reset()
        # The loop closes the sockets in its next turn.
        await asyncio.sleep(0)

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)


async def _abandon(dialling: asyncio.Future[Any]) -> None:
    """End an attempt, or what came of it."""
    dialling.cancel()
    with contextlib.suppress(asyncio.CancelledError, GeomirrorError):
        _, side = await dialling
        side.reset()


def reset_socket(sock: socket.socket) -> None:
    """Close an application's connection that was not taken over."""
    arm_reset(sock)
    sock.close()
