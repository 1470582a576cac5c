"""What a rollback cuts off, as the contents of a branch; and the pass that leads to its target.

```
 blocks changed in (p, applied]     last content in the image, but for those that were changed in
 blocks changed in (applied, end]   last content in the journal
```
Both are written in the order of their blocks, as an undo file is.
Deliberately not here: which epochs these are (`engine_rollback`), the files (`branches`, `undo`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from geomirror.errors import RefusedError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.arrays import run_heads
from geomirror.volume.before_images import BeforeImages, ContentsWriter
from geomirror.volume.epoch_table import KIND_DATA, KIND_ZERO, Table, empty_table
from geomirror.volume.image import Image
from geomirror.volume.merge import Keys, keys_of, merge_tables
from geomirror.volume.undo import UndoOverflowError
from geomirror.volume.undo_contents import OldPart
from geomirror.volume.undo_file import UndoWriter

_FLAG_IMAGE = 2
"""Of a run in a tail's table: its content is what the image holds. Never in a file."""
_IN_IMAGE = 2
_BLOCKS_MAX = 256
"""Contents in memory at once: 1 MiB."""


def tail_table(in_image: Table, in_journal: Table) -> Table:
    """The blocks of a tail and where the last content of each lies.

    :param in_image: blocks of epochs that are applied; their kinds do not matter.
    :param in_journal: merged tables of the epochs that are not.
    """
    images = empty_table(len(in_image))
    for name in ("volume", "count", "block"):
        images[name] = in_image[name]
    images["kind"], images["flags"] = KIND_ZERO, _FLAG_IMAGE
    return merge_tables([images, in_journal])


def is_in_image(table: Table) -> npt.NDArray[np.bool_]:
    """Of which entries of a tail's table the content is what the image holds."""
    found: npt.NDArray[np.bool_]
    found = (table["kind"] == KIND_ZERO) & (table["flags"] == _FLAG_IMAGE)
    return found


def grown_table(before: Mapping[int, int], images: Mapping[int, Image]) -> Table:
    """The blocks that volumes have grown by, which undo does not name.

    :param before: bytes of those that have; 0 of one that was added.
    """
    grown = empty_table(len(before))
    for at, (volume, size_bytes) in enumerate(sorted(before.items())):
        first = size_bytes // BLOCK_BYTES
        grown[at]["volume"], grown[at]["block"] = volume, first
        grown[at]["count"] = -(-images[volume].size_bytes // BLOCK_BYTES) - first
    grown["kind"] = KIND_ZERO
    return grown


def fill_branch(
    writer: ContentsWriter,
    table: Table,
    images: Mapping[int, Image],
    sizes: Mapping[int, int],
    read: Callable[[int, int], bytes],
    raw_bytes_max: int,
) -> None:
    """Add the contents of a tail. Blocking.

    :param sizes: bytes of the volumes at its end; an image has those of the applied epoch.
    :param read: journal contents by (address, length).
    :raises RefusedError: it is more than `raw_bytes_max`.
    """
    if not len(table):
        return
    where = np.where(is_in_image(table), _IN_IMAGE, table["kind"])
    breaks = (where[1:] != where[:-1]) | (table["volume"][1:] != table["volume"][:-1])
    heads = run_heads(breaks).tolist()
    for start, end in zip(heads, [*heads[1:], len(table)], strict=True):
        rows = table[start:end]
        volume = int(rows["volume"][0])
        if where[start] == _IN_IMAGE:
            try:
                BeforeImages(writer, volume, images[volume], raw_bytes_max).save(rows)
            except UndoOverflowError:
                raise too_large(raw_bytes_max) from None
        elif where[start] == KIND_DATA:
            _add_journal(writer, volume, sizes[volume], rows, read)
        else:
            for block, count in rows[["block", "count"]].tolist():
                writer.add_zero(volume, block, count)
        if writer.raw_bytes > raw_bytes_max:
            raise too_large(raw_bytes_max)


def _add_journal(
    writer: ContentsWriter,
    volume: int,
    size_bytes: int,
    rows: Table,
    read: Callable[[int, int], bytes],
) -> None:
    for at in range(0, len(rows), _BLOCKS_MAX):
        part = rows[at : at + _BLOCKS_MAX]
        contents = [
            read(address, min(BLOCK_BYTES, size_bytes - block * BLOCK_BYTES))
            for block, address in part[["block", "address"]].tolist()
        ]
        writer.add_blocks(volume, part["block"].astype(np.int64), b"".join(contents))


def too_large(bytes_max: int) -> RefusedError:
    """A tail has more bytes than branches have room for."""
    return RefusedError(
        f"what would be cut off is more than {bytes_max} bytes, which is what is left for branches",
        hint='drop one: "geomirror branch list RES", "geomirror branch drop RES NAME"',
    )


def fill_joint(writer: UndoWriter, parts: Iterable[OldPart], changed: Table) -> None:
    """Add, of old contents, those of the blocks that `changed` names. Blocking."""
    if not len(changed):
        return  # Of marks, for instance.
    keys = keys_of(changed)
    ends = keys + changed["count"].astype(np.int64)
    for part in parts:
        if part.contents is None:
            _add_zeros(writer, part, keys, ends)
            continue
        wanted = empty_table(len(part.blocks))
        wanted["volume"], wanted["block"] = part.volume, part.blocks
        own = keys_of(wanted)
        at = np.searchsorted(keys, own, side="right") - 1
        chosen = np.flatnonzero((at >= 0) & (own < ends[np.maximum(at, 0)]))
        if len(chosen):
            blocks = np.array(part.blocks, dtype=np.int64)[chosen]
            data = b"".join(part.contents[i] for i in chosen.tolist())
            assert len(data) == len(blocks) * BLOCK_BYTES
            writer.add_blocks(part.volume, blocks, data)


def _add_zeros(writer: UndoWriter, part: OldPart, starts: Keys, ends: Keys) -> None:
    """The parts of a run of zeros that lie in [start, end) keys."""
    edge = empty_table(1)
    edge["volume"], edge["block"] = part.volume, part.blocks[0]
    low = int(keys_of(edge)[0])
    high = low + part.block_count
    first = max(int(np.searchsorted(starts, low, side="right")) - 1, 0)
    last = int(np.searchsorted(starts, high, side="left"))
    for start, end in zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True):
        begin, stop = max(start, low), min(end, high)
        if begin < stop:
            writer.add_zero(part.volume, part.blocks[0] + begin - low, stop - begin)
