"""The file of one peer's dirty bitmap: two header slots, then the bits of each volume.

```
 header A │ header B │ volume 0: page 0 A │ page 0 B │ page 1 A │ … │ volume 1: …      4096 each
```
Headers and pages have two slots: the older one is overwritten, so a write that a crash tears leaves
the newer one. Pages are synced first, the header after them, so that a header never promises bits
that a crash has taken. The format is in `docs/disk_format.md`.
Deliberately not here: which bits are set and when they may be cleared (`dirty_bitmap`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import xxhash

from geomirror.errors import IntegrityError
from geomirror.limits import MIB
from geomirror.volume.store import File, Store

DIRECTORY = "bitmap"
_SLOT_BYTES = 4096
PAGE_BITS_BYTES = _SLOT_BYTES - 16
"""Bits of a page, the unit of writing: 32640 regions, nearly 2 GiB of volume."""
PAGE_REGIONS = PAGE_BITS_BYTES * 8
_PAGE_BYTES = 2 * _SLOT_BYTES
_PAGE_HEAD = struct.Struct("<QQ")
_BITS_OFFSET = 2 * _SLOT_BYTES
_READ_BYTES_MAX = 1 * MIB
_MAGIC = b"GMBITS1\0"
_VERSION = 1
_FLAG_IN_USE = 1
_HEADER = struct.Struct("<8sIIQ16sQ32sQI")
_VOLUME = struct.Struct("<IQ")
_CHECK = struct.Struct("<Q")
_PEER = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class BitmapHeader:
    """What the bits mean: all that changed in (base_epoch, through_epoch] is set in them."""

    base_generation: bytes
    """16 bytes."""
    base_epoch: int
    """The peer's durable position when the bitmap was begun; it serves no other peer state."""
    base_hash: bytes
    """H(base_epoch), 32 bytes."""
    through_epoch: int
    regions: tuple[tuple[int, int], ...]
    """(volume index, regions), ascending."""
    sequence: int = 0

    def encode(self) -> bytes:
        """One slot, 4096 bytes."""
        assert len(self.base_generation) == 16
        assert len(self.base_hash) == 32
        body = _HEADER.pack(
            _MAGIC,
            _VERSION,
            _FLAG_IN_USE,
            self.sequence,
            self.base_generation,
            self.base_epoch,
            self.base_hash,
            self.through_epoch,
            len(self.regions),
        )
        body += b"".join(_VOLUME.pack(*each) for each in self.regions)
        slot = (body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))).ljust(_SLOT_BYTES, b"\0")
        assert len(slot) == _SLOT_BYTES
        return slot

    @classmethod
    def decode(cls, slot: bytes) -> BitmapHeader | None:
        """The header in a slot, or None: never written, torn, or of an unknown version."""
        magic, version, flags, sequence, generation, epoch, chain_hash, through, count = (
            _HEADER.unpack_from(slot)
        )
        end = _HEADER.size + count * _VOLUME.size
        if magic != _MAGIC or version != _VERSION or end + _CHECK.size > len(slot):
            return None
        if _CHECK.unpack_from(slot, end)[0] != xxhash.xxh3_64_intdigest(slot[:end]):
            return None
        if not flags & _FLAG_IN_USE:
            return None
        regions = tuple(_VOLUME.iter_unpack(slot[_HEADER.size : end]))
        return cls(generation, epoch, chain_hash, through, regions, sequence)

    def offsets(self) -> dict[int, int]:
        """Where the bits of each volume begin."""
        offset, found = _BITS_OFFSET, {}
        for volume, regions in self.regions:
            found[volume] = offset
            offset += pages_of(regions) * _PAGE_BYTES
        return found

    def file_bytes(self) -> int:
        """Size of the file."""
        return _BITS_OFFSET + sum(pages_of(regions) * _PAGE_BYTES for _, regions in self.regions)


class BitmapPage(NamedTuple):
    """The bits of 32640 regions of a volume, and the slot that they are written to."""

    volume: int
    page: int
    slot: int
    bits: bytes
    sequence: int = 0
    """Of the write that made it; set when read from disk."""

    def encode(self, sequence: int) -> bytes:
        """The 4096 bytes of the slot."""
        check = _page_check(self.volume, self.page, sequence, self.bits)
        return _PAGE_HEAD.pack(sequence, check) + self.bits


def write_new_file(
    store: Store, peer: str, header: BitmapHeader, pages: Sequence[BitmapPage]
) -> None:
    """Write a whole bitmap beside the old one, which it then replaces durably."""
    temporary = f"{DIRECTORY}/{peer}.new"
    store.unlink(temporary)
    file = store.create(temporary, header.file_bytes())
    try:
        write_pages(file, header, pages)
    finally:
        file.close()
    store.rename(temporary, file_name(peer))
    store.sync_directory(DIRECTORY)


