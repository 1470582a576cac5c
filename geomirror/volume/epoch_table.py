"""The table of an epoch: which blocks it changes, their digests, and where their content lies.

```
 entry, 40 bytes, sorted by (volume, block), never overlapping
 ┌────────┬──────┬───────┬───────┬───────┬─────────┬───────────┐
 │ volume │ kind │ flags │ count │ block │ address │ digest 16 │
 └────────┴──────┴───────┴───────┴───────┴─────────┴───────────┘
```
DATA entries have count 1. ZERO entries are runs, address 0, digest all zero. The chain hash covers
(volume, count, block, digest) and the epoch's volume changes only, so it does not depend on where
or how contents are stored.
Deliberately not here: reading contents (`seal`, `apply`) and the record around it (`record`).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from geomirror.volume.volume_change import VolumeChange, canonical_changes

KIND_DATA = 0
KIND_ZERO = 1
FLAG_PUNCH = 1

ENTRY = np.dtype(
    [
        ("volume", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("count", "<u4"),
        ("block", "<u8"),
        ("address", "<u8"),
        ("digest_low", "<u8"),
        ("digest_high", "<u8"),
    ]
)
_CANONICAL = np.dtype(
    [
        ("volume", "<u2"),
        ("zero", "<u2"),
        ("count", "<u4"),
        ("block", "<u8"),
        ("digest_low", "<u8"),
        ("digest_high", "<u8"),
    ]
)
assert ENTRY.itemsize == 40
assert _CANONICAL.itemsize == 32

BLOCK_MAX = 1 << 52
"""No block number is higher: 16 ZiB, and sums of block and count stay exact."""

Table = npt.NDArray[np.void]
"""A one-dimensional array of `ENTRY`."""

HASH_ZERO = bytes(32)
"""H(0): the chain hash before the first epoch."""
_CHAIN = struct.Struct("<32s16sQQQI")


@dataclass(frozen=True)
class Epoch:
    """A sealed epoch as both sides know it; the payload of an EPOCH record.

    [first_lsn, end_lsn) is the primary's LSN range. A fold has `first_number < number`.
    """

    number: int
    first_number: int
    generation: bytes
    first_lsn: int
    end_lsn: int
    wall_ns: int
    chain_hash: bytes
    table: Table = field(repr=False)
    is_asserted: bool = False
    is_mark: bool = False
    changes: tuple[VolumeChange, ...] = ()
    """Volumes that it grows and adds, by index."""

    def raw_bytes(self, block_bytes: int = 4096) -> int:
        """Bytes of data blocks in it; zero runs count nothing."""
        return int(np.count_nonzero(self.table["kind"] == KIND_DATA)) * block_bytes


def empty_table(count: int = 0) -> Table:
    """A zeroed table of `count` entries."""
    return np.zeros(count, dtype=ENTRY)


def chain_hash(
    previous: bytes,
    generation: bytes,
    number: int,
    first_lsn: int,
    end_lsn: int,
    table: Table,
    changes: tuple[VolumeChange, ...] = (),
) -> bytes:
    """H(e) of invariant I9, as `docs/disk_format.md` spells it out. 32 bytes."""
    assert len(previous) == 32
    assert len(generation) == 16
    canonical = np.zeros(len(table), dtype=_CANONICAL)
    for name in ("volume", "count", "block", "digest_low", "digest_high"):
        canonical[name] = table[name]
    digest = hashlib.sha256(
        _CHAIN.pack(previous, generation, number, first_lsn, end_lsn, len(table))
    )
    digest.update(canonical.tobytes())
    digest.update(canonical_changes(changes))
    return digest.digest()


def is_canonical(table: Table) -> bool:
    """Whether entries are sorted, do not overlap, and have legal kinds and counts."""
    if len(table) == 0:
        return True
    kind, count, start = table["kind"], table["count"], table["block"]
    if int(kind.max()) > KIND_ZERO or int(count.min()) == 0 or int(start.max()) > BLOCK_MAX:
        return False
    # Of the two kinds DATA is 0, and 1 is the least that a count can be.
    if np.count_nonzero((count > 1) > kind):
        return False
    before, after = table["volume"][:-1], table["volume"][1:]
    follows = start[1:] >= start[:-1] + count[:-1]
    follows &= after == before
    follows |= after > before
    return int(np.count_nonzero(follows)) == len(follows)
