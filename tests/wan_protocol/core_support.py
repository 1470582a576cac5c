"""A stage for the replica cores: real engines over simulated disks, real cores, a clock by hand.

```
 write ─▶ Primary ─ RunJob ─▶ run at once, or held ─▶ job_done
                  ─ SendMessage, SendFrame ─▶ encode, decode ─▶ Secondary     (or parked, or lost)
```
Nothing happens by itself: `pass_time` moves the clock from timer to timer, `settle` executes what
the cores decided. Beside it runs a model that is too simple to be wrong: the content at each cut.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from geomirror.environment import MS, SeededEntropy
from geomirror.errors import GeomirrorError, JournalFullError, RemoteProtocolError
from geomirror.limits import KIB, SIMULATION, Limits
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.open_epoch import EpochDraft
from geomirror.volume.record import RecordType
from geomirror.volume.superblock import GenerationRecord, PeerRecord
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
from geomirror.wan_protocol.sender import Sender
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


class Stage:
    """A primary and secondaries; links are up from the start unless told otherwise.

    :param first_sync: secondaries are blank, as at the creation of a resource.
    """

    def __init__(
        self,
        *peers: str,
        limits: Limits = SIMULATION,
        journal_bytes: int = 2048 * KIB,
        peer_journal_bytes: int = 2048 * KIB,
        first_sync: bool = False,
        is_connected: bool = True,
        sizes: dict[int, int] | None = None,
    ) -> None:
        self.limits = limits
        self.sizes = SIZES if sizes is None else sizes
        self.journal_bytes = journal_bytes
        self.peer_journal_bytes = peer_journal_bytes
        self.first_sync = first_sync
        self.peers = list(peers) or [PEER]
        self.now_ns = 1_000_000 * MS
        self.content = {i: bytearray(size) for i, size in self.sizes.items()}
        self.at_epoch: dict[int, dict[int, bytes]] = {0: self._frozen()}
        self.links: set[str] = set()
        self.is_parked: Callable[[str, str, SendMessage | SendFrame], bool] = lambda s, t, d: False
        self.is_lost: Callable[[str, str, SendMessage | SendFrame], bool] = lambda s, t, d: False
        self.parked: list[Wire] = []
        self.errors: list[RemoteProtocolError] = []
        """What cores raised; the link was closed each time."""
        self._arriving: deque[Wire] = deque()
        self._lives = 0
        self.nodes: dict[str, Node] = {}
        for name in [PRIMARY, *self.peers]:
            self.nodes[name] = self._made(name)
        self.settle()
        if is_connected:
            for name in self.peers:
                self.link_up(name)

    # Parts by their names in a story.

    @property
    def primary(self) -> Primary:
        core = self.nodes[PRIMARY].core
        assert isinstance(core, Primary)
        return core

    @property
    def secondary(self) -> Secondary:
        return self.mirror(self.peers[0])

    def mirror(self, name: str) -> Secondary:
        core = self.nodes[name].core
        assert isinstance(core, Secondary)
        return core

    def sender(self, name: str = PEER) -> Sender:
        return self.primary.senders[name]

    @property
    def east(self) -> Node:
        return self.nodes[PRIMARY]

    @property
    def west(self) -> Node:
        return self.nodes[self.peers[0]]

    # Machines.

    def _made(self, name: str) -> Node:
        is_primary = name == PRIMARY
        store = SimStore(f"stage/{name}")
        engine = self.create_engine(store, name)
        superblock = engine.superblock
        if not is_primary:
            superblock.data_state = "blank" if self.first_sync else "consistent"
        elif not self.first_sync:
            for peer in self.peers:
                superblock.peers[peer] = PeerRecord()
        job = engine.checkpoint_job()
        if job is not None:
            job.run()
            engine.complete_checkpoint(job)
        return Node(name, store, engine, self._core(name, engine))

    def create_engine(
        self,
        store: SimStore,
        name: str,
        *,
        generation: bytes | None = None,
        sizes: dict[int, int] | None = None,
    ) -> Engine:
        chain: list[GenerationRecord] = []
        if name == PRIMARY or generation is not None:
            chain = [GenerationRecord((generation or GENERATION).hex(), 1, by=name)]
        return Engine.create(
            store,
            self.limits,
            SeededEntropy(f"stage/{name}"),
            name="orders",
            resource_id=RESOURCE,
            volumes=[VolumeSpec(i, str(i), size) for i, size in (sizes or self.sizes).items()],
            journal_bytes=self.journal_bytes if name == PRIMARY else self.peer_journal_bytes,
            role="primary" if name == PRIMARY else "secondary",
            chain=chain,
            wall_ns=WALL_NS,
        )

    def _core(self, name: str, engine: Engine) -> Primary | Secondary:
        self._lives += 1
        core: Primary | Secondary
        if name == PRIMARY:
            self._watch_cuts(engine)
            core = Primary(
                engine,
                self.limits,
                incarnation=self._lives.to_bytes(16, "little"),
                peers=self.peers,
                now_ns=self.now_ns,
                wall_ns=self.wall_ns,
            )
        else:
            core = Secondary(engine, self.limits, primary=PRIMARY)
        core.handle_timer(self.now_ns)
        return core

    def _watch_cuts(self, engine: Engine) -> None:
        real = engine.cut

        def cut(wall_ns: int, *, is_mark: bool = False) -> EpochDraft | None:
            draft = real(wall_ns, is_mark=is_mark)
            if draft is not None:
                self.at_epoch[draft.number] = self._frozen()
            return draft

        engine.cut = cut  # type: ignore[method-assign]

    def crash(self, name: str, *, is_kill: bool = False, style: CrashStyle | None = None) -> None:
        """The process dies (`is_kill`), or the machine does; links to it are gone."""
        node = self.nodes[name]
        for peer in self.peers if name == PRIMARY else [name]:
            self.link_down(peer)
        node.is_alive = False
        node.waiting.clear()
        node.held.clear()
        node.store.faults.clear()
        node.store.crash(lose_nothing=is_kill, style=style)

    def start(self, name: str, *, is_connected: bool = True) -> None:
        """Bring a crashed machine back, from whatever is in its store."""
        node = self.nodes[name]
        assert not node.is_alive
        entropy = SeededEntropy(f"stage/{name}/{self._lives}")
        node.engine = Engine.open(
            node.store, self.limits, entropy, lambda volume: node.store.open("none")
        )
        if name == PRIMARY:
            self._take_recovered(node.engine)
        node.core = self._core(name, node.engine)
        node.is_alive = True
        self.settle()
        if is_connected:
            for peer in self.peers if name == PRIMARY else [name]:
                self.link_up(peer)

    def restart(self, name: str, *, is_kill: bool = False) -> None:
        """Crash and come back at once; without `is_kill` everything unsynced is lost."""
        self.crash(name, is_kill=is_kill, style=LOSE_ALL)
        self.start(name)

    def _take_recovered(self, engine: Engine) -> None:
        """A crash of the primary may lose what was not flushed; never what is sealed."""
        for volume, size in self.sizes.items():
            self.content[volume][:] = engine.read(volume, 0, size)

    def snapshot(self, name: str) -> SimStore:
        """A copy of a machine's disk as it is now."""
        return copy.deepcopy(self.nodes[name].store)

    def restore(self, name: str, store: SimStore) -> None:
        """Put an older disk into the machine and start it."""
        self.crash(name, is_kill=True)
        self.nodes[name].store = copy.deepcopy(store)
        self.start(name)

    def replace(self, name: str, engine: Engine, store: SimStore) -> None:
        """Another installation answers under this name; its link is down."""
        self.link_down(name)
        node = self.nodes[name]
        self.nodes[name] = Node(name, store, engine, self._core(name, engine))
        assert node.name == name
        self.settle()

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
        return self.primary.has_decisions

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

    # The client.

    def write(self, offset: int, data: bytes, volume: int = 0) -> None:
        self.submit([write_of(offset, data, volume)])

    def write_blocks(self, first: int, count: int, seed: int, volume: int = 0) -> None:
        """`count` adjacent blocks of noise in one batch."""
        self.write(first * BLOCK, noise(seed, count * BLOCK), volume)

    def trim(self, offset: int, length: int, volume: int = 0) -> None:
        self.submit([trim_of(offset, length, volume)])

    def submit(self, writes: Sequence[tuple[int, int, int, int, bytes | None]]) -> None:
        """One batch, *completed* when this returns. Raises what the core raises."""
        # The model comes first: the core may cut an epoch before its `write` returns.
        before = {volume: bytes(self.content[volume]) for _, volume, *_ in writes}
        for _, volume, offset, length, data in writes:
            self.content[volume][offset : offset + length] = data or bytes(length)
        try:
            self.primary.write(writes, self.now_ns, self.wall_ns)
        except GeomirrorError:
            for volume, old in before.items():
                self.content[volume][:] = old
            raise
        self.settle()

    def seal(self) -> int:
        """Seal what is open, without waiting for its age; returns the sealed epoch."""
        self.primary.seal_now(self.now_ns)
        self.settle()
        return self.primary.engine.sealed_epoch

    def write_epochs(self, count: int, *, blocks: int = 4, seed: int = 0) -> int:
        """`count` epochs of some blocks each, sealed one after the other.

        Time passes only while the writer is held back.
        """
        for at in range(count):
            first = (seed + at * blocks) % (512 - blocks)
            for _ in range(100):
                try:
                    self.write_blocks(first, blocks, seed * 1000 + at)
                    break
                except JournalFullError:
                    self.pass_time(20)
            self.seal()
        return self.primary.engine.sealed_epoch

    # What must be true.

    def _frozen(self) -> dict[int, bytes]:
        return {volume: bytes(data) for volume, data in self.content.items()}

    def image(self, name: str = PEER) -> dict[int, bytes]:
        """What the backing devices of a secondary hold."""
        images = self.nodes[name].engine.images
        return {index: image.read(0, image.size_bytes) for index, image in images.items()}

    def check(self, name: str = PEER) -> int:
        """O1: the image is the primary's content at exactly the applied epoch; returns it."""
        engine = self.nodes[name].engine
        assert engine.superblock.data_state == "consistent"
        epoch = engine.applied_epoch
        expected = self.at_epoch[epoch]
        for volume, data in self.image(name).items():
            differing = different_blocks(data, expected[volume])
            assert not differing, f"{name} at epoch {epoch}: volume {volume}, {differing[:10]}"
        return epoch

    def check_in_sync(self, name: str = PEER) -> None:
        """Everything that was written is applied there, and both sides say so."""
        sender = self.sender(name)
        sealed = self.primary.engine.sealed_epoch
        assert self.primary.is_sealed
        assert self.at_epoch[sealed] == self._frozen()
        assert self.check(name) == sealed
        assert self.nodes[name].engine.sealed_hash == self.primary.engine.sealed_hash
        assert (sender.mode, sender.data_state) == ("Stream", "consistent")
        assert (sender.durable_epoch, sender.applied_epoch) == (sealed, sealed)


def different_blocks(left: bytes, right: bytes) -> list[int]:
    assert len(left) == len(right)
    starts = range(0, len(right), BLOCK)
    return [at // BLOCK for at in starts if left[at : at + BLOCK] != right[at : at + BLOCK]]
