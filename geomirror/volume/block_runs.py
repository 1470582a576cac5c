"""Sets of blocks as ascending runs, in arrays: a set of 10 GiB in one run costs 16 bytes.

```
 [start, end)   ███  ██████   █        disjoint, ascending, not even touching
```
Deliberately not here: where the blocks come from (`epoch_changes`), what is said about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomirror.volume.arrays import Indices, run_heads, run_tails
from geomirror.volume.epoch_table import Table


def indices(values: Sequence[int]) -> Indices:
    """A column of block numbers."""
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class BlockRuns:
    """A set of blocks of one volume; never changes."""

    starts: Indices
    ends: Indices

    def __len__(self) -> int:
        """Runs, not blocks."""
        return len(self.starts)

    @classmethod
    def between(cls, first: int, end: int) -> BlockRuns:
        """All blocks of [first, end)."""
        return cls(indices([first]), indices([end])) if end > first else EMPTY

    def within(self, first: int, end: int) -> BlockRuns:
        """The part in [first, end)."""
        low = int(np.searchsorted(self.ends, first, side="right"))
        high = int(np.searchsorted(self.starts, end, side="left"))
        if low >= high or first >= end:
            return EMPTY
        starts, ends = self.starts[low:high], self.ends[low:high]
        return BlockRuns(np.maximum(starts, first), np.minimum(ends, end))

    def widened(self, shift: int) -> BlockRuns:
        """A superset in whole groups of 2**shift blocks, with fewer runs."""
        ends = -((-self.ends) >> shift)
        return united([BlockRuns((self.starts >> shift) << shift, ends << shift)])


EMPTY = BlockRuns(indices([]), indices([]))


def united(sets: Sequence[BlockRuns]) -> BlockRuns:
    """The union. The runs of a given set may be in any order, overlap and touch."""
    starts = np.concatenate([each.starts for each in sets]) if sets else EMPTY.starts
    if not len(starts):
        return EMPTY
    ends = np.concatenate([each.ends for each in sets])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    heads = run_heads(starts[1:] > ends[:-1])
    return BlockRuns(starts[heads], ends[run_tails(heads, len(starts))])


def runs_of_table(table: Table) -> dict[int, BlockRuns]:
    """What an epoch's table changes, by volume."""
    found: dict[int, BlockRuns] = {}
    for volume in np.unique(table["volume"]).tolist():
        low, high = np.searchsorted(table["volume"], [volume, volume + 1]).tolist()
        starts = table["block"][low:high].astype(np.int64)
        ends = starts + table["count"][low:high].astype(np.int64)
        found[volume] = united([BlockRuns(starts, ends)])
    return found


def overlaps(sets: Sequence[BlockRuns], first: int, end: int) -> tuple[Indices, Indices]:
    """In how many of the sets each block of [first, end) is.

    :returns: (starts, counts) of ascending pieces that cover the range without a gap; neighbours
        differ.
    """
    parts = [each.within(first, end) for each in sets]
    edges = np.concatenate([indices([first]), *(p.starts for p in parts), *(p.ends for p in parts)])
    steps = np.ones(len(edges), dtype=np.int64)
    steps[0] = 0
    steps[1 + sum(map(len, parts)) :] = -1
    order = np.argsort(edges, kind="stable")
    edges, counts = edges[order], np.cumsum(steps[order])
    # Of several steps at one block the last sum counts.
    tails = run_tails(run_heads(edges[1:] != edges[:-1]), len(edges))
    edges, counts = edges[tails], counts[tails]
    heads = run_heads(counts[1:] != counts[:-1])
    edges, counts = edges[heads], counts[heads]
    return edges[edges < end], counts[edges < end]
