"""One file of a simulated disk: immutable pages, a cache over what is durable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from geomirror.errors import StorageError
from geomirror.volume.store import Buffer

if TYPE_CHECKING:
    from tests.sim.disk import SimStore

PAGE = 4096
SECTOR = 512
SECTORS = PAGE // SECTOR
ALL_SECTORS = (1 << SECTORS) - 1
ZERO_PAGE = bytes(PAGE)


@dataclass(eq=False)
class Inode:
    """Content of one file. Pages are immutable bytes; an absent page is all zero."""

    size: int = 0
    durable_size: int = 0
    cache: dict[int, bytes] = field(default_factory=dict)
    durable: dict[int, bytes] = field(default_factory=dict)
    dirty: dict[int, int] = field(default_factory=dict)
    """Page → mask of the sectors written since the last sync."""
    synced: dict[int, int] = field(default_factory=dict)
    """Page → mask of the sectors that any sync has made durable, zeros included."""
    reserved_bytes: int = 0
    changes: int = 0
    """How often what a reader sees may have changed."""

    def used_bytes(self) -> int:
        """Bytes that it takes on the disk."""
        return max(self.reserved_bytes, len(self.cache) * PAGE)

    def copy_durable(self) -> Inode:
        """What is on the disk now, as a file of its own."""
        size, pages = self.durable_size, self.durable
        synced = dict(self.synced)
        return Inode(size, size, dict(pages), dict(pages), {}, synced, self.reserved_bytes)


class SimFile:
    """Implements `geomirror.volume.store.File`; unusable after a crash, like any descriptor."""

    def __init__(self, store: SimStore, inode: Inode, name: str) -> None:
        self.name = name
        self._store = store
        self._inode = inode
        self._incarnation = store.incarnation
        self._is_closed = False
        self._is_poisoned = False

    def size(self) -> int:
        """Size now."""
        self._check("size")
        return self._inode.size

    def pread(self, length: int, offset: int) -> bytes:
        """Exactly `length` bytes, zeros beyond the end."""
        self._check("pread")
        inode = self._inode
        first, start = offset >> 12, offset & 4095
        last = (offset + length + PAGE - 1) >> 12
        get = inode.cache.get
        if last - first == 1:
            data = get(first, ZERO_PAGE)
        else:
            pages = [*map(get, range(first, last), repeat(ZERO_PAGE))]
            if pages and not start:
                pages[-1] = pages[-1][: length - (len(pages) - 1) * PAGE]
            data = b"".join(pages)
        if length != len(data):
            data = data[start : start + length]
        if offset + length > inode.size:
            data = data[: max(0, inode.size - offset)].ljust(length, b"\0")
        return data

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`."""
        buffer[:] = self.pread(len(buffer), offset)

    def pread_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """One `pread` each."""
        return [self.pread(length, offset) for offset, length in ranges]

    def try_read(self, length: int, offset: int) -> bytes | None:
        """A simulated disk needs no waiting for."""
        return self.pread(length, offset)

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        """A hint that nothing here can use."""

    def expect_reads(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Another one."""

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write into the cache."""
        self._check("pwritev")
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        self._write(data if type(data) is bytes else bytes(data), offset)

    def pwritev_each(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """One `pwritev` each: the machine may stop between them."""
        for offset, buffers in runs:
            self.pwritev(buffers, offset)

    def fdatasync(self) -> None:
        """Cache to disk; a failure poisons this descriptor and drops the dirty marks."""
        if self._is_poisoned:
            raise StorageError(f"fdatasync {self.name}: refused after an earlier failure")
        inode = self._inode
        try:
            self._check("fdatasync")
        except StorageError:
            self._is_poisoned = True
            inode.dirty.clear()
            raise
        if inode.dirty:
            cache, durable, synced = inode.cache, inode.durable, inode.synced
            for page, mask in inode.dirty.items():
                synced[page] = synced.get(page, 0) | mask
                content = cache.get(page)
                if content is None:
                    durable.pop(page, None)
                else:
                    durable[page] = content
            inode.dirty.clear()
        inode.durable_size = inode.size

    def zero(self, length: int, offset: int, *, punch: bool) -> None:
        """Zeros; whole pages are dropped."""
        self._check("zero")
        inode = self._inode
        inode.changes += 1
        length = min(length, max(0, inode.size - offset))
        end = offset + length
        first, last = -(-offset // PAGE), end // PAGE
        if first >= last:
            self._write(bytes(length), offset)
            return
        for page in self._pages(first, last):
            inode.cache.pop(page, None)
            inode.dirty[page] = ALL_SECTORS
        if first * PAGE > offset:
            self._write(bytes(first * PAGE - offset), offset)
        if end > last * PAGE:
            self._write(bytes(end - last * PAGE), last * PAGE)

    def data_ranges(
        self, length: int, offset: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The pages that exist, joined."""
        self._check("data_ranges")
        end = min(offset + length, self._inode.size)
        ranges: list[tuple[int, int]] = []
        first, last = offset // PAGE, -(-end // PAGE)
        cache = self._inode.cache
        present = (
            [page for page in range(first, last) if page in cache]
            if last - first < len(cache)
            else sorted(page for page in cache if first <= page < last)
        )
        for page in present:
            start, stop = max(offset, page * PAGE), min(end, (page + 1) * PAGE)
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = (ranges[-1][0], stop - ranges[-1][0])
            else:
                ranges.append((start, stop - start))
        ranges = [(start, size) for start, size in ranges if size > 0]
        if count_max is not None and len(ranges) > count_max:
            rest = ranges[count_max][0]
            ranges[count_max:] = [(rest, end - rest)]
        return ranges

    def truncate(self, size: int) -> None:
        """Grow sparse or shrink."""
        self._check("truncate")
        old = self._inode.size
        if size < old:
            self.zero(old - size, size, punch=True)
        self._inode.size = size
        self._inode.changes += 1

    def close(self) -> None:
        """Release; twice is once."""
        self._is_closed = True

    def _check(self, operation: str) -> None:
        store = self._store
        if self._is_closed or self._is_poisoned or self._incarnation != store.incarnation:
            is_bad = self._is_closed or self._incarnation != store.incarnation
            why = "Bad file descriptor" if is_bad else "refused after a failed fdatasync"
            raise StorageError(f"{operation} {self.name}: {why}")
        counts = store.counts
        counts[operation] = counts.get(operation, 0) + 1
        if store.on_operation is not None or store.faults:
            store.disturb(operation, self.name)

    def _pages(self, first: int, last: int) -> list[int]:
        inode = self._inode
        known = inode.cache.keys() | inode.durable.keys()
        if last - first < len(known):
            return [page for page in range(first, last) if page in known]
        return sorted(page for page in known if first <= page < last)

    def _write(self, data: bytes, offset: int) -> None:
        inode, store = self._inode, self._store
        cache, dirty = inode.cache, inode.dirty
        page, start = offset >> 12, offset & 4095
        position, size = 0, len(data)
        if size == 0:
            return
        inode.changes += 1
        if store.is_limited:
            store.require_space(inode, page, -(-(offset + size) // PAGE), self.name)
        while position < size:
            if not start and size - position >= PAGE:
                cache[page] = data[position : position + PAGE]
                dirty[page] = ALL_SECTORS
                count = PAGE
            else:
                count = min(PAGE - start, size - position)
                old = cache.get(page, ZERO_PAGE)
                end = start + count
                cache[page] = old[:start] + data[position : position + count] + old[end:]
                touched = (1 << -(-end // SECTOR)) - (1 << start // SECTOR)
                dirty[page] = dirty.get(page, 0) | touched
            position += count
            page, start = page + 1, 0
        if offset + size > inode.size:
            inode.size = offset + size
        if store.random_float() < store.writeback:
            store.write_back(inode)
