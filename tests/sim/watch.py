"""What the oracle sees of one node: positions as they move, images and undo as they settle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomirror.errors import LimitExceededError, NotFoundError
from geomirror.wan_protocol.resync_intake import CONSISTENT
from geomirror.wan_protocol.secondary import Secondary
from tests.sim.oracle import BLOCK
from tests.sim.status_check import StatusCheck
from tests.sim.viewing import CheckedView

if TYPE_CHECKING:
    from tests.sim.node import SimNode

UNDO_CHANCE = 0.3
NEW_VIEW_CHANCE = 0.3
PINNED_CHANCE = 0.5
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
        self._view: CheckedView | None = None
        self._view_volumes: list[int] = []

    def begin(self) -> None:
        """A new life."""
        self._status = StatusCheck(self._node) if self._node.is_primary else None
        self._view = None
        self._sealed_seen = self._node.engine.sealed_epoch
        self._applied_seen = -1

    def observe(self) -> None:
        """Compare what changed."""
        node = self._node
        if node.core.is_frozen:
            return  # Its role changes.
        if node.core.fenced is not None:
            if not self.fence_reason:
                self.fence_reason = str(node.core.fenced)
                node.world.note(f"{node.name}: fenced: {self.fence_reason}")
                node.setup.on_fenced(node)
            return
        engine = node.engine
        if node.setup.is_succession:
            node.setup.placing.look(node)
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
        engine, oracle = self._node.engine, self._node.oracle
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
            images = [(i, image) for i, image in engine.images.items() if image.size_bytes]
            content = {i: image.read(0, image.size_bytes) for i, image in images}
        self._node.oracle.applied(self._node.name, engine.applied_epoch, content)

    def _check_undo(self) -> None:
        """O5 for a few blocks: in a new view of some point, or in one that was opened before."""
        node = self._node
        oracle, chance = node.oracle, node.world.random
        if self._view is None or chance.random() < NEW_VIEW_CHANCE:
            self._open_view()
        view = self._view
        if view is None:
            return
        sizes = oracle.epoch_sizes[view.epoch]
        try:
            found = {index: view.size_of(index) for index in self._view_volumes}
        except (NotFoundError, LimitExceededError):
            self._view = None
            return
        oracle.check_old_sizes(
            node.name, {i: size for i, size in found.items() if size}, view.epoch
        )
        changed = [
            (volume, block)
            for volume, block in oracle.changes.get(view.epoch + 1, [])
            if block * BLOCK < sizes.get(volume, 0)
        ]
        for _ in range(min(UNDO_SAMPLES, len(changed))):
            volume, block = changed[int(chance.random() * len(changed))]
            size = min(BLOCK, sizes[volume] - block * BLOCK)
            try:
                content = view.read(volume, block * BLOCK, size)
            except (NotFoundError, LimitExceededError):
                self._view = None
                return
            oracle.undone(node.name, volume, block, view.epoch, content)

    def _open_view(self) -> None:
        """A view of any epoch that can be restored, pinned half of the time."""
        engine, chance = self._node.engine, self._node.world.random
        kept = engine.undo.history.kept(engine.applied_epoch)
        epochs = [each.to_epoch for each in kept[:-1]]
        engine.undo.unpin("view")
        if not epochs:
            return
        epoch = epochs[int(chance.random() * len(epochs))]
        if chance.random() < PINNED_CHANCE:
            engine.undo.pin("view", epoch)
        self._view_volumes = sorted(engine.physical_images)
        self._view = CheckedView(self._node, epoch)
