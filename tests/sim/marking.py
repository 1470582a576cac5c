"""The operator marks, and what must be true of marks.

M1 a mark whose command returned is at the primary in every later life, until it is deleted.
M2 a secondary that has its epoch durable by the stream knows it and holds it.
M3 whoever holds a mark can show exactly the primary's content at its epoch: the image as it is, or
with undo, block by block. M4 when faults stop, every member has the primary's names, and no others.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from geomirror.errors import GeomirrorError, LimitExceededError, RefusedError
from geomirror.volume.mark_log import holds_state
from geomirror.volume.marks import Mark
from geomirror.volume.undo_history import History
from geomirror.wan_protocol.mark_making import MarkRequest
from geomirror.wan_protocol.primary import Primary
from tests.sim.node import SimNode
from tests.sim.options import NEVER
from tests.sim.oracle import BLOCK, OracleError
from tests.sim.viewing import CheckedView
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

NAMES = [f"mark-{number}" for number in range(14)]
"""Two more than the limit takes."""
CALM_FACTOR = 8
"""Operations are so much rarer between storms: each new mark is an epoch, and a pass everywhere."""
LOOK_NS = (100 * MS, 1500 * MS)
STATE_CHANCE = 0.1
"""That a held mark is read at a look at a node that changed since the last look or the one before:
what was read stays as it is until something changes, and opening a view reads all tables since."""
STATES_AT_END = 2
BLOCKS_MAX = 8
EPOCHS_MAX = 6
"""Blocks looked at are those that changed in so many epochs after the mark."""


def draw_marks(seed: int) -> int:
    """Mean time between two operations on marks in storms of a run; in some there are none."""
    chance = random.Random(f"{seed}/marks")
    return NEVER if chance.random() < 0.25 else int(chance.uniform(0.2, 3) * SECOND)


class Seen(NamedTuple):
    """What the marked states of a node rested on at a look."""

    key: tuple[int, int, int]
    """Life, version of the marks, applied epoch."""
    history: History
    is_settled: bool
    """It was the same at the look before."""


class Marking:
    """Makes, confirms and deletes marks, and looks at every member's table now and then."""

    def __init__(self, simulation: Simulation, seed: int, mean_ns: int) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._chance = random.Random(f"{seed}/marking")
        self._looks = random.Random(f"{seed}/marks looked at")
        """Of its own: what is looked at does not change what is done."""
        self._seen: dict[str, Seen] = {}
        self._mean_ns = mean_ns
        self._is_light = simulation.is_succession
        """What was answered by one primary need not be known to the next: M3 and M4 only."""
        self.made: dict[str, Mark] = {}
        """What the operator was told, by name."""
        self._open: list[MarkRequest] = []
        self._changing: dict[str, tuple[int, Mark | None]] = {}
        """Name → (end LSN, mark then) of changes that are not durable yet."""
        self._doubtful: set[str] = set()
        """Names of which an earlier life had not answered."""
        self.checks = 0
        self.held = 0

    def begin(self) -> None:
        """Start to work and to look."""
        if self._mean_ns != NEVER:
            self._work()
            self._look()

    def _work(self) -> None:
        if self._simulation.client.is_ending:
            return
        self._world.after(int(self._mean_ns * self._chance.expovariate(1)) + MS, self._work)
        if not self._simulation.client.is_storm and self._chance.random() * CALM_FACTOR >= 1:
            return
        node = self._simulation.primary
        if node.is_alive and node.core.fenced is None:
            node.call(lambda: self._operate(node))

    def _operate(self, node: SimNode) -> None:
        core, now_ns = node.core, node.now_ns()
        if not isinstance(core, Primary) or core.is_frozen:
            return
        self._collect(node)
        name = self._chance.choice(NAMES)
        known = core.engine.marks.table.find(name)
        is_busy = name in self._changing or name in self._doubtful
        try:
            if known is None or is_busy or self._chance.random() < 0.3:
                self._open.append(core.mark(name, now_ns, node.wall_ns()))
                if known is not None and not is_busy and not self._is_light:
                    raise OracleError(f"{name} was made twice")
            elif self._chance.random() < 0.3:
                confirmed = known._replace(is_quiesced=True)
                self._changing[name] = core.confirm_mark(known, now_ns), confirmed
            else:
                _, end_lsn = core.delete_mark(name, now_ns)
                self._changing[name] = end_lsn, None
        except (RefusedError, LimitExceededError):
            pass
        except GeomirrorError:
            # The disk: the change was not made, or a crash will tell.
            self._doubtful.add(name)

    def _collect(self, node: SimNode) -> None:
        """Take the answers that are there."""
        durable_lsn = node.engine.journal.durable_lsn
        for name, (end_lsn, mark) in list(self._changing.items()):
            if durable_lsn >= end_lsn:
                del self._changing[name]
                self.made.pop(name, None)
                if mark is not None:
                    self.made[name] = mark
        # A name that was deleted a moment ago may be given again: in this order.
        for request in [r for r in self._open if r.is_done]:
            self._open.remove(request)
            if request.error is None and request.mark is not None:
                self.made[request.name] = request.mark
                self._doubtful.discard(request.name)

    def recovered(self, node: SimNode) -> None:
        """M1, after a crash of the primary: what was not answered may be either way."""
        self._doubtful |= {request.name for request in self._open} | set(self._changing)
        self._open.clear()
        self._changing.clear()
        self._check_primary(node)
        table = node.engine.marks.table
        for name in sorted(self._doubtful):
            self.made.pop(name, None)
            mark = table.find(name)
            if mark is not None:
                self.made[name] = mark
        self._doubtful.clear()

    def _check_primary(self, node: SimNode) -> None:
        if node.is_damaged or self._is_light:
            return
        table = node.engine.marks.table
        told = {name: mark for name, mark in self.made.items() if name not in self._unsure()}
        for name, mark in told.items():
            if table.find(name) != mark:
                raise OracleError(f"{node.name}: {table.find(name)} is there, {mark} was answered")
        for mark in table.marks():
            if mark.name not in self._unsure() and mark.name not in self.made:
                raise OracleError(f"{node.name}: {mark} is there, nobody made it")
            if not table.is_held(mark):
                raise OracleError(f"{node.name}: {mark} is not held where it was made")

    def _unsure(self) -> set[str]:
        return self._doubtful | {r.name for r in self._open} | set(self._changing)

    def _look(self) -> None:
        if not self._simulation.client.is_ending:
            self._world.after(int(self._chance.uniform(*LOOK_NS)), self._look)
        self.check()

    def check(self) -> None:
        """M1 to M3, for everybody who is up."""
        primary = self._simulation.primary
        if primary.is_alive and primary.core.fenced is None and primary.is_primary:
            self._collect(primary)
            self._check_primary(primary)
        for node in self._simulation.nodes.values():
            if node.is_alive and node.core.fenced is None and not node.is_damaged:
                if not node.is_primary and not self._is_light:
                    self._check_secondary(node)
                self._check_states(node)
        self.checks += 1

    def _check_secondary(self, node: SimNode) -> None:
        """M2."""
        engine = node.engine
        table = engine.marks.table
        unsure = self._unsure()
        for name, mark in self.made.items():
            is_there = mark.epoch <= engine.sealed_epoch and _is_streamed(node, mark.epoch)
            found = table.find(name)
            if is_there and name not in unsure and (found is None or found[:3] != mark[:3]):
                raise OracleError(f"{node.name} has epoch {mark.epoch} and not {mark}")
        for mark in table.marks():
            # Marks of a resync may be here still when a power cut gives the copy before it back.
            is_there = mark.epoch <= engine.sealed_epoch
            is_state = is_there and holds_state(engine.superblock, mark.epoch)
            is_held = table.is_held(mark)
            is_whole = engine.superblock.data_state == "consistent"
            is_missed = is_whole and _is_streamed(node, mark.epoch) and is_state > is_held
            if is_held > is_state or is_missed:
                raise OracleError(f"{node.name}: {mark} is held: {is_held}, which is wrong")

    def _check_states(self, node: SimNode) -> None:
        """M3."""
        engine, core = node.engine, node.core
        if not core.is_image_settled or core.is_running("resync"):
            return
        if engine.superblock.data_state != "consistent":
            return
        count = self._count_states(node)
        marked = engine.marks.table.marked_epochs()
        if not marked or (count == 0 and self._seen[node.name].is_settled):
            return
        kept = engine.undo.history.kept(engine.applied_epoch)
        horizon = kept[0].from_epoch if kept else engine.applied_epoch
        ends = {horizon, engine.applied_epoch, *(each.to_epoch for each in kept)}
        held = [epoch for epoch in marked if horizon <= epoch <= engine.applied_epoch]
        for epoch in held:
            if epoch not in ends:
                raise OracleError(f"{node.name}: no pass ends at marked epoch {epoch}")
        if held:
            with node.store.undisturbed():
                for epoch in self._looks.sample(held, min(count, len(held))):
                    self._check_state(node, epoch)
                    self.held += 1

    def _count_states(self, node: SimNode) -> int:
        """How many marks of a node to read at this look."""
        engine, before = node.engine, self._seen.get(node.name)
        key = (node.life, engine.marks.table.version, engine.applied_epoch)
        history = engine.undo.history
        is_settled = before is not None and before.key == key and before.history is history
        was_settled = before is not None and before.is_settled
        self._seen[node.name] = Seen(key, history, is_settled)
        if self._simulation.faults.is_ending:
            return STATES_AT_END
        is_due = not (is_settled and was_settled)
        return int(is_due and self._looks.random() < STATE_CHANCE)

    def _check_state(self, node: SimNode, epoch: int) -> None:
        engine, oracle = node.engine, node.oracle
        last = min(epoch + EPOCHS_MAX, engine.applied_epoch)
        sizes = oracle.epoch_sizes[epoch]
        touched = {key for n in range(epoch, last + 1) for key in oracle.changes.get(n, [])}
        changed = sorted((v, block) for v, block in touched if block * BLOCK < sizes.get(v, 0))
        view = CheckedView(node, epoch)
        for volume, block in self._looks.sample(changed, min(BLOCKS_MAX, len(changed))):
            size = min(BLOCK, sizes[volume] - block * BLOCK)
            try:
                content = view.read(volume, block * BLOCK, size)
            except LimitExceededError:
                return  # Volumes have grown: more was changed since than a view may hold.
            oracle.undone(node.name, volume, block, epoch, content)

    @property
    def is_converged(self) -> bool:
        """M4: everybody has the primary's marks."""
        tables = [node.engine.marks.table for node in self._simulation.nodes.values()]
        return all(table.marks() == tables[0].marks() for table in tables)


def _is_streamed(node: SimNode, epoch: int) -> bool:
    """It came to this copy after its last resync: of earlier ones some were left out."""
    superblock = node.engine.superblock
    is_whole = superblock.data_state == "consistent"
    if superblock.consistent_from == epoch:
        return is_whole  # What a resync copied was named elsewhere, and is known by its end.
    return (is_whole or superblock.consistent_from >= 0) and superblock.consistent_from < epoch
