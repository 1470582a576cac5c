"""A peer's dirty bitmap as the primary keeps it: which epochs it covers, and how more are added.

The bitmap covers every change after `base_epoch` up to `through_epoch`. Later epochs are retained
in the journal; retention moves only after the bits are durable (I14), so bitmap and journal
together are exact after any crash. It serves only a peer at exactly its base, or past it on the
same chain: what another history changed is in no bitmap here, and then everything is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine

LATER_SAVED_MAX = 16
"""Epochs after the base whose hash is in the superblock: 80 bytes each."""


@dataclass
class PeerBitmap:
    """`is_initial`: the peer never had a consistent image; its first sync is no resync."""

    bitmap: DirtyBitmap
    base_epoch: int
    through_epoch: int
    is_initial: bool = False
    updated_ns: int = 0
    covers_all: bool = False
    """It began with every bit set, so that without its file every bit is set again."""
    base_hash: bytes = b""
    """H(base_epoch)."""
    later: dict[int, bytes] = field(default_factory=dict)
    """Epochs after the base that the peer may have reached -> H."""

    def serves(self, epoch: int, chain_hash: bytes, known: bytes | None) -> bool:
        """Whether the bits are enough for a peer at this point.

        :param known: H(epoch) here, if it is known.
        """
        if self.covers_all and self.base_epoch == 0:
            return True  # Every bit is set: one is cleared only after the base has moved.
        if epoch == self.base_epoch:
            return chain_hash == self.base_hash
        expected = self.later.get(epoch) if known is None else known
        return epoch > self.base_epoch and expected == chain_hash

    def move_base(self, epoch: int, chain_hash: bytes) -> None:
        """From here on the bitmap is only right for a peer that kept what was copied."""
        self.base_epoch, self.base_hash = epoch, chain_hash
        self.later = {number: found for number, found in self.later.items() if number > epoch}

    def saved_later(self) -> dict[int, str]:
        """`later` for the superblock: the newest of them."""
        newest = sorted(self.later)[-LATER_SAVED_MAX:]
        return {number: self.later[number].hex() for number in newest}


@dataclass
class BitmapJob:
    """Add the tables of epochs (through, `through_epoch`] and make the bits durable."""

    engine: Engine
    bitmap: DirtyBitmap
    numbers: list[int]
    through_epoch: int
    sizes: dict[int, int]
    """Of the volumes at that epoch."""

    def run(self) -> None:
        """Blocking; raises StorageError, IntegrityError."""
        self.bitmap.grow(self.sizes)
        for number in self.numbers:
            self.bitmap.set_table(self.engine.load_epoch(number).table, number)
        job = self.bitmap.write_job()
        if job is not None:
            job.run()
