"""In which order an apply pass takes the new contents from the journal.

```
 journal  ▓▓h▓▓▓▓h▓▓s▓▓▓▓▓h▓▓▓▓        ▓▓▓▓h▓▓▓▓        h header, s superseded: read in vain
          ╰─── one read ─────╯        ╰ one read╯
          ╰──────────── one chunk, in one buffer ─╯      its blocks: to the image, ascending
```
By image block, contents lie all over the journal and each costs a read; by address, a chunk of
16 MiB takes a few large ones. Chunks are written one after the other: the order of writes within a
pass means nothing, since every block is in it once and all of it is synced at its end.
Deliberately not here: reading and writing (`apply`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from geomirror.limits import BLOCK_BYTES, KIB, MIB
from geomirror.volume.arrays import run_heads, run_lengths, run_tails
from geomirror.volume.image import WRITE_RUN_BYTES_MAX
from geomirror.volume.merge import Keys

READ_BYTES_MAX = 4 * MIB
"""One read of the journal."""
GAP_BYTES_MAX = 16 * KIB
"""Bytes read in vain rather than starting another read: copying 4 KiB costs
a fraction of a read (`bench costs`). At worst, four blocks of five are superseded ones."""


@dataclass(frozen=True)
class Chunk:
    """New contents that are in memory together."""

    rows: Keys
    """Which contents these are, ascending."""
    positions: Keys
    """Where each of them lies in the buffer."""
    reads: list[tuple[int, int, int]]
    """(address, position in the buffer, length); none crosses from one segment to the next."""
    size_bytes: int
    """Of the buffer."""


def plan_chunks(addresses: Keys, sizes: Keys, segment_bytes: int, bytes_max: int) -> list[Chunk]:
    """Chunks of at most `bytes_max` that hold all contents, by ascending address.

    :param addresses: in the journal; at least one.
    :param sizes: of the contents, at most 4096 bytes each.
    """
    order = addresses.argsort(kind="stable")
    ordered, lengths = addresses[order], sizes[order]
    segment = ordered // segment_bytes
    steps = ordered[1:] - ordered[:-1]
    breaks = steps > lengths[:-1] + GAP_BYTES_MAX
    breaks |= segment[1:] != segment[:-1]
    # In the buffer contents lie as in the journal, but for what is not read between them.
    offsets = np.zeros(len(ordered), dtype=np.int64)
    np.cumsum(np.where(breaks, lengths[:-1], steps), out=offsets[1:])
    chunk = offsets // (bytes_max - BLOCK_BYTES)
    is_next_chunk = chunk[1:] != chunk[:-1]
    breaks |= is_next_chunk
    heads = run_heads(breaks)
    starts = ordered[heads]
    ends = np.maximum.reduceat(ordered + lengths, heads)
    chunk_heads = run_heads(is_next_chunk)
    bounds = [*chunk_heads.tolist(), len(ordered)]
    read_bounds = heads.searchsorted(bounds).tolist()
    chunks = []
    for index, low in enumerate(bounds[:-1]):
        base = int(offsets[low])
        rows, positions = order[low : bounds[index + 1]], offsets[low : bounds[index + 1]] - base
        ascending = rows.argsort()
        reads = slice(read_bounds[index], read_bounds[index + 1])
        columns = (starts[reads], offsets[heads[reads]] - base, ends[reads])
        chunks.append(
            Chunk(
                rows[ascending],
                positions[ascending],
                list(_split(zip(*(column.tolist() for column in columns), strict=True))),
                int((positions + lengths[low : bounds[index + 1]]).max()),
            )
        )
    return chunks


def _split(reads: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """(address, position, length) of (address, position, end), none too long."""
    for start, position, end in reads:
        for address in range(start, end, READ_BYTES_MAX):
            length = min(READ_BYTES_MAX, end - address)
            yield address, position + address - start, length


def write_runs(
    blocks: Keys, positions: Keys, sizes: Keys, buffer: memoryview
) -> list[tuple[int, list[memoryview]]]:
    """(offset, contents) of each run of adjacent blocks, for one write each.

    Runs end where a window of `WRITE_RUN_BYTES_MAX` of the image does: some file systems hold
    readers back for the whole of a write.

    :param blocks: ascending; contents lie in `buffer` at `positions` and have `sizes`.
    """
    adjacent = blocks[1:] - blocks[:-1] == 1
    joined = adjacent & (positions[1:] - positions[:-1] == BLOCK_BYTES)
    heads = run_heads(~joined)
    starts = positions[heads]
    ends = starts + (run_lengths(heads, len(blocks)) - 1) * BLOCK_BYTES
    ends += sizes[run_tails(heads, len(blocks))]
    rows = zip(starts.tolist(), ends.tolist(), strict=True)
    views = [buffer[start:end] for start, end in rows]
    breaks = ~adjacent[heads[1:] - 1]
    window = blocks[heads] // (WRITE_RUN_BYTES_MAX // BLOCK_BYTES)
    breaks |= window[1:] != window[:-1]
    firsts = run_heads(breaks)
    offsets = (blocks[heads[firsts]] * BLOCK_BYTES).tolist()
    if len(firsts) == len(views):
        return [(offset, [view]) for offset, view in zip(offsets, views, strict=True)]
    bounds = [*firsts.tolist(), len(views)]
    return [(offset, views[bounds[i] : bounds[i + 1]]) for i, offset in enumerate(offsets)]
