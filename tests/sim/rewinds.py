"""The operator rewinds the primary, and commits that or takes it back.

R1 after a rewind the volumes are S of its epoch, and after a return what they were before the
rewind, whatever stopped the machine in between; both are judged from the disk, when the resource is
opened anew. R2 nobody serves a part of a return. What was cut off is a branch until it is committed
(O6).
The steps are the product's (`node.rewinding`), done as its service does them: the resource is
closed, they are done, it is opened again. Returns of more than one epoch have tests of their own
(`tests/node`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from geomirror.errors import LimitExceededError, NotFoundError, RefusedError
from geomirror.node import branch_intake, rewinding
from geomirror.node.branch_desk import REWOUND, rewind_branch
from geomirror.node.context import NodeContext
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from geomirror.wan_protocol.sender import FOLD, STREAM
from tests.sim.options import NEVER
from tests.sim.oracle import OracleError
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.node import SimNode
    from tests.sim.simulation import Simulation

CALM_FACTOR = 6
NEWEST = 3
"""A rewind goes to one of so many of the newest points: what a return takes in is bounded."""

OPERATIONS_MAX = 250
"""A machine that stops in a rewind or a return does so at one of so many operations on its disk."""

Content = dict[int, bytes]
Errand = Callable[["SimNode"], None]
"""What a node does with its resource while that is closed."""


def draw_rewinds(seed: int) -> int:
    """Mean time between two looks whether to rewind; in half of the runs there are none."""
    chance = random.Random(f"{seed}/rewinds")
    return NEVER if chance.random() < 0.5 else int(chance.uniform(2, 12) * SECOND)


@dataclass
class _Clock:
    node: SimNode

    def wall_ns(self) -> int:
        return self.node.wall_ns()


@dataclass
class _Context:
    """What rewinding needs of a node."""

    name: str
    clock: _Clock
    entropy: Any


def _context(node: SimNode) -> NodeContext:
    return cast(NodeContext, _Context(node.name, _Clock(node), node.entropy))


class Rewinds:
    """Draws and does them in one run."""

    def __init__(self, simulation: Simulation, seed: int, mean_ns: int) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._chance = random.Random(f"{seed}/rewinding")
        self._mean_ns = mean_ns
        self.counts: dict[str, int] = {}

    def begin(self) -> None:
        """Schedule what the options ask for."""
        if self._mean_ns != NEVER:
            self._world.after(int(self._mean_ns * self._chance.expovariate(1)) + MS, self._work)

    def _work(self) -> None:
        simulation = self._simulation
        if simulation.faults.is_ending:
            return
        self._world.after(int(self._mean_ns * self._chance.expovariate(1)) + MS, self._work)
        if not simulation.client.is_storm and self._chance.random() * CALM_FACTOR >= 1:
            return
        node = simulation.primary
        core = node.core
        is_free = node.is_alive and isinstance(core, Primary) and core.fenced is None
        if not is_free or core.is_frozen or node.roles.stage != "Primary":
            return
        try:
            self._operate(node)
        except (NotFoundError, RefusedError, LimitExceededError) as error:
            self._world.note(f"{node.name}: no rewind: {error}")

    def _operate(self, node: SimNode) -> None:
        engine = node.engine
        branch = _rewound(engine)
        if branch is None or self._chance.random() < 0.2:
            points = [each for each in engine.rollback_points() if each < engine.sealed_epoch]
            if points:
                epoch = self._chance.choice(points[-NEWEST:])
                self._require_copies(node, epoch)
                self._do(node, "rewind", partial(_rewind, epoch=epoch))
        elif self._chance.random() < 0.3:
            self._count("commit")
            for each in self._simulation.nodes.values():
                if each.is_alive and branch.name in [
                    b.name for b in each.engine.branches.records()
                ]:
                    each.run_blocking(partial(each.engine.drop_branch, branch.name))
        else:
            self._require_copies(node, branch.base_epoch)
            with node.store.undisturbed():
                is_small = branch_intake.is_one_epoch(
                    engine, branch_intake._size_of(engine, branch.name)
                )
            if not is_small:
                raise RefusedError("more than one epoch is not looked at here")
            self._do(node, "return", partial(_return, branch=branch))

    def _do(self, node: SimNode, kind: str, errand: Errand) -> None:
        self._count(kind)
        self._world.note(f"{node.name}: {kind}")
        self._simulation.crash(node, is_kill=True)
        is_stopped = self._chance.random() < 0.4
        count = self._chance.randrange(1, OPERATIONS_MAX) if is_stopped else 0
        node.errand = partial(_stopping, errand=errand, count=count)

    def _count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _require_copies(self, node: SimNode, epoch: int) -> None:
        """As the command does: every copy is there and can go back, too."""
        core = node.core
        assert isinstance(core, Primary)
        chain_hash = node.engine.rollback_target(epoch).chain_hash
        for name in node.others:
            other, sender = self._simulation.nodes[name], core.senders[name]
            is_streamed = sender.is_open and sender.mode in (STREAM, FOLD)
            if not is_streamed or sender.data_state != CONSISTENT or not other.is_alive:
                raise RefusedError(f"the copy at {name} is {sender.mode}")
            if not isinstance(other.core, Secondary) or other.core.fenced is not None:
                raise RefusedError(f"{name} does not answer")
            if other.engine.committed_epoch > epoch:
                other.engine.retreat_point(epoch, chain_hash)


def is_rewind(generation: GenerationRecord) -> bool:
    """Whether a history was begun by a rewind, or by its end: members follow it by themselves."""
    reason = generation.reason
    is_over = reason in (REWOUND, rewinding.RETURNED)
    return is_over or reason.startswith(rewinding.RETURNING)


def _rewound(engine: Engine) -> BranchRecord | None:
    """The branch of the last rewind, if that is neither committed nor taken back."""
    last = engine.superblock.chain[-1]
    name = rewind_branch(last.identity)
    found = [each for each in engine.branches.records() if each.name == name]
    return found[0] if found and last.reason == REWOUND else None


# What is done while the resource is closed.


def open_quietly(node: SimNode) -> None:
    """The resource was just opened and nobody is served: end what a crash left, run the errand.

    :raises GeomirrorError: of the disk: the machine is started again, which ends it.
    """
    errand, node.errand = node.errand, None
    superblock = node.engine.superblock
    if superblock.role != "primary" or not superblock.chain:
        return
    reason = superblock.chain[-1].reason
    if errand is None and not reason.startswith(rewinding.RETURNING):
        return
    _follow_steps(node)
    if reason.startswith(rewinding.RETURNING):
        node.world.note(f"{node.name}: a return is gone on with")
        rewinding.finish_return(node.engine, _context(node))
        _check_returned(node, node.setup.placing.taken_in[reason[len(rewinding.RETURNING) :]])
    elif errand is not None and not superblock.superseded_by:
        try:
            errand(node)
        except (NotFoundError, RefusedError, LimitExceededError) as error:
            node.world.note(f"{node.name}: it is refused: {error}")
            _reopen(node)
    if node.engine.superblock.chain[-1].reason.startswith(rewinding.RETURNING):
        raise OracleError(f"R2: {node.name} serves a part of a return")


def _follow_steps(node: SimNode) -> None:
    """Let the oracle know of a generation before anything of it is on the disk."""
    engine, placing = node.engine, node.setup.placing
    real = engine.roll_back
    node.watch_writes()

    def roll_back(to_epoch: int, name: str, **options: Any) -> Any:
        chain = options.get("chain")
        assert chain is not None
        placing.begin_rewound(node, chain)
        return real(to_epoch, name, **options)

    engine.roll_back = roll_back  # type: ignore[method-assign]


def _stopping(node: SimNode, errand: Errand, count: int) -> None:
    """Do it, and let the power go away at the count-th operation on the disk; 0: at none."""
    node.stop_at_operation(count)
    errand(node)
    node.stop_at_operation(0)


def _rewind(node: SimNode, epoch: int) -> None:
    rewinding.rewind(node.engine, _context(node), epoch)
    _reopen(node)
    _compare(node, node.oracle.content_at(epoch), f"after a rewind to epoch {epoch}")


def _return(node: SimNode, branch: BranchRecord) -> None:
    if branch.name not in [each.name for each in node.engine.branches.records()]:
        return
    node.setup.placing.taken_in[branch.name] = branch
    rewinding.begin_return(node.engine, _context(node), branch)
    _check_returned(node, branch)


def _check_returned(node: SimNode, branch: BranchRecord) -> None:
    engine, placing, oracle = node.engine, node.setup.placing, node.oracle
    for number in range(oracle.sealed_epoch + 1, engine.sealed_epoch + 1):
        oracle.sealed(number, engine.epoch_info(number).chain_hash)
    _reopen(node)
    expected = placing.lines[branch.generation].content_at(branch.end_epoch)
    _compare(node, expected, f"after the return of {branch.name}")


def _reopen(node: SimNode) -> None:
    """As the service does: what counts is on the disk."""
    for wrapped in ("cut", "write", "grow", "roll_back"):
        node.engine.__dict__.pop(wrapped, None)
    node.engine.close()
    node.engine = Engine.open(
        node.store, node.setup.limits, node.entropy, lambda volume: node.store.open("none")
    )


def _compare(node: SimNode, expected: Content, when: str) -> None:
    with node.store.undisturbed():
        sizes = node.engine.sizes.now.items()
        found = {volume: node.engine.read(volume, 0, size) for volume, size in sizes}
    if found != expected:
        raise OracleError(f"R1: {node.name} holds something else {when}")
    node.setup.placing.rewinds += 1
    node.oracle.checks += 1
