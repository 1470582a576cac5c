"""Which undo passes are merged, so that history gets coarser with age instead of being lost.

```
 age     0 ───────── 1 h ───────── 24 h ───────── 7 d ────────── 30 d ───▶ dropped
 points  one a second    every 30 s     every 5 min    every hour
```
Merging (a, b] and (b, c] gives (a, c]: the state at b cannot be viewed any more, those at a and c
can. A pinned epoch (a view, a mark) is never merged away. Passes wait until all that will become
one are old enough, so that each is written once a level. Age is the time between passes, added up
from the newest one: while replication is down nothing gets older, and a clock that steps back adds
nothing, one that steps forward at most `STEP_NS_MAX` (as does a time without writes). So a clock
that jumps by a month makes nothing a month old.
All of it is looked at every ten seconds: ages, levels and neighbours are arrays, and single passes
are looked at only where two may be merged.
Under pressure the finest level is made shorter first, and what is at its old end merges.
Deliberately not here: merging (`undo_merge`), budgets (`undo`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from geomirror.environment import SECOND
from geomirror.volume.undo_columns import (
    GAP,
    GENERATION_HIGH,
    GENERATION_LOW,
    RAW,
    TO,
    WALL,
    Columns,
    Numbers,
    columns_of,
    follows,
)
from geomirror.volume.undo_label import PassInfo

MERGE_PASSES_MAX = 256
"""Passes of one merge: so many tables are read for it."""

STEP_NS_MAX = 300 * SECOND
"""What the time between two passes adds to the age of all before, at most; where a level's step is
longer, that step: points that were merged to one an hour are an hour apart."""
SQUEEZES_MAX = 6
"""Times that a level is made a quarter as long under pressure: an hour becomes a second."""

Level = tuple[int, int]
"""(step, age) in ns: points that are `step` apart are kept up to `age`."""


def level_of(age_ns: int, levels: Sequence[Level]) -> int:
    """Number of the level of a point of this age; the last one for all beyond it."""
    for number, (_, level_age_ns) in enumerate(levels):
        if age_ns < level_age_ns:
            return number
    return len(levels) - 1


def ages_of(walls_ns: Sequence[int], levels: Sequence[Level] = ()) -> list[int]:
    """Ages in ns of points whose clock times these are, oldest first; of the newest it is 0."""
    found: list[int] = ages_in(np.array(walls_ns, dtype=np.int64), levels).tolist()
    return found


def ages_in(walls_ns: Numbers, levels: Sequence[Level] = ()) -> Numbers:
    """`ages_of` as an array.

    :param levels: where points are meant to be further apart than `STEP_NS_MAX`, so much counts.
    """
    ages = np.zeros(len(walls_ns), dtype=np.int64)
    steps = (walls_ns[1:] - walls_ns[:-1]).clip(0)
    ages[:-1] = np.minimum(steps, STEP_NS_MAX)[::-1].cumsum()[::-1]
    for (_, start_ns), (step_ns, _) in itertools.pairwise(levels):
        old = int((ages >= start_ns).sum()) - 1
        if step_ns > STEP_NS_MAX and old > 0:
            ages[:old] = ages[old] + np.minimum(steps[:old], step_ns)[::-1].cumsum()[::-1]
    return ages


def steps_of(ages_ns: Numbers, levels: Sequence[Level]) -> Numbers:
    """The step in ns of the level of each point of such an age."""
    ends, steps = np.array([age for _, age in levels]), np.array([step for step, _ in levels])
    found: Numbers = steps[np.minimum(ends.searchsorted(ages_ns, "right"), len(levels) - 1)]
    return found


def squeezed(levels: Sequence[Level]) -> Iterator[Sequence[Level]]:
    """The levels, ever shorter: the finest first, then the next with it. The last one keeps its
    age, beyond which points are dropped."""
    for number in range(len(levels) - 1):
        for power in range(1, SQUEEZES_MAX + 1):
            gone = [(step, age >> 2 * SQUEEZES_MAX) for step, age in levels[:number]]
            step, age = levels[number]
            yield [*gone, (step, age >> 2 * power), *levels[number + 1 :]]


def next_merge(
    passes: Sequence[PassInfo],
    pinned: Collection[int],
    raw_bytes_max: int,
    levels: Sequence[Level],
    settled_ns: int,
    columns: Columns | None = None,
) -> list[PassInfo]:
    """The next passes to merge into one, at least two, oldest first; empty when none is due.

    :param pinned: epochs that stay boundaries.
    :param raw_bytes_max: before-images that one merge may hold.
    :param settled_ns: newer passes are left alone: a crash may have to repeat one of them exactly.
    :param columns: of the passes, when they are known.
    """
    if len(passes) < 2:
        return []
    columns = columns_of(passes) if columns is None else columns
    walls, raw = columns[WALL], columns[RAW]
    ages = ages_in(walls, levels)
    steps = steps_of(ages, levels)
    buckets = walls // steps
    may_join = _may_join(columns, pinned)
    # Pairs that are in one bucket; nearly all passes have none there, and are not looked at again.
    pairs = may_join & (steps[1:] == steps[:-1]) & (buckets[1:] == buckets[:-1])
    pairs &= (ages[1:] >= settled_ns) & (raw[1:] + raw[:-1] <= raw_bytes_max)
    end = 0
    for start in pairs.nonzero()[0].tolist():
        if start < end:
            continue
        end, raw_bytes, fits = start + 1, int(raw[start]), True
        while end < len(passes) and fits and pairs[end - 1]:
            raw_bytes += int(raw[end])
            fits = raw_bytes <= raw_bytes_max and end - start < MERGE_PASSES_MAX
            end += fits
        if end == len(passes) or not fits:
            return list(passes[start:end])
        fits = raw_bytes + int(raw[end]) <= raw_bytes_max and end - start < MERGE_PASSES_MAX
        is_same = walls[end] // steps[start] == buckets[start]
        # One that belongs to it will be as old: merging twice writes the same again.
        if not (may_join[end - 1] and fits and is_same):
            return list(passes[start:end])
    return []


def _may_join(columns: Columns, pinned: Collection[int]) -> npt.NDArray[np.bool_]:
    """Of each pass but the first: whether anything but age and size is against merging it with the
    one before it."""
    found = follows(columns)
    found &= columns[GAP, 1:] == 0
    found &= columns[GENERATION_LOW, 1:] == columns[GENERATION_LOW, :-1]
    found &= columns[GENERATION_HIGH, 1:] == columns[GENERATION_HIGH, :-1]
    if pinned:
        found &= ~np.isin(columns[TO, :-1], np.fromiter(pinned, np.int64, len(pinned)))
    return found


def expired(
    passes: Sequence[PassInfo],
    pinned: Collection[int],
    levels: Sequence[Level],
    columns: Columns | None = None,
) -> int:
    """How many of the oldest passes are beyond the last level; the newest one never is."""
    if not passes:
        return 0
    columns = columns_of(passes) if columns is None else columns
    # Ages never grow from one to the next, nor does what is needed.
    count = int((ages_in(columns[WALL], levels)[:-1] >= levels[-1][1]).sum())
    if pinned:
        # A pass restores the state before it: one that ends at a pinned epoch is not needed by it.
        count = min(count, int(columns[TO].searchsorted(min(pinned), "right")))
    return count
