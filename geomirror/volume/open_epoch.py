"""Cutting the open epoch: what it changed, captured in an instant.

```
 index.touched ─▶ whole blocks   (block, source) arrays     ┐
                  parts          (block, parts at the cut)  ├─▶ EpochDraft ─▶ SealJob (thread)
 index.extents ─▶ of this epoch  (first, end, source)       ┘
```
A touched block's newest source is from the open epoch, so the newest sources at the cut are the
epoch, whatever happened in between.
Invariant: a draft never changes. Parts and sources in it stay readable because the engine pins the
journal from the cut until the epoch is committed.
Deliberately not here: contents and digests (`seal`), when to cut (the primary's core).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.block_runs import BlockRuns, indices
from geomirror.volume.dirty_index import DirtyIndex, Parts, source_lsn
from geomirror.volume.epoch_table import ENTRY
from geomirror.volume.volume_change import VolumeChange, encode_changes, merge_changes

Column = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VolumeDraft:
    """What an epoch changed in one volume."""

    volume: int
    blocks: Column
    """Blocks written or zeroed whole, in no order; one entry a block."""
    sources: Column
    """Source of each of them: address, or a negative zero source."""
    parts: list[tuple[int, Parts]]
    """Blocks written in part, with all their undestaged parts at the cut."""
    extents: list[tuple[int, int, int]]
    """Zero extents (first, end, source), ascending; blocks named above override them."""
    size_bytes: int
    """Of the volume at the end of the epoch: its last block may be short."""

    def block_bytes(self, block: int) -> int:
        """Bytes that exist of a block."""
        return min(BLOCK_BYTES, self.size_bytes - block * BLOCK_BYTES)


@dataclass(frozen=True)
class EpochDraft:
    """An epoch that is cut and not yet sealed. [first_lsn, end_lsn) is its LSN range."""

    number: int
    first_lsn: int
    end_lsn: int
    boundary_lsn: int
    """Every record of it lies below this position of the local journal, later ones at or above."""
    wall_ns: int
    is_mark: bool
    volumes: list[VolumeDraft] = field(repr=False)
    changes: tuple[VolumeChange, ...] = ()
    """Volumes that grew or were added in it."""

    @property
    def entries_max(self) -> int:
        """Most entries that its table can have."""
        return sum(
            2 * (len(each.blocks) + len(each.parts)) + len(each.extents) for each in self.volumes
        )

    @property
    def reserve_bytes(self) -> int:
        """Journal bytes that sealing it needs: fills and table, without record headers."""
        fills = sum(len(each.parts) for each in self.volumes) * BLOCK_BYTES
        return fills + self.entries_max * ENTRY.itemsize + len(encode_changes(self.changes))


@dataclass
class OpenEpoch:
    """The epoch that takes writes now."""

    number: int
    first_lsn: int
    boundary_lsn: int
    """Where its records begin in the local journal; above `first_lsn` only after a recovery."""
    since_wall_ns: int | None = None
    """Wall clock of its first write; None while it is empty."""
    last_wall_ns: int = 0
    changes: list[VolumeChange] = field(default_factory=list)
    """Volumes that grew or were added in it, in order."""


def cut_volume(volume: int, index: DirtyIndex, boundary_lsn: int) -> VolumeDraft:
    """Take what the open epoch changed in a volume; `index.touched` is empty afterwards.

    On the event loop.

    :param boundary_lsn: where the open epoch's records begin: newer extents are its own.
    """
    entries, touched = index.entries, index.touched
    index.recount()
    # A block changed in part and whole or zeroed since is not among these parts.
    parts = [
        (block, entry)
        for block in sorted(index.open_partial)
        if isinstance(entry := entries.get(block), tuple)
    ]
    blocks = np.fromiter(touched.keys(), dtype=np.int64, count=len(touched))
    sources = np.fromiter(touched.values(), dtype=np.int64, count=len(touched))
    if parts:
        is_whole = sources != 0
        blocks, sources = blocks[is_whole], sources[is_whole]
    extents = [each for each in index.extents if source_lsn(each[2]) >= boundary_lsn]
    index.touched = {}
    index.open_partial = set()
    return VolumeDraft(volume, blocks, sources, parts, extents, index.size_bytes)


def cut(
    epoch: OpenEpoch,
    indexes: Mapping[int, DirtyIndex],
    *,
    end_lsn: int,
    wall_ns: int,
    is_mark: bool = False,
) -> EpochDraft:
    """The draft of everything since the last cut; the caller opens the next epoch at `end_lsn`."""
    volumes = [cut_volume(i, index, epoch.boundary_lsn) for i, index in sorted(indexes.items())]
    return EpochDraft(
        epoch.number,
        epoch.first_lsn,
        end_lsn,
        end_lsn,
        wall_ns,
        is_mark,
        volumes,
        merge_changes(epoch.changes),
    )


def open_changes(index: DirtyIndex, boundary_lsn: int) -> list[BlockRuns]:
    """What the open epoch has changed in a volume so far: to be united, the index may go on."""
    touched = index.touched
    blocks = np.fromiter(touched.keys(), dtype=np.int64, count=len(touched))
    extents = [each for each in index.extents if source_lsn(each[2]) >= boundary_lsn]
    return _runs_of(blocks, extents)


def draft_changes(draft: VolumeDraft) -> list[BlockRuns]:
    """What a draft changes in a volume: to be united."""
    parts = indices([block for block, _ in draft.parts])
    return [BlockRuns(parts, parts + 1), *_runs_of(draft.blocks, draft.extents)]


def _runs_of(blocks: Column, extents: list[tuple[int, int, int]]) -> list[BlockRuns]:
    starts = indices([start for start, _, _ in extents])
    ends = indices([end for _, end, _ in extents])
    return [BlockRuns(blocks, blocks + 1), BlockRuns(starts, ends)]
