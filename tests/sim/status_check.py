"""O9: block status never leaves out a block that a mirror does not hold durably.

Asked of the primary at some of its epochs, about a mirror whose session is open and whose image is
consistent: what the mirror holds is then the content at its last sealed epoch, from the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomirror.volume.block_runs import BlockRuns
from geomirror.wan_protocol.block_status import BACKING, BlockStatus
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.resync_intake import CONSISTENT
from tests.sim.oracle import BLOCK, OracleError

if TYPE_CHECKING:
    from tests.sim.node import SimNode

EVERY = 16
"""Sealed epochs between two questions. Counted, not drawn: what a seed does stays the same."""


class StatusCheck:
    """Asks one primary, for one of its lives."""

    def __init__(self, node: SimNode) -> None:
        assert isinstance(node.core, Primary)
        self._node = node
        self._core = node.core
        self._status = BlockStatus(node.core)
        self._countdown = EVERY

    def sealed(self) -> None:
        """Another epoch is sealed; now and then, ask."""
        self._countdown -= 1
        if self._countdown == 0:
            self._countdown = EVERY
            self.ask()

    def ask(self) -> None:
        """Ask about every mirror and the backing device, and compare."""
        oracle = self._node.oracle
        with self._node.store.undisturbed():
            for volume, content in oracle.content.items():
                lacking = self._answer(volume, len(content))
                for name in self._core.senders:
                    self._check(name, volume, blocks_of(lacking[name]))
                self._check_backing(volume, blocks_of(lacking[BACKING]))
        oracle.checks += 1

    def _answer(self, volume: int, size: int) -> dict[str, BlockRuns]:
        holders = [*self._core.senders, BACKING]
        while True:
            job = self._status.next_job(holders, volume, 0, size)
            job.run()
            job.release()
            if job.lacking is not None:
                return job.lacking

    def _check(self, name: str, volume: int, told: set[int]) -> None:
        mirror, sender = self._node.setup.node(name), self._core.senders[name]
        is_known = sender.is_open and mirror.is_alive and mirror.oracle is self._node.oracle
        if not is_known or mirror.engine.superblock.data_state != CONSISTENT:
            return
        epoch = mirror.engine.sealed_epoch
        for block in self._changed(volume):
            held = self._node.oracle.block_at(volume, block, epoch)
            if block not in told and held != self._now(volume, block):
                raise OracleError(
                    f"block {block} of volume {volume} counts as held by {name}, "
                    f"which is at epoch {epoch}"
                )

    def _check_backing(self, volume: int, told: set[int]) -> None:
        image, content = (
            self._node.engine.physical_images[volume],
            self._node.oracle.content[volume],
        )
        for block in self._changed(volume):
            # Where a volume has grown beyond the image, the backing may hold anything.
            now = bytes(content[block * BLOCK : (block + 1) * BLOCK])
            if block not in told and image.read_existing(block) != now:
                raise OracleError(f"block {block} of volume {volume} counts as destaged")

    def _changed(self, volume: int) -> list[int]:
        oracle = self._node.oracle
        return sorted(block for of, block in {*oracle.history, *oracle.touched} if of == volume)

    def _now(self, volume: int, block: int) -> bytes:
        oracle = self._node.oracle
        content = oracle.content[volume][block * BLOCK : (block + 1) * BLOCK]
        return bytes(content).ljust(BLOCK, b"\0")


def blocks_of(runs: BlockRuns) -> set[int]:
    """All blocks of a set."""
    pairs = zip(runs.starts.tolist(), runs.ends.tolist(), strict=True)
    return {block for start, end in pairs for block in range(start, end)}
