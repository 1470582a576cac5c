"""Which undo file holds what a block was at one epoch: the index of a view.

```
 passes after the epoch   (40,41]  (41,45]  (45,46] …      the oldest that holds a block counts
                              └────────┴────────┘
                  base: merged once        recent: added since, merged into the base in bulk
```
Nothing here is ever changed: `extended` makes another index, so that readers on several threads
need no lock. 48 bytes of memory for each block that was changed since the epoch.
Deliberately not here: reading contents (`view`), what is kept (`undo`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from geomirror.errors import LimitExceededError
from geomirror.volume.epoch_table import KIND_ZERO, Table, empty_table
from geomirror.volume.merge import Keys, key_of, keys_of, merge_tables
from geomirror.volume.undo_chunks import ChunkMap
from geomirror.volume.undo_file import PLACE_BITS, PassInfo

IMAGE = -2
"""The block is unchanged since the epoch."""
ZERO = -1
_GROUP_ENTRIES = 1 << 18
"""Entries of several passes that are merged at once."""
_RECENT_PART = 8
"""The recent table becomes part of the base at an eighth of its size: each entry is moved a few
times, and a new pass does not move them all."""

Places = npt.NDArray[np.int64]
PlaceOrPlaces = TypeVar("PlaceOrPlaces", int, Places)


class PassReader(Protocol):
    """What an index needs of the undo of one pass (`UndoReader`, `GroupReader`)."""

    chunks: ChunkMap

    def located(self, number: int) -> Table:
        """See `UndoReader.located`."""

    def old_sizes(self) -> dict[int, int]:
        """See `UndoReader.old_sizes`."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True)
class Layer:
    """A merged table and its sort keys. `address` of a DATA entry is where its content lies."""

    table: Table = field(default_factory=empty_table)
    keys: Keys = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Layer:
        """Of several tables: of a block the last one that has it counts."""
        merged = merge_tables(tables)
        return cls(merged, keys_of(merged))

    def enter(self, places: Places, volume: int, block: int) -> None:
        """Enter what is known of the range from `block` on."""
        low = key_of(volume, block)
        first = max(int(self.keys.searchsorted(low, "right")) - 1, 0)
        last = int(self.keys.searchsorted(low + len(places), "left"))
        if first >= last:
            return
        part, starts = self.table[first:last], self.keys[first:last] - low
        is_data = part["kind"] != KIND_ZERO
        if not is_data.all():
            zeros, counts = starts[~is_data].tolist(), part["count"][~is_data].tolist()
            for start, count in zip(zeros, counts, strict=True):
                places[max(start, 0) : max(start + count, 0)] = ZERO
        if starts[0] < 0:
            is_data[0] = False  # Only the first one may begin before the range.
        places[starts[is_data]] = part["address"][is_data].astype(np.int64)


@dataclass(frozen=True)
class ViewIndex:
    """Index of the passes after `epoch`, as far as they are in `passes`."""

    epoch: int
    passes: tuple[PassInfo, ...] = ()
    files: tuple[ChunkMap, ...] = field(default=(), repr=False)
    """One for each pass."""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """Bytes at the epoch of the volumes that have grown since, 0 of those that were added."""
    base: Layer = field(default_factory=Layer, repr=False)
    recent: Layer = field(default_factory=Layer, repr=False)

    def extended(
        self,
        passes: Sequence[PassInfo],
        open_reader: Callable[[PassInfo], PassReader],
        entries_max: int,
    ) -> ViewIndex:
        """An index of `passes` too, which follow those that are here. Blocking.

        :param open_reader: opens the undo of a pass; closed again here.
        :raises LimitExceededError: more than `entries_max` blocks were changed since the epoch.
        :raises NotFoundError, IntegrityError: a file is gone, or damaged.
        """
        files, base, recent = list(self.files), self.base, self.recent.table
        sizes = dict(self.sizes)
        group: list[Table] = []
        grouped = 0
        for info in passes:
            reader = open_reader(info)
            try:
                files.append(reader.chunks)
                group.append(reader.located(len(files) - 1))
                sizes = {**reader.old_sizes(), **sizes}  # What is older wins.
            finally:
                reader.close()
            grouped += len(group[-1])
            if grouped >= _GROUP_ENTRIES:
                # What is older wins, so it comes last.
                recent = merge_tables([*reversed(group), recent])
                group, grouped = [], 0
            if len(base.table) + len(recent) + grouped > entries_max:
                raise LimitExceededError(
                    f"more than {entries_max} blocks were changed since epoch {self.epoch}",
                    hint="choose a newer point",
                )
        recent = merge_tables([*reversed(group), recent])
        if len(recent) > len(base.table) // _RECENT_PART:
            base, recent = Layer.of([recent, base.table]), empty_table()
        everything = (*self.passes, *passes)
        return ViewIndex(self.epoch, everything, tuple(files), sizes, base, Layer.of([recent]))

    def table(self) -> Table:
        """All of it as one canonical table; `address` of a DATA entry is its place."""
        return merge_tables([self.recent.table, self.base.table])

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
