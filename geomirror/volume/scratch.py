"""What was written to a view: whole blocks beside it, within a quota, gone with the view.

```
 views/NAME.0.scratch   sparse, each block at its own offset       views/NAME.map   which blocks
```
The map has the format of a dirty bitmap with one bit for each 4 KiB. A write is complete when it is
in RAM and in the page cache; a flush makes contents durable first, then the map: what a crash
leaves is the view with every flushed write.
Not thread-safe: one job at a time. Deliberately not here: the view itself (`view`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from geomirror.errors import NoSpaceError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.bitmap_file import (
    BitmapHeader,
    next_header,
    raise_sequence,
    read_header,
    read_pages,
    write_pages,
)
from geomirror.volume.region_bits import RegionBits
from geomirror.volume.store import Buffer, File, Store

DIRECTORY = "views"

ReadBase = Callable[[int, int, int], bytes]
"""(volume, offset, length) of the view below."""


class Scratch:
    """The overlay of one view."""

    def __init__(
        self, header: BitmapHeader, map_file: File, files: Mapping[int, File], quota_bytes: int
    ) -> None:
        self.quota_bytes = quota_bytes
        self._header = header
        self._map = map_file
        self._files = files
        self._sizes = {volume: file.size() for volume, file in files.items()}
        self._bits = {volume: RegionBits(blocks) for volume, blocks in header.regions}

    @classmethod
    def create(
        cls, store: Store, name: str, volumes: Mapping[int, int], epoch: int, quota_bytes: int
    ) -> Scratch:
        """An empty overlay. Blocking; durable but for its name.

        :param volumes: size in bytes by volume index.
        """
        regions = tuple((index, -(-size // BLOCK_BYTES)) for index, size in sorted(volumes.items()))
        header = BitmapHeader(bytes(16), epoch, bytes(32), epoch, regions, sequence=1)
        map_file = store.create(map_name(name), header.file_bytes())
        write_pages(map_file, header, [])
        files = {index: store.create(data_name(name, index), volumes[index]) for index in volumes}
        return cls(header, map_file, files, quota_bytes)

    @classmethod
    def open(cls, store: Store, name: str, quota_bytes: int) -> Scratch:
        """The overlay as it was last flushed. Blocking.

        :raises IntegrityError: the map is damaged. :raises StorageError: a file is missing.
        """
        map_file = store.open(map_name(name))
        header = read_header(map_file)
        files = {index: store.open(data_name(name, index)) for index, _ in header.regions}
        found = cls(header, map_file, files, quota_bytes)
        for page in read_pages(map_file, header):
            found._bits[page.volume].load(page.page, page.bits, page.slot)
            found._header = raise_sequence(found._header, page.sequence)
        return found

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks written so far."""
        return sum(bits.count for bits in self._bits.values()) * BLOCK_BYTES

    def read(self, volume: int, offset: int, length: int, base: ReadBase) -> Buffer:
        """The bytes of a range: what was written, else what the view has. Blocking."""
        first, last = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        runs = self._runs(volume, first, last)
        if not runs:
            return base(volume, offset, length)
        content = bytearray()
        if runs != [(first, last - first)]:
            content += base(volume, offset, length)
        content += bytes(length - len(content))
        for start, count in runs:
            low = max(start * BLOCK_BYTES, offset)
            high = min((start + count) * BLOCK_BYTES, offset + length)
            self._files[volume].pread_into(memoryview(content)[low - offset : high - offset], low)
        return content

    def write(self, volume: int, offset: int, data: Buffer, base: ReadBase) -> None:
        """Write a range; blocks that are written in part are completed from the view. Blocking.

        :raises NoSpaceError: it would go over the quota, or the disk is full; nothing changed.
        """
        end = offset + len(data)
        self._require_room(volume, offset, end)
        low, high = self._complete(volume, offset, end, base)
        self._files[volume].pwritev([low, data, high], offset - len(low))
        self._mark(volume, offset, end)

    def zero(self, volume: int, offset: int, length: int, base: ReadBase) -> None:
        """Make a range read as zeros. Blocking; raises as `write`."""
        end = offset + length
        self._require_room(volume, offset, end)
        low, high = self._complete(volume, offset, end, base)
        file = self._files[volume]
        # Only whole blocks are punched: what lies beside the range must not be lost in between.
        first = offset + -offset % BLOCK_BYTES
        last = end if end == self._sizes[volume] else end - end % BLOCK_BYTES
        if first > last:
            file.pwritev([low, bytes(length), high], offset - len(low))
        else:
            if offset < first:
                file.pwritev([low, bytes(first - offset)], offset - len(low))
            if first < last:
                file.zero(last - first, first, punch=True)
            if last < end:
                file.pwritev([bytes(end - last), high], last)
        self._mark(volume, offset, end)

    def flush(self) -> None:
        """Make everything written durable: contents, then the map. Blocking."""
        pages = [
            page
            for volume, bits in self._bits.items()
            for page in bits.take_pages(volume, everything=False)
        ]
        for file in self._files.values():
            file.fdatasync()  # Also without new blocks: old ones may have been written again.
        if not pages:
            return
        self._header = next_header(self._header, self._header.through_epoch)
        write_pages(self._map, self._header, pages)
        for page in pages:
            self._bits[page.volume].mark_written(page.page)

    def close(self) -> None:
        """Close all files; nothing is synced."""
        for file in (self._map, *self._files.values()):
            file.close()

    def _runs(self, volume: int, first: int, last: int) -> list[tuple[int, int]]:
        """(first, count) of what was written among blocks first … last - 1."""
        bits, runs = self._bits[volume], []
        at = first
        while at < last:
            found = bits.next_run(at, last - at)
            if found is None or found[0] >= last:
                break
            start, count = found[0], min(found[1], last - found[0])
            runs.append((start, count))
            at = start + count
        return runs

    def _require_room(self, volume: int, offset: int, end: int) -> None:
        first, last = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        held = sum(count for _, count in self._runs(volume, first, last))
        needed = (last - first - held) * BLOCK_BYTES
        if self.used_bytes + needed > self.quota_bytes:
            raise NoSpaceError(
                f"the view's quota of {self.quota_bytes} bytes is used up",
                hint="make another view with a larger --quota",
            )

    def _complete(
        self, volume: int, offset: int, end: int, base: ReadBase
    ) -> tuple[Buffer, Buffer]:
        """What is in the first and last block beside [offset, end)."""
        low: Buffer = b""
        high: Buffer = b""
        start = offset - offset % BLOCK_BYTES
        stop = min(end + -end % BLOCK_BYTES, self._sizes[volume])
        if start < offset:
            low = self.read(volume, start, offset - start, base)
        if end < stop:
            high = self.read(volume, end, stop - end, base)
        return low, high

    def _mark(self, volume: int, offset: int, end: int) -> None:
        first = offset // BLOCK_BYTES
        self._bits[volume].set_run(first, -(-end // BLOCK_BYTES) - first)


def map_name(name: str) -> str:
    """Which blocks were written."""
    return f"{DIRECTORY}/{name}.map"


def data_name(name: str, volume: int) -> str:
    """What was written to one volume."""
    return f"{DIRECTORY}/{name}.{volume}.scratch"
