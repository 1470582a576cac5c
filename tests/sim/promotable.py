"""O11: whatever is cut off during a resync, a copy that was consistent still is, or can be.

At any operation on the disk of a secondary that is held at E0, its machine may be lost but for the
disk: from a copy of that, after a power cut, the engine has to recover, go back, and hold exactly
S(E0); and again when the power goes away while it goes back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from tests.sim.disk import SimStore
from tests.sim.oracle import BLOCK, OracleError
from tests.sim.placing import Placing

if TYPE_CHECKING:
    from tests.sim.node import SimNode

OPERATIONS_MAX = 24
"""A cut comes within so many operations of one job."""


CUT = "cut"
"""Reason of a generation that only a copy of a disk has."""


class _CutError(BaseException):
    """The power goes away."""


@dataclass
class CutCheck:
    """Makes cuts and looks at what is left."""

    placing: Placing
    limits: Limits
    chance: random.Random
    part: float = 0.02
    """Of the jobs of a held secondary that are cut somewhere."""
    cuts: int = 0
    returns: int = 0
    """Cuts after which the copy had to go back."""
    promotions: int = 0
    """Cuts after which it was promoted and went back behind its readers."""

    def watch(self, node: SimNode) -> None:
        """A job of this node runs next: perhaps look in the middle of it."""
        store, engine = node.store, node.engine
        is_due = engine.superblock.held is not None and self.chance.random() < self.part
        if not is_due or store.on_operation is not None or node.is_damaged:
            return
        left = self.chance.randrange(OPERATIONS_MAX)

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                store.on_operation = None
                self.cut(node, f"{operation} {name}")

        store.on_operation = count

    def cut(self, node: SimNode, where: str) -> None:
        """Lose the machine, in a copy of its disk.

        :raises OracleError: what is left is not promotable, or not what it says.
        """
        written = node.engine._written
        floor: int | None = None
        if written.held is not None:
            floor = written.held.epoch
        elif written.data_state == "consistent":
            floor = written.applied_epoch
        store = node.store.clone(self.chance.random())
        store.crash(lose_nothing=self.chance.random() < 0.2)
        epoch = self._after(store, node.name, where)
        if floor is not None and (epoch is None or epoch < floor):
            raise OracleError(f"O11: {node.name} cut in {where}: at {epoch}, was at {floor}")
        self.cuts += 1

    def _after(self, store: SimStore, name: str, where: str) -> int | None:
        try:
            engine = self._opened(store)
            if engine.held is not None and not engine.can_return:
                epoch = engine.held.epoch
                engine.close()
                return epoch
            if engine.held is not None and self.chance.random() < 0.5:
                self.promotions += 1
                engine = self._promoted(store, engine, name, where)
            elif engine.held is not None:
                self.returns += 1
                engine = self._returned(store, engine)
            # A fresh primary reads as the epoch that it was promoted at, wherever its images are.
            promoted = engine.unapplied_promotion
            epoch = engine.state_epoch if promoted is None else promoted
            if epoch is not None:
                self._compare(engine, epoch, name, where)
            engine.close()
        except GeomirrorError as error:
            raise OracleError(f"O11: {name} cut in {where}: {error}") from error
        return epoch

    def _opened(self, store: SimStore) -> Engine:
        entropy = SeededEntropy(str(self.chance.random()))
        return Engine.open(store, self.limits, entropy, lambda volume: store.open("none"))

    def _returned(self, store: SimStore, engine: Engine) -> Engine:
        """Go back, perhaps with another cut on the way."""
        left = self.chance.randrange(40) if self.chance.random() < 0.5 else 1 << 30

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise _CutError

        store.on_operation = count
        try:
            engine.begin_return()
            _checkpoint(engine)
            engine.return_job().run()
            engine.complete_return()
            _checkpoint(engine)
        except _CutError:
            store.on_operation = None
            store.crash()
            engine = self._opened(store)
            if engine.held is not None:
                return self._returned(store, engine)
        finally:
            store.on_operation = None
        return engine

    def _promoted(self, store: SimStore, engine: Engine, name: str, where: str) -> Engine:
        """Make it the primary; readers see E0 at every moment, also after another cut."""
        held = engine.superblock.held
        assert held is not None
        left = self.chance.randrange(40)

        def count(operation: str, file_name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise _CutError

        store.on_operation = count
        try:
            engine.take_held()
            identity = self.chance.randbytes(16)
            job = engine.promote(engine.next_generation(identity, CUT, CUT, 1), [])
            job.run()
            engine.complete_checkpoint(job)
            self._compare(engine, held.epoch, name, where)
            engine.finish_return()
        except _CutError:
            store.on_operation = None
            store.crash()
            engine = self._opened(store)
            if engine.held is not None:
                return self._promoted(store, engine, name, where)
            self._compare(engine, held.epoch, name, where)
            engine.finish_return()
        finally:
            store.on_operation = None
        return engine

    def _compare(self, engine: Engine, epoch: int, name: str, where: str) -> None:
        # A generation that began here has nothing of its own.
        chain = [g for g in engine.superblock.chain if g.reason != CUT]
        oracle = self.placing.line_of(engine.superblock, chain)
        rotten = oracle.rotten.get(name, ())
        for volume, image in engine.images.items():
            content = image.read(0, image.size_bytes)
            for block in range(image.block_count):
                held = content[block * BLOCK : (block + 1) * BLOCK].ljust(BLOCK, b"\0")
                is_same = held == oracle.block_at(volume, block, epoch)
                if not is_same and (volume, block) not in rotten:
                    place = f"block {block} of volume {volume}"
                    raise OracleError(f"O11: {name} cut in {where}: {place} is not that of {epoch}")
        oracle.checks += 1


def _checkpoint(engine: Engine) -> None:
    job = engine.checkpoint_job()
    assert job is not None
    job.run()
    engine.complete_checkpoint(job)
