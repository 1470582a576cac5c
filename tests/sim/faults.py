"""Everything that goes wrong: machines, links, disks, clocks, readers and operators."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from geomirror.limits import KIB, SIMULATION
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.resync_intake import CONSISTENT
from geomirror.wan_protocol.secondary import Secondary
from tests.sim.disk_file import Inode
from tests.sim.node import SimNode
from tests.sim.options import NEVER
from tests.sim.oracle import OracleError
from tests.sim.sync_check import draw_policy
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

CALM_FACTOR = 12
"""Faults are so much rarer between storms."""
WALL_STEP_NS = 3600 * SECOND
STOP_LOOKS = 30
"""Tenths of a second that an orderly stop may take."""
STOPPED_OPERATIONS_MAX = 40
"""A power cut inside a disk operation is at one of so many that come next."""
CHANGE_OPERATIONS_MAX = 24
"""The same, from a step of a change of a role on: each takes a few."""


class Faults:
    """Draws and does the faults of one run."""

    def __init__(self, simulation: Simulation) -> None:
        self.is_ending = False
        self.stops_in_changes = 0
        self.last_ns = 0
        """Time of the last fault, or of its mending."""
        self._simulation = simulation
        self._world = simulation.world
        self._chance = simulation.world.random
        self._snapshots: dict[str, dict[str, Inode]] = {}

    def begin(self) -> None:
        """Schedule what the options ask for."""
        options = self._simulation.options
        self._repeat(options.crash_mean_ns, self._crash)
        self._repeat(options.stop_mean_ns, self._stop)
        self._repeat(options.cut_mean_ns, self._cut)
        self._repeat(options.break_mean_ns, self._break)
        self._repeat(options.disk_fault_mean_ns, self._fail_disk)
        self._repeat(options.slow_disk_mean_ns, self._slow_disk)
        self._repeat(options.clock_step_mean_ns, self._step_clock)
        self._repeat(options.hold_mean_ns, self._hold)
        self._repeat(options.pause_mean_ns, self._pause)
        self._repeat(options.snapshot_mean_ns, self._snapshot)
        self._repeat(options.policy_mean_ns, self._change_policy)

    def end(self) -> None:
        """Mend everything that does not mend itself."""
        self.is_ending = True
        simulation = self._simulation
        for node in simulation.nodes.values():
            node.store.faults.clear()
            node.recover_disk()
            node.stop_at_operation(0)
            core = node.core
            if isinstance(core, Secondary):
                self._release(node, core, node.life)
            else:
                self._resume(node, core, None, node.life)
        for pair in simulation.pairs:
            simulation.network.heal(*pair)

    def _repeat(self, mean_ns: int, action: Callable[[], None]) -> None:
        if mean_ns == NEVER:
            return

        def again() -> None:
            if self.is_ending:
                return
            if self._is_time():
                self._note_time()
                action()
            self._world.after(int(mean_ns * self._chance.expovariate(1)) + MS, again)

        self._world.after(int(mean_ns * self._chance.expovariate(1)) + MS, again)

    def _is_time(self) -> bool:
        client = self._simulation.client
        is_chosen = not client.is_quiet and self._chance.random() * CALM_FACTOR < 1
        return client.is_storm or is_chosen

    def _later(self, low_ns: int, high_ns: int, action: Callable[[], None]) -> None:
        """Mend a fault after a while."""

        def mend() -> None:
            self._note_time()
            action()

        self._world.after(self._world.between(low_ns, high_ns), mend)

    def _note_time(self) -> None:
        self.last_ns = max(self.last_ns, self._world.now_ns)

    def restarts(self, after_ns: int) -> None:
        """A node stopped and comes back after a while."""
        self.last_ns = max(self.last_ns, self._world.now_ns + after_ns)

    def promised(self, node: SimNode) -> None:
        """A node said that something is durable: sometimes the power goes away right then."""
        is_due = self._chance.random() < self._simulation.options.promise_crash_chance
        if is_due and not self.is_ending:
            life = node.life

            def crash() -> None:
                if node.life == life and node.is_alive:
                    self._simulation.crash(node, is_kill=False)

            self._world.after(self._world.between(10_000, 5 * MS), crash)

    def changing(self, node: SimNode) -> None:
        """A step of a change of its role comes next: sometimes the power goes away in it."""
        chance = self._chance
        if self.is_ending or chance.random() >= self._simulation.options.change_crash_chance:
            return
        self.stops_in_changes += 1
        node.stop_at_operation(chance.randrange(1, CHANGE_OPERATIONS_MAX))

    def _any_node(self) -> SimNode:
        return self._chance.choice(list(self._simulation.nodes.values()))

    def _any_secondary(self) -> SimNode:
        return self._chance.choice(self._simulation.secondaries)

    def _any_pair(self) -> tuple[str, str]:
        return self._chance.choice(self._simulation.pairs)

    def _crash(self) -> None:
        node = self._any_node()
        if not node.is_alive:
            return
        if self._chance.random() < 0.5:
            node.stop_at_operation(self._chance.randrange(1, STOPPED_OPERATIONS_MAX))
        else:
            self._simulation.crash(node, is_kill=self._chance.random() < 0.4)

    def _stop(self) -> None:
        """Somebody stops a node in order, and starts it again."""
        node = self._any_node()
        if not node.is_alive:
            return
        core, life = node.core, node.life
        self._world.note(f"{node.name}: stop")
        node.call(lambda: core.stop(node.now_ns()))

        def look(left: int) -> None:
            if node.life != life:
                return
            if left and not (core.is_settled and core.is_idle):
                self._world.after(100 * MS, lambda: look(left - 1))
            else:
                self._world.note(f"{node.name}: settled: {core.is_settled}")
                self._simulation.crash(node, is_kill=True)

        look(STOP_LOOKS)

    def flip_some(self, node: SimNode) -> None:
        """Silent corruption of something that is provably durable, or of a superblock copy.

        What no record and no superblock proves durable looks like a torn tail to anybody.
        """
        proven = node.engine._written.known_durable_lsn
        scan = node.engine._written.scan_lsn
        name, bit = "superblock", self._chance.randrange(8 * 600)
        if proven - scan > 100 and self._chance.random() < 0.8:
            number, offset = divmod(self._chance.randrange(scan, proven), SIMULATION.segment_bytes)
            name, bit = f"journal/{number:016x}.seg", offset * 8 + self._chance.randrange(8)
        if node.store.exists(name) and bit // 8 < len(node.store.content(name).rstrip(b"\0")):
            node.store.flip_bit(name, bit)
            node.is_damaged = True
            self._world.note(f"{node.name}: bit {bit} of {name} flips")

    def _cut(self) -> None:
        network, pair = self._simulation.network, self._any_pair()
        directions = self._chance.choice([(True, True), (True, False), (False, True)])
        self._world.note(f"link {'-'.join(pair)} cut {directions}")
        network.cut(*pair, directions)
        long = 40 * SECOND if self._chance.random() < 0.2 else 8 * SECOND
        self._later(100 * MS, long, lambda: network.heal(*pair))

    def _break(self) -> None:
        network, pair = self._simulation.network, self._any_pair()
        # Soon, as soon as something is on its way.
        for delay_ns in (0, 300 * MS, 700 * MS):
            self._world.after(delay_ns, lambda: network.break_connection(*pair))

    def _fail_disk(self) -> None:
        node = self._any_node()
        if self._chance.random() < 0.5:
            operation = self._chance.choice(["fdatasync", "pwritev", "sync_directory", "pread"])
            node.store.fail(operation, error=errno.EIO, skip=self._chance.randrange(10))
            self._world.note(f"{node.name}: the next {operation} will fail")
            return
        room = self._chance.choice([0, 100 * KIB, SIMULATION.segment_bytes])
        self._world.note(f"{node.name}: {room} bytes left on the disk")
        used = sum(inode.used_bytes() for inode in node.store.inodes())
        node.store.capacity_bytes = used + room
        self._later(100 * MS, 8 * SECOND, node.recover_disk)

    def _slow_disk(self) -> None:
        node = self._any_node()
        self._world.note(f"{node.name}: slow disk")
        node.is_slow = True
        self._later(500 * MS, 8 * SECOND, node.recover_disk)

    def _step_clock(self) -> None:
        node = self._any_node()
        node.wall_shift_ns += self._chance.randrange(-WALL_STEP_NS, WALL_STEP_NS)

    def _hold(self) -> None:
        self.hold(self._any_secondary())

    def hold(self, node: SimNode) -> None:
        """Readers keep a secondary's image as it is for a while."""
        core, life = node.core, node.life
        if not isinstance(core, Secondary) or not node.is_alive or core.hold_apply:
            return
        self._world.note(f"{node.name}: held by readers")
        node.call(lambda: core.set_hold(True, node.now_ns()))
        held = core.engine.applied_epoch if _is_still(core) else NEVER
        self._later(200 * MS, 20 * SECOND, lambda: self._release(node, core, life, held))

    def _release(self, node: SimNode, core: Secondary, life: int, held: int = NEVER) -> None:
        if not node.is_alive or node.life != life or not core.hold_apply:
            return
        engine = core.engine
        # Readers see what a resync changes through undo; applying is what waits for them.
        is_resynced = engine.held is not None or engine.superblock.consistent_from > held
        if not is_resynced and any(each.from_epoch >= held for each in engine.undo.passes()):
            raise OracleError(f"{node.name} applied an epoch after {held} under its readers")
        if _is_still(core):
            node.watch.check_image()
        node.call(lambda: core.set_hold(False, node.now_ns()))

    def _pause(self) -> None:
        """The operator pauses one peer or all, and resumes later."""
        node = self._simulation.primary
        core, life = node.core, node.life
        if not isinstance(core, Primary) or not node.is_alive:
            return
        peer = self._chance.choice([None, *core.senders])
        self._world.note(f"{node.name}: pause {peer}")
        node.call(lambda: core.pause(peer, is_paused=True))
        self._later(200 * MS, 20 * SECOND, lambda: self._resume(node, core, peer, life))

    def _resume(self, node: SimNode, core: Primary, peer: str | None, life: int) -> None:
        if node.is_alive and node.life == life:
            node.call(lambda: core.pause(peer, is_paused=False))

    def _change_policy(self) -> None:
        """The operator changes what flushes wait for."""
        node, sync = self._simulation.primary, self._simulation.sync
        core = node.core
        if isinstance(core, Primary) and node.is_alive and core.fenced is None:
            sync.policy = draw_policy(self._chance, list(core.senders))
            self._world.note(f"{node.name}: settings {sync.policy}")
            node.call(lambda: core.set_policy(sync.policy, node.now_ns()))

    def _snapshot(self) -> None:
        """Take a snapshot of a secondary's disk; the next time, put it back."""
        node = self._any_secondary()
        if node.is_primary:
            return  # See `put_back`.
        snapshot = self._snapshots.pop(node.name, None)
        if snapshot is not None:
            self._simulation.put_back.copy_returned(node)
            if node.is_alive:
                self._simulation.crash(node, is_kill=False)
            self._world.note(f"{node.name}: the disk is put back to its snapshot")
            node.store.restore(snapshot)
            self._simulation.oracle.restored(node.name)
            self._simulation.verdicts.put_back(node.name)
            self._simulation.placing.forget(node)
        elif node.is_alive and node.core.fenced is None:
            states = {node.engine.superblock.data_state, node.engine._written.data_state}
            if states == {CONSISTENT}:
                self._world.note(f"{node.name}: snapshot of the disk")
                self._snapshots[node.name] = node.store.snapshot()


def _is_still(core: Secondary) -> bool:
    """The image is at an epoch and nothing is changing it."""
    is_settled = core.is_image_settled and not core.is_running("resync")
    return is_settled and core.fenced is None and core.data_state == CONSISTENT
