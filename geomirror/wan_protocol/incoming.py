"""Epochs on their way into a secondary: frames spooled in the journal, in any order, until the
commit says that they are complete and right.

A frame is decoded and its data spooled at once (a BLOCKS record, not durable, belonging to no
epoch), so memory holds only tables: 40 bytes a block. Deliberately not here: order, durability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from geomirror.errors import IntegrityError, RemoteProtocolError
from geomirror.limits import PRODUCTION
from geomirror.volume.epoch_table import (
    HASH_ZERO,
    KIND_DATA,
    Epoch,
    Table,
    chain_hash,
    empty_table,
    is_canonical,
)
from geomirror.wan_protocol.epoch_decode import DecodedFrame
from geomirror.wan_protocol.growth import changes_of
from geomirror.wan_protocol.messages import EpochCommit

GENERATION_BYTES = 16
HASH_BYTES = 32
FRAMES_MAX = 1 << 17
"""Frames of one epoch: 8 GiB of raw data, far above any fold."""


def number_bitmap(numbers: set[int] | list[int]) -> bytes:
    """Bitmap with the given bits set; bit 0 of byte 0 is number 0."""
    bitmap = bytearray((max(numbers, default=-1) >> 3) + 1)
    for number in numbers:
        bitmap[number >> 3] |= 1 << (number & 7)
    return bytes(bitmap)


def check_commit(commit: EpochCommit, entries_max: int) -> None:
    """Believe no number of a commit that could cost memory or not be stored.

    :raises RemoteProtocolError: it is not one that a primary sends.
    """
    positions = (commit.epoch, commit.first_lsn, commit.end_lsn, commit.wall_ns)
    is_fold = commit.first_epoch != commit.epoch
    if (
        not 0 < commit.first_epoch <= commit.epoch
        or not all(0 <= position < 1 << 63 for position in positions)
        or not 0 <= commit.frames <= FRAMES_MAX
        or not 0 <= commit.entries <= entries_max
        or len(commit.volumes) > PRODUCTION.volumes_max
        or len(commit.generation) != GENERATION_BYTES
        or len(commit.chain_hash) != HASH_BYTES
        or len(commit.table_hash) != (HASH_BYTES if is_fold else 0)
    ):
        raise RemoteProtocolError(f"commit of epoch {commit.epoch} is out of bounds")


@dataclass
class Incoming:
    """One epoch (or fold) of which frames or the commit have arrived."""

    number: int
    parts: dict[int, Table] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    """Of volumes, as the frames were read; -1 when two of them were read with different ones."""
    commit: EpochCommit | None = None
    lowest_address: int = 0
    wire_bytes: int = 0
    progress_ns: int = 0
    is_second_try: bool = False
    """All of it was once here and was not what the commit says."""

    def add(self, sequence: int, frame: DecodedFrame, address: int, wire_bytes: int) -> None:
        """Take the table of a spooled frame whose data begins at journal address `address`."""
        assert 0 <= sequence < FRAMES_MAX
        table = frame.table
        for volume, size in frame.sizes.items():
            if self.sizes.setdefault(volume, size) != size:
                self.sizes[volume] = -1
        if address:
            # By the kind, because the entries of zeros have no address.
            table["address"] += np.uint64(address) * (table["kind"] == KIND_DATA)
        self.parts[sequence] = table
        self.wire_bytes += wire_bytes
        if address and not 0 < self.lowest_address < address:
            self.lowest_address = address

    def drop_parts(self) -> int:
        """Forget all frames; they are asked for again once the commit is here. Returns bytes."""
        dropped_bytes, self.wire_bytes = self.wire_bytes, 0
        self.parts.clear()
        self.sizes.clear()
        self.lowest_address = 0
        return dropped_bytes

    @property
    def is_complete(self) -> bool:
        """Every frame that the commit names is here."""
        return self.commit is not None and len(self.parts) >= self.commit.frames

    def missing(self) -> list[int]:
        """Frames named by the commit that are not here."""
        if self.commit is None:
            return []
        return [i for i in range(self.commit.frames) if i not in self.parts]

    def assemble(self, previous_hash: bytes, sizes: Mapping[int, int]) -> Epoch:
        """The epoch, if its table is what the primary sealed.

        :param previous_hash: chain hash of the epoch before it, as this node has it durable.
        :param sizes: of the volumes at that epoch; the commit's changes follow them.
        :raises IntegrityError: the table or its hash is not what the commit says.
        """
        commit = self.commit
        assert commit is not None
        assert self.is_complete
        ordered = [self.parts[i] for i in range(commit.frames)]
        table = np.concatenate(ordered) if ordered else empty_table()
        if len(table) != commit.entries or not is_canonical(table):
            raise IntegrityError(
                f"epoch {self.number}: {len(table)} entries received, {commit.entries} committed"
            )
        changes = changes_of(commit.volumes)
        self._check_sizes({**sizes, **{each.index: each.size_bytes for each in changes}})
        is_fold = commit.first_epoch != commit.epoch
        found = chain_hash(
            HASH_ZERO if is_fold else previous_hash,
            commit.generation,
            commit.epoch,
            commit.first_lsn,
            commit.end_lsn,
            table,
            changes,
        )
        if found != (commit.table_hash if is_fold else commit.chain_hash):
            raise IntegrityError(
                f"epoch {self.number}: content or history differs from the primary's "
                f"(chain hash {found.hex()[:16]})"
            )
        return Epoch(
            commit.epoch,
            commit.first_epoch,
            commit.generation,
            commit.first_lsn,
            commit.end_lsn,
            commit.wall_ns,
            commit.chain_hash,
            table,
            is_asserted=is_fold,
            is_mark=commit.is_mark,
            changes=changes,
        )

    def _check_sizes(self, sizes: Mapping[int, int]) -> None:
        """Were the frames read with the sizes of their epoch?"""
        for volume, size in sorted(self.sizes.items()):
            if sizes.get(volume) != size:
                raise IntegrityError(
                    f"epoch {self.number}: frames say that volume {volume} has {size} bytes, "
                    f"it has {sizes.get(volume, 0)}"
                )
