"""One seed: a primary and two secondaries, a client, and everything that can go wrong."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from geomirror.errors import FencedError, GeomirrorError, IntegrityError, JournalFullError, StorageError
from geomirror.limits import KIB, SIMULATION
from geomirror.volume.record import RecordType
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import CONSISTENT
from tests.sim.network import Network
from tests.sim.node import MachineStoppedError, Setup, SimNode
from tests.sim.oracle import Entry, Mirror, Oracle, OracleError
from tests.sim.world import MS, SECOND, World

PRIMARY, SECONDARIES = "east", ["colo", "west"]
NAMES = [PRIMARY, *SECONDARIES]
HEAL_NS = 90 * SECOND
"""Bound of O7: lag is zero again so long after the last fault."""


@dataclass(frozen=True)
class Options:
    """What may happen in a run; drawn from the seed."""

    seconds: int
    delay_ns: int
    jitter_ns: int
    bytes_per_second: int
    crash_mean_ns: int
    cut_mean_ns: int
    break_mean_ns: int
    flip_chance: float
    disk_fault_mean_ns: int
    bit_flips: bool
    first_sync: bool
    journal_bytes: int
    burst: int

    @classmethod
    def draw(cls, chance: random.Random, seconds: int) -> Options:
        """Swarm: every run has its own mixture; some faults are absent in many."""

        def mean(low_s: float, high_s: float) -> int:
            if chance.random() < 0.3:
                return 10_000 * SECOND
            return int(chance.uniform(low_s, high_s) * SECOND)

        return cls(
            seconds=seconds,
            delay_ns=int(chance.uniform(1, 150) * MS),
            jitter_ns=int(chance.choice([0, 2, 40]) * MS),
            bytes_per_second=chance.choice([60_000, 300_000, 2_000_000]),
            crash_mean_ns=mean(5, 30),
            cut_mean_ns=mean(4, 30),
            break_mean_ns=mean(2, 20),
            flip_chance=chance.choice([0.0, 0.0, 0.01]),
            disk_fault_mean_ns=mean(10, 40),
            bit_flips=chance.random() < 0.25,
            first_sync=chance.random() < 0.2,
            journal_bytes=chance.choice([1024, 2048, 4096]) * KIB,
            burst=chance.choice([4, 16, 40]),
        )


@dataclass
class Outcome:
    """What a run did; `is_detected` when damage was planted and noticed, which ends a run."""

    seed: int
    simulated_seconds: float
    cpu_seconds: float
    checks: int
    crashes: int
    operations: int
    lost: int
    resyncs: int
    epochs: int
    is_detected: bool = False
    notes: list[str] = field(default_factory=list)


class Simulation:
    """Runs one seed. `run` raises OracleError with the story's last lines."""

    def __init__(self, seed: int, seconds: int = 60) -> None:
        self.seed = seed
        self.world = World(seed)
        self.chance = self.world.random
        self.options = Options.draw(self.chance, seconds)
        sizes = {0: 48 * 4096 + 1536, 1: 20 * 4096}
        self.oracle = Oracle(sizes)
        options = self.options
        self.network = Network(
            self.world,
            NAMES,
            self._deliver,
            self._link_event,
            delay_ns=options.delay_ns,
            jitter_ns=options.jitter_ns,
            bytes_per_second=options.bytes_per_second,
            flip_chance=options.flip_chance,
        )
        self.setup = Setup(
            self.world,
            self.network,
            self.oracle,
            SIMULATION,
            PRIMARY,
            SECONDARIES,
            sizes,
            options.journal_bytes,
            options.first_sync,
            self._flushed,
            self._room,
        )
        self.nodes = {name: SimNode(name, self.setup, seed) for name in NAMES}
        self.network.is_alive = lambda name: self.nodes[name].is_alive
        self.crashes = self.lost = self.operations = 0
        self.is_ending = self.is_detected = self.is_held = False
        self._next_burst_ns = 0
        for node in self.nodes.values():
            node.on_stopped = lambda node=node: self._stopped(node)  # type: ignore[method-assign]
            node.on_recovered = lambda node=node: self._check_recovered(node)  # type: ignore[method-assign]
            node.on_fenced = lambda node=node: self._fenced(node)  # type: ignore[method-assign]

    # The story.

    def run(self) -> Outcome:
        """Faults for a while, then none, then everything has to be equal."""
        began = time.process_time()
        try:
            self._begin()
            self.world.run_until(self.options.seconds * SECOND)
            self._heal()
        except (OracleError, AssertionError, GeomirrorError) as error:
            if not (self.is_detected and isinstance(error, GeomirrorError)):
                story = "\n".join(self.world.trace[-40:])
                kind = type(error).__name__
                raise OracleError(f"seed={self.seed}: {kind}: {error}\n{story}") from error
        primary = self.nodes[PRIMARY].core
        assert isinstance(primary, Primary)
        return Outcome(
            self.seed,
            self.world.now_ns / SECOND,
            time.process_time() - began,
            self.oracle.checks,
            self.crashes,
            self.operations,
            self.lost,
            sum(s.counters.resyncs for s in primary.senders.values()),
            self.oracle.sealed_epoch,
            self.is_detected,
        )

    def _begin(self) -> None:
        for name in SECONDARIES:
            self.oracle.mirrors[name] = Mirror(self.oracle.blank())
        for node in self.nodes.values():
            node.create()
        for name in SECONDARIES:
            self.network.connect_later(PRIMARY, name)
        self._work()
        self._tick()
        options = self.options
        self._repeat(options.crash_mean_ns, self._crash_some)
        self._repeat(options.cut_mean_ns, self._cut_some)
        self._repeat(options.break_mean_ns, self._break_some)
        self._repeat(options.disk_fault_mean_ns, self._fail_some_disk)

    def _repeat(self, mean_ns: int, action: object) -> None:
        def again() -> None:
            if self.is_ending:
                return
            assert callable(action)
            action()
            self.world.after(int(mean_ns * self.chance.expovariate(1)) + MS, again)

        self.world.after(int(mean_ns * self.chance.expovariate(1)) + MS, again)

    def _tick(self) -> None:
        for node in self.nodes.values():
            node.poke()
        self.world.after(100 * MS, self._tick)

    # The client.

    def _work(self) -> None:
        """Bursts of writes with idle times between them."""
        if not self.is_ending:
            gap = self.chance.choice([5 * MS, 30 * MS, 200 * MS, 3 * SECOND])
            self.world.after(self.world.between(MS, gap), self._work)
        primary = self.nodes[PRIMARY]
        if not primary.is_alive or self.is_held or primary.core.fenced is not None:
            return
        for _ in range(self.chance.randrange(1, self.options.burst + 1)):
            if not self._write_batch(primary):
                return
        if self.chance.random() < 0.3:
            self._flush(primary)

    def _write_batch(self, primary: SimNode) -> bool:
        entries = [self._draw_entry() for _ in range(self.chance.choice([1, 1, 3, 8]))]
        writes = [
            (
                int(RecordType.WRITE if e.data is not None else self._zero_kind()),
                e.volume,
                e.offset,
                e.length,
                e.data,
            )
            for e in entries
        ]
        core, now_ns = primary.core, self.world.now_ns
        assert isinstance(core, Primary)
        primary.writing = entries
        is_held = [False]

        def action() -> None:
            try:
                core.write(writes, now_ns, now_ns + self.world.wall_offset_ns)
            except (JournalFullError, GeomirrorError) as error:
                is_held[0] = True
                self.is_held = isinstance(error, JournalFullError)

        primary.call(action)
        self.operations += len(entries)
        return not is_held[0] and primary.is_alive

    def _zero_kind(self) -> RecordType:
        return self.chance.choice([RecordType.ZERO, RecordType.TRIM])

    def _draw_entry(self) -> Entry:
        chance = self.chance
        volume = chance.choice([0, 0, 0, 1])
        size = self.oracle.sizes[volume]
        length = min(chance.choice([512, 4096, 4096, 4096, 8192, 1000, 20_000]), size)
        offset = chance.randrange(0, size - length + 1)
        if chance.random() < 0.8:
            offset = offset // 4096 * 4096
        if chance.random() < 0.12:
            length = min(chance.choice([4096, 32_768, 100_000]), size - offset)
            return Entry(volume, offset, length, None)
        self._serial = getattr(self, "_serial", 0) + 1
        pattern = self._serial.to_bytes(8, "little") + chance.randbytes(8)
        data = (pattern * (length // 16 + 1))[:length]
        return Entry(volume, offset, length, data)

    def _flush(self, primary: SimNode) -> None:
        token = (primary.life, len(self.oracle.log))
        primary.call(lambda: primary.core.flush(token, self.world.now_ns))

    def _flushed(self, token: object, error: GeomirrorError | None) -> None:
        assert isinstance(token, tuple)
        life, position = token
        if error is None and life == self.nodes[PRIMARY].life:
            self.oracle.flushed = max(self.oracle.flushed, position)

    def _room(self) -> None:
        self.is_held = False

    # Faults.

    def _deliver(self, target: str, source: str, payload: object) -> None:
        self.nodes[target].receive(source, payload)

    def _link_event(self, name: str, peer: str, is_up: bool) -> None:
        self.nodes[name].link_event(peer, is_up)

    def _crash_some(self) -> None:
        node = self.nodes[self.chance.choice(NAMES)]
        if not node.is_alive:
            return
        if self.chance.random() < 0.5:
            node.stop_at_operation(self.chance.randrange(1, 40))
        else:
            self._crash(node, is_kill=self.chance.random() < 0.4)

    def _stopped(self, node: SimNode) -> None:
        self._crash(node, is_kill=self.chance.random() < 0.3)

    def _crash(self, node: SimNode, *, is_kill: bool) -> None:
        self.crashes += 1
        node.crash(is_kill=is_kill)
        for peer in NAMES:
            pair = (node.name, peer)
            if pair in self.network.links or pair[::-1] in self.network.links:
                self.network.down(*pair)
        if self.options.bit_flips and self.chance.random() < 0.5 and not self.is_ending:
            self._flip_some(node)
        if node.is_primary:
            self.is_held = False
        self.world.after(self.world.between(50 * MS, 3 * SECOND), lambda: self._restart(node))

    def _flip_some(self, node: SimNode) -> None:
        """Silent corruption of something that is provably durable, or of a superblock copy.

        What no record and no superblock proves durable looks like a torn tail to anybody.
        """
        proven = node.engine._written.known_durable_lsn
        scan = node.engine._written.scan_lsn
        name, bit = "superblock", self.chance.randrange(8 * 600)
        if proven - scan > 100 and self.chance.random() < 0.8:
            number, offset = divmod(self.chance.randrange(scan, proven), SIMULATION.segment_bytes)
            name, bit = f"journal/{number:016x}.seg", offset * 8 + self.chance.randrange(8)
        if node.store.exists(name) and bit // 8 < len(node.store.content(name).rstrip(b"\0")):
            node.store.flip_bit(name, bit)
            node.is_damaged = True
            self.world.note(f"{node.name}: bit {bit} of {name} flips")

    def _restart(self, node: SimNode) -> None:
        if node.is_alive:
            return
        node.fence_reason = ""
        try:
            node.open()
        except MachineStoppedError:
            self._stopped(node)
            return
        except StorageError as error:
            self.world.note(f"{node.name}: does not start: {error}")
            self._crash(node, is_kill=False)
            return
        except (FencedError, IntegrityError) as error:
            self._noticed(node, error)
            return
        for peer in NAMES:
            if peer != node.name and PRIMARY in (peer, node.name):
                self.network.connect_later(node.name, peer)

    def _noticed(self, node: SimNode, error: GeomirrorError) -> None:
        """Damage that was planted has been noticed: right, and the end of this run's story."""
        if not node.is_damaged:
            raise OracleError(f"{node.name} does not start: {error}")
        self.is_detected = True
        raise error

    def _check_recovered(self, node: SimNode) -> None:
        engine = node.engine
        self.world.note(f"{node.name}: back at epoch {engine.sealed_epoch}")
        if node.is_primary:
            content = {
                volume: engine.read(volume, 0, size) for volume, size in self.oracle.sizes.items()
            }
            self.lost += self.oracle.recovered(content, engine.sealed_epoch)
            for number in range(self.oracle.sealed_epoch + 1, engine.sealed_epoch + 1):
                self.oracle.sealed(number, engine.epoch_info(number).chain_hash)
        elif engine.superblock.data_state == CONSISTENT:
            self.oracle.restarted(node.name, engine.sealed_epoch)

    def _fenced(self, node: SimNode) -> None:
        """A core stopped itself after a failed disk operation: the operator restarts the machine."""
        if node.is_damaged and "differs" in node.fence_reason:
            self.is_detected = True
        life = node.life

        def restart() -> None:
            if node.life == life:
                self._crash(node, is_kill=False)

        self.world.after(self.world.between(100 * MS, SECOND), restart)

    def _cut_some(self) -> None:
        name = self.chance.choice(SECONDARIES)
        directions = self.chance.choice([(True, True), (True, False), (False, True)])
        self.world.note(f"link {PRIMARY}-{name} cut {directions}")
        self.network.cut(PRIMARY, name, directions)
        span = self.world.between(100 * MS, 12 * SECOND)
        self.world.after(span, lambda: self.network.heal(PRIMARY, name))

    def _break_some(self) -> None:
        self.network.break_connection(PRIMARY, self.chance.choice(SECONDARIES))

    def _fail_some_disk(self) -> None:
        node = self.nodes[self.chance.choice(NAMES)]
        if self.chance.random() < 0.5:
            operation = self.chance.choice(["fdatasync", "pwritev", "sync_directory"])
            node.store.fail(operation, skip=self.chance.randrange(10))
            self.world.note(f"{node.name}: the next {operation} will fail")
            return
        self.world.note(f"{node.name}: disk full")
        node.store.capacity_bytes = 0

        def free() -> None:
            node.store.capacity_bytes = 1 << 40

        self.world.after(self.world.between(100 * MS, 4 * SECOND), free)

    # The end.

    def _heal(self) -> None:
        """No more faults: O7."""
        self.is_ending = True
        self.world.note("no more faults")
        for node in self.nodes.values():
            node.store.faults.clear()
            node.store.capacity_bytes = 1 << 40
            node.stop_at_operation(1 << 60)
        for name in SECONDARIES:
            self.network.heal(PRIMARY, name)
        deadline = self.world.now_ns + HEAL_NS
        while self.world.now_ns < deadline:
            self.world.run_until(self.world.now_ns + SECOND)
            primary = self.nodes[PRIMARY]
            if primary.is_alive and primary.core.fenced is None:
                core = primary.core
                assert isinstance(core, Primary)
                primary.call(lambda core=core: core.seal_now(self.world.now_ns))
                if self._is_converged(core):
                    break
        else:
            if any(node.is_damaged for node in self.nodes.values()):
                self.is_detected = True
                return
            raise OracleError(f"O7: no convergence {HEAL_NS // SECOND} s after the last fault")
        for name in SECONDARIES:
            self.nodes[name].check_image()

    def _is_converged(self, core: Primary) -> bool:
        if not core.is_sealed or self.oracle.epoch_prefix[core.engine.sealed_epoch] != len(
            self.oracle.log
        ):
            return False
        sealed = core.engine.sealed_epoch
        return all(
            self.nodes[name].is_alive
            and self.nodes[name].engine.applied_epoch == sealed
            and self.nodes[name].engine.superblock.data_state == CONSISTENT
            and core.senders[name].applied_epoch == sealed
            and core.lag_seconds(core.senders[name], self.world.now_ns) == 0.0
            for name in SECONDARIES
        )
