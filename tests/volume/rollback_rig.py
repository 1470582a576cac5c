"""An engine that goes back, beside the content of every epoch that it ever had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from geomirror.errors import NotFoundError
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, SIZES, Expected, Rig, Step, Stop, open_engine

WALL_NS = 1_700_000_000_000_000_000
CHANGES = ("write", "sync", "rename", "unlink", "create", "zero", "truncate")


def stop_after(store: SimStore, count: int) -> None:
    """Let the `count`-th change of the disk from now raise `Stop`."""
    left = count

    def look(operation: str, name: str) -> None:
        nonlocal left
        if any(part in operation for part in CHANGES):
            left -= 1
            if left < 0:
                raise Stop(f"{operation} {name}")

    store.on_operation = look


class RollbackRig(Rig):
    """A rig that forgets no epoch, with passes that undo leads back through."""

    follow = False
    """The peer has everything durable soon, and the journal is trimmed."""

    def persist(self) -> None:
        kept = dict(self.epochs)
        super().persist()
        self.epochs = kept

    def settle(self) -> None:
        """Everything in an epoch, durable; some of it applied."""
        self.seal(is_disturbed=False)
        self.sync_all()

    def sync_all(self) -> None:
        job = self.engine.sync_job()
        job.run()
        self.engine.complete_sync(job)
        self.durable_step = len(self.steps)

    def put(self, offset: int, data: bytes) -> None:
        """Write to volume 0."""
        batch = [(1, 0, offset, len(data), memoryview(data))]
        self._write(batch, [Step(1, 0, offset, len(data), data)])

    def checkpoint(self) -> None:
        """Make the superblock durable; nothing is forgotten."""
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)

    def thin(self) -> None:
        engine = self.engine
        if engine.half_applied_through is None:
            passes = engine.undo.passes()[:3]
            follows = all(a.to_epoch == b.from_epoch for a, b in pairwise(passes))
            if len(passes) > 1 and follows and not any(each.is_gap for each in passes):
                ThinJob(engine.store, engine.undo, engine.limits, []).merge(passes)

    def history(self, epochs: int) -> None:
        """Random writes in `epochs` epochs, some passes, some thinning."""
        for _ in range(epochs):
            for _ in range(self.random.randrange(1, 6)):
                self.write()
            self.settle()
            if self.random.random() < 0.4:
                self.apply()
                self.persist()
            if self.random.random() < 0.1:
                self.thin()
            if self.follow:
                self.peer_epoch = self.engine.sealed_epoch
                self.engine.superblock.peers["peer"].durable_epoch = self.peer_epoch
                self.engine.retain("peer", self.peer_epoch)
                self.persist()
                self.upkeep()
        self.persist()

    def go_back(self, target: int, name: str) -> None:
        """Roll back, and let the model be what it was then."""
        self.engine.roll_back(target, name, wall_ns=len(self.batches))
        for number in [each for each in self.epochs if each > target]:
            del self.epochs[number]
        base = self.epochs[target]
        del self.steps[base.step :]
        self.content = {i: bytearray(data) for i, data in base.content.items()}
        self.durable_step = len(self.steps)
        end_lsn = self.engine.journal.end_lsn
        self.epochs[target] = replace(base, end_lsn=end_lsn)
        self.peer_epoch = min(self.peer_epoch, target)

    def check_at(self, epoch: int, expected: Expected) -> None:
        """The engine is exactly at `epoch`."""
        engine = self.engine
        assert engine.sealed_epoch == engine.committed_epoch == engine.applied_epoch == epoch
        assert engine.superblock.rollback is None
        assert engine.sealed_hash == engine.applied_hash == expected.chain_hash
        assert engine.dirty_entries == 0
        for volume, size in SIZES.items():
            assert engine.images[volume].read(0, size) == expected.content[volume]
            assert engine.read(volume, 0, size) == expected.content[volume]

    def check_history(self, expected: dict[int, Expected]) -> None:
        """Whatever undo says to lead to shows exactly that."""
        engine = self.engine
        kept = engine.undo.history.kept(engine.applied_epoch)
        for epoch in [each.from_epoch for each in kept] + [engine.applied_epoch]:
            view = View(
                epoch, engine.images, lambda: engine.undo.history, engine.store.open, 1 << 20
            )
            for volume, size in SIZES.items():
                assert view.read(volume, 0, size) == expected[epoch].content[volume]

    def check_branch(self, name: str, base: Expected, tip: Expected) -> None:
        """The branch shows the tip, and holds the blocks that the tail changed and no other."""
        view = self.engine.view_branch(name)
        changed = set()
        for step in self.steps[base.step : tip.step]:
            end = -(-(step.offset + step.length) // BLOCK)
            changed.update((step.volume, block) for block in range(step.offset // BLOCK, end))
        try:
            held = [
                (volume, block + i) for volume, block, count, _ in view.runs() for i in range(count)
            ]
            assert held == sorted(changed)
            for volume, size in SIZES.items():
                assert view.read(volume, 0, size) == tip.content[volume]
        finally:
            view.close()

    def stop_after(self, count: int) -> None:
        """Stop the machine at a change of the disk, the `count`-th from now."""
        stop_after(self.store, count)

    def reopen(self, *, lose_nothing: bool = False) -> None:
        """The machine comes back."""
        self.store.on_operation = None
        self.store.crash(lose_nothing=lose_nothing)
        self.opened += 1
        self.engine = open_engine(self.store, self.seed * 1000 + self.opened)

    def reopen_stopped(self) -> None:
        """Open while `stop_after` is in force."""
        self.opened += 1
        self.engine = open_engine(self.store, self.seed * 1000 + self.opened)


def message_of(call: Callable[[], object]) -> str:
    """The message."""
    try:
        call()
    except NotFoundError as error:
        return str(error)
    raise AssertionError("it was found")
