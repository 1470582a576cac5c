"""The dirty bitmap of a peer: the 64 KiB regions it lacks, when the journal cannot tell any more.

```
 epochs (base, through] ──set_table──▶ bits ──write_job──▶ disk: pages first, then the header
 peer holds it durably ──clear_range──▶
```
Invariant: set are at least all regions that changed in (base, through] and that the peer may lack,
in RAM as on disk; a crash at any point leaves at least the bits that were durable before, so bitmap
and the journal after `durable_through_epoch` are exact together (I14). Hence the rule: a region may
be cleared only when its content is durable at the peer, or the peer's resync is complete; the
clearing reaches the disk with the next write job, and until then costs sending it again at worst.
RAM: 2 MiB per TiB of volume where bits are set; untouched pages cost nothing.
Not thread-safe: a bitmap, its jobs included, is used by one thread at a time.
Deliberately not here: when a peer enters or leaves bitmap mode (`wan_protocol`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from geomirror.errors import NotFoundError
from geomirror.limits import BLOCK_BYTES, REGION_BYTES
from geomirror.volume.bitmap_file import (
    DIRECTORY,
    BitmapHeader,
    BitmapPage,
    file_name,
    next_header,
    raise_sequence,
    read_header,
    read_pages,
    write_new_file,
    write_pages,
)
from geomirror.volume.block_runs import BlockRuns
from geomirror.volume.epoch_table import Table
from geomirror.volume.region_bits import RegionBits
from geomirror.volume.store import Store

_REGION_SHIFT = (REGION_BYTES // BLOCK_BYTES).bit_length() - 1
assert BLOCK_BYTES << _REGION_SHIFT == REGION_BYTES
_SHORT_REGIONS = 64
"""Runs that are cleared region by region."""


class DirtyBitmap:
    """Regions that one peer lacks; made by `create` or `load`."""

    def __init__(self, store: Store, peer: str, header: BitmapHeader, *, is_new_file: bool) -> None:
        self.peer = peer
        self.through_epoch = header.through_epoch
        """Everything that changed in (base epoch, this] is set in RAM."""
        self.durable_through_epoch = 0 if is_new_file else header.through_epoch
        """The same on disk: what the journal need not keep for this peer. 0: nothing yet."""
        self._store = store
        self._header = header
        self._is_new_file = is_new_file
        self._bits = {volume: RegionBits(regions) for volume, regions in header.regions}
        self._job: BitmapJob | None = None

    @classmethod
    def create(
        cls,
        store: Store,
        peer: str,
        volumes: Mapping[int, int],
        *,
        generation: bytes,
        epoch: int,
        chain_hash: bytes,
    ) -> DirtyBitmap:
        """An empty bitmap in RAM; on disk, in place of an older one, when a write job has run.

        :param volumes: size in bytes by volume index.
        :param epoch: the peer's durable epoch, with its generation and chain hash; the bitmap
            serves only a peer that is at or past exactly that point.
        """
        file_name(peer)
        regions = tuple((volume, _regions(volumes[volume])) for volume in sorted(volumes))
        header = BitmapHeader(generation, epoch, chain_hash, epoch, regions)
        return cls(store, peer, header, is_new_file=True)

    @classmethod
    def load(cls, store: Store, peer: str) -> DirtyBitmap:
        """The bitmap of a peer as it was last made durable.

        :raises NotFoundError: there is none.
        :raises IntegrityError: it is damaged; create another and `set_all`.
        """
        name = file_name(peer)
        if not store.exists(name):
            raise NotFoundError(f'no dirty bitmap of peer "{peer}"')
        file = store.open(name)
        try:
            header = read_header(file)
            found = cls(store, peer, header, is_new_file=False)
            for page in read_pages(file, header):
                found._bits[page.volume].load(page.page, page.bits, page.slot)
                found._header = raise_sequence(found._header, page.sequence)
        finally:
            file.close()
        return found

    @property
    def base(self) -> tuple[bytes, int, bytes]:
        """(generation, epoch, chain hash) that the peer must hold for these bits to be enough."""
        header = self._header
        return header.base_generation, header.base_epoch, header.base_hash

    def count(self) -> int:
        """Dirty regions of all volumes."""
        return sum(bits.count for bits in self._bits.values())

    @property
    def is_full(self) -> bool:
        """Every region of every volume is dirty."""
        return all(bits.count == bits.regions for bits in self._bits.values())

    @property
    def is_on_disk(self) -> bool:
        """There is a file of it."""
        return not self._is_new_file

    @property
    def is_changed(self) -> bool:
        """A write job would have bits to write."""
        return self._is_new_file or any(bits.is_changed for bits in self._bits.values())

    @property
    def volumes(self) -> list[int]:
        """Volume indices, ascending."""
        return sorted(self._bits)

    def set_table(self, table: Table, through_epoch: int | None = None) -> None:
        """Mark every region that a table (of an epoch, a pass or a fold) touches.

        :param through_epoch: the table's epoch, when all before it are in the bitmap too.
        """
        for volume in np.unique(table["volume"]).tolist():
            entries = table[table["volume"] == volume]
            first = entries["block"].astype(np.int64)
            last = (first + entries["count"].astype(np.int64) - 1) >> _REGION_SHIFT
            first >>= _REGION_SHIFT
            is_short = last - first <= 1
            bits = self._bits[volume]
            bits.set_each(np.concatenate([first[is_short], last[is_short]]))
            for low, high in zip(first[~is_short].tolist(), last[~is_short].tolist(), strict=True):
                bits.set_run(low, high - low + 1)
        if through_epoch is not None:
            self.through_epoch = max(self.through_epoch, through_epoch)

    def set_range(self, volume: int, offset: int, length: int) -> None:
        """Mark the regions of a byte range."""
        if length > 0:
            first = offset // REGION_BYTES
            last = (offset + length - 1) // REGION_BYTES
            self._bits[volume].set_run(first, last - first + 1)

    def set_all(self) -> None:
        """Mark everything: the first sync, or a peer of unknown content."""
        for bits in self._bits.values():
            bits.set_run(0, bits.regions)

    def is_dirty(self, volume: int, region: int) -> bool:
        """Whether the peer lacks the region."""
        return self._bits[volume].is_set(region)

    def blocks_within(self, volume: int, first: int, end: int) -> BlockRuns:
        """Blocks of [first, end), widened to regions, that the peer lacks; 8 KiB of bits a 4 GiB.

        Regions beyond those known count as dirty. May be asked for while another thread runs
        `set_table`: what that adds may be missing yet, nothing else.
        """
        low, high = first >> _REGION_SHIFT, ((end - 1) >> _REGION_SHIFT) + 1
        bits = self._bits.get(volume)
        known = max(low, min(high, bits.regions)) if bits is not None else low
        flags = np.zeros(high - low + 2, dtype=np.int8)
        if bits is not None and known > low:
            flags[1 : 1 + known - low] = bits.flags_of(low, known)
        flags[1 + known - low : -1] = 1
        edges = np.flatnonzero(flags[1:] != flags[:-1]) + low
        return BlockRuns(edges[::2] << _REGION_SHIFT, edges[1::2] << _REGION_SHIFT)

    def next_run(
        self, volume: int, from_region: int = 0, count_max: int = 1 << 62
    ) -> tuple[int, int] | None:
        """(first region, count) of the next dirty run at or after `from_region`, or None."""
        return self._bits[volume].next_run(from_region, count_max)

    def runs_within(self, volume: int, first: int, end: int) -> list[tuple[int, int]]:
        """(first region, end) of the dirty runs in [first, end), ascending; of one that reaches
        beyond, the part in there. Thousands cost little more than a few."""
        bits = self._bits[volume]
        flags = np.zeros(end - first + 2, dtype=np.int8)
        flags[1 : 1 + min(end, bits.regions) - first] = bits.flags_of(first, min(end, bits.regions))
        edges = (np.flatnonzero(flags[1:] != flags[:-1]) + first).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def runs(self, volume: int, from_region: int = 0) -> Iterator[tuple[int, int]]:
        """Dirty runs (first region, count), ascending; sees changes made while it is iterated."""
        while (run := self.next_run(volume, from_region)) is not None:
            yield run
            from_region = run[0] + run[1]

    def clear_range(self, volume: int, first_region: int, count: int) -> None:
        """The peer holds the content of these regions durably."""
        self._bits[volume].clear_run(first_region, count)

    def clear_runs(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """The same of many (volume, first region, end)."""
        single: dict[int, list[int]] = {}
        for volume, first, end in runs:
            if end - first <= _SHORT_REGIONS:
                single.setdefault(volume, []).extend(range(first, end))
            else:
                self.clear_range(volume, first, end - first)
        for volume, regions in single.items():
            self._bits[volume].clear_each(np.array(regions, dtype=np.int64))

    def grow(self, volumes: Mapping[int, int]) -> None:
        """Follow grown and new volumes; added regions are clean.

        :param volumes: size in bytes by volume index.
        """
        regions = {volume: bits.regions for volume, bits in self._bits.items()}
        wanted = {volume: _regions(size_bytes) for volume, size_bytes in volumes.items()}
        if any(count > regions.get(volume, 0) for volume, count in wanted.items()):
            counts = {v: max(regions.get(v, 0), wanted.get(v, 0)) for v in {**regions, **wanted}}
            self.resize({volume: count * REGION_BYTES for volume, count in counts.items()})

    def resize(self, volumes: Mapping[int, int]) -> None:
        """Follow grown, new and removed volumes; added regions are clean.

        :param volumes: size in bytes by volume index.
        """
        assert self._job is None, "a bitmap write is under way"
        for volume in set(self._bits) - set(volumes):
            del self._bits[volume]
        for volume, size_bytes in volumes.items():
            old = self._bits.get(volume)
            self._bits[volume] = RegionBits(_regions(size_bytes), old)
        regions = tuple((volume, self._bits[volume].regions) for volume in sorted(self._bits))
        if regions != self._header.regions:
            self._header = replace(self._header, regions=regions)
            self._is_new_file = True

    def write_job(self) -> BitmapJob | None:
        """A job that makes the present state durable, or None: it is already. One at a time."""
        assert self._job is None, "a bitmap write is under way"
        pages: list[BitmapPage] = []
        for volume in self.volumes:
            pages += self._bits[volume].take_pages(volume, everything=self._is_new_file)
        is_promise_new = self.through_epoch != self._header.through_epoch
        if not pages and not is_promise_new and not self._is_new_file:
            return None
        header = next_header(self._header, self.through_epoch)
        self._job = BitmapJob(self, self._store, header, pages, self._is_new_file)
        return self._job

    def delete(self) -> None:
        """Remove the file, durably: the peer has everything through the stream again."""
        name = file_name(self.peer)
        if self._store.exists(name):
            self._store.unlink(name)
            self._store.sync_directory(DIRECTORY)

    def _finish_write(self, job: BitmapJob, *, is_written: bool) -> None:
        """The job has run, or failed: then what it held is written by the next one."""
        assert job is self._job
        self._job = None
        for page in job.pages:
            if is_written:
                self._bits[page.volume].mark_written(page.page)
            else:
                self._bits[page.volume].mark_unwritten(page.page)
        if is_written:
            self._header = job.header
            self._is_new_file = False
            self.durable_through_epoch = job.header.through_epoch


@dataclass
class BitmapJob:
    """Makes a state of a bitmap durable; blocking. The bitmap is left alone while it runs.

    :param is_new_file: the layout has changed, or there is no file yet: one is written beside the
        old and renamed over it. `pages` are all that hold bits then.
    """

    bitmap: DirtyBitmap
    store: Store
    header: BitmapHeader
    pages: list[BitmapPage] = field(repr=False)
    is_new_file: bool

    def run(self) -> None:
        """Write and sync; `durable_through_epoch` has moved when this returns.

        :raises StorageError: on disk are the old bits or a superset; run another job.
        """
        is_written = False
        try:
            if self.is_new_file:
                write_new_file(self.store, self.bitmap.peer, self.header, self.pages)
            else:
                file = self.store.open(file_name(self.bitmap.peer))
                try:
                    write_pages(file, self.header, self.pages)
                finally:
                    file.close()
            is_written = True
        finally:
            self.bitmap._finish_write(self, is_written=is_written)


def _regions(size_bytes: int) -> int:
    return -(-size_bytes // REGION_BYTES)
