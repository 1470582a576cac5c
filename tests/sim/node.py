"""One simulated node: the real engine and core over a simulated disk; jobs take simulated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.superblock import GenerationRecord, PeerRecord
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
    decode_message,
    encode_message,
)
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from tests.sim.disk import SimStore
from tests.sim.network import Network
from tests.sim.oracle import Entry, Oracle
from tests.sim.world import MS, World


class MachineStoppedError(BaseException):
    """Power goes away in the middle of a disk operation."""


@dataclass
class Setup:
    """What all nodes of a simulation share."""

    world: World
    network: Network
    oracle: Oracle
    limits: Limits
    primary: str
    secondaries: list[str]
    volumes: dict[int, int]
    journal_bytes: int
    needs_first_sync: bool
    on_flush: Callable[[object, GeomirrorError | None], None]
    on_room: Callable[[], None]


class SimNode:
    """A machine with one resource; it can stop at any disk operation and come back."""

    def __init__(self, name: str, setup: Setup, seed: int) -> None:
        self.name = name
        self.setup = setup
        self.world = setup.world
        self.is_primary = name == setup.primary
        self.store = SimStore(f"{seed}/{name}")
        self.entropy = SeededEntropy(f"{seed}/{name}")
        self.is_alive = False
        self.is_damaged = False
        self.life = 0
        self.links: set[str] = set()
        self.fence_reason = ""
        self.engine: Engine
        self.core: Primary | Secondary
        self._timer_ns: int | None = None
        self._stop_at: int | None = None
        self._is_draining = False
        self.writing: list[Entry] = []
        self.sealed_seen = 0
        self.applied_seen = 0
        self.store.on_operation = self._on_operation

    # Life.

    def create(self) -> None:
        """Make the resource, as the node's service does."""
        setup = self.setup
        chain = []
        if self.is_primary:
            chain.append(GenerationRecord(self.entropy.token_bytes(16).hex(), 1, by=self.name))
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
            wall_ns=self.world.wall_offset_ns,
        )
        superblock = self.engine.superblock
        is_blank = setup.needs_first_sync and not self.is_primary
        superblock.data_state = "blank" if is_blank else CONSISTENT
        if self.is_primary:
            for peer in setup.secondaries:
                mode = "Bitmap" if setup.needs_first_sync else "Stream"
                record = PeerRecord(mode=mode, is_initial=setup.needs_first_sync)
                superblock.peers[peer] = record
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)
        self._begin()

    def open(self) -> None:
        """Come back after a crash. FencedError: the disk is damaged, and it was noticed."""
        self.engine = Engine.open(
            self.store, self.setup.limits, self.entropy, lambda volume: self.store.open("none")
        )
        self.on_recovered()
        self._begin()

    def on_recovered(self) -> None:
        """Storage is recovered, nothing runs yet; replaced by the runner."""
        raise NotImplementedError

    def _begin(self) -> None:
        world, setup = self.world, self.setup
        if self.is_primary:
            self.core = Primary(
                self.engine,
                setup.limits,
                incarnation=self.entropy.token_bytes(16),
                peers=setup.secondaries,
                now_ns=world.now_ns,
                wall_ns=world.now_ns + world.wall_offset_ns,
            )
            self._watch_cuts()
        else:
            self.core = Secondary(self.engine, setup.limits, primary=setup.primary)
            self.core.now_ns = world.now_ns
        self.is_alive = True
        self._timer_ns = None
        self.sealed_seen = self.engine.sealed_epoch
        self.applied_seen = -1
        self.call(lambda: self.core.handle_timer(world.now_ns))

    def _watch_cuts(self) -> None:
        engine, oracle = self.engine, self.setup.oracle
        real = engine.cut

        def cut(wall_ns: int, *, is_mark: bool = False) -> Any:
            draft = real(wall_ns, is_mark=is_mark)
            if draft is not None:
                oracle.cut(draft.number)
            return draft

        real_write = engine.write

        def write(writes: Any, wall_ns: int) -> int:
            # In doubt until the call returns: a crash inside it may keep any first part.
            before = len(oracle.log)
            for entry in self.writing:
                oracle.add(entry)
            try:
                return real_write(writes, wall_ns)
            except GeomirrorError:
                oracle.forget_last(len(oracle.log) - before)
                raise

        engine.cut = cut  # type: ignore[method-assign]
        engine.write = write  # type: ignore[method-assign]

    def crash(self, *, is_kill: bool) -> None:
        """The process dies, or the machine does; it is the caller's to bring it back."""
        self.world.note(f"{self.name}: {'killed' if is_kill else 'power cut'}")
        self.is_alive = False
        self.life += 1
        self.links.clear()
        self._stop_at = None
        hook, self.store.on_operation = self.store.on_operation, None
        self.store.faults.clear()
        self.store.crash(lose_nothing=is_kill)
        self.store.on_operation = hook

    def stop_at_operation(self, count: int) -> None:
        """Cut the power at the count-th disk operation from now."""
        self._stop_at = count

    def _on_operation(self, operation: str, name: str) -> None:
        if self._stop_at is not None:
            self._stop_at -= 1
            if self._stop_at <= 0:
                self._stop_at = None
                raise MachineStoppedError

    # The shell.

    def call(self, action: Callable[[], Any]) -> None:
        """Call into the core, then do what it decided."""
        if not self.is_alive:
            return
        try:
            action()
            self._drain()
        except MachineStoppedError:
            self.on_stopped()
        except RemoteProtocolError as error:
            # What the shell does: close the link.
            self.world.note(f"{self.name}: protocol error {error}")
            for peer in list(self.links):
                self.setup.network.down(self.name, peer)

    def on_stopped(self) -> None:
        """Power went away inside a disk operation; replaced by the runner."""
        raise NotImplementedError

    def _drain(self) -> None:
        if self._is_draining:
            return
        self._is_draining = True
        try:
            while self.is_alive and (decision := self.core.next_decision()) is not None:
                self._execute(decision)
        finally:
            self._is_draining = False
        self._observe()
        self._arm()

    def _execute(self, decision: object) -> None:
        setup = self.setup
        match decision:
            case SendMessage(peer, _, message):
                if isinstance(message, Acknowledge):
                    oracle = setup.oracle
                    oracle.reported_durable(self.name, message.durable_epoch, message.durable_hash)
                body = encode_message(message)
                setup.network.send(self.name, peer, body, len(body) + 32, is_frame=False)
            case SendFrame(peer, _, epoch, sequence, body, is_resync):
                frame = ("frame", epoch, sequence, is_resync, body)
                setup.network.send(self.name, peer, frame, len(body) + 32, is_frame=True)
            case FlushDone(token, error):
                setup.on_flush(token, error)
            case RunJob():
                self._run_job(decision)
            case RoomAvailable():
                setup.on_room()
            case Emit(kind, fields):
                self.world.note(f"{self.name}: {kind} {fields}")

    def _run_job(self, run: RunJob) -> None:
        world, life = self.world, self.life
        limit = 30 * MS if run.kind in ("sync", "checkpoint") else 8 * MS
        error: list[GeomirrorError | None] = [None]

        def execute() -> None:
            if self.life != life:
                return
            try:
                run.job.run()
            except GeomirrorError as failure:
                error[0] = failure
            except MachineStoppedError:
                self.on_stopped()

        def finish() -> None:
            if self.life == life:
                self.call(lambda: self.core.job_done(run, error[0], world.now_ns))

        start = world.now_ns + world.between(50_000, 2 * MS)
        world.at(start, execute)
        world.at(start + world.between(100_000, limit), finish)

    def _arm(self) -> None:
        at_ns = self.core.get_timer()
        if at_ns is None or (self._timer_ns is not None and self._timer_ns <= at_ns):
            return
        life = self.life
        # A timer that is due already fires with the delay of a busy loop.
        when_ns = max(at_ns, self.world.now_ns + MS)
        self._timer_ns = when_ns

        def fire() -> None:
            if self.life == life and self._timer_ns == when_ns:
                self._timer_ns = None
                self.call(lambda: self.core.handle_timer(self.world.now_ns))

        self.world.at(when_ns, fire)

    def receive(self, source: str, payload: Any) -> None:
        """Something arrived from a peer."""

        def action() -> None:
            now_ns = self.world.now_ns
            if isinstance(payload, bytes):
                self.core.receive(source, decode_message(payload), now_ns)
            elif isinstance(self.core, Secondary):
                _, epoch, sequence, is_resync, body = payload
                self.core.receive_frame(
                    source, epoch, sequence, body, is_resync=is_resync, now_ns=now_ns
                )
            self.refresh_room()

        self.call(action)

    def link_event(self, peer: str, is_up: bool) -> None:
        """A link came up or went down."""
        now_ns = self.world.now_ns
        self.world.note(f"{self.name}: link to {peer} {'up' if is_up else 'down'}")
        if is_up:
            self.links.add(peer)
            self.call(lambda: self.core.link_up(peer, now_ns))
        else:
            self.links.discard(peer)
            self.call(lambda: self.core.link_down(peer, now_ns))

    def refresh_room(self) -> None:
        """Tell a primary what its links' queues take."""
        if isinstance(self.core, Primary) and self.is_alive:
            for peer in sorted(self.links):
                room = self.setup.network.room(self.name, peer)
                self.core.link_room(peer, room, self.world.now_ns)

    def poke(self) -> None:
        """The shell's tick: queues may have drained."""
        self.call(self.refresh_room)

    # What the oracle sees.

    def _observe(self) -> None:
        if self.core.fenced is not None:
            if not self.fence_reason:
                self.fence_reason = str(self.core.fenced)
                self.world.note(f"{self.name}: fenced: {self.fence_reason}")
                self.on_fenced()
            return
        engine, oracle = self.engine, self.setup.oracle
        if self.is_primary:
            while self.sealed_seen < engine.sealed_epoch:
                self.sealed_seen += 1
                if self.sealed_seen in engine.epoch_numbers():
                    info = engine.epoch_info(self.sealed_seen)
                    oracle.sealed(self.sealed_seen, info.chain_hash)
                else:
                    oracle.sealed_epoch = max(oracle.sealed_epoch, self.sealed_seen)
            return
        is_settled = not self.core.is_running("apply") and not self.core.is_running("resync")
        if engine.applied_epoch != self.applied_seen and is_settled:
            self.applied_seen = engine.applied_epoch
            if engine.superblock.data_state == CONSISTENT:
                self.check_image()

    def on_fenced(self) -> None:
        """The core stopped itself; replaced by the runner."""
        raise NotImplementedError

    def check_image(self) -> None:
        """O1 for this secondary."""
        content = {i: image.read(0, image.size_bytes) for i, image in self.engine.images.items()}
        self.setup.oracle.applied(self.name, self.engine.applied_epoch, content)
