"""Sealing a draft: final contents of partly written blocks, digests, table, chain hash.

```
 draft ─▶ whole blocks ── journal, few big reads ──▶ digest ──▶ DATA (address, digest)
       ─▶ parts ── journal + image ──▶ content ────▶ digest ──▶ DATA (fill, digest)
       ─▶ zeros, all-zero contents ───────────────────────────▶ ZERO runs
                                                                └─▶ canonical table ─▶ H(e)
```
Invariant: the image still holds, for every byte that no part covers, the content before this epoch:
apply never goes past a sealed epoch, and this one is not sealed. Content(e) depends on the records
of e alone (I9), so a block that was rewritten with what it already held is in the table too.
Deliberately not here: appending FILL and EPOCH records (`engine`, on the loop).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES, KIB, MIB
from geomirror.volume.arrays import joined, run_heads
from geomirror.volume.digest import ZERO_DIGEST, digest_of, digests_of
from geomirror.volume.dirty_index import Parts
from geomirror.volume.epoch_table import (
    ENTRY,
    KIND_DATA,
    KIND_ZERO,
    Table,
    chain_hash,
    empty_table,
    is_canonical,
)
from geomirror.volume.image import Image
from geomirror.volume.merge import keys_of, merge_tables
from geomirror.volume.open_epoch import Column, EpochDraft, VolumeDraft

READ_BYTES_MAX = 1 * MIB
"""One read of the journal. Few enough that the interpreter lock changes hands rarely."""
GAP_BYTES_MAX = 16 * KIB
"""Bytes read in vain rather than starting another read (record headers, superseded writes)."""
ZERO_SOURCE_PUNCH = 1
"""Bit of a negated zero source: the range may be punched."""


class SealJob:
    """Makes the table of a draft; `run` blocks and may run on any thread.

    :param read: journal contents by (address, length).
    :param segment_bytes: no read crosses a segment.
    """

    def __init__(
        self,
        draft: EpochDraft,
        *,
        previous_hash: bytes,
        generation: bytes,
        read: Callable[[int, int], bytes],
        images: Mapping[int, Image],
        segment_bytes: int,
    ) -> None:
        self.draft = draft
        self.generation = generation
        self._previous_hash = previous_hash
        self._read = read
        self._images = images
        self._segment_bytes = segment_bytes
        self.table: Table = empty_table()
        """After `run`: canonical; addresses of fills are 0 until their records are appended."""
        self.fills: list[bytes] = []
        """After `run`: whole contents of partly written blocks, in table order."""
        self.fill_rows: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """After `run`: the table row of each fill."""
        self.chain_hash = b""
        """After `run`: H(number)."""

    def run(self) -> None:
        """Read, digest, and build the table.

        :raises StorageError: the journal or an image cannot be read.
        """
        extents: list[Table] = []
        singles: list[Table] = []
        fills: list[Table] = []
        self.fills = []
        for each in self.draft.volumes:
            extents.append(_zero_table(each.volume, each.extents))
            singles.append(self._whole_blocks(each))
            fills.append(self._partial_blocks(each))
        filled = joined(fills, ENTRY)
        self.table = _canonical(joined(extents, ENTRY), joined([filled, *singles], ENTRY))
        assert is_canonical(self.table)
        has_content = filled["kind"] == KIND_DATA
        self.fill_rows = np.searchsorted(keys_of(self.table), keys_of(filled[has_content]))
        assert len(self.fill_rows) == len(self.fills)
        draft = self.draft
        self.chain_hash = chain_hash(
            self._previous_hash,
            self.generation,
            draft.number,
            draft.first_lsn,
            draft.end_lsn,
            self.table,
            draft.changes,
        )

    def _whole_blocks(self, draft: VolumeDraft) -> Table:
        """Entries of the blocks whose content is one address, or zeros."""
        table = empty_table(len(draft.blocks))
        table["volume"] = draft.volume
        table["count"] = 1
        table["block"] = draft.blocks
        is_data = draft.sources > 0
        table["kind"] = np.where(is_data, KIND_DATA, KIND_ZERO)
        table["flags"] = np.where(is_data, 0, -draft.sources & ZERO_SOURCE_PUNCH)
        table["address"] = np.where(is_data, draft.sources, 0)
        # Only the last block of a volume can be short: it is handled alone, all others alike.
        is_short = draft.blocks == (draft.size_bytes // BLOCK_BYTES)
        for row in np.flatnonzero(is_data & is_short).tolist():
            length = draft.block_bytes(int(draft.blocks[row]))
            content = self._read(int(draft.sources[row]), length)
            _set_content(table, row, content)
        self._digest(table, np.flatnonzero(is_data & ~is_short))
        return table

    def _digest(self, table: Table, rows: npt.NDArray[np.int64]) -> None:
        """Digests of whole 4 KiB blocks, read in few big pieces; all-zero ones become ZERO."""
        zero_low, zero_high = np.uint64(ZERO_DIGEST[0]), np.uint64(ZERO_DIGEST[1])
        rows = rows[np.argsort(table["address"][rows], kind="stable")]
        addresses = table["address"][rows].astype(np.int64)
        for start, end in _reads(addresses, self._segment_bytes):
            base = int(addresses[start])
            length = int(addresses[end - 1]) + BLOCK_BYTES - base
            data = memoryview(self._read(base, length))
            offsets = (addresses[start:end] - base).tolist()
            low, high = digests_of([data[at : at + BLOCK_BYTES] for at in offsets])
            part = rows[start:end]
            table["digest_low"][part] = low
            table["digest_high"][part] = high
            for i in np.flatnonzero((low == zero_low) & (high == zero_high)).tolist():
                _set_content(
                    table, int(part[i]), bytes(data[offsets[i] : offsets[i] + BLOCK_BYTES])
                )

    def _partial_blocks(self, draft: VolumeDraft) -> Table:
        """Entries of the blocks written in part; their contents go to `fills`."""
        table = empty_table(len(draft.parts))
        table["volume"] = draft.volume
        table["count"] = 1
        image = self._images[draft.volume]
        for row, (block, parts) in enumerate(draft.parts):
            content = self._content(image, block, parts, draft.block_bytes(block))
            table["block"][row] = block
            _set_content(table, row, content)
            if table["kind"][row] == KIND_DATA:
                self.fills.append(content)
        return table

    def _content(self, image: Image, block: int, parts: Parts, length: int) -> bytes:
        covered = sum(end - start for start, end, _ in parts)
        content = bytearray(length)
        if covered < length:
            # Less than the block where the volume has grown since: the rest is a part of zeros.
            old = image.read_existing(block)[:length]
            content[: len(old)] = old
        for start, end, source in parts:
            content[start:end] = (
                self._read(source, end - start) if source > 0 else bytes(end - start)
            )
        assert len(content) == length
        return bytes(content)


def _set_content(table: Table, row: int, content: bytes) -> None:
    """Make a row DATA with its digest, or ZERO when the content is all zero."""
    is_zero = content.count(0) == len(content)
    low, high = (0, 0) if is_zero else digest_of(content)
    table["kind"][row] = KIND_ZERO if is_zero else KIND_DATA
    table["digest_low"][row] = low
    table["digest_high"][row] = high
    if is_zero:
        table["address"][row] = 0


def _reads(addresses: Column, segment_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) index ranges of ascending addresses that are worth one read each."""
    if not len(addresses):
        return
    segments = addresses // segment_bytes
    breaks = np.ones(len(addresses), dtype=bool)
    breaks[1:] = addresses[1:] - addresses[:-1] > BLOCK_BYTES + GAP_BYTES_MAX
    breaks[1:] |= segments[1:] != segments[:-1]
    # Within a stretch, a new read starts each time it enters another READ_BYTES_MAX.
    stretch = np.maximum.accumulate(np.where(breaks, addresses, 0))
    part = (addresses - stretch) // READ_BYTES_MAX
    breaks[1:] |= part[1:] != part[:-1]
    heads = run_heads(breaks[1:]).tolist()
    yield from zip(heads, [*heads[1:], len(addresses)], strict=True)


def _zero_table(volume: int, extents: list[tuple[int, int, int]]) -> Table:
    """ZERO entries of the extents; a run longer than a u32 counts is several."""
    count_max = (1 << 32) - 1
    rows = [
        (start, min(end - start, count_max), -source & ZERO_SOURCE_PUNCH)
        for first, end, source in extents
        for start in range(first, end, count_max)
    ]
    table = empty_table(len(rows))
    table["volume"] = volume
    table["kind"] = KIND_ZERO
    table["block"] = [row[0] for row in rows]
    table["count"] = [row[1] for row in rows]
    table["flags"] = [row[2] for row in rows]
    return table


def _canonical(extents: Table, singles: Table) -> Table:
    """The singles over the extents, sorted, adjacent zero runs of equal flags joined."""
    singles = singles[np.argsort(keys_of(singles), kind="stable")]
    if len(extents) and len(singles):
        return merge_tables([extents, singles])
    table = extents if len(extents) else singles
    if not bool((table["kind"] == KIND_ZERO).any()):
        return table
    # A single table is returned as it is; two halves of it are joined where they touch.
    half = len(table) // 2
    return merge_tables([table[:half], table[half:]])
