"""The old contents that an index of undo files leads to, in the order of their blocks.

```
 index, ascending ─▶ up to 256 single blocks with their contents, or one run of zeros, at a time
```
Each file's blocks are in order, so each of its chunks is decompressed once.
Memory: one chunk of each file, 1 MiB of contents.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.epoch_table import KIND_ZERO
from geomirror.volume.store import File
from geomirror.volume.undo_chunks import BLOCKS_PER_CHUNK
from geomirror.volume.view_index import ViewIndex, block_of, file_of

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


def old_contents(index: ViewIndex, files: Sequence[File]) -> Iterator[OldPart]:
    """Everything in the index, ascending by volume and block. Blocking.

    :param files: open undo files, one for each pass of the index.
    :raises IntegrityError: a file is damaged.
    """
    chunks: dict[int, tuple[int, bytes]] = {}

    def content(address: int) -> bytes:
        number = file_of(address)
        chunk, inside = divmod(block_of(address), BLOCKS_PER_CHUNK)
        held, raw = chunks.get(number, (-1, b""))
        if held != chunk:
            raw = index.files[number].read(files[number], chunk)
            chunks[number] = chunk, raw
        return raw[inside * BLOCK_BYTES : (inside + 1) * BLOCK_BYTES]

    table = index.table()
    fields = ["volume", "kind", "count", "block", "address"]
    volume = -1
    blocks: list[int] = []
    contents: list[bytes] = []
    for at in range(0, len(table), _BLOCKS_MAX):
        for owner, kind, count, block, address in table[at : at + _BLOCKS_MAX][fields].tolist():
            if blocks and (owner != volume or kind == KIND_ZERO or len(blocks) >= _BLOCKS_MAX):
                yield OldPart(volume, blocks, len(blocks), contents)
                blocks, contents = [], []
            volume = owner
            if kind == KIND_ZERO:
                yield OldPart(volume, [block], count, None)
            else:
                blocks.append(block)
                contents.append(content(address))
    if blocks:
        yield OldPart(volume, blocks, len(blocks), contents)


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
