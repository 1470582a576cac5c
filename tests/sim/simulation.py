"""One seed: a primary and two secondaries, a client, and everything that can go wrong."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

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
from tests.sim.options import NEVER, Options
from tests.sim.oracle import Oracle, OracleError
from tests.sim.placing import Placing
from tests.sim.promotable import CutCheck
from tests.sim.proof import StumbleError, is_proof
from tests.sim.put_back import PutBack
from tests.sim.rewinds import Rewinds
from tests.sim.scheduled import Scheduled
from tests.sim.succession import Succession, successions
from tests.sim.sync_check import SyncCheck, draw_policy
from tests.sim.verdict_check import VerdictCheck
from tests.sim.verifying import Verifying, draw_interval, draw_verifies
from tests.sim.world import MS, SECOND, World

PRIMARY = "east"
NAMES = [PRIMARY, "colo", "west", "north", "south"]
VOLUMES = {0: 112 * 4096 + 1536, 1: 20 * 4096}
HEAL_NS = 90 * SECOND
"""Bound of O7: lag is zero again so long after the last fault."""
QUIET_NS = 40 * SECOND
LAG_S_MAX = 20
VERDICTS_NS = 700 * MS
"""Between two looks at what survivors would say; also right after each crash."""
RESTART_LOOKS = 4
"""The same before a node that comes back has heard of anybody, each time by other survivors."""
SECONDS = 600
"""Length of a run, if nothing else is asked for."""
SUCCESSION_EVERY = 3
"""One of so many ordinary runs is about changes of the primary."""


def kind_of(seed: int) -> dict[str, Any]:
    """The options that make an ordinary run one of its kind."""
    return successions(seed) if seed % SUCCESSION_EVERY == 0 else {}


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
    promotions: int
    tails: int
    rewinds: int
    verifies: int
    rotten: int
    put_backs: int
    is_detected: bool
    fingerprint: str


class Simulation:
    """Runs one seed. `run` raises OracleError or StumbleError with the story's last lines."""

    def __init__(self, seed: int, seconds: int = SECONDS, **focus: object) -> None:
        """:param focus: options to use instead of what the seed draws."""
        self.seed = seed
        self.world = World(seed)
        self.chance = self.world.random
        count = int(str(focus.get("nodes", 3)))
        names, secondaries = NAMES[:count], NAMES[1:count]
        drawn = Options.draw(self.chance, seconds, names)
        policies = random.Random(f"{seed}/policy")
        drawn = replace(drawn, policy=draw_policy(policies, secondaries))
        drawn = replace(drawn, marks_mean_ns=draw_marks(seed), growth_chance=draw_growth(seed))
        verify_mean_ns, rot_mean_ns = draw_verifies(seed)
        drawn = replace(drawn, verify_mean_ns=verify_mean_ns, rot_mean_ns=rot_mean_ns)
        drawn = replace(drawn, verify_every_ns=draw_interval(seed))
        options = replace(drawn, **focus)  # type: ignore[arg-type]
        self.options = options
        self.oracle = Oracle(VOLUMES)
        self.placing = Placing(self.oracle)
        self.is_succession = options.succession_mean_ns != NEVER
        self.sync = SyncCheck(options.policy)
        self.verdicts = VerdictCheck(self.oracle, random.Random(f"{seed}/verdicts"))
        self.cuts = CutCheck(self.placing, SIMULATION, random.Random(f"{seed}/cuts"))
        self.network = Network(
            self.world,
            names,
            lambda target, source, payload: self.nodes[target].receive(source, payload),
            lambda name, peer, is_up: self.nodes[name].link_event(peer, is_up),
            lambda source, target: self.nodes[source].writable(target),
            delay_ns=options.delay_ns,
            jitter_ns=options.jitter_ns,
            bytes_per_second=options.bytes_per_second,
            flip_chance=options.flip_chance,
        )
        self.client = Client(self.world, options, self.sync, lambda: self.writers)
        self.client.on_storm = self._check_lag
        setup = Setup(
            self.world,
            self.network,
            SIMULATION,
            PRIMARY,
            secondaries,
            VOLUMES,
            options.journal_bytes,
            options.first_sync,
            options.clock_rates,
            self.sync,
            self.verdicts,
            self.cuts,
            self.placing,
            self.is_succession,
            on_flush=self.client.flushed,
            on_room=self.client.room,
            on_primary=self._began,
            on_stopped=self._stopped,
            on_recovered=self._check_recovered,
            on_fenced=self._fenced,
            on_outranked=lambda node: self.succession.outranked(node),
            on_followed=lambda node: self.succession.followed(node),
            on_not_followed=lambda node, error: self.succession.refused(node, error),
            on_reopen=lambda node: self.crash(node, is_kill=True),
            on_promise=lambda node: self.faults.promised(node),
            on_step=lambda node: self.faults.changing(node),
            on_resync=lambda node: self.succession.resyncs(node),
            on_verify_answer=lambda *what: self.verifying.answered(*what),
            on_accepted=lambda *what: self.put_back.accepted(*what),
            node=lambda name: self.nodes[name],
        )
        self.nodes = {name: SimNode(name, setup, seed) for name in names}
        self.pairs = [(PRIMARY, name) for name in secondaries]
        if self.is_succession:
            self.pairs = list(combinations(names, 2))
        self._current, self._claim = PRIMARY, (0, "")
        self.network.is_alive = lambda name: self.nodes[name].is_alive
        self.faults = Faults(self)
        self.marking = Marking(self, seed, options.marks_mean_ns)
        self.succession = Succession(self, seed, options.succession_mean_ns)
        self.rewinds = Rewinds(self, seed, options.rewind_mean_ns)
        self.verifying = Verifying(self, seed, options.verify_mean_ns, options.rot_mean_ns)
        self.scheduled = Scheduled(self, options.verify_every_ns)
        self.put_back = PutBack(self, seed, options.put_back_mean_ns)
        self.crashes = self.lost = 0
        self.is_detected = False

    @property
    def primary(self) -> SimNode:
        """The node that is written to; of several the one with the highest claim."""
        return self.nodes[self._current]

    @property
    def secondaries(self) -> list[SimNode]:
        """All others."""
        return [node for name, node in self.nodes.items() if name != self._current]

    @property
    def writers(self) -> list[SimNode]:
        """Nodes that take writes, if they are up; until they have heard of each other, several."""
        if not self.is_succession:
            return [self.primary]
        return [node for node in self.nodes.values() if node.is_alive and node.roles.is_writer]

    def _began(self, node: SimNode) -> None:
        """A node serves as a primary."""
        last = node.engine.superblock.chain[-1]
        if (last.token, last.identity) >= self._claim:
            self._current, self._claim = node.name, (last.token, last.identity)
        self.placing.began(node)
        self.placing.acted(node, node.engine.superblock.chain)

    def run(self) -> Outcome:
        """Faults for a while, then none, then everything has to be equal."""
        began = time.process_time()
        try:
            self._begin()
            self.world.run_until(self.options.seconds * SECOND)
            self._heal()
        except (OracleError, AssertionError, GeomirrorError, LookupError) as error:
            if not (self.is_detected and isinstance(error, GeomirrorError)):
                story = "\n".join(self.world.trace[-40:])
                kind = type(error).__name__
                told = f"seed={self.seed}: {kind}: {error}\n{story}"
                raise (OracleError if is_proof(error) else StumbleError)(told) from error
        lines = {id(line): line for line in (self.oracle, *self.placing.lines.values())}.values()
        return Outcome(
            self.seed,
            self.world.now_ns / SECOND,
            time.process_time() - began,
            sum(line.checks for line in lines),
            self.crashes,
            self.client.operations,
            self.lost,
            self.client.grower.count,
            sum(
                sender.counters.resyncs
                for node in self.nodes.values()
                if isinstance(node.core, Primary)
                for sender in node.core.senders.values()
            ),
            max(line.sealed_epoch for line in lines),
            sum(node.roles.promotions for node in self.nodes.values()),
            self.placing.tails,
            self.placing.rewinds,
            self.verifying.ended + sum(self.scheduled.ended.values()),
            self.verifying.rotten,
            self.put_back.count,
            self.is_detected,
            self.world.fingerprint(),
        )

    def _begin(self) -> None:
        for node in self.secondaries:
            self.placing.mirror(node)
        for node in self.nodes.values():
            node.create()
            if self.options.growth_chance:
                leave_garbage(node)
        for pair in self.pairs:
            self.network.connect_later(*pair)
        self.client.begin()
        self.faults.begin()
        self.marking.begin()
        self.succession.begin()
        self.rewinds.begin()
        self.verifying.begin()
        self.scheduled.begin()
        self.put_back.begin()
        if not self.is_succession:
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
        if not self.is_succession:
            self.verdicts.look(self.nodes)
        # One that stops while it opens has no engine yet; the last one may be of another disk.
        is_known = was_alive and not node.is_damaged
        if is_known and not node.is_primary and node.engine.held is not None:
            self.cuts.cut(node, "a crash")
        is_ending = self.faults.is_ending
        if self.options.bit_flips and self.chance.random() < 0.5 and not is_ending:
            self.faults.flip_some(node)
        self.client.room(node)
        is_long = self.chance.random() < 0.1 and not is_ending
        longest = 40 * SECOND if is_long else 3 * SECOND
        after_ns = self.world.between(50 * MS, longest)
        self.faults.restarts(after_ns)
        self.world.after(after_ns, lambda: self._restart(node))

    def make_anew(self, node: SimNode) -> None:
        """The operator takes a copy out and adds it again: its disk is blank."""
        self.world.note(f"{node.name}: made anew")
        node.crash(is_kill=True)
        for pair in self._pairs_of(node):
            self.network.down(*pair)
        self.placing.forget(node)
        node.make_anew()
        for pair in self._pairs_of(node):
            self.network.connect_later(*pair)

    def _stopped(self, node: SimNode) -> None:
        self.crash(node, is_kill=self.chance.random() < 0.3)

    def _restart(self, node: SimNode) -> None:
        if node.is_alive:
            return
        node.watch.fence_reason = ""
        for pair in self._pairs_of(node):
            # Its packets tell the others at once, if they have not noticed before.
            self.network.down(*pair)
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
        for _ in range(0 if self.is_succession else RESTART_LOOKS):
            self.verdicts.look(self.nodes)  # What it knows now is what was durable.
        for pair in self._pairs_of(node):
            self.network.connect_later(*pair)

    def _pairs_of(self, node: SimNode) -> list[tuple[str, str]]:
        return [pair for pair in self.pairs if node.name in pair]

    def _noticed(self, node: SimNode, error: GeomirrorError) -> None:
        """Damage that was planted has been noticed: right, and the end of this run's story."""
        if not node.is_damaged:
            raise OracleError(f"{node.name} does not start: {error}")
        self.is_detected = True
        raise error

    def _check_recovered(self, node: SimNode) -> None:
        engine = node.engine
        self.world.note(f"{node.name}: back at epoch {engine.sealed_epoch}")
        oracle = node.oracle
        if self.is_succession:
            self.placing.look(node)
        if engine.superblock.role == "primary":
            self.sync.recovered(oracle, engine.superblock.peers)
            with node.store.undisturbed():
                sizes = engine.sizes.now.items()
                content = {volume: engine.read(volume, 0, size) for volume, size in sizes}
            if not self.placing.is_writer(node):
                self._check_gone_back(node, content)
                return
            self.lost += oracle.recovered(content, engine.sealed_epoch)
            self.placing.recovered(node)
            self.marking.recovered(node)
            for number in range(oracle.sealed_epoch + 1, engine.sealed_epoch + 1):
                oracle.sealed(number, engine.epoch_info(number).chain_hash)
        elif engine.superblock.data_state == CONSISTENT:
            oracle.restarted(node.name, engine.sealed_epoch)

    def _check_gone_back(self, node: SimNode, content: dict[int, bytes]) -> None:
        """A primary that stopped between giving up its tail and becoming a secondary."""
        epoch = node.engine.sealed_epoch
        if content != node.oracle.content_at(epoch):
            raise OracleError(f"{node.name} went back to epoch {epoch}, and holds something else")

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
        if self.world.now_ns - self.faults.last_ns < QUIET_NS or self.is_succession:
            return  # Members that wait for an operator may lag for as long as they like.
        assert isinstance(core, Primary)
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
        self.converge()
        if self.is_detected:
            return
        for node in self.secondaries:
            node.watch.check_image()
        for node in self.nodes.values():
            self.placing.check_branches(node)
        self.marking.check()
        self.scheduled.finish()
        self.verifying.finish()

    def converge(self) -> None:
        """Everything has to be the same everywhere, soon."""
        deadline = self.world.now_ns + HEAL_NS
        while not self._is_converged():
            if self.world.now_ns >= deadline:
                if any(node.is_damaged for node in self.nodes.values()):
                    self.is_detected = True
                    return
                raise OracleError(f"O7: no convergence {HEAL_NS // SECOND} s after the last fault")
            self.world.run_until(self.world.now_ns + SECOND)
            self.succession.mend()
            core, primary = self.primary.core, self.primary
            if isinstance(core, Primary) and core.fenced is None:
                primary.call(partial(core.seal_now, primary.now_ns()))

    def _is_converged(self) -> bool:
        core, oracle = self.primary.core, self.primary.oracle
        if not isinstance(core, Primary) or not self.primary.is_alive or core.fenced is not None:
            return False
        if not core.is_sealed or self.client.held:
            return False
        sealed = core.engine.sealed_epoch
        if oracle.epoch_prefix[sealed] != len(oracle.log):
            return False
        return self.marking.is_converged and all(
            node.is_alive
            and not node.is_primary
            and node.oracle is oracle
            and node.engine.applied_epoch == sealed
            and node.engine.superblock.data_state == CONSISTENT
            and core.senders[node.name].applied_epoch == sealed
            and core.lag_seconds(core.senders[node.name], self.primary.now_ns()) == 0.0
            for node in self.secondaries
        )
