"""Merging epoch tables: one table that has the effect of several, the newest entry of a block wins.

```
 older  ████ZERO████████████   D   D        DATA counts one block, ZERO is a run
 newer      D     ▒▒zero▒▒▒▒▒▒▒▒▒▒▒
 merged ████D█████▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
```
Everything is interval arithmetic on arrays: a zero run of 4 GiB costs as much as one of 8 KiB, and
no Python object is made per entry. The result is canonical (`epoch_table.is_canonical`), adjacent
ZERO runs of equal flags are joined.
Deliberately not here: contents. Addresses and digests are carried along, never looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geomirror.volume.arrays import joined, run_heads, run_tails
from geomirror.volume.epoch_table import (
    ENTRY,
    KIND_ZERO,
    Table,
    empty_table,
    is_canonical,
)

_VOLUME_SHIFT = 46
"""A key is volume << 46 | block, within an i64; volumes of up to 2**46 blocks stay apart."""
_BLOCK_MASK = (1 << _VOLUME_SHIFT) - 1
_OVERLAID = 16
"""Tables whose runs are overlaid at once."""
RUN_BLOCKS_MAX = (1 << 32) - 1
"""An entry's count is a u32; a longer run (16 TiB) is several entries."""

Keys = npt.NDArray[np.int64]


class _Runs(NamedTuple):
    """Disjoint ascending zero runs [start, end) with their age (index of the table) and flags."""

    start: Keys
    end: Keys
    age: Keys
    flags: npt.NDArray[np.uint8]

    def take(self, chosen: slice) -> _Runs:
        return _Runs(self.start[chosen], self.end[chosen], self.age[chosen], self.flags[chosen])


def merge_tables(tables: Sequence[Table]) -> Table:
    """One canonical table equal in effect to applying `tables` one after the other.

    A single table is returned as it is, so that folding one epoch cannot change its chain hash.

    :param tables: canonical tables, oldest first.
    """
    filled = [table for table in tables if len(table)]
    if len(filled) <= 1:
        return filled[0] if filled else empty_table()
    entries = joined(filled, ENTRY)
    age = np.repeat(np.arange(len(filled), dtype=np.int64), [len(table) for table in filled])
    assert int(entries["block"].max()) <= _BLOCK_MASK - RUN_BLOCKS_MAX
    single = entries["count"] == 1
    keys = keys_of(entries)
    if bool(single.all()):
        kept, _ = _newest(keys)
        return _join_zero_runs(entries[kept], keys[kept])

    runs = _overlay_all(entries, keys, age, single, len(filled))
    single_keys = keys[single]
    newest, single_keys = _newest(single_keys)
    singles = entries[single][newest]
    single_age = age[single][newest]
    # A single block stands if no newer run covers it; then it splits the run, if there is one.
    at = runs.start.searchsorted(single_keys, "right") - 1
    owner = np.maximum(at, 0)
    inside = (at >= 0) & (single_keys < runs.end[owner])
    stands = ~inside | (single_age > runs.age[owner])
    singles, single_keys, inside = singles[stands], single_keys[stands], inside[stands]
    runs = _split(runs, single_keys[inside])

    merged = joined([singles, _run_entries(runs)], ENTRY)
    merged_keys = np.concatenate([single_keys, runs.start])
    order = merged_keys.argsort(kind="stable")
    return _join_zero_runs(merged[order], merged_keys[order])


def key_of(volume: int, block: int) -> int:
    """volume << 46 | block: one sortable integer."""
    return volume << _VOLUME_SHIFT | block


def keys_of(entries: Table) -> Keys:
    """The `key_of` each entry."""
    keys: Keys = entries["volume"].astype(np.int64)
    keys <<= _VOLUME_SHIFT
    keys |= entries["block"].view(np.int64)
    return keys


def blocks_of(keys: Keys) -> tuple[Keys, Keys]:
    """The volume and the block of each `key_of`."""
    return keys >> _VOLUME_SHIFT, keys & _BLOCK_MASK


def _newest(keys: Keys) -> tuple[Keys, Keys]:
    """Indices of the last occurrence of each key, by ascending key, and those keys."""
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    is_last = np.empty(len(keys), dtype=bool)
    is_last[-1:] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_last[:-1])
    return order[is_last], ordered[is_last]


