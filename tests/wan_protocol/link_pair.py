"""Two link cores joined by a simulated network: TCP connections over a path that fails.

Modelled: delay, jitter and the stall of a lost packet per connection; cuts of one direction or
both, which hold bytes back until TCP's retry and lose resets; handshakes of several round trips;
nodes that do not run for a while; nodes that start anew. The shell (`peer_link_io`) is modelled as
far as it matters: what arrives on which connection, in which order.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from geomirror.environment import MS, SECOND, SeededEntropy
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol.link import LinkCore
from geomirror.wan_protocol.link_decisions import Close, Dial, Down, SendPing, SendUse, Up

ANSWER_STEP = 2
"""Of them the one that tells the dialling side that a host is there."""
HANDSHAKE_STEPS = 4
"""Messages of TCP, TLS and the byte that accepts, before the dialling side says hello."""
CONTROL = -1


@dataclass
class Wire:
    """One direction of a connection, towards the node `to`."""

    to: str
    count: int = 0
    arrival_ns: int = 0
    held: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """What has to be sent again, by its number."""

    @property
    def is_stalled(self) -> bool:
        return bool(self.held)


class Connection:
    """A TCP connection; each end is open or closed."""

    def __init__(self, link: bytes, index: int, dialler: str, acceptor: str, path: str) -> None:
        self.link, self.index, self.dialler, self.path = link, index, dialler, path
        self.open_at = {dialler, acceptor}
        self.greeted_at: set[str] = set()
        self.wires = {name: Wire(name) for name in (dialler, acceptor)}


class Network:
    """The path between a and b, and the clock."""

    def __init__(
        self,
        seed: int,
        *,
        delay_ns: int,
        dialling: str = "ab",
        paths: tuple[str, ...] = ("{peer}:1",),
    ) -> None:
        self.paths = paths
        """On which a node dials the other one, whose name is put in."""
        self.holes: set[str] = set()
        """Paths on which nothing arrives."""
        self.refusing: set[str] = set()
        """Paths on which nobody listens."""
        self.random = random.Random(seed)
        self.now_ns = 0
        self.delay_ns = delay_ns
        self.cut: set[str] = set()
        """Nodes that nothing reaches."""
        self.connections: list[Connection] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self.nodes = {name: Node(self, name, seed, name in dialling) for name in "ab"}
        self.mismatch_ns: dict[str, int] = {}
        self.mismatch_ns_max = 0
        for node in self.nodes.values():
            node.settle()

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_ns, self._count, action))

    def run(self, until_ns: int) -> None:
        while self._events and self._events[0][0] <= until_ns:
            self.now_ns, _, action = heapq.heappop(self._events)
            action()
        self.now_ns = until_ns
        self.compare()

    def cut_off(self, names: str, for_ns: int) -> None:
        """Nothing reaches these nodes for a while."""
        self.cut |= set(names)
        self.at(self.now_ns + for_ns, lambda: self.heal(names, for_ns))

    def heal(self, names: str, down_ns: int) -> None:
        self.cut -= set(names)
        self.connections = [item for item in self.connections if item.open_at]
        for connection in self.connections:
            for wire in connection.wires.values():
                if wire.to in names and wire.is_stalled:
                    # The retries of TCP double: the next is up to the length of the outage away.
                    pause_ns = int(self.random.uniform(0, max(200 * MS, down_ns)))
                    self.at(self.now_ns + pause_ns, lambda c=connection, w=wire: self._retry(c, w))

    def send(self, connection: Connection, to: str, payload: tuple[Any, ...]) -> None:
        wire = connection.wires[to]
        wire.count += 1
        self._transmit(connection, wire, wire.count, payload)

    def _transmit(
        self, connection: Connection, wire: Wire, number: int, payload: tuple[Any, ...]
    ) -> None:
        if wire.is_stalled or wire.to in self.cut or connection.path in self.holes:
            wire.held[number] = payload
            return
        delay_ns = self.delay_ns + int(self.random.uniform(0, self.delay_ns / 8))
        if self.random.random() < 0.005:
            delay_ns += 2 * self.delay_ns + 200 * MS
        wire.arrival_ns = max(wire.arrival_ns + 1, self.now_ns + delay_ns)
        self.at(wire.arrival_ns, lambda: self._arrive(connection, wire, number, payload))

    def _arrive(
        self, connection: Connection, wire: Wire, number: int, payload: tuple[Any, ...]
    ) -> None:
        if wire.is_stalled or wire.to in self.cut:
            wire.held[number] = payload
        else:
            self.nodes[wire.to].arrived(connection, payload)

    def _retry(self, connection: Connection, wire: Wire) -> None:
        if wire.to not in self.cut:
            held, wire.held = sorted(wire.held.items()), {}
            for number, payload in held:
                self._transmit(connection, wire, number, payload)

    def reset(self, connection: Connection, to: str) -> None:
        """A packet that TCP never repeats."""
        if to not in self.cut:
            self.at(self.now_ns + self.delay_ns, lambda: self.nodes[to].was_reset(connection))

    def compare(self) -> None:
        """How long one side has been up on a set on which the other side is not."""
        for name, other in (("a", "b"), ("b", "a")):
            up = self.nodes[name].up
            if up is not None and self.nodes[other].up != up:
                since_ns = self.mismatch_ns.setdefault(name, self.now_ns)
                self.mismatch_ns_max = max(self.mismatch_ns_max, self.now_ns - since_ns)
            elif name in self.mismatch_ns:
                since_ns = self.mismatch_ns.pop(name)
                self.mismatch_ns_max = max(self.mismatch_ns_max, self.now_ns - since_ns)


class Node:
    """A core and its part of the shell."""

    def __init__(self, network: Network, name: str, seed: int, is_dialling: bool) -> None:
        self.network, self.name = network, name
        self.peer = "b" if name == "a" else "a"
        self.up: bytes | None = None
        self.changes: list[Up | Down] = []
        self.changed_ns: list[int] = []
        """When; but for those that it was killed in."""
        self.used: set[bytes] = set()
        self._stalled_until_ns = 0
        self._waiting: list[Callable[[], None]] = []
        self.received = 0
        self._is_dialling = is_dialling
        self._lives = 0
        self._seed = seed
        self._sent: dict[bytes, int] = {}
        self._expected: dict[bytes, int] = {}
        self._control: dict[bytes, Connection] = {}
        self._hello_waits: dict[bytes, list[Connection]] = {}
        self._mine: list[Connection] = []
        self._start()

    def _start(self) -> None:
        self._lives += 1
        self.incarnation = f"{self.name}{self._lives}".encode().ljust(16)
        self._timer_ns: int | None = None
        self.core = LinkCore(
            node=self.name,
            peer=self.peer,
            limits=PRODUCTION,
            entropy=SeededEntropy(f"{self._seed} {self.name} {self._lives}"),
            endpoints=self.paths() if self._is_dialling else [],
            now_ns=self.network.now_ns,
        )

    def paths(self) -> list[str]:
        """On which it dials the other one."""
        return [path.format(peer=self.peer) for path in self.network.paths]

    def restart(self) -> None:
        """The process is killed and started again; the kernel closes its connections."""
        for connection in self._mine[:]:
            self._close(connection)
        if self.up is not None:
            self.changes.append(Down("killed"))
            self.up = None
        self._control.clear()
        self._hello_waits.clear()
        self._start()
        self.settle()

    def stall(self, for_ns: int) -> None:
        """It does not run for a while; what arrives waits."""
        self._stalled_until_ns = max(self._stalled_until_ns, self.network.now_ns + for_ns)
        self.network.at(self._stalled_until_ns, self._wake)

    def _wake(self) -> None:
        if self.network.now_ns >= self._stalled_until_ns:
            waiting, self._waiting = self._waiting, []
            for action in waiting:
                action()

    # What happens to it.

    def _later(self, action: Callable[[], None]) -> bool:
        if self.network.now_ns >= self._stalled_until_ns and not self._waiting:
            return False
        self._waiting.append(action)
        return True

    def arrived(self, connection: Connection, payload: tuple[Any, ...]) -> None:
        if self._later(lambda: self.arrived(connection, payload)):
            return
        if self.name not in connection.open_at:
            self.network.reset(connection, self.peer)
            return
        if payload[0] != "step" and connection not in self._mine:
            self._mine.append(connection)
        if self.name in connection.greeted_at:
            is_bulk = connection.index != CONTROL
            self.core.heard(connection.link, self.network.now_ns, is_bulk=is_bulk)
        getattr(self, "_on_" + payload[0])(connection, *payload[1:])
        self.settle()

    def was_reset(self, connection: Connection) -> None:
        if self._later(lambda: self.was_reset(connection)):
            return
        if self.name in connection.open_at:
            self._forget(connection)
            link, index, now_ns = connection.link, connection.index, self.network.now_ns
            if self.name not in connection.greeted_at:
                if connection.dialler == self.name:
                    self.core.dial_failed(link, index, "reset", now_ns)
            elif index == CONTROL:
                self._close_set(link)
                self.core.set_lost(link, "reset", now_ns)
            else:
                self.core.data_lost(link, index, "reset", now_ns)
            self.settle()

    def timer(self, due_ns: int) -> None:
        if due_ns == self._timer_ns and not self._later(lambda: self.timer(due_ns)):
            self._timer_ns = None
            self.core.handle_timer(self.network.now_ns)
            self.settle()

    # What arrives.

    def _send(self, connection: Connection, *payload: Any) -> None:
        self.network.send(connection, self.peer, payload)

    def _on_step(self, connection: Connection, step: int) -> None:
        link, is_control = connection.link, connection.index == CONTROL
        if step == ANSWER_STEP and is_control:
            self.core.dial_answered(link, self.network.now_ns)
        if step < HANDSHAKE_STEPS:
            self._send(connection, "step", step + 1)
        elif is_control or link in self._control:
            self._say_hello(connection)
        else:
            self._hello_waits.setdefault(link, []).append(connection)

    def _say_hello(self, connection: Connection) -> None:
        after, rank = self.core.given_up, self.core.rank(connection.link)
        self._send(connection, "hello", self.incarnation, after, rank)

    def _on_hello(
        self, connection: Connection, incarnation: bytes, after: bytes, rank: int
    ) -> None:
        link, index, now_ns = connection.link, connection.index, self.network.now_ns
        is_dialled = connection.dialler == self.name
        if not is_dialled:
            if index != CONTROL and link not in self._control:
                self._close(connection)
                return
            self._say_hello(connection)
        connection.greeted_at.add(self.name)
        if index == CONTROL:
            self._control[link] = connection
            for waiting in self._hello_waits.pop(link, []):
                self._say_hello(waiting)
            self.core.control_up(
                link,
                now_ns,
                is_dialled=is_dialled,
                incarnation=incarnation,
                after=after,
                rank=rank,
            )
        else:
            self.core.data_up(link, index, now_ns)

    def _on_ping(self, connection: Connection, sent_ns: int) -> None:
        self._send(connection, "pong", sent_ns)

    def _on_pong(self, connection: Connection, sent_ns: int) -> None:
        self.core.pong(connection.link, sent_ns, self.network.now_ns)

    def _on_use(self, connection: Connection, number: int) -> None:
        self.core.use_received(connection.link, number, self.network.now_ns)

    def _on_message(self, connection: Connection, number: int) -> None:
        # The invariant: this side is up on the very set, and nothing before it was dropped.
        assert self.up == connection.link
        assert number == self._expected.get(connection.link, 0)
        self._expected[connection.link] = number + 1
        self.received += 1

    # What it does.

    def send_message(self) -> None:
        """Something of a session, as soon as and as long as it is up."""
        if self.up in self._control:
            number = self._sent.get(self.up, 0)
            self._sent[self.up] = number + 1
            self._send(self._control[self.up], "message", number)

    def settle(self) -> None:
        while (decision := self.core.next_decision()) is not None:
            match decision:
                case Dial(link, path, index):
                    is_attempt = any(c.link == link for c in self._mine)
                    if index == CONTROL or is_attempt or link in self._control:
                        self._dial(Connection(link, index, self.name, self.peer, path))
                case Close(link):
                    self._close_set(link)
                case SendPing(link, now_ns) if link in self._control:
                    self._send(self._control[link], "ping", now_ns)
                case SendUse(link, number) if link in self._control:
                    self._send(self._control[link], "use", number)
                case Up(link) if link in self._control:
                    assert self.up is None
                    assert link not in self.used, "a set came back to life"
                    self.used.add(link)
                    self._change(decision, link)
                    self.send_message()
                case Down() if self.up is not None:
                    self._change(decision, None)
        due_ns = self.core.get_timer()
        if due_ns is not None and due_ns != self._timer_ns:
            self.network.at(max(due_ns, self.network.now_ns), lambda: self.timer(due_ns))
        self._timer_ns = due_ns

    def _dial(self, connection: Connection) -> None:
        network = self.network
        network.connections.append(connection)
        self._mine.append(connection)
        if connection.path in network.refusing:
            network.at(network.now_ns + 2 * network.delay_ns, lambda: self.was_reset(connection))
        else:
            self._send(connection, "step", 1)

    def _change(self, change: Up | Down, up: bytes | None) -> None:
        self.network.compare()
        self.up = up
        self.changes.append(change)
        self.changed_ns.append(self.network.now_ns)
        self.network.compare()

    def _close_set(self, link: bytes) -> None:
        self._control.pop(link, None)
        self._hello_waits.pop(link, None)
        for connection in [item for item in self._mine if item.link == link]:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._forget(connection)
        self.network.reset(connection, self.peer)

    def _forget(self, connection: Connection) -> None:
        connection.open_at.discard(self.name)
        if connection in self._mine:
            self._mine.remove(connection)

    @property
    def sets(self) -> int:
        """Sets that have not been closed."""
        return len(self._control)


def disturb(network: Network, until_ns: int) -> None:
    """Faults of every kind at random times, until a moment before `until_ns`."""
    chance = network.random
    while network.now_ns < until_ns:
        network.run(network.now_ns + int(chance.expovariate(1 / (2 * SECOND))))
        node = network.nodes[chance.choice("ab")]
        kind = chance.random()
        if kind < 0.65:
            network.cut_off(
                chance.choice(["a", "b", "ab", "ab"]), int(chance.uniform(0.1, 3.0) * SECOND)
            )
        elif kind < 0.80:
            node.stall(int(chance.uniform(0.1, 1.5) * SECOND))
        elif kind < 0.87:
            node.restart()
        elif network.connections:
            connection = chance.choice(network.connections)
            for name in "ab":
                network.nodes[name].was_reset(connection)
        for each in network.nodes.values():
            each.send_message()
