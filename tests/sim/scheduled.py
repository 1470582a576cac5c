"""Comparisons that begin by themselves, with what a node keeps of them across crashes and roles.

V4 one that comes to its end has looked at every block: those that differed all the while are
counted, however often it was interrupted; and when faults stop, every copy is compared from begin
to end within two intervals.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from geomirror.environment import SECOND
from geomirror.limits import KIB
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.verify_run import CLEAN, DONE, Position, VerifyRun
from geomirror.wan_protocol.verify_schedule import Copy, Times, choose, why_anew
from tests.sim.node import SimNode
from tests.sim.options import NEVER
from tests.sim.oracle import BLOCK, OracleError

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

TICK_NS = SECOND // 2
RATE = 256 * KIB
END_NS = 60 * SECOND
"""A comparison of these volumes takes no longer once nothing goes wrong."""
Key = tuple[int, int]


@dataclass
class Kept:
    """Of one copy, at one node: what its file would have."""

    times: Times
    position: Position | None = None
    """Of one that is not at its end."""
    generation: str = ""
    epoch: int = 0
    noted_wall_ns: int = 0
    started_wall_ns: int = 0
    differing: set[Key] = field(default_factory=set)
    """Blocks that differed when it began, and have not rotted again since."""
    since_epoch: int = 0
    """Applied at the copy by then; what is written later may be compared as it is then."""


class Scheduled:
    """Does what a node does once a second."""

    def __init__(self, simulation: Simulation, every_ns: int) -> None:
        self._simulation = simulation
        self._every_ns = every_ns
        self._kept: dict[tuple[str, str], Kept] = {}
        self._runs: dict[tuple[str, str], VerifyRun] = {}
        self._is_over = False
        self.ended: dict[str, int] = {}
        """By copy."""

    def begin(self) -> None:
        """Start to look."""
        if self._every_ns != NEVER:
            self._simulation.world.after(TICK_NS, self._again)

    def _again(self) -> None:
        if self._is_over:
            return
        self._simulation.world.after(TICK_NS, self._again)
        node = self._simulation.primary
        core = node.core
        if not node.is_alive or not isinstance(core, Primary):
            return
        if core.fenced is None and not core.is_frozen:
            self._tick(node, core)

    def rotted(self, name: str, key: Key) -> None:
        """A block of a copy rots: whether it was seen before says nothing of it now."""
        for (_, peer), kept in self._kept.items():
            if peer == name:
                kept.differing.discard(key)

    def _tick(self, node: SimNode, core: Primary) -> None:
        wall_ns, copies = node.wall_ns(), []
        for peer in sorted(core.senders):
            kept = self._kept.setdefault((node.name, peer), Kept(Times.first_seen(wall_ns)))
            self._note(node, core, peer, kept)
            if kept.position is not None and (node.name, peer) not in self._runs:
                self._go_on(node, core, peer, kept)
            is_running = (node.name, peer) in self._runs
            copies.append(Copy(peer, kept.times, is_running, core.is_comparable(peer)))
        chosen = choose(self._every_ns, copies, wall_ns)
        if chosen is not None:
            kept = self._kept[node.name, chosen]
            kept.started_wall_ns = wall_ns
            kept.differing = self._differing(chosen)
            kept.since_epoch = self._simulation.nodes[chosen].engine.applied_epoch
            self._start(node, core, chosen, kept, None)

    def _start(
        self, node: SimNode, core: Primary, peer: str, kept: Kept, found: Position | None
    ) -> None:
        kept.generation = node.engine.generation.hex()
        kept.position = found or Position()
        before = core.verifies.get(peer)
        if before is not None and not before.is_over:
            return  # The next time.
        node.call(
            lambda: core.start_verify(
                *(peer,), bytes_per_second=RATE, is_healing=False, now_ns=node.now_ns(), found=found
            )
        )
        self._runs[node.name, peer] = core.verifies[peer]

    def _go_on(self, node: SimNode, core: Primary, peer: str, kept: Kept) -> None:
        """After a crash, or as the primary again."""
        position, away_ns = kept.position, node.wall_ns() - kept.noted_wall_ns
        chain = node.engine.superblock.chain
        if why_anew(chain, kept.generation, kept.epoch, away_ns, self._every_ns):
            kept.position = None
            return
        assert position is not None
        self._start(node, core, peer, kept, replace(position, runs=list(position.runs)))

    def _note(self, node: SimNode, core: Primary, peer: str, kept: Kept) -> None:
        run = self._runs.get((node.name, peer))
        if run is None:
            return
        if core.verifies.get(peer) is not run:
            del self._runs[node.name, peer]  # Of a life that is over.
            return
        found = run.position()
        kept.position = replace(found, runs=list(found.runs))
        kept.epoch, kept.noted_wall_ns = run.epoch, node.wall_ns()
        if not run.is_over:
            return
        del self._runs[node.name, peer]
        kept.position = None
        if run.state != DONE:
            return
        kept.times.ended(kept.started_wall_ns, is_clean=run.result == CLEAN)
        self.ended[peer] = self.ended.get(peer, 0) + 1
        changes = self._simulation.oracle.changes
        written = {key for each in changes if each > kept.since_epoch for key in changes[each]}
        missed = (kept.differing & self._differing(peer)) - written
        if run.found.different_blocks < len(missed):
            count = run.found.different_blocks
            raise OracleError(f"V4: {peer}: {count} blocks differ, and {sorted(missed)} do")

    def _differing(self, peer: str) -> set[Key]:
        """Blocks of a copy's images that are not what they should be at its epoch."""
        simulation = self._simulation
        node, oracle = simulation.nodes[peer], simulation.oracle
        if not node.is_alive or simulation.is_succession or node.engine.held is not None:
            return set()
        epoch, found = node.engine.applied_epoch, set()
        # As it lies there; a read would be an operation of the node's disk.
        images = {index: node.store.content(i.file.name) for index, i in node.engine.images.items()}
        for volume, block in oracle.rotten.get(peer, ()):
            size = min(BLOCK, oracle.epoch_sizes[epoch].get(volume, 0) - block * BLOCK)
            if size > 0:
                part = images[volume][block * BLOCK :][:size].ljust(size, b"\0")
                if part != oracle.block_at(volume, block, epoch)[:size]:
                    found.add((volume, block))
        return found

    def finish(self) -> None:
        """No more faults: whatever was interrupted, each copy is compared as a whole, soon."""
        if self._every_ns == NEVER:
            return
        simulation, world = self._simulation, self._simulation.world
        core = simulation.primary.core
        assert isinstance(core, Primary)
        wanted = {peer: self.ended.get(peer, 0) + 1 for peer in core.senders}
        deadline = world.now_ns + 2 * self._every_ns + len(wanted) * END_NS
        while any(self.ended.get(peer, 0) < count for peer, count in wanted.items()):
            if world.now_ns >= deadline:
                raise OracleError(f"V4: of {sorted(wanted)} some are not compared: {self.ended}")
            world.run_until(world.now_ns + SECOND)
        self._is_over = True