def write_pages(file: File, header: BitmapHeader, pages: Sequence[BitmapPage]) -> None:
    """Write pages into their slots, sync, then the header into its own, sync."""
    offsets = header.offsets()
    for page in pages:
        offset = offsets[page.volume] + page.page * _PAGE_BYTES + page.slot * _SLOT_BYTES
        file.pwritev([page.encode(header.sequence)], offset)
    if pages:
        file.fdatasync()
    file.pwritev([header.encode()], header.sequence % 2 * _SLOT_BYTES)
    file.fdatasync()


def file_name(peer: str) -> str:
    """`bitmap/PEER.bits`; node names are checked where they enter, asserted here."""
    assert _PEER.fullmatch(peer), f"not a node name: {peer!r}"
    return f"{DIRECTORY}/{peer}.bits"


def pages_of(regions: int) -> int:
    """Pages that hold the bits of so many regions."""
    return -(-regions // PAGE_REGIONS)


def read_header(file: File) -> BitmapHeader:
    """The newer of the valid slots.

    :raises IntegrityError: none is valid, or the file is shorter than it says.
    """
    slots = [BitmapHeader.decode(file.pread(_SLOT_BYTES, at)) for at in (0, _SLOT_BYTES)]
    valid = [header for header in slots if header is not None]
    if not valid:
        raise _damaged(file, "has no valid header")
    newest = max(valid, key=lambda header: header.sequence)
    if file.size() < newest.file_bytes():
        raise _damaged(file, "is too short")
    return newest


def read_pages(file: File, header: BitmapHeader) -> Iterator[BitmapPage]:
    """The newest version of every page that was ever written; `slot` is the one to write next."""
    offsets = header.offsets()
    for volume, regions in header.regions:
        start, size = offsets[volume], pages_of(regions) * _PAGE_BYTES
        done = 0
        for offset, length in file.data_ranges(size, start):
            low = max((offset - start) // _PAGE_BYTES * _PAGE_BYTES, done)
            high = min(-(-(offset - start + length) // _PAGE_BYTES) * _PAGE_BYTES, size)
            for at in range(low, high, _READ_BYTES_MAX):
                content = file.pread(min(_READ_BYTES_MAX, high - at), start + at)
                for inside in range(0, len(content), _PAGE_BYTES):
                    pair = content[inside : inside + _PAGE_BYTES]
                    yield _newest(file, volume, (at + inside) // _PAGE_BYTES, pair)
            done = max(done, high)


def _newest(file: File, volume: int, page: int, pair: bytes) -> BitmapPage:
    found = BitmapPage(volume, page, 0, bytes(PAGE_BITS_BYTES))
    newest, written = 0, 0
    for slot in (0, 1):
        content = pair[slot * _SLOT_BYTES : (slot + 1) * _SLOT_BYTES]
        sequence, check = _PAGE_HEAD.unpack_from(content)
        bits = content[_PAGE_HEAD.size :]
        written += any(content)
        if sequence > newest and check == _page_check(volume, page, sequence, bits):
            newest, found = sequence, BitmapPage(volume, page, 1 - slot, bits, sequence)
    # One torn slot is a write that a crash cut short; two cannot be.
    if written == 2 and not newest:
        raise _damaged(file, f"has no valid version of page {page} of volume {volume}")
    return found


def _page_check(volume: int, page: int, sequence: int, bits: bytes) -> int:
    seed = (volume << 32 | page) ^ sequence << 40 & (1 << 64) - 1
    return xxhash.xxh3_64_intdigest(bits, seed=seed)


def next_header(header: BitmapHeader, through_epoch: int) -> BitmapHeader:
    """The header that replaces `header` in the other slot."""
    return replace(header, through_epoch=through_epoch, sequence=header.sequence + 1)


def raise_sequence(header: BitmapHeader, page_sequence: int) -> BitmapHeader:
    """Go past the pages that an interrupted write left, so that the next one's count as newer.

    The parity stays: the next header must not overwrite the one that counts now.
    """
    ahead = max(0, page_sequence - header.sequence)
    return replace(header, sequence=header.sequence + (ahead + 1) // 2 * 2)


def _damaged(file: File, what: str) -> IntegrityError:
    return IntegrityError(
        f"dirty bitmap {file.name} {what}",
        hint='everything counts as changed for this peer; run "geomirror resync"',
    )
