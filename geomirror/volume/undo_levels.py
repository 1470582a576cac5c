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
Under pressure the finest level is made shorter first, and what is at its old end merges.
Deliberately not here: merging (`undo_merge`), budgets (`undo`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from geomirror.environment import SECOND
from geomirror.volume.undo_label import PassInfo

MERGE_PASSES_MAX = 256
"""Passes of one merge: so many files are open at once."""

STEP_NS_MAX = 300 * SECOND
"""What the time between two passes adds to the age of all before, at most."""
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


def ages_of(walls_ns: Sequence[int]) -> list[int]:
    """Ages in ns of points whose clock times these are, oldest first; of the newest it is 0."""
    ages = [0] * len(walls_ns)
    for at in range(len(walls_ns) - 2, -1, -1):
        step_ns = walls_ns[at + 1] - walls_ns[at]
        ages[at] = ages[at + 1] + min(max(step_ns, 0), STEP_NS_MAX)
    return ages


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
) -> list[PassInfo]:
    """The next passes to merge into one, at least two, oldest first; empty when none is due.

    :param pinned: epochs that stay boundaries.
    :param raw_bytes_max: before-images that one merge may hold.
    :param settled_ns: newer passes are left alone: a crash may have to repeat one of them exactly.
    """
    if not passes:
        return []
    group: list[PassInfo] = []
    bucket = (1, -1)
    raw_bytes = 0
    for each, age_ns in zip(passes, ages_of([each.wall_ns for each in passes]), strict=True):
        step_ns, _ = levels[level_of(age_ns, levels)]
        here = (step_ns, each.wall_ns // step_ns)
        fits = raw_bytes + each.raw_bytes <= raw_bytes_max and len(group) < MERGE_PASSES_MAX
        belongs = _follows(group, each, pinned) and fits and each.wall_ns // bucket[0] == bucket[1]
        if not belongs or here != bucket or age_ns < settled_ns:
            # One that belongs to it will be as old: merging twice writes the same again.
            if len(group) > 1 and not belongs:
                return group
            group, raw_bytes = [], 0
        if age_ns < settled_ns:
            break
        bucket = here
        if not each.is_gap:
            group.append(each)
            raw_bytes += each.raw_bytes
    return group if len(group) > 1 else []


def _follows(group: Sequence[PassInfo], each: PassInfo, pinned: Collection[int]) -> bool:
    """Whether nothing but its age keeps a pass from being merged with the group before it."""
    if not group or each.is_gap:
        return False
    last = group[-1]
    is_boundary = last.to_epoch in pinned or last.generation != each.generation
    return last.to_epoch == each.from_epoch and not is_boundary


def expired(passes: Sequence[PassInfo], pinned: Collection[int], levels: Sequence[Level]) -> int:
    """How many of the oldest passes are beyond the last level; the newest one never is."""
    if not passes:
        return 0
    ages = ages_of([each.wall_ns for each in passes])
    lowest = min(pinned, default=None)
    count = 0
    for each, age_ns in zip(passes[:-1], ages, strict=False):
        # A pass restores the state before it: one that ends at a pinned epoch is not needed by it.
        is_needed = lowest is not None and each.to_epoch > lowest
        if age_ns < levels[-1][1] or is_needed:
            break
        count += 1
    return count
