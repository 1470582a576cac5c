"""The old contents that an index of undo files leads to, in the order of their blocks.

```
 index, ascending ─▶ 16384 blocks ─▶ read file by file, chunk by chunk ─▶ in their order again
                  ─▶ up to 256 single blocks with their contents, or one run of zeros, at a time
```
Blocks that are next to each other lie in any of thousands of files. So that neither all of them are
open nor a chunk of each is in memory, a batch is read in the order of the files: one is open at a
time, and of a batch each chunk is decompressed once.
Memory: 64 MiB of contents, one chunk.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

import numpy as np

from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.volume.epoch_table import KIND_ZERO, Table
from geomirror.volume.store import File
from geomirror.volume.undo_chunks import BLOCKS_PER_CHUNK, damage
from geomirror.volume.view_index import ViewIndex, block_of, file_of

_BATCH_ENTRIES = 64 * MIB // BLOCK_BYTES
"""Entries whose contents are in memory: a merge is one batch."""
_BLOCKS_MAX = 256
"""Blocks copied at once: 1 MiB."""


class OldPart(NamedTuple):
    """Some blocks of one volume, ascending, or a run of zeros."""

    volume: int
    blocks: list[int]
    """The blocks of `contents`; of a run its first one."""
    block_count: int
    """Blocks in all."""
    contents: list[bytes] | None
    """4096 bytes each, a short last block padded; None: all of them are zeros."""


def old_contents(
    index: ViewIndex, open_file: Callable[[str], File], pause: Callable[[], None] = lambda: None
) -> Iterator[OldPart]:
    """Everything in the index, ascending by volume and block. Blocking.

    :param open_file: opens an undo file by its name.
    :param pause: called before each file that is read; what it raises ends this.
    :raises IntegrityError: a file is damaged. :raises StorageError: one cannot be read.
    """
    table = index.table()
    fields = ["volume", "kind", "count", "block"]
    volume = -1
    blocks: list[int] = []
    contents: list[bytes] = []
    for at in range(0, len(table), _BATCH_ENTRIES):
        batch = table[at : at + _BATCH_ENTRIES]
        found = _contents_of(index, batch, open_file, pause)
        for row, (owner, kind, count, block) in enumerate(batch[fields].tolist()):
            if blocks and (owner != volume or kind == KIND_ZERO or len(blocks) >= _BLOCKS_MAX):
                yield OldPart(volume, blocks, len(blocks), contents)
                blocks, contents = [], []
            volume = owner
            if kind == KIND_ZERO:
                yield OldPart(volume, [block], count, None)
            else:
                blocks.append(block)
                contents.append(found[row])
    if blocks:
        yield OldPart(volume, blocks, len(blocks), contents)


def _contents_of(
    index: ViewIndex, batch: Table, open_file: Callable[[str], File], pause: Callable[[], None]
) -> dict[int, bytes]:
    """The contents of the DATA entries of a batch, by row."""
    rows = (batch["kind"] != KIND_ZERO).nonzero()[0]
    addresses = batch["address"][rows].astype(np.int64)
    order = addresses.argsort(kind="stable")
    found: dict[int, bytes] = {}
    pairs = zip(rows[order].tolist(), addresses[order].tolist(), strict=True)
    for number, entries in itertools.groupby(pairs, key=lambda pair: file_of(pair[1])):
        pause()
        chunks = index.files[number]
        held, raw = -1, b""
        with closing(open_file(chunks.name)) as file:
            for row, address in entries:
                chunk, inside = divmod(block_of(address), BLOCKS_PER_CHUNK)
                if chunk != held:
                    held, raw = chunk, chunks.read(file, chunk)
                found[row] = raw[inside * BLOCK_BYTES : (inside + 1) * BLOCK_BYTES]
                if len(found[row]) != BLOCK_BYTES:
                    raise damage(chunks.name, f"has a damaged chunk {chunk}")
    return found


def within(parts: Iterable[OldPart], sizes: Mapping[int, int]) -> Iterator[OldPart]:
    """The parts, as far as volumes of these sizes reach.

    What a volume has grown by since, later passes may name, too.
    """
    for part in parts:
        end = -(-sizes.get(part.volume, 0) // BLOCK_BYTES)
        if part.contents is None:
            count = min(part.block_count, end - part.blocks[0])
            if count > 0:
                yield part._replace(block_count=count)
            continue
        count = bisect_left(part.blocks, end)
        if count:
            yield OldPart(part.volume, part.blocks[:count], count, part.contents[:count])
