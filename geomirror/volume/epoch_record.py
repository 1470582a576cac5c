"""Payload of an EPOCH record: the epoch and its table, as `docs/disk_format.md` lays it out."""

from __future__ import annotations

import struct

import numpy as np

from geomirror.errors import IntegrityError
from geomirror.limits import PRODUCTION
from geomirror.volume.epoch_table import ENTRY, KIND_ZERO, Epoch, Table, is_canonical
from geomirror.volume.volume_change import decode_changes, encode_changes

_HEADER = struct.Struct("<QQ16sQQQQ32sIIII")
EPOCH_HEADER_BYTES = 112
assert _HEADER.size == EPOCH_HEADER_BYTES

_FLAG_ASSERTED = 1
_FLAG_MARK = 2


def encode_epoch(epoch: Epoch, previous_lsn: int) -> bytes:
    """The payload; `previous_lsn` is the EPOCH record before this one in the journal, 0 for none.

    The table must be canonical: sorted by (volume, block), without overlaps.
    """
    assert len(epoch.generation) == 16
    assert len(epoch.chain_hash) == 32
    assert epoch.table.dtype == ENTRY
    flags = _FLAG_ASSERTED * epoch.is_asserted | _FLAG_MARK * epoch.is_mark
    changes = encode_changes(epoch.changes)
    header = _HEADER.pack(
        epoch.number,
        epoch.first_number,
        epoch.generation,
        epoch.first_lsn,
        epoch.end_lsn,
        epoch.wall_ns,
        previous_lsn,
        epoch.chain_hash,
        len(epoch.table),
        flags,
        len(changes),
        0,
    )
    return header + epoch.table.tobytes() + changes


def peek_epoch(payload: bytes) -> tuple[int, bool]:
    """(number, whether a mark cut it) of a payload, or of its header alone."""
    fields = _HEADER.unpack_from(payload)
    return fields[0], bool(fields[9] & _FLAG_MARK)


def decode_epoch(
    payload: bytes, *, entries_max: int = PRODUCTION.epoch_entries_max
) -> tuple[Epoch, int]:
    """The epoch (its table is a writable copy) and the LSN of the EPOCH record before it.

    :raises IntegrityError: the payload is not one that `encode_epoch` makes.
    """
    if len(payload) < EPOCH_HEADER_BYTES:
        raise IntegrityError(f"epoch record of {len(payload)} bytes is shorter than its header")
    fields = _HEADER.unpack_from(payload)
    number, first_number, count, flags = fields[0], fields[1], fields[8], fields[9]
    table_end = EPOCH_HEADER_BYTES + count * ENTRY.itemsize
    what = f"record of epoch {number}"
    if count > entries_max:
        raise IntegrityError(f"{what} has {count} entries, more than {entries_max}")
    if len(payload) != table_end + fields[10]:
        raise IntegrityError(f"{what} has {len(payload)} bytes, wrong for {count} entries")
    if not 0 < first_number <= number or fields[3] > fields[4]:
        raise IntegrityError(f"{what} covers no range of epochs or LSNs")
    if flags & ~(_FLAG_ASSERTED | _FLAG_MARK) or fields[11]:
        raise IntegrityError(f"{what} has unknown flags {flags}")
    table = np.frombuffer(payload, dtype=ENTRY, count=count, offset=EPOCH_HEADER_BYTES).copy()
    if not is_canonical(table) or not _are_zeros_bare(table):
        raise IntegrityError(f"{what} has a table that is not in canonical form")
    epoch = Epoch(
        number=number,
        first_number=first_number,
        generation=fields[2],
        first_lsn=fields[3],
        end_lsn=fields[4],
        wall_ns=fields[5],
        chain_hash=fields[7],
        table=table,
        is_asserted=bool(flags & _FLAG_ASSERTED),
        is_mark=bool(flags & _FLAG_MARK),
        changes=decode_changes(payload[table_end:], what),
    )
    return epoch, fields[6]


def _are_zeros_bare(table: Table) -> bool:
    """ZERO entries carry neither an address nor a digest."""
    is_zero = table["kind"] == KIND_ZERO
    if not is_zero.any():
        return True
    zeros = table[is_zero]
    return not any(zeros[name].any() for name in ("address", "digest_low", "digest_high"))