def _overlay_all(
    entries: Table, keys: Keys, age: Keys, single: npt.NDArray[np.bool_], tables: int
) -> _Runs:
    """The newest run at each point, over the runs of all tables; overlaid as a tree."""
    chosen = (~single).nonzero()[0]
    start = keys[chosen]
    end = start + entries["count"][chosen].astype(np.int64)
    everything = _Runs(start, end, age[chosen], entries["flags"][chosen])
    bounds = everything.age.searchsorted(np.arange(tables + 1)).tolist()
    layers = [
        everything.take(slice(low, high)) for low, high in itertools.pairwise(bounds) if high > low
    ]
    while len(layers) > 1:
        layers = [_overlay(layers[i : i + _OVERLAID]) for i in range(0, len(layers), _OVERLAID)]
    return layers[0]


def _overlay(layers: Sequence[_Runs]) -> _Runs:
    """The runs of all, oldest first: of each only where no newer one is."""
    points = np.concatenate([*(each.start for each in layers), *(each.end for each in layers)])
    points.sort()
    points = points[run_heads(points[1:] != points[:-1])]
    left = points[:-1]
    owner = np.full(len(left), -1, dtype=np.int64)
    first = 0
    for layer in layers:
        at = layer.start.searchsorted(left, "right") - 1
        covered = (at >= 0) & (left < layer.end[np.maximum(at, 0)])
        owner[covered] = at[covered] + first
        first += len(layer.start)
    heads = run_heads(owner[1:] != owner[:-1])
    tails = run_tails(heads, len(left)) + 1
    used = owner[heads] >= 0
    heads, tails = heads[used], tails[used]
    origin = owner[heads]
    ages = np.concatenate([each.age for each in layers])
    flags = np.concatenate([each.flags for each in layers])
    return _Runs(points[heads], points[tails], ages[origin], flags[origin])


def _split(runs: _Runs, holes: Keys) -> _Runs:
    """Cut one block out of the runs at each hole; every hole lies in a run."""
    # The k-th smallest start belongs to the k-th smallest end, empty pieces included.
    start, end = np.concatenate([runs.start, holes + 1]), np.concatenate([runs.end, holes])
    start.sort()
    end.sort()
    kept = start < end
    start, end = start[kept], end[kept]
    origin = runs.start.searchsorted(start, "right") - 1
    return _Runs(start, end, runs.age[origin], runs.flags[origin])


def _run_entries(runs: _Runs) -> Table:
    entries = empty_table(len(runs.start))
    entries["volume"] = runs.start >> _VOLUME_SHIFT
    entries["block"] = runs.start & _BLOCK_MASK
    entries["count"] = runs.end - runs.start
    entries["kind"] = KIND_ZERO
    entries["flags"] = runs.flags
    return entries


def _join_zero_runs(entries: Table, keys: Keys) -> Table:
    """Join adjacent ZERO entries with equal flags; `entries` ascending and not overlapping."""
    zero = entries["kind"] == KIND_ZERO
    end = keys + entries["count"].astype(np.int64)
    joins = zero[1:] & zero[:-1] & (keys[1:] == end[:-1])
    joins &= entries["flags"][1:] == entries["flags"][:-1]
    if not joins.any():
        assert is_canonical(entries)
        return entries
    heads = run_heads(~joins)
    tails = run_tails(heads, len(entries))
    blocks = end[tails] - keys[heads]
    runs = entries[heads]
    if int(blocks.max()) > RUN_BLOCKS_MAX:
        runs, blocks = _split_long(runs, blocks)
    runs["count"] = blocks
    assert is_canonical(runs)
    return runs


def _split_long(entries: Table, blocks: Keys) -> tuple[Table, Keys]:
    """Give each run of more than `RUN_BLOCKS_MAX` blocks as many entries as it needs."""
    parts = -(-blocks // RUN_BLOCKS_MAX)
    first = np.repeat(np.cumsum(parts) - parts, parts)
    skipped = (np.arange(len(first)) - first) * RUN_BLOCKS_MAX
    split = np.repeat(entries, parts)
    split["block"] += skipped.astype(np.uint64)
    return split, np.minimum(np.repeat(blocks, parts) - skipped, RUN_BLOCKS_MAX)
