"""What the oracle sees of one node: positions as they move, images and undo as they settle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from tests.sim.status_check import StatusCheck

if TYPE_CHECKING:
    from tests.sim.node import SimNode

UNDO_CHANCE = 0.3
UNDO_SAMPLES = 3
"""Old blocks read back after some passes."""


class Watch:
    """Looks at a node after everything it did."""

    def __init__(self, node: SimNode) -> None:
        self.fence_reason = ""
        self._node = node
        self._sealed_seen = 0
        self._applied_seen = -1
        self._status: StatusCheck | None = None

    def begin(self) -> None:
        """A new life."""
        self._status = StatusCheck(self._node) if self._node.is_primary else None
        self._sealed_seen = self._node.engine.sealed_epoch
        self._applied_seen = -1

    def observe(self) -> None:
        """Compare what changed."""
        node = self._node
        if node.core.fenced is not None:
            if not self.fence_reason:
                self.fence_reason = str(node.core.fenced)
                node.world.note(f"{node.name}: fenced: {self.fence_reason}")
                node.setup.on_fenced(node)
            return
        engine = node.engine
        if node.is_primary and self._sealed_seen < engine.sealed_epoch:
            self._see_sealed()
        if engine.applied_epoch == self._applied_seen:
            return
        core = node.core
        if core.is_image_settled and not core.is_running("resync"):
            self._applied_seen = engine.applied_epoch
            if engine.superblock.data_state == CONSISTENT:
                if isinstance(core, Secondary):
                    self.check_image()
                if node.world.random.random() < UNDO_CHANCE:
                    with node.store.undisturbed():
                        self._check_undo()

    def _see_sealed(self) -> None:
        engine, oracle = self._node.engine, self._node.setup.oracle
        numbers = engine.epoch_numbers()
        while self._sealed_seen < engine.sealed_epoch:
            self._sealed_seen += 1
            if self._sealed_seen in numbers:
                oracle.sealed(self._sealed_seen, engine.epoch_info(self._sealed_seen).chain_hash)
            else:
                oracle.sealed_epoch = max(oracle.sealed_epoch, self._sealed_seen)

        if self._status is not None:
            self._status.sealed()

    def check_image(self) -> None:
        """O1 for this secondary."""
        engine = self._node.engine
        with self._node.store.undisturbed():
            content = {i: image.read(0, image.size_bytes) for i, image in engine.images.items()}
        self._node.setup.oracle.applied(self._node.name, engine.applied_epoch, content)

    def _check_undo(self) -> None:
        """O5 for a few blocks, at the start of some pass that can be undone."""
        node = self._node
        engine, oracle, chance = node.engine, node.setup.oracle, node.world.random
        horizon = engine.undo.horizon(engine.applied_epoch)
        starts = [p.from_epoch for p in engine.undo.passes() if p.from_epoch >= horizon]
        if not starts:
            return
        epoch = starts[int(chance.random() * len(starts))]
        changed = oracle.changes.get(epoch + 1, [])
        for _ in range(min(UNDO_SAMPLES, len(changed))):
            volume, block = changed[int(chance.random() * len(changed))]
            content = engine.undo.block_at(volume, block, epoch)
            if content is None:
                content = engine.images[volume].read_block(block)
            oracle.undone(node.name, volume, block, epoch, content)
