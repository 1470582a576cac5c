"""The position of a copy that is made anew, and whose history it follows.

A resync gives the images another epoch than the journal leads to: what is in the journal does not
count any more, and neither does the undo.
"""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.errors import RefusedError
from geomirror.volume.engine_layers import LayeredImages
from geomirror.volume.generations import ChainEntry, chain_records
from geomirror.volume.superblock import DataState
from geomirror.volume.volume_change import VolumeChange


class CopyPosition(LayeredImages):
    """The part of `Engine` that a resync uses."""

    def reset_position(
        self,
        generation: bytes,
        epoch: int,
        chain_hash: bytes,
        *,
        data_state: DataState = "inconsistent",
        changes: Sequence[VolumeChange] = (),
        is_held: bool = False,
    ) -> None:
        """The images hold (or are being given) `epoch` of another node: forget all epochs here.

        :param changes: what leads from the volumes' sizes here to those there; prepared.

        No job may be running. The next checkpoint persists it and drops the undo, unless an
        earlier state is held by it.

        :raises RefusedError: `generation` is not the current one here.
        """
        if generation != self.generation:
            raise RefusedError(
                f'resource "{self.superblock.name}" follows another history: '
                f"{self.generation.hex()} here, {generation.hex()} there"
            )
        assert not self._open_entries
        self._grow_images(changes)
        self.sizes.reset((v.index, v.name, v.size_bytes) for v in self.superblock.volumes)
        self._directory.clear()
        self._spooled.clear()
        self._unsealed.clear()
        superblock = self.superblock
        superblock.applied_epoch = superblock.applied_first_epoch = epoch
        superblock.applied_hash = chain_hash.hex()
        superblock.applied_end_lsn = superblock.last_epoch_lsn = superblock.applied_wall_ns = 0
        superblock.data_state = data_state
        self.sealed_epoch = self.committed_epoch = epoch
        self.sealed_hash = self.committed_hash = chain_hash
        self._open.number = epoch + 1
        if not is_held:
            self.undo.void()
            superblock.former_until = -1
            self.marks.table.drop_boundaries()

    def adopt_chain(self, chain: Sequence[ChainEntry]) -> None:
        """Take over the primary's generation chain; persisted by the next checkpoint."""
        self.superblock.chain = chain_records(chain)
