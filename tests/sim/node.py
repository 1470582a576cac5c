"""One simulated node: the real engine and core over a simulated disk; jobs take simulated time.

It is the shell of the cores: what `node.replica_runner` does with threads and sockets, it does with
simulated delays. A life ends with a crash; `life` tells late events of earlier ones apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.open_epoch import EpochDraft
from geomirror.volume.superblock import DataState, GenerationRecord, PeerRecord
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.decisions import (
    Emit,
    FlushDone,
    RoomAvailable,
    RunJob,
    SendFrame,
    SendMessage,
)
from geomirror.wan_protocol.messages import (
    Acknowledge,
    AnnounceAcknowledge,
    EpochCommit,
    SessionAccept,
    VerifyAnswer,
    decode_message,
    encode_message,
)
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.resync_intake import CONSISTENT
from geomirror.wan_protocol.secondary import Secondary
from tests.sim.disk import SimStore
from tests.sim.network import Network
from tests.sim.oracle import Entry, Growth, Oracle
from tests.sim.placing import Placing
from tests.sim.promotable import CutCheck
from tests.sim.rewinds import Errand, open_quietly
from tests.sim.roles import Roles
from tests.sim.sync_check import SyncCheck
from tests.sim.verdict_check import VerdictCheck
from tests.sim.viewing import UndoMemory
from tests.sim.watch import Watch
from tests.sim.world import MS, SECOND, WALL_OFFSET_NS, World

SLOW_JOBS = frozenset(("sync", "checkpoint"))
SLOW_FACTOR = 40
STALL_CHANCE = 0.02
"""Of a job on a disk that is well."""
AILING_NS = 30 * SECOND
"""A disk that was slow or full may take so long to catch up."""
OLDER_CHANCE = 0.15
"""Of a machine with the previous version."""
WRITABLE_FRACTION = 2
"""The link asks for more when its queue is half empty, after it was fuller."""


class MachineStoppedError(BaseException):
    """Power goes away in the middle of a disk operation."""


@dataclass
class Setup:
    """What all nodes of a simulation share; the callbacks are the runner's."""

    world: World
    network: Network
    limits: Limits
    primary: str
    secondaries: list[str]
    volumes: dict[int, int]
    journal_bytes: int
    needs_first_sync: bool
    clock_rates: dict[str, float]
    sync: SyncCheck
    verdicts: VerdictCheck
    cuts: CutCheck
    placing: Placing
    is_succession: bool
    """The primary may change: everybody is linked with everybody."""
    on_flush: Callable[[object, GeomirrorError | None], None]
    on_room: Callable[[SimNode], None]
    on_primary: Callable[[SimNode], None]
    """It serves as a primary from now on."""
    on_stopped: Callable[[SimNode], None]
    on_recovered: Callable[[SimNode], None]
    on_fenced: Callable[[SimNode], None]
    on_outranked: Callable[[SimNode], None]
    """It has a tail that a history with a higher claim lacks."""
    on_followed: Callable[[SimNode], None]
    """A superseded primary is a secondary now."""
    on_not_followed: Callable[[SimNode, GeomirrorError], None]
    """It could not give up its tail."""
    on_reopen: Callable[[SimNode], None]
    """A change of the role failed: the daemon opens the resource again."""
    on_promise: Callable[[SimNode], None]
    """Something was said to be durable: a good moment for the power to go away."""
    on_step: Callable[[SimNode], None]
    """A job of a change of its role runs next."""
    on_resync: Callable[[SimNode], None]
    """A copy writes what a resync brought."""
    on_verify_answer: Callable[[str, str, VerifyAnswer], None]
    on_accepted: Callable[[SimNode, str, SessionAccept], None]
    """A primary has taken in where a copy stands."""
    node: Callable[[str], SimNode]
    """A machine by its name."""


