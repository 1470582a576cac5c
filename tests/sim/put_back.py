"""An older state of a node's whole disk is put back under it, and it does not win.

Of a copy (`faults` does it): P2 a primary that was told more in this life notices it, and does not
count the copy as in sync any more. Of the primary: whoever writes keeps a snapshot of its disk now
and then; later the disk is that again, whatever became of the node meanwhile. It goes on from
there, so the history forks within a generation: what it writes from then on is on another line than
what the copies have of it (`Oracle.twin`). Which of the lines a node is on is what its list of
starts says; O1 to O6 are judged by that line, so none of its epochs is overwritten, forgotten or
shown as another one's without a branch of it.
P1: a copy with epochs that the primary has lost says so, and so does the primary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomirror.wan_protocol.messages import SessionAccept
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from geomirror.wan_protocol.sender import FOLD, STREAM
from tests.sim.disk_file import Inode
from tests.sim.node import SimNode
from tests.sim.options import NEVER
from tests.sim.oracle import Oracle, OracleError
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

CALM_FACTOR = 6
LATER_NS = (SECOND, 30 * SECOND)
"""From a snapshot to its return."""


def draw_put_backs(seed: int) -> int:
    """Mean time between snapshots of the primary's disk in storms of a run with successions; in
    most there are none."""
    chance = random.Random(f"{seed}/put back")
    return NEVER if chance.random() < 0.6 else int(chance.uniform(4, 20) * SECOND)


@dataclass
class Older:
    """A disk as it was, and what was true of it."""

    disk: dict[str, Inode]
    line: Oracle


class PutBack:
    """Takes snapshots of whoever is the primary, and puts them back."""

    def __init__(self, simulation: Simulation, seed: int, mean_ns: int) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._chance = random.Random(f"{seed}/putting back")
        self._mean_ns = mean_ns
        self.count = 0
        self._said: dict[tuple[str, int, str], int] = {}
        """Primary, its life and a copy → the epoch that it knew to be durable there."""
        self.refused = 0
        """How often a copy was seen that refuses its primary for it."""

    @property
    def is_on(self) -> bool:
        """Whether it happens in this run."""
        return self._mean_ns != NEVER

    def begin(self) -> None:
        """Schedule what the options ask for."""
        if self.is_on:
            self._work()

    def _work(self) -> None:
        simulation = self._simulation
        if simulation.faults.is_ending:
            return
        self._world.after(int(self._mean_ns * self._chance.expovariate(1)) + MS, self._work)
        if simulation.client.is_storm or self._chance.random() * CALM_FACTOR < 1:
            self._take(simulation.primary)
        self._look()

    def _take(self, node: SimNode) -> None:
        core = node.core
        is_writer = node.is_alive and node.roles.is_writer and core.fenced is None
        placing = self._simulation.placing
        if not is_writer or core.is_frozen or node.is_damaged or not placing.is_writer(node):
            return
        line = node.oracle.twin(f"{node.engine.generation.hex()}#{self.count}")
        self.count += 1
        self._simulation.sync.fork(node.oracle, line)
        older = Older(node.store.snapshot(), line)
        self._world.note(f"{node.name}: snapshot of the disk of a primary, {line.sealed_epoch}")
        self._world.after(self._world.between(*LATER_NS), lambda: self._return(node, older))

    def _return(self, node: SimNode, older: Older) -> None:
        simulation = self._simulation
        if simulation.faults.is_ending:
            return
        if node.is_alive:
            simulation.crash(node, is_kill=False)
        self._world.note(f"{node.name}: the disk is put back, to epoch {older.line.sealed_epoch}")
        node.store.restore(older.disk)
        simulation.placing.put_back(node, older.line)

    def _look(self) -> None:
        """P1: who refuses for it is believed by both sides."""
        nodes = self._simulation.nodes
        for node in nodes.values():
            core = node.core
            if not node.is_alive or not isinstance(core, Secondary) or not core.put_back_primary:
                continue
            self.refused += 1
            primary = nodes[core.put_back_primary]
            if primary.engine.generation != node.engine.generation:
                continue  # It went over to another history meanwhile.
            if not self._simulation.placing.is_put_back(primary):
                raise OracleError(f"{node.name}: {core.refusal}, which it was not")
            self._check_told(node, primary)

    def _check_told(self, node: SimNode, primary: SimNode) -> None:
        core = primary.core
        if not primary.is_alive or not isinstance(core, Primary) or core.is_frozen:
            return
        sender = core.senders.get(node.name)
        if sender is not None and sender.is_open:
            raise OracleError(f"{primary.name} streams to {node.name}, which has what it lost")

    # Copies.

    def copy_returned(self, copy: SimNode) -> None:
        """An older disk is put into the machine of a copy."""
        for node in self._simulation.nodes.values():
            core = node.core
            sender = core.senders.get(copy.name) if isinstance(core, Primary) else None
            if not node.is_alive or sender is None or not sender.is_open:
                continue
            if sender.mode in (STREAM, FOLD) and sender.data_state == CONSISTENT:
                self._said[node.name, node.life, copy.name] = sender.durable_epoch

    def accepted(self, node: SimNode, peer: str, message: SessionAccept) -> None:
        """P2: a primary has heard where a copy stands."""
        said = self._said.pop((node.name, node.life, peer), None)
        core = node.core
        if said is None or message.durable_epoch >= said or not isinstance(core, Primary):
            return
        sender = core.senders[peer]
        if sender.is_open and (not sender.gone_back_from or core.is_in_sync(peer)):
            raise OracleError(
                f"{peer} had epoch {said} durable, comes back with {message.durable_epoch}, and "
                f"{node.name} has not noticed"
            )
