"""One seed: a primary and two secondaries, a client, and everything that can go wrong."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from functools import partial

from geomirror.errors import FencedError, GeomirrorError, IntegrityError, StorageError
from geomirror.limits import SIMULATION
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.resync_intake import CONSISTENT
from tests.sim.client import Client
from tests.sim.faults import STOPPED_OPERATIONS_MAX, Faults
from tests.sim.growth import draw_growth, leave_garbage
from tests.sim.marking import Marking, draw_marks
from tests.sim.network import Network
from tests.sim.node import MachineStoppedError, Setup, SimNode
from tests.sim.options import Options
from tests.sim.oracle import Mirror, Oracle, OracleError
from tests.sim.promotable import CutCheck
from tests.sim.sync_check import SyncCheck, draw_policy
from tests.sim.verdict_check import VerdictCheck
from tests.sim.world import MS, SECOND, World

PRIMARY, SECONDARIES = "east", ["colo", "west"]
NAMES = [PRIMARY, *SECONDARIES]
VOLUMES = {0: 112 * 4096 + 1536, 1: 20 * 4096}
HEAL_NS = 90 * SECOND
"""Bound of O7: lag is zero again so long after the last fault."""
QUIET_NS = 40 * SECOND
LAG_S_MAX = 20
VERDICTS_NS = 700 * MS
"""Between two looks at what survivors would say; also right after each crash."""
SECONDS = 600
"""Length of a run, if nothing else is asked for."""


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
    growths: int
    resyncs: int
    epochs: int
    is_detected: bool
    fingerprint: str


class Simulation:
    """Runs one seed. `run` raises OracleError with the story's last lines."""

    def __init__(self, seed: int, seconds: int = SECONDS, **focus: object) -> None:
        """:param focus: options to use instead of what the seed draws."""
        self.seed = seed
        self.world = World(seed)
        self.chance = self.world.random
        drawn = Options.draw(self.chance, seconds, NAMES)
        policies = random.Random(f"{seed}/policy")
        drawn = replace(drawn, policy=draw_policy(policies, SECONDARIES))
        drawn = replace(drawn, marks_mean_ns=draw_marks(seed), growth_chance=draw_growth(seed))
        options = replace(drawn, **focus)  # type: ignore[arg-type]
        self.options = options
        self.oracle = Oracle(VOLUMES)
        self.sync = SyncCheck(options.policy, self.oracle)
        self.verdicts = VerdictCheck(self.oracle, random.Random(f"{seed}/verdicts"))
        self.cuts = CutCheck(self.oracle, SIMULATION, random.Random(f"{seed}/cuts"))
        self.network = Network(
            self.world,
            NAMES,
            lambda target, source, payload: self.nodes[target].receive(source, payload),
            lambda name, peer, is_up: self.nodes[name].link_event(peer, is_up),
            lambda source, target: self.nodes[source].writable(target),
            delay_ns=options.delay_ns,
            jitter_ns=options.jitter_ns,
            bytes_per_second=options.bytes_per_second,
            flip_chance=options.flip_chance,
        )
        self.client = Client(self.world, options, self.oracle, self.sync, lambda: self.primary)
        self.client.on_storm = self._check_lag
        setup = Setup(
            self.world,
            self.network,
            self.oracle,
            SIMULATION,
            PRIMARY,
            SECONDARIES,
            VOLUMES,
            options.journal_bytes,
            options.first_sync,
            options.clock_rates,
            self.sync,
            self.verdicts,
            self.cuts,
            on_flush=self.client.flushed,
            on_room=self.client.room,
            on_stopped=self._stopped,
            on_recovered=self._check_recovered,
            on_fenced=self._fenced,
            on_promise=lambda node: self.faults.promised(node),
            node=lambda name: self.nodes[name],
        )
        self.nodes = {name: SimNode(name, setup, seed) for name in NAMES}
        self.network.is_alive = lambda name: self.nodes[name].is_alive
        self.faults = Faults(self)
        self.marking = Marking(self, seed, options.marks_mean_ns)
        self.crashes = self.lost = 0
        self.is_detected = False

    @property
    def primary(self) -> SimNode:
        """The node that is written to."""
        return self.nodes[PRIMARY]

    @property
    def secondaries(self) -> list[SimNode]:
        """All others."""
        return [self.nodes[name] for name in SECONDARIES]

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
        core = self.primary.core
        assert isinstance(core, Primary)
        return Outcome(
            self.seed,
            self.world.now_ns / SECOND,
            time.process_time() - began,
            self.oracle.checks,
            self.crashes,
            self.client.operations,
            self.lost,
            self.client.grower.count,
            sum(s.counters.resyncs for s in core.senders.values()),
            self.oracle.sealed_epoch,
            self.is_detected,
            self.world.fingerprint(),
        )

    def _begin(self) -> None:
        for name in SECONDARIES:
            self.oracle.mirrors[name] = Mirror(self.oracle.blank())
        for node in self.nodes.values():
            node.create()
            if self.options.growth_chance:
                leave_garbage(node)
        for name in SECONDARIES:
            self.network.connect_later(PRIMARY, name)
        self.client.begin()
        self.faults.begin()
        self.marking.begin()
        self._look_at_verdicts()

    def _look_at_verdicts(self) -> None:
        self.verdicts.look(self.nodes)
        self.world.after(VERDICTS_NS, self._look_at_verdicts)

    # Lives.

    def crash(self, node: SimNode, *, is_kill: bool) -> None:
        """Stop a node now; it comes back soon."""
        self.crashes += 1
        was_alive = node.is_alive
        node.crash(is_kill=is_kill)
        self.network.lose(node.name)
        self.verdicts.look(self.nodes)
        # One that stops while it opens has no engine yet; the last one may be of another disk.
        is_known = was_alive and not node.is_damaged
        if is_known and not node.is_primary and node.engine.held is not None:
            self.cuts.cut(node, "a crash")
        is_ending = self.faults.is_ending
        if self.options.bit_flips and self.chance.random() < 0.5 and not is_ending:
            self.faults.flip_some(node)
        if node.is_primary:
            self.client.reconnect()
        is_long = self.chance.random() < 0.1 and not is_ending
        longest = 40 * SECOND if is_long else 3 * SECOND
        after_ns = self.world.between(50 * MS, longest)
        self.faults.restarts(after_ns)
        self.world.after(after_ns, lambda: self._restart(node))

    def _stopped(self, node: SimNode) -> None:
        self.crash(node, is_kill=self.chance.random() < 0.3)

    def _restart(self, node: SimNode) -> None:
        if node.is_alive:
            return
        node.watch.fence_reason = ""
        for peer in NAMES:
            if peer != node.name and PRIMARY in (peer, node.name):
                # Its packets tell the others at once, if they have not noticed before.
                self.network.down(node.name, peer)
        if not self.faults.is_ending and self.chance.random() < 0.25:
            node.stop_at_operation(self.chance.randrange(1, STOPPED_OPERATIONS_MAX))
        try:
            node.open()
        except MachineStoppedError:
            self._stopped(node)
            return
        except StorageError as error:
            self.world.note(f"{node.name}: does not start: {error}")
            self.crash(node, is_kill=False)
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
            self.sync.recovered(engine.superblock.peers)
            with node.store.undisturbed():
                sizes = engine.sizes.now.items()
                content = {volume: engine.read(volume, 0, size) for volume, size in sizes}
            self.lost += self.oracle.recovered(content, engine.sealed_epoch)
            self.marking.recovered(node)
            for number in range(self.oracle.sealed_epoch + 1, engine.sealed_epoch + 1):
                self.oracle.sealed(number, engine.epoch_info(number).chain_hash)
        elif engine.superblock.data_state == CONSISTENT:
            self.oracle.restarted(node.name, engine.sealed_epoch)

    def _fenced(self, node: SimNode) -> None:
        """A core stopped itself after a failed disk operation: somebody restarts the machine."""
        if node.is_damaged and "differs" in node.watch.fence_reason:
            self.is_detected = True
        life = node.life

        def restart() -> None:
            if node.life == life:
                self.crash(node, is_kill=False)

        self.world.after(self.world.between(100 * MS, SECOND), restart)

    def _check_lag(self) -> None:
        """A storm begins: before it, after a while without faults, nothing may lag."""
        core = self.primary.core
        assert isinstance(core, Primary)
        if self.world.now_ns - self.faults.last_ns < QUIET_NS:
            return
        for name, sender in core.senders.items():
            lag_s = core.lag_seconds(sender, self.primary.now_ns())
            if lag_s > LAG_S_MAX:
                raise OracleError(
                    f"{name} lags {lag_s:.0f} s, {QUIET_NS // SECOND} s after the last fault"
                )
        self.oracle.checks += 1

    # The end.

    def _heal(self) -> None:
        """No more faults: O7."""
        self.world.note("no more faults")
        self.client.is_ending = True
        self.faults.end()
        deadline = self.world.now_ns + HEAL_NS
        while not self._is_converged():
            if self.world.now_ns >= deadline:
                if any(node.is_damaged for node in self.nodes.values()):
                    self.is_detected = True
                    return
                raise OracleError(f"O7: no convergence {HEAL_NS // SECOND} s after the last fault")
            self.world.run_until(self.world.now_ns + SECOND)
            core, primary = self.primary.core, self.primary
            assert isinstance(core, Primary)
            primary.call(partial(core.seal_now, primary.now_ns()))
        for node in self.secondaries:
            node.watch.check_image()
        self.marking.check()

    def _is_converged(self) -> bool:
        core = self.primary.core
        assert isinstance(core, Primary)
        engine = core.engine
        if not self.primary.is_alive or core.fenced is not None:
            return False
        if not core.is_sealed or self.client.is_held:
            return False
        sealed = engine.sealed_epoch
        if self.oracle.epoch_prefix[sealed] != len(self.oracle.log):
            return False
        return self.marking.is_converged and all(
            node.is_alive
            and node.engine.applied_epoch == sealed
            and node.engine.superblock.data_state == CONSISTENT
            and core.senders[node.name].applied_epoch == sealed
            and core.lag_seconds(core.senders[node.name], self.primary.now_ns()) == 0.0
            for node in self.secondaries
        )
