"""Verifies under everything that goes wrong, and disks that rot at rest.

V1 no region is ever called different unless a block of it rotted at one of the two nodes: whatever
is written, applied, copied or lost meanwhile. V2 when faults stop, a verify comes to its end, names
exactly the blocks that rotted, and afterwards every copy is the primary's content, byte for byte.
V3 what is written again for a copy is what a reader of the primary finds there (`oracle`).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from geomirror.limits import KIB
from geomirror.wan_protocol.messages import VerifyAnswer
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.verify_run import CLEAN, DONE, HEALED, Position, VerifyRun
from tests.sim.node import SimNode
from tests.sim.options import NEVER
from tests.sim.oracle import BLOCK, Oracle, OracleError
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

CALM_FACTOR = 8
END_NS = 60 * SECOND
"""A verify of these volumes takes no longer once nothing goes wrong."""
RATES = (256 * KIB, 1024 * KIB, 8192 * KIB)
ROTTEN_MAX = 3
"""Blocks that rot at each node at the end."""


def draw_verifies(seed: int) -> tuple[int, int]:
    """Mean times between verifies, and between blocks that rot, in storms of a run."""
    chance = random.Random(f"{seed}/verifies")
    verifies = NEVER if chance.random() < 0.3 else int(chance.uniform(1, 8) * SECOND)
    rots = NEVER if chance.random() < 0.5 else int(chance.uniform(3, 20) * SECOND)
    return verifies, rots


def draw_interval(seed: int) -> int:
    """How often copies are compared by themselves; never where verifies are begun by hand."""
    chance = random.Random(f"{seed}/scheduled")
    every_ns = int(chance.uniform(2, 20) * SECOND)
    return every_ns if draw_verifies(seed)[0] == NEVER else NEVER


class Verifying:
    """Starts verifies, lets blocks rot, and judges what is found."""

    def __init__(self, simulation: Simulation, seed: int, mean_ns: int, rot_mean_ns: int) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._chance = random.Random(f"{seed}/verifying")
        self._mean_ns, self._rot_mean_ns = mean_ns, rot_mean_ns
        self._positions: dict[str, Position] = {}
        """Of verifies that a crash interrupted, as a node keeps them."""
        self.ended = 0
        self.rotten = 0

    @property
    def _oracle(self) -> Oracle:
        return self._simulation.oracle

    def begin(self) -> None:
        """Start to work."""
        self._repeat(self._mean_ns, self._start)
        if not self._simulation.is_succession:
            # Where the primary changes, what rotted might become what counts.
            self._repeat(self._rot_mean_ns, self._rot)

    def _repeat(self, mean_ns: int, action: object) -> None:
        if mean_ns == NEVER:
            return

        def again() -> None:
            if self._simulation.client.is_ending:
                return
            self._world.after(int(mean_ns * self._chance.expovariate(1)) + MS, again)
            if self._simulation.client.is_storm or self._chance.random() * CALM_FACTOR < 1:
                assert callable(action)
                action()

        self._world.after(int(mean_ns * self._chance.expovariate(1)) + MS, again)

    def _start(self) -> None:
        node = self._simulation.primary
        core = node.core
        if not node.is_alive or core.fenced is not None or not isinstance(core, Primary):
            return
        peer = self._chance.choice(sorted(core.senders))
        run = core.verifies.get(peer)
        if run is not None and not run.is_over:
            self._positions[peer] = run.position()
            if self._chance.random() < 0.1:
                node.call(lambda: core.stop_verify(peer, "by hand", node.now_ns()))
            return
        if run is not None and run.state == DONE:
            self._judge(run)
            self._positions.pop(peer, None)
        self._begin_run(node, core, peer, self._positions.get(peer))

    def _begin_run(
        self, node: SimNode, core: Primary, peer: str, found: Position | None = None
    ) -> VerifyRun:
        rate, heals = self._chance.choice(RATES), self._chance.random() < 0.8
        node.call(
            lambda: core.start_verify(
                peer, bytes_per_second=rate, is_healing=heals, now_ns=node.now_ns(), found=found
            )
        )
        return core.verifies[peer]

    def _judge(self, run: VerifyRun) -> None:
        """V1 for a verify that has come to its end."""
        self.ended += 1
        known = self._known(run.peer)
        for volume, first, count in run.found.runs:
            for block in range(first, first + count):
                if (volume, block) not in known:
                    raise OracleError(f"V1: {run.peer}: block {block} of volume {volume} differs")

    def answered(self, peer: str, primary: str, answer: VerifyAnswer) -> None:
        """V1 for what a secondary just said."""
        nodes = self._simulation.nodes
        core = nodes[primary].core
        if not isinstance(core, Primary):
            return
        run = core.verifies.get(peer)
        ask = None if run is None or run.round is None else run.round.asks.get(answer.ask)
        if ask is None or nodes[primary].is_damaged or nodes[peer].is_damaged:
            return
        step = core.limits.verify_region_blocks
        known = self._known(peer)
        for region, _ in answer.different:
            first = ask.span.first + region * step
            if not any((ask.span.volume, first + at) in known for at in range(step)):
                raise OracleError(
                    f"V1: {peer} at epoch {run.round.epoch if run and run.round else 0}: volume "
                    f"{ask.span.volume} is called different from block {first} on"
                )

    def _known(self, peer: str) -> set[tuple[int, int]]:
        """Blocks that may differ between the primary and a copy."""
        rotten = self._oracle.rotten
        return rotten.get(peer, set()) | rotten.get(self._simulation.primary.name, set())

    # Rot.

    def _rot(self) -> None:
        node = self._chance.choice(self._simulation.secondaries)
        if node.is_alive and not node.is_damaged:
            self._rot_block(node)

    def _rot_block(self, node: SimNode) -> tuple[int, int]:
        """One bit of an image flips at rest."""
        images = [image for image in node.engine.images.values() if image.size_bytes]
        image = self._chance.choice(images)
        byte = self._chance.randrange(image.size_bytes)
        node.store.flip_bit(image.file.name, byte * 8 + self._chance.randrange(8))
        key = (image.index, byte // BLOCK)
        self._oracle.rotten.setdefault(node.name, set()).add(key)
        self._simulation.scheduled.rotted(node.name, key)
        self.rotten += 1
        self._world.note(f"{node.name}: block {key[1]} of volume {key[0]} rots")
        return key

    # The end.

    def finish(self) -> None:
        """V2; nothing goes wrong any more, and everybody has everything."""
        simulation = self._simulation
        if any(node.is_damaged for node in simulation.nodes.values()):
            return
        self._compare_all({})
        primary = simulation.primary
        blocks: dict[str, set[tuple[int, int]]] = {}
        for node in simulation.secondaries:
            count = self._chance.randrange(ROTTEN_MAX)
            blocks[node.name] = {self._rot_block(node) for _ in range(count)}
        is_destaged = primary.engine.applied_epoch == primary.engine.sealed_epoch
        if is_destaged and self._chance.random() < 0.3:
            # What it holds now is its content: the first verify brings it to every copy.
            blocks[min(blocks)].add(self._rot_block(primary))
        self._compare_all(blocks)
        self._check_equal()

    def _compare_all(self, blocks: dict[str, set[tuple[int, int]]]) -> None:
        """Verify every copy; with `blocks` it has to find exactly those."""
        simulation, primary = self._simulation, self._simulation.primary
        core = primary.core
        assert isinstance(core, Primary)
        healed: set[tuple[int, int]] = set()
        """What is written again for one copy comes to all of them."""
        rotten_at = primary.engine.sealed_epoch
        for peer in sorted(core.senders):
            before = core.verifies.get(peer)
            if before is not None and not before.is_over:
                core.stop_verify(peer, "the end", primary.now_ns())
            primary.call(
                lambda peer=peer: core.start_verify(
                    peer, bytes_per_second=8 << 20, is_healing=True, now_ns=primary.now_ns()
                )
            )
            run = core.verifies[peer]
            deadline = self._world.now_ns + END_NS
            while not run.is_over:
                if self._world.now_ns >= deadline:
                    raise OracleError(f"V2: the verify of {peer} does not end: {run.reason}")
                self._world.run_until(self._world.now_ns + SECOND // 4)
            simulation.converge()
            if not blocks:
                continue
            # Healed by the stream, before the verify came to it or after.
            written = self._written_since(rotten_at)
            found, rotten = run.found.different_blocks, blocks[peer] - healed
            healed |= blocks[peer]
            is_found = len(rotten - written) <= found <= len(rotten)
            if not is_found or run.result != (HEALED if found else CLEAN):
                raise OracleError(
                    f"V2: {peer}: {found} blocks differ ({run.result}), {len(rotten)} are rotten"
                )

    def _written_since(self, epoch: int) -> set[tuple[int, int]]:
        """Blocks that the client wrote in later epochs."""
        changes = self._simulation.primary.oracle.changes
        return {key for number in changes if number > epoch for key in changes[number]}

    def _check_equal(self) -> None:
        primary = self._simulation.primary
        for volume, size in primary.engine.sizes.now.items():
            expected = primary.engine.read(volume, 0, size)
            for node in self._simulation.secondaries:
                if node.engine.images[volume].read(0, size) != expected:
                    raise OracleError(f"V2: {node.name}: volume {volume} is not healed")
        self._oracle.checks += 1