class SimNode:
    """A machine with one resource; it can stop at any disk operation and come back."""

    def __init__(self, name: str, setup: Setup, seed: int) -> None:
        self.name = name
        self.setup = setup
        self.world = setup.world
        self.role = "primary" if name == setup.primary else "secondary"
        self.store = SimStore(f"{seed}/{name}")
        self.entropy = SeededEntropy(f"{seed}/{name}")
        self.watch = Watch(self)
        self.roles = Roles(self)
        self.undo_memory = UndoMemory()
        self.errand: Errand | None = None
        """What is done with the resource when it is opened next, before it is served."""
        self.readings = 0
        """Reads of a client that are under way."""
        self.is_alive = False
        self.is_damaged = False
        self.is_slow = False
        self.is_older = random.Random(f"{seed}/{name}/version").random() < OLDER_CHANCE
        """Its version says no digests in a resync."""
        self.ailing_until_ns = 0
        self.wall_shift_ns = 0
        self.life = 0
        self.links: set[str] = set()
        self.engine: Engine
        self.core: Primary | Secondary
        self._clock_rate = setup.clock_rates[name]
        self._timer_ns: int | None = None
        self._stop_at = 0
        self._is_draining = False

    @property
    def is_primary(self) -> bool:
        """By its superblock, in this life or the last one."""
        return self.role == "primary"

    @property
    def oracle(self) -> Oracle:
        """The history that it is on."""
        return self.setup.placing.line_at(self)

    @property
    def is_copying(self) -> bool:
        """Its image is none by itself: what it has counts for no promise."""
        return self.engine.superblock.data_state != CONSISTENT

    @property
    def others(self) -> list[str]:
        """All other members."""
        return [n for n in (self.setup.primary, *self.setup.secondaries) if n != self.name]

    # Clocks: each node has its own, none of them right.

    def now_ns(self) -> int:
        """Monotonic time of this node."""
        return int(self.world.now_ns * self._clock_rate)

    def wall_ns(self) -> int:
        """Wall clock of this node; it may step either way."""
        return WALL_OFFSET_NS + self.world.now_ns + self.wall_shift_ns

    # Life.

    def create(self) -> None:
        """Make the resource, as the node's service does."""
        is_blank = self.setup.needs_first_sync and not self.is_primary
        self._create("blank" if is_blank else CONSISTENT)

    def _create(self, data_state: DataState) -> None:
        setup = self.setup
        chain = []
        if self.is_primary:
            first = GenerationRecord(self.entropy.token_bytes(16).hex(), 1, by=self.name)
            setup.placing.begin(first)
            chain.append(first)
        self.engine = Engine.create(
            self.store,
            setup.limits,
            self.entropy,
            name="sim",
            resource_id=b"simulated-volume",
            volumes=[VolumeSpec(i, str(i), size) for i, size in setup.volumes.items()],
            journal_bytes=setup.journal_bytes,
            role="primary" if self.is_primary else "secondary",
            chain=chain,
            wall_ns=self.wall_ns(),
        )
        superblock = self.engine.superblock
        superblock.data_state = data_state
        if self.is_primary:
            for peer in setup.secondaries:
                mode = "Bitmap" if setup.needs_first_sync else "Stream"
                record = PeerRecord(mode=mode, is_initial=setup.needs_first_sync)
                superblock.peers[peer] = record
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)
        self.roles.begin(superblock.role)
        self._begin()

    def make_anew(self) -> None:
        """Begin again with a blank disk, as a secondary."""
        self.role = "secondary"
        self.store = SimStore(f"{self.name}/{self.world.random.random()}")
        self._create(data_state="blank")

    def open(self) -> None:
        """Come back after a crash. FencedError: the disk is damaged, and it was noticed."""
        self.engine = Engine.open(
            self.store, self.setup.limits, self.entropy, lambda volume: self.store.open("none")
        )
        self.setup.on_recovered(self)
        open_quietly(self)
        self.roles.begin(self.engine.superblock.role)
        self._begin()

    def _begin(self) -> None:
        setup = self.setup
        self.role = self.engine.superblock.role
        for wrapped in ("cut", "write", "grow", "roll_back"):
            self.engine.__dict__.pop(wrapped, None)
        if self.is_primary:
            self.core = Primary(
                self.engine,
                setup.limits,
                incarnation=self.entropy.token_bytes(16),
                peers=self.others,
                now_ns=self.now_ns(),
                wall_ns=self.wall_ns(),
            )
            self.watch_writes()
            self.core.set_policy(setup.sync.policy_at(self.name), self.now_ns())
        else:
            chain = self.engine.superblock.chain
            primary = chain[-1].by if chain and chain[-1].by != self.name else setup.primary
            members = self.others if setup.is_succession else []
            self.core = Secondary(self.engine, setup.limits, primary=primary, members=members)
            self.core.now_ns = self.now_ns()
        self.is_alive = True
        self._timer_ns = None
        if self.is_primary:
            setup.on_primary(self)
        self.watch.begin()
        self.call(self._handle_timer)

    def serve(self) -> None:
        """Go on over the same engine, in the role that its superblock has."""
        self.life += 1
        life = self.life
        self.run_blocking(self._begin)
        if self.life != life:
            return
        for peer in sorted(self.links):
            self.call(partial(self.core.link_up, peer, self.now_ns()))

    def watch_writes(self) -> None:
        """From now on the history that the node is on hears of all that is written."""
        engine = self.engine
        real_cut, real_write, real_grow = engine.cut, engine.write, engine.grow
        core, is_healing = self.core, False
        assert isinstance(core, Primary)
        real_heal = core._heal_write

        def heal_write(*what: Any) -> None:
            nonlocal is_healing
            is_healing = True
            try:
                real_heal(*what)
            finally:
                is_healing = False

        core._heal_write = heal_write  # type: ignore[method-assign]

        def cut(wall_ns: int, *, is_mark: bool = False) -> EpochDraft | None:
            draft = real_cut(wall_ns, is_mark=is_mark)
            if draft is not None:
                self.oracle.cut(draft.number)
            return draft

        def write(writes: Any, wall_ns: int) -> int:
            # In doubt until the call returns: a crash inside it may keep any first part.
            last = engine.superblock.chain[-1]
            self.setup.placing.check_claim(self, (last.token, last.identity), "takes a write by")
            oracle = self.oracle
            before = len(oracle.log)
            if is_healing:
                oracle.check_healing(self.name, writes)
            for _, volume, offset, length, data in writes:
                oracle.add(Entry(volume, offset, length, data))
            try:
                return real_write(writes, wall_ns)
            except GeomirrorError:
                oracle.forget_last(len(oracle.log) - before)
                raise

        def grow(change: VolumeChange, wall_ns: int) -> int:
            oracle = self.oracle
            oracle.add(Growth(change.index, change.old_size_bytes, change.size_bytes))
            try:
                return real_grow(change, wall_ns)
            except GeomirrorError:
                oracle.forget_last(1)
                raise

        engine.grow = grow  # type: ignore[method-assign]
        engine.cut = cut  # type: ignore[method-assign]
        engine.write = write  # type: ignore[method-assign]

    def crash(self, *, is_kill: bool) -> None:
        """The process dies, or the machine does; it is the caller's to bring it back."""
        self.world.note(f"{self.name}: {'killed' if is_kill else 'power cut'}")
        self.is_alive = False
        self.life += 1
        self.undo_memory = UndoMemory()
        self.errand = None
        self.readings = 0
        self.links.clear()
        self.stop_at_operation(0)
        self.store.faults.clear()
        self.store.crash(lose_nothing=is_kill)

    def stop_at_operation(self, count: int) -> None:
        """Cut the power at the count-th disk operation from now; 0: do not."""
        self._stop_at = count
        self.store.on_operation = self._on_operation if count else None

    def _on_operation(self, operation: str, name: str) -> None:
        self._stop_at -= 1
        if self._stop_at <= 0:
            self.stop_at_operation(0)
            self.world.note(f"{self.name}: stops in {operation} {name}")
            raise MachineStoppedError

    @property
    def is_ailing(self) -> bool:
        """The disk is, or was a moment ago, slow or full: writers may have to wait for it."""
        is_bad_now = self.is_slow or self.store.is_limited
        return is_bad_now or self.world.now_ns < self.ailing_until_ns

    def recover_disk(self) -> None:
        """The disk is fast and has room again."""
        self.is_slow = False
        self.store.capacity_bytes = 1 << 62
        self.ailing_until_ns = self.world.now_ns + AILING_NS

    # The shell.

    def call(self, action: Callable[[], Any]) -> None:
        """Call into the core, then do what it decided."""
        if not self.is_alive:
            return
        try:
            action()
            self._drain()
        except MachineStoppedError:
            self.setup.on_stopped(self)
        except RemoteProtocolError as error:
            # What the shell does: close the link.
            self.world.note(f"{self.name}: protocol error {error}")
            for peer in sorted(self.links):
                self.setup.network.down(self.name, peer)

    def _drain(self) -> None:
        if self._is_draining:
            return
        self._is_draining = True
        core = self.core
        try:
            while self.is_alive and core.decisions:
                while self.is_alive and (decision := core.next_decision()) is not None:
                    self._execute(decision)
                if isinstance(core, Primary):
                    self._tell_new_sessions(core)
        finally:
            self._is_draining = False
        self.watch.observe()
        self.roles.look()
        self._arm()

    def _tell_new_sessions(self, core: Primary) -> None:
        """A session that was just accepted does not know the link's room yet."""
        for peer in sorted(self.links):
            sender = core.senders[peer]
            if sender.is_open and sender.room_bytes == 0:
                room = self.setup.network.room(self.name, peer)
                if room:
                    core.link_room(peer, room, self.now_ns())

    def _execute(self, decision: object) -> None:
        setup = self.setup
        match decision:
            case SendMessage(peer, _, message):
                if isinstance(message, Acknowledge):
                    self._reported(message)
                elif isinstance(message, SessionAccept):
                    setup.placing.acted(self, self.engine.superblock.chain)
                if isinstance(message, (Acknowledge, AnnounceAcknowledge, EpochCommit)):
                    setup.on_promise(self)
                setup.sync.report(self.oracle, self.name, message)
                setup.verdicts.report(message)
                if isinstance(message, SessionAccept) and self.is_older:
                    message = msgspec.structs.replace(message, gives_digests=False)
                if isinstance(message, VerifyAnswer):
                    setup.on_verify_answer(self.name, peer, message)
                body = encode_message(message)
                setup.network.send(self.name, peer, body, len(body) + 32, is_frame=False)
            case SendFrame(peer, _, epoch, sequence, body, is_resync):
                frame = ("frame", epoch, sequence, is_resync, body)
                setup.network.send(self.name, peer, frame, len(body) + 32, is_frame=True)
            case FlushDone(token, error):
                setup.on_flush(token, error)
                setup.on_promise(self)
            case RunJob():
                self._run_job(decision)
                if decision.kind == "resync":
                    setup.on_resync(self)
            case RoomAvailable():
                setup.on_room(self)
            case Emit(kind, fields):
                if kind == "sync_restored":
                    setup.sync.restored(self.oracle, str(fields["peer"]))
                self.world.note(f"{self.name}: {kind} {fields}")

    def _reported(self, message: Acknowledge) -> None:
        oracle = self.oracle
        before = self.setup.placing.mirror(self).durable_epoch
        oracle.reported_durable(self.name, message.durable_epoch, message.durable_hash)
        engine = self.engine
        has_all = 0 <= engine._written.consistent_from <= engine.sealed_epoch
        if self.setup.is_succession and self.is_copying and not has_all:
            # A promotion may go back to the state from before the resync.
            self.setup.placing.mirror(self).durable_epoch = before

    def _run_job(self, run: RunJob) -> None:
        life = self.life
        at_ns, end_ns = self.job_times(run.kind)
        # What it does happens at one instant, early or late; its end is noticed after that.
        self.world.at(at_ns, partial(self._run, run, life, end_ns))

    def job_times(self, kind: str) -> tuple[int, int]:
        """When a job that begins now does what it does, and when its end is noticed."""
        world = self.world
        limit = 30 * MS if kind in SLOW_JOBS else 8 * MS
        factor = SLOW_FACTOR if self.is_slow or world.random.random() < STALL_CHANCE else 1
        first, second = world.between(50_000, 2 * MS), world.between(100_000, limit) * factor
        if world.random.random() < 0.5:
            first, second = second, first
        return world.now_ns + first, world.now_ns + first + second

    def _run(self, run: RunJob, life: int, end_ns: int) -> None:
        if self.life != life:
            return
        error = self.run_blocking(run.job.run)
        if self.life == life:
            self.world.at(end_ns, partial(self._finish, run, life, error))

    def run_blocking(self, work: Callable[[], None]) -> GeomirrorError | None:
        """Do what may use the disk; what it raised. The machine may stop in it."""
        if not self.is_primary:
            self.setup.cuts.watch(self)
        try:
            work()
        except GeomirrorError as error:
            return error
        except MachineStoppedError:
            self.setup.on_stopped(self)
        return None

    def _finish(self, run: RunJob, life: int, error: GeomirrorError | None) -> None:
        if self.life == life:
            self.call(lambda: self.core.job_done(run, error, self.now_ns()))

    def _arm(self) -> None:
        if not self.is_alive:
            return
        at_ns = self.core.get_timer()
        if at_ns is None:
            return
        # A timer that is due already fires with the delay of a busy loop.
        when_ns = max(int(at_ns / self._clock_rate) + 1000, self.world.now_ns + MS)
        if self._timer_ns is not None and self._timer_ns <= when_ns:
            return
        self._timer_ns = when_ns
        self.world.at(when_ns, partial(self._fire, self.life, when_ns))

    def _fire(self, life: int, when_ns: int) -> None:
        if self.life == life and self._timer_ns == when_ns:
            self._timer_ns = None
            self.call(self._handle_timer)

    def _handle_timer(self) -> None:
        self.core.handle_timer(self.now_ns())

    def receive(self, source: str, payload: Any) -> None:
        """Something arrived from a peer."""
        self.call(partial(self._receive, source, payload))

    def _receive(self, source: str, payload: Any) -> None:
        now_ns, core = self.now_ns(), self.core
        if isinstance(payload, bytes):
            message = decode_message(payload)
            core.receive(source, message, now_ns)
            if isinstance(message, SessionAccept):
                self.setup.on_accepted(self, source, message)
        elif isinstance(core, Secondary):
            _, epoch, sequence, is_resync, body = payload
            core.receive_frame(source, epoch, sequence, body, is_resync=is_resync, now_ns=now_ns)

    def writable(self, peer: str) -> None:
        """The link's queue has drained."""
        if isinstance(self.core, Primary) and peer in self.links:
            self.call(partial(self._writable, peer, self.core))

    def _writable(self, peer: str, core: Primary) -> None:
        core.link_room(peer, self.setup.network.room(self.name, peer), self.now_ns())

    def link_event(self, peer: str, is_up: bool) -> None:
        """A link came up or went down."""
        self.world.note(f"{self.name}: link to {peer} {'up' if is_up else 'down'}")
        if is_up:
            self.links.add(peer)
            self.call(lambda: self.core.link_up(peer, self.now_ns()))
        else:
            self.links.discard(peer)
            self.call(lambda: self.core.link_down(peer, self.now_ns()))
