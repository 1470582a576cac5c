"""Which undo file holds what a block was at one epoch: the index of a view.

```
 passes after the epoch   (40,41]  (41,45]  (45,46] …      the oldest that holds a block counts
                              └────────┴────────┘
                  base: merged once        recent: added since, merged into the base in bulk
```
Nothing here is ever changed: `extended` makes another index, so that readers on several threads
need no lock. Thousands of passes are merged while a view is open: `following` reads the merged
files, and leaves all others alone. 20 bytes of memory for each block that was changed since the
epoch, and about half a KiB for each pass.
Deliberately not here: reading contents (`view`), what is kept (`undo`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from geomirror.errors import LimitExceededError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.epoch_table import KIND_DATA, KIND_ZERO, Table, empty_table
from geomirror.volume.merge import Keys, blocks_of, key_of, keys_of, merge_tables
from geomirror.volume.undo_chunks import ChunkMap
from geomirror.volume.undo_file import (
    PLACE_BITS,
    PassInfo,
    located_each,
    old_sizes,
)

IMAGE = -2
"""The block is unchanged since the epoch."""
ZERO = -1
_GROUP_ENTRIES = 1 << 20
"""Entries of several passes that are merged at once: each merge moves all that is there."""
_RECENT_PART = 8
"""The recent table becomes part of the base at an eighth of its size: each entry is moved a few
times, and a new pass does not move them all."""

_NUMBERS_MAX = 1 << 20
"""Files that an index has seen, by far below what addresses take; then it is made anew."""

Places = npt.NDArray[np.int64]
PlaceOrPlaces = TypeVar("PlaceOrPlaces", int, Places)


class PassRuns(Protocol):
    """What an index needs of the undo of one pass (`PassTables`, `GroupTables`)."""

    chunks: ChunkMap
    runs: npt.NDArray[np.void]
    """Entries of an undo file."""


ReadTables = Callable[[PassInfo], PassRuns]


@dataclass(frozen=True)
class Layer:
    """A merged table in 20 bytes an entry, ascending."""

    keys: Keys = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: npt.NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, dtype=np.uint32))
    """Blocks: one of data, or a run of zeros."""
    places: Places = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """`ZERO`, or file << 40 | place in blocks."""

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Layer:
        """Of several tables: of a block the last one that has it counts."""
        merged = merge_tables(tables)
        places = merged["address"].astype(np.int64)
        places[merged["kind"] == KIND_ZERO] = ZERO
        return cls(keys_of(merged), merged["count"].astype(np.uint32), places)

    def __len__(self) -> int:
        return len(self.keys)

    def table(self) -> Table:
        """As a canonical table; `address` of a DATA entry is its place."""
        table, is_zero = empty_table(len(self)), self.places == ZERO
        table["volume"], table["block"] = blocks_of(self.keys)
        table["kind"], table["count"] = np.where(is_zero, KIND_ZERO, KIND_DATA), self.counts
        table["address"] = np.where(is_zero, 0, self.places)
        return table

    def moved(self, from_files: Keys, to: Layer) -> Layer | None:
        """The same with what lies in these files lying where `to` says; None: it does not say."""
        rows = (np.isin(file_of(self.places), from_files)).nonzero()[0]
        if not len(rows):
            return self
        if not len(to):
            return None
        wanted = self.keys[rows]
        at = np.minimum(to.keys.searchsorted(wanted), len(to) - 1)
        if (to.keys[at] != wanted).any() or (to.places[at] == ZERO).any():
            return None
        places = self.places.copy()
        places[rows] = to.places[at]
        return Layer(self.keys, self.counts, places)

    def enter(self, places: Places, volume: int, block: int) -> None:
        """Enter what is known of the range from `block` on."""
        low = key_of(volume, block)
        first = max(int(self.keys.searchsorted(low, "right")) - 1, 0)
        last = int(self.keys.searchsorted(low + len(places), "left"))
        if first >= last:
            return
        found, starts = self.places[first:last], self.keys[first:last] - low
        is_data = found != ZERO
        if not is_data.all():
            zeros, counts = starts[~is_data].tolist(), self.counts[first:last][~is_data].tolist()
            for start, count in zip(zeros, counts, strict=True):
                places[max(start, 0) : max(start + count, 0)] = ZERO
        if starts[0] < 0:
            is_data[0] = False  # Only the first one may begin before the range.
        places[starts[is_data]] = found[is_data]


@dataclass(frozen=True)
class ViewIndex:
    """Index of the passes after `epoch`, as far as they are in `passes`."""

    epoch: int
    passes: tuple[PassInfo, ...] = ()
    numbers: tuple[int, ...] = field(default=(), repr=False)
    """Of their files, in addresses."""
    files: Mapping[int, ChunkMap] = field(default_factory=dict, repr=False)
    """By number."""
    next_number: int = 0
    sizes: Mapping[int, int] = field(default_factory=dict)
    """Bytes at the epoch of the volumes that have grown since, 0 of those that were added."""
    base: Layer = field(default_factory=Layer, repr=False)
    recent: Layer = field(default_factory=Layer, repr=False)

    def extended(self, passes: Sequence[PassInfo], read: ReadTables, entries_max: int) -> ViewIndex:
        """An index of `passes` too, which follow those that are here. Blocking.

        :param read: reads the tables of a pass.
        :raises LimitExceededError: more than `entries_max` blocks were changed since the epoch.
        :raises NotFoundError, IntegrityError: a file is gone, or damaged.
        """
        files, base, recent = dict(self.files), self.base, self.recent.table()
        sizes = dict(self.sizes)
        number = self.next_number
        for group in _groups(passes, read, entries_max):
            group_numbers = range(number, number + len(group))
            number += len(group)
            files.update(zip(group_numbers, (each.chunks for each in group), strict=True))
            runs = [each.runs for each in group]
            sizes = {**old_sizes(runs), **sizes}  # What is older wins.
            tables = located_each(list(zip(runs, group_numbers, strict=True)))
            recent = merge_tables([*reversed(tables), recent])
            self._check_room(len(base) + len(recent), entries_max)
        self._check_room(len(base) + len(recent), entries_max)
        if len(recent) > len(base) // _RECENT_PART:
            base, recent = Layer.of([recent, base.table()]), empty_table()
        numbers = (*self.numbers, *range(self.next_number, number))
        everything = (*self.passes, *passes)
        layers = (sizes, base, Layer.of([recent]))
        return ViewIndex(self.epoch, everything, numbers, files, number, *layers)

    def _check_room(self, entries: int, entries_max: int) -> None:
        if entries > entries_max:
            raise LimitExceededError(
                f"more than {entries_max} blocks were changed since epoch {self.epoch}",
                hint="choose a newer point",
            )

    def following(self, passes: Sequence[PassInfo], read: ReadTables) -> ViewIndex | None:
        """An index of the first of `passes`, some of which are merged of those that are here; None
        when that cannot be told, or something else has become of them. Blocking.

        What a merged file holds of a block is what the first of its passes held that had it, and
        where this index says that a block lies in one of them, it is in that very one.

        :raises NotFoundError, IntegrityError: a file is gone, or damaged.
        """
        merges = merged_into(self.passes, passes)
        if merges is None or self.next_number + len(merges) > _NUMBERS_MAX:
            return None
        files, numbers = dict(self.files), list(self.numbers)
        everything, sizes = list(self.passes), dict(self.sizes)
        layers, number = [self.base, self.recent], self.next_number
        for first, count, info in reversed(merges):
            gone = numbers[first : first + count]
            tables = read(info)
            merged = Layer.of([located_each([(tables.runs, number)])[0]])
            moved = _moved(layers, np.array(gone, dtype=np.int64), merged)
            if moved is None:
                return None
            layers = moved
            if info.to_epoch > self.passes[-1].to_epoch:
                # Passes that are not here yet went into it: they are newer than all that is.
                layers[1] = Layer.of([merged.table(), layers[1].table()])
                sizes = {**old_sizes([tables.runs]), **sizes}
            for each in gone:
                del files[each]
            files[number] = tables.chunks
            numbers[first : first + count], everything[first : first + count] = [number], [info]
            number += 1
        kept = (tuple(everything), tuple(numbers), files, number, sizes)
        return ViewIndex(self.epoch, *kept, *layers)

    def table(self) -> Table:
        """All of it as one canonical table; `address` of a DATA entry is its place."""
        return merge_tables([self.recent.table(), self.base.table()])

    def places(self, volume: int, block: int, count: int) -> Places:
        """Where each block of a range lies: `IMAGE`, `ZERO`, or file << 40 | place in blocks."""
        places = np.empty(count, dtype=np.int64)
        places.fill(IMAGE)
        for layer in (self.recent, self.base):  # What is older wins, so it comes last.
            layer.enter(places, volume, block)
        return places


def file_of(place: PlaceOrPlaces) -> PlaceOrPlaces:
    """The number of the file of a place that is one, or of each of many."""
    return place >> PLACE_BITS


def block_of(place: PlaceOrPlaces) -> PlaceOrPlaces:
    """Where in its file a place is, in blocks."""
    return place & ((1 << PLACE_BITS) - 1)


def _groups(
    passes: Sequence[PassInfo], read: ReadTables, entries_max: int
) -> Iterator[list[PassRuns]]:
    """The tables of all passes, as many at a time as are worth being merged at once."""
    group: list[PassRuns] = []
    entries = 0
    for info in passes:
        tables = read(info)
        group.append(tables)
        entries += len(tables.runs) + info.raw_bytes // BLOCK_BYTES
        if entries >= min(_GROUP_ENTRIES, entries_max):
            yield group
            group, entries = [], 0
    if group:
        yield group


def _moved(layers: list[Layer], from_files: Keys, to: Layer) -> list[Layer] | None:
    """`Layer.moved` of both."""
    base, recent = (each.moved(from_files, to) for each in layers)
    if base is not None and recent is not None:
        return [base, recent]
    # What the base hides may be content in a later one of these files, and zeros in the first.
    whole = Layer.of([layers[1].table(), layers[0].table()]).moved(from_files, to)
    return None if whole is None else [whole, Layer()]


def merged_into(
    old: Sequence[PassInfo], new: Sequence[PassInfo]
) -> list[tuple[int, int, PassInfo]] | None:
    """(position, count, pass) of each of `new` that took the place of some of `old`, ascending; the
    others that are there are the same. The last one may reach further than `old`. None when it is
    not like that."""
    found: list[tuple[int, int, PassInfo]] = []
    at = 0
    for each in new:
        if at == len(old):
            break
        if each is old[at] or each == old[at]:
            at += 1
            continue
        first = at
        if each.is_part or old[at].is_part or each.from_epoch != old[at].from_epoch:
            return None
        while at < len(old) and old[at].to_epoch < each.to_epoch:
            at += 1
        if at < len(old) and old[at].to_epoch != each.to_epoch:
            return None
        at = min(at + 1, len(old))
        found.append((first, at - first, each))
    return found if at == len(old) else None
