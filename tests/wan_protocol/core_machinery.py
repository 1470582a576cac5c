"""What moves the replica cores on a stage: packets on links, the clock, jobs.

Nothing happens by itself: `pass_time` moves the clock from timer to timer, `settle` executes what
the cores decided.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from geomirror.environment import MS
from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import KIB
from geomirror.volume.engine import Engine
from geomirror.volume.record import RecordType
from geomirror.wan_protocol.decisions import (
    Decision,
    Emit,
    FlushDone,
    RoomAvailable,
    RunJob,
    SendFrame,
    SendMessage,
)
from geomirror.wan_protocol.messages import Message, decode_message, encode_message
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary
from tests.sim.disk import CrashStyle, SimStore

BLOCK = 4096
SIZES = {0: 512 * BLOCK + 1536, 1: 20 * BLOCK}
PRIMARY = "east"
PEER = "west"
RESOURCE = b"sixteen bytes id"
GENERATION = bytes(range(1, 17))
WALL_NS = 1_700_000_000_000_000_000
QUEUE_BYTES = 1024 * KIB
LOSE_ALL = CrashStyle(0.0)
STEPS_MAX = 20_000
"""Timers or decisions in one call: more means that a core spins."""

M = TypeVar("M", bound=Message)
Wire = tuple[str, str, SendMessage | SendFrame]
"""(source, target, what)."""


def noise(seed: int, length: int = BLOCK) -> bytes:
    """Repeatable bytes that no compression makes smaller."""
    return random.Random(seed).randbytes(length)


def write_of(offset: int, data: bytes, volume: int = 0) -> tuple[int, int, int, int, bytes | None]:
    return int(RecordType.WRITE), volume, offset, len(data), data


def trim_of(offset: int, length: int, volume: int = 0) -> tuple[int, int, int, int, bytes | None]:
    return int(RecordType.TRIM), volume, offset, length, None


@dataclass
class Node:
    """One machine: its disk, its core, and everything the core decided."""

    name: str
    store: SimStore
    engine: Engine
    core: Primary | Secondary
    held: set[str] = field(default_factory=set)
    """Patterns of job kinds that wait for `Stage.run_held`."""
    waiting: list[RunJob] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    frames: list[SendFrame] = field(default_factory=list)
    flushes: list[tuple[object, GeomirrorError | None]] = field(default_factory=list)
    rooms: int = 0
    is_alive: bool = True

    def event_kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def sent(self, kind: type[M]) -> list[M]:
        return [message for message in self.messages if isinstance(message, kind)]


class Machinery:
    """Machines by name, the links between the primary and each of the others, one clock."""

    def __init__(self, peers: list[str]) -> None:
        self.peers = peers
        self.nodes: dict[str, Node] = {}
        self.now_ns = 1_000_000 * MS
        self.links: set[str] = set()
        self.is_parked: Callable[[str, str, SendMessage | SendFrame], bool] = lambda s, t, d: False
        self.is_lost: Callable[[str, str, SendMessage | SendFrame], bool] = lambda s, t, d: False
        self.parked: list[Wire] = []
        self.errors: list[RemoteProtocolError] = []
        """What cores raised; the link was closed each time."""
        self._arriving: deque[Wire] = deque()

    @property
    def east(self) -> Node:
        return self.nodes[PRIMARY]

    @property
    def primary(self) -> Primary:
        core = self.east.core
        assert isinstance(core, Primary)
        return core

    # Links.

    def link_up(self, name: str = PEER) -> None:
        if name in self.links or not (self.east.is_alive and self.nodes[name].is_alive):
            return
        self.links.add(name)
        self.nodes[name].core.link_up(PRIMARY, self.now_ns)
        self.primary.link_up(name, self.now_ns)
        self.settle()

    def link_down(self, name: str = PEER) -> None:
        """Everything under way is lost."""
        if name not in self.links:
            return
        self.links.discard(name)
        self.parked = [wire for wire in self.parked if name not in wire[:2]]
        self._arriving = deque(wire for wire in self._arriving if name not in wire[:2])
        self.primary.link_down(name, self.now_ns)
        self.nodes[name].core.link_down(PRIMARY, self.now_ns)
        self.settle()

    def reconnect(self, name: str = PEER) -> None:
        self.link_down(name)
        self.link_up(name)

    def park_frames(self, *peers: str) -> None:
        """From now on frames to these peers (or all) stay in the link's queue."""
        self.is_parked = lambda _, target, what: (
            isinstance(what, SendFrame) and target in (peers or self.peers)
        )

    def unpark(self, count: int | None = None, *, name: str | None = None) -> int:
        """Let parked packets arrive; with no count all of them, and no more are parked."""
        mine = [wire for wire in self.parked if name in (None, wire[1])]
        chosen = mine if count is None else mine[:count]
        if count is None:
            self.is_parked = lambda source, target, what: False
        self.parked = [wire for wire in self.parked if not any(wire is each for each in chosen)]
        self._arriving.extend(chosen)
        self.settle()
        return len(chosen)

    def park_all(self) -> None:
        """From now on everything from the primary waits, commits too."""
        self.is_parked = lambda source, target, what: source == PRIMARY

    def deliver(self, wires: Sequence[Wire]) -> None:
        """Let these parked packets (or copies of them) arrive now, in this order."""
        self.parked = [wire for wire in self.parked if not any(wire is each for each in wires)]
        self._arriving.extend(wires)
        self.settle()

    def parked_frames(self) -> list[Wire]:
        return [wire for wire in self.parked if isinstance(wire[2], SendFrame)]

    def parked_commits(self) -> list[Wire]:
        return [wire for wire in self.parked if isinstance(wire[2], SendMessage)]

    def parked_bytes(self, name: str = PEER) -> int:
        """Frame bytes in the link's queue: in flight as the sender sees it."""
        return sum(
            len(what.body)
            for _, target, what in self.parked
            if target == name and isinstance(what, SendFrame)
        )

    def _send(self, source: str, what: SendMessage | SendFrame) -> None:
        wire = (source, what.peer, what)
        peer = what.peer if source == PRIMARY else source
        if peer not in self.links or self.is_lost(*wire):
            return
        if self.is_parked(*wire):
            self.parked.append(wire)
        else:
            self._arriving.append(wire)

    def _arrive(self, source: str, target: str, what: SendMessage | SendFrame) -> None:
        core = self.nodes[target].core
        try:
            if isinstance(what, SendMessage):
                core.receive(source, decode_message(encode_message(what.message)), self.now_ns)
            else:
                assert isinstance(core, Secondary)
                core.receive_frame(
                    source,
                    what.epoch,
                    what.sequence,
                    what.body,
                    is_resync=what.is_resync,
                    now_ns=self.now_ns,
                )
        except RemoteProtocolError as error:
            self.errors.append(error)
            self.link_down(source if target == PRIMARY else target)

    # Time.

    @property
    def wall_ns(self) -> int:
        return WALL_NS + self.now_ns

    def pass_time(self, ms: float) -> None:
        """Move the clock from timer to timer."""
        end_ns = self.now_ns + int(ms * MS)
        self.settle()
        overdue = 0
        for _ in range(STEPS_MAX):
            alive = [node.core for node in self.nodes.values() if node.is_alive]
            due = min((t for core in alive if (t := core.get_timer()) is not None), default=end_ns)
            # A timer that is due already fires with the delay of a busy loop.
            self.now_ns = min(end_ns, max(due, self.now_ns + MS))
            for core in alive:
                # Only when it asked for it: a wake-up that a core forgot to ask for never comes.
                at_ns = core.get_timer()
                if at_ns is not None and at_ns <= self.now_ns:
                    core.handle_timer(self.now_ns)
            self.settle()
            times = [core.get_timer() for core in alive]
            overdue = overdue + 1 if any(t is not None and t <= self.now_ns for t in times) else 0
            assert overdue < 5, "a timer that is never satisfied"
            if self.now_ns >= end_ns:
                return
        raise AssertionError("the cores' timers spin")

    def settle(self) -> None:
        """Execute decisions and deliver packets until nothing is left to do now."""
        for _ in range(STEPS_MAX):
            if not (self._drain() or self._deliver() or self._refresh_room()):
                return
        raise AssertionError("the cores spin")

    def _drain(self) -> bool:
        is_busy = False
        for node in self.nodes.values():
            while node.is_alive and (decision := node.core.next_decision()) is not None:
                is_busy = True
                self._execute(node, decision)
        return is_busy

    def _deliver(self) -> bool:
        if not self._arriving:
            return False
        source, target, what = self._arriving.popleft()
        if target in self.nodes and self.nodes[target].is_alive:
            self._arrive(source, target, what)
        return True

    def _refresh_room(self) -> bool:
        for name in sorted(self.links):
            room = max(0, QUEUE_BYTES - self.parked_bytes(name))
            self.primary.link_room(name, room, self.now_ns)
        return bool(self.primary.decisions)

    def _execute(self, node: Node, decision: Decision) -> None:
        match decision:
            case RunJob():
                node.jobs.append(decision.kind)
                if any(fnmatchcase(decision.kind, pattern) for pattern in node.held):
                    node.waiting.append(decision)
                else:
                    self._run(node, decision)
            case SendMessage():
                node.messages.append(decision.message)
                self._send(node.name, decision)
            case SendFrame():
                node.frames.append(decision)
                self._send(node.name, decision)
            case FlushDone(token, error):
                node.flushes.append((token, error))
            case RoomAvailable():
                node.rooms += 1
            case Emit(kind, fields):
                node.events.append((kind, fields))

    # Jobs.

    def _run(self, node: Node, run: RunJob) -> None:
        error: GeomirrorError | None = None
        try:
            run.job.run()
        except GeomirrorError as failure:
            error = failure
        node.core.job_done(run, error, self.now_ns)

    def hold(self, name: str, *patterns: str) -> None:
        """Jobs of these kinds are slow from now on."""
        self.nodes[name].held.update(patterns)

    def run_held(self, name: str, pattern: str = "*", *, is_done: bool = True) -> int:
        """Run the waiting jobs of a kind; with `is_done` False the core does not hear of it yet."""
        node = self.nodes[name]
        chosen = [run for run in node.waiting if fnmatchcase(run.kind, pattern)]
        for run in chosen:
            if is_done:
                node.waiting.remove(run)
                self._run(node, run)
            else:
                run.job.run()
        self.settle()
        return len(chosen)

    def release(self, name: str, pattern: str = "*") -> None:
        """Jobs of this kind are fast again."""
        node = self.nodes[name]
        node.held = {each for each in node.held if not fnmatchcase(each, pattern)}
        while self.run_held(name, pattern):
            pass
