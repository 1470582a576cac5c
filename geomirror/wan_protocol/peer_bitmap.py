"""A peer's dirty bitmap as the primary keeps it: which epochs it covers, and how more are added.

The bitmap covers every change after `base_epoch` up to `through_epoch`. Later epochs are retained
in the journal; retention moves only after the bits are durable (I14), so bitmap and journal
together are exact after any crash.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine


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
