"""The bits of one volume in RAM, in the pages that the disk has, as arrays the kernel fills lazily.

Deliberately not here: files and epochs (`bitmap_file`, `dirty_bitmap`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from geomirror.limits import MIB
from geomirror.volume.arrays import run_heads
from geomirror.volume.bitmap_file import PAGE_BITS_BYTES, PAGE_REGIONS, BitmapPage, pages_of

_Bytes = npt.NDArray[np.uint8]
_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


class RegionBits:
    """A set of regions 0 … regions - 1.

    :param old: bits to take over; those beyond `regions` are dropped.
    """

    def __init__(self, regions: int, old: RegionBits | None = None) -> None:
        pages = pages_of(regions)
        self.regions = regions
        self.count = 0
        # np.zeros maps memory without touching it: 64 TiB cost 128 MiB only if all bits are set.
        self._bits: _Bytes = np.zeros(pages * PAGE_BITS_BYTES, dtype=np.uint8)
        self._changed = np.zeros(pages, dtype=np.bool_)
        self._used = np.zeros(pages, dtype=np.bool_)
        self._slots = np.zeros(pages, dtype=np.uint8)  # the slot that the next write goes to
        if old is not None:
            self._take_over(old)

    def _take_over(self, old: RegionBits) -> None:
        for page in np.flatnonzero(old._used[: len(self._used)]).tolist():
            content = old._page(page)
            if self.regions < (page + 1) * PAGE_REGIONS:
                flags = np.unpackbits(content, bitorder="little")
                flags[self.regions - page * PAGE_REGIONS :] = 0
                content = np.packbits(flags, bitorder="little")
            self.load(page, content.tobytes(), 0)

    def load(self, page: int, content: bytes, next_slot: int) -> None:
        """Take a page as it is on disk; the next write of it goes to `next_slot`."""
        loaded = np.frombuffer(content, dtype=np.uint8)
        self._page(page)[:] = loaded
        self._used[page] = bool(loaded.any())
        self._slots[page] = next_slot
        self.count += _ones(loaded)

    def is_set(self, region: int) -> bool:
        """Whether one region is in the set."""
        assert 0 <= region < self.regions
        return bool(self._bits[region >> 3] >> (region & 7) & 1)

    @property
    def is_changed(self) -> bool:
        """Pages differ from what was last taken to be written."""
        return bool(self._changed.any())

    def set_each(self, regions: npt.NDArray[np.int64]) -> None:
        """Add single regions, in any order."""
        if not len(regions):
            return
        ordered = np.unique(regions)
        assert int(ordered[0]) >= 0
        assert int(ordered[-1]) < self.regions
        where = ordered >> 3
        heads = run_heads(where[1:] != where[:-1])
        masks = np.left_shift(1, ordered & 7).astype(np.uint8)
        where, masks = where[heads], np.bitwise_or.reduceat(masks, heads)
        old = self._bits[where]
        new = old | masks
        differs = new != old
        where, old, new = where[differs], old[differs], new[differs]
        self._bits[where] = new
        self.count += _ones(new) - _ones(old)
        pages = where // PAGE_BITS_BYTES
        self._changed[pages] = True
        self._used[pages] = True

    def set_run(self, first: int, count: int) -> None:
        """Add `count` regions from `first` on."""
        for start, masks in self._masks(first, count):
            part = self._bits[start : start + len(masks)]
            masks &= ~part
            part |= masks
            self.count += _ones(masks)
            self._used[self._touched(start, masks)] = True

    def clear_run(self, first: int, count: int) -> None:
        """Remove `count` regions from `first` on."""
        for start, masks in self._masks(first, count):
            low = start // PAGE_BITS_BYTES
            high = (start + len(masks) - 1) // PAGE_BITS_BYTES + 1
            if not bool(self._used[low:high].any()):
                continue
            part = self._bits[start : start + len(masks)]
            masks &= part
            part ^= masks
            self.count -= _ones(masks)
            for page in self._touched(start, masks).tolist():
                self._used[page] = bool(self._page(page).any())

    def clear_each(self, regions: npt.NDArray[np.int64]) -> None:
        """Remove single regions, in any order: thousands at once at the cost of a few."""
        if not len(regions):
            return
        ordered = np.unique(regions)
        assert int(ordered[0]) >= 0
        assert int(ordered[-1]) < self.regions
        where = ordered >> 3
        heads = run_heads(where[1:] != where[:-1])
        masks = np.left_shift(1, ordered & 7).astype(np.uint8)
        where, masks = where[heads], np.bitwise_or.reduceat(masks, heads)
        masks &= self._bits[where]
        where, masks = where[masks != 0], masks[masks != 0]
        self._bits[where] ^= masks
        self.count -= _ones(masks)
        pages = where // PAGE_BITS_BYTES
        self._changed[pages] = True
        for page in np.unique(pages).tolist():
            self._used[page] = bool(self._page(page).any())

    def _touched(self, start: int, differences: _Bytes) -> npt.NDArray[np.int64]:
        """The pages with differences, which count as changed now."""
        pages = np.unique((np.flatnonzero(differences) + start) // PAGE_BITS_BYTES)
        self._changed[pages] = True
        return pages

    def next_run(self, from_region: int, count_max: int) -> tuple[int, int] | None:
        """(first, count ≤ count_max) of the next run at or after `from_region`, or None."""
        assert count_max > 0
        first = -1
        page, offset = divmod(from_region, PAGE_REGIONS)
        while page < len(self._used):
            if not self._used[page]:
                if first >= 0:
                    break
                page, offset = page + int(np.argmax(self._used[page:])), 0
                if not self._used[page]:
                    return None
            flags = np.unpackbits(self._page(page), bitorder="little")[offset:]
            if first < 0:
                skipped = int(np.argmax(flags))
                if flags[skipped]:
                    first = page * PAGE_REGIONS + offset + skipped
                    flags, offset = flags[skipped:], offset + skipped
            if first >= 0:
                end = int(np.argmin(flags))
                if not flags[end]:
                    return first, min(page * PAGE_REGIONS + offset + end - first, count_max)
                if (page + 1) * PAGE_REGIONS - first >= count_max:
                    return first, count_max
            page, offset = page + 1, 0
        return (first, min(page * PAGE_REGIONS - first, count_max)) if first >= 0 else None

    def flags_of(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        """Whether each of the regions first…end - 1 is set.

        While another thread adds regions, some of those that it adds may be among them.
        """
        assert 0 <= first <= end <= self.regions
        flags = np.unpackbits(self._bits[first >> 3 : (end + 7) >> 3], bitorder="little")
        return flags[first & 7 : (first & 7) + end - first].astype(np.bool_)

    def take_pages(self, volume: int, *, everything: bool) -> list[BitmapPage]:
        """Copies of the pages to write; they count as written from here on.

        :param everything: all pages that hold bits, for a new file; else the changed ones.
        """
        if everything:
            self._slots[:] = 0
        pages = np.flatnonzero(self._used if everything else self._changed).tolist()
        self._changed[:] = False
        return [
            BitmapPage(volume, page, int(self._slots[page]), self._page(page).tobytes())
            for page in pages
        ]

    def mark_written(self, page: int) -> None:
        """The page is durable: its next version goes to the other slot."""
        self._slots[page] ^= 1

    def mark_unwritten(self, page: int) -> None:
        """Writing the page failed: it has to be written again, into the same slot."""
        self._changed[page] = True

    def _masks(self, first: int, count: int) -> Iterator[tuple[int, _Bytes]]:
        """(byte, masks from there on) of a run, in pieces of at most 1 MiB."""
        assert first >= 0
        assert 0 < count <= self.regions - first
        low, high = first >> 3, (first + count - 1) >> 3
        for start in range(low, high + 1, MIB):
            masks = np.full(min(MIB, high + 1 - start), 255, dtype=np.uint8)
            if start == low:
                masks[0] &= 255 << (first & 7) & 255
            if start + len(masks) == high + 1:
                masks[-1] &= 255 >> (7 - (first + count - 1 & 7))
            yield start, masks

    def _page(self, page: int) -> _Bytes:
        return self._bits[page * PAGE_BITS_BYTES : (page + 1) * PAGE_BITS_BYTES]


def _ones(values: _Bytes) -> int:
    """Set bits."""
    return int(_ONES[values].sum(dtype=np.int64))
