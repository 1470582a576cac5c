"""A set of blocks: those whose before-image an open undo pass holds already.

One bit for each block, in pages of a GiB that exist only where something was saved: 32 KiB of
memory for each. Not thread-safe: one job at a time uses it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from geomirror.volume.epoch_table import KIND_ZERO, Table, empty_table

PAGE_BLOCKS = 1 << 18

_Mask = npt.NDArray[np.bool_]


class SavedBlocks:
    """Starts empty."""

    def __init__(self) -> None:
        self._pages: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}

    def missing(self, table: Table) -> Table:
        """The blocks of a table's entries that are not in the set: ascending runs, kind ZERO."""
        parts: list[Table] = []
        for volume, page, first, wanted in _pages(table):
            saved = self._pages.get((volume, page))
            if saved is not None:
                within = saved[first >> 3 : first + len(wanted) >> 3]
                wanted &= ~np.unpackbits(within).view(np.bool_)
            edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
            runs = empty_table(len(edges) // 2)
            runs["volume"], runs["kind"] = volume, KIND_ZERO
            runs["block"] = edges[::2] + (page * PAGE_BLOCKS + first)
            runs["count"] = edges[1::2] - edges[::2]
            parts.append(runs)
        return np.concatenate(parts) if parts else empty_table()

    def has_near(self, table: Table) -> bool:
        """Whether some block of a table's entries may be in the set; looks at few bits."""
        rows = table[["volume", "block", "count"]].tolist() if self._pages else []
        return any(self.may_hold(*row) for row in rows)

    def may_hold(self, volume: int, first: int, count: int) -> bool:
        """Whether blocks near to a range are in the set: eight of them are looked at at once."""
        while count > 0:
            page, inside = divmod(first, PAGE_BLOCKS)
            step = min(count, PAGE_BLOCKS - inside)
            saved = self._pages.get((volume, page))
            if saved is not None and saved[inside >> 3 : ((inside + step - 1) >> 3) + 1].any():
                return True
            first, count = first + step, count - step
        return False

    def add(self, table: Table) -> None:
        """Put the blocks of a table's entries into the set."""
        for volume, page, first, wanted in _pages(table):
            saved = self._pages.get((volume, page))
            if saved is None:
                saved = self._pages[volume, page] = np.zeros(PAGE_BLOCKS >> 3, dtype=np.uint8)
            saved[first >> 3 : first + len(wanted) >> 3] |= np.packbits(wanted)


def _pages(table: Table) -> Iterator[tuple[int, int, int, _Mask]]:
    """(volume, page, first block in it, which blocks from there on the entries cover), ascending.

    First block and count are multiples of 8: a few blocks cost no more than they are.
    """
    for volume in np.unique(table["volume"]).tolist():
        entries = table[table["volume"] == volume]
        starts = entries["block"].astype(np.int64)
        ends = starts + entries["count"].astype(np.int64)
        touched: set[int] = set()
        firsts, lasts = starts // PAGE_BLOCKS, (ends - 1) // PAGE_BLOCKS
        for first, last in np.unique(np.stack([firsts, lasts]), axis=1).T.tolist():
            touched.update(range(first, last + 1))
        for page in sorted(touched):
            base = page * PAGE_BLOCKS
            inside = (firsts <= page) & (lasts >= page)
            low = np.maximum(starts[inside] - base, 0)
            high = np.minimum(ends[inside] - base, PAGE_BLOCKS)
            start, end = int(low.min()) & ~7, int(high.max()) + 7 & ~7
            # Counted up where a run begins and down where it ends: covered is what is above zero.
            steps = np.zeros(end - start + 1, dtype=np.int32)
            np.add.at(steps, low - start, 1)
            np.add.at(steps, high - start, -1)
            yield volume, page, start, np.cumsum(steps[:-1]) > 0
