"""The epoch table as it lies in a journal: what is accepted encodes to itself, bit for bit."""

from __future__ import annotations

import numpy as np

from geomirror.errors import IntegrityError
from geomirror.volume.epoch_record import EPOCH_HEADER_BYTES, decode_epoch, encode_epoch
from geomirror.volume.epoch_table import BLOCK_MAX, HASH_ZERO, chain_hash, is_canonical
from tests.fuzz.source import Source
from tests.volume.hexdump import VECTORS, load

ENTRIES_MAX = 64


def seeds() -> list[bytes]:
    """The golden vector, as it is and with its count made right."""
    golden = load((VECTORS / "epoch_record_v1.hex").read_text())
    return [b"\0" + golden, b"\1" + golden, b"\1" + golden[:EPOCH_HEADER_BYTES]]


def run(data: bytes) -> None:
    """Decode; the table of what is accepted is in order, and hashes the same in two halves."""
    source = Source(data)
    is_mended = source.flag()
    payload = bytearray(source.rest())
    if is_mended and len(payload) >= EPOCH_HEADER_BYTES:
        count = (len(payload) - EPOCH_HEADER_BYTES) // 40
        payload = payload[: EPOCH_HEADER_BYTES + 40 * count]
        payload[96:100] = count.to_bytes(4, "little")
        payload[100:112] = bytes([payload[100] & 3]) + bytes(11)
    try:
        epoch, previous_lsn = decode_epoch(bytes(payload), entries_max=ENTRIES_MAX)
    except IntegrityError:
        return
    assert encode_epoch(epoch, previous_lsn) == bytes(payload)
    table = epoch.table
    assert len(table) <= ENTRIES_MAX
    after = (-1, 0)
    for row in table.tolist():
        volume, kind, _flags, count, block = row[:5]
        assert (volume, block) >= after
        assert kind in (0, 1)
        assert count >= 1
        assert block <= BLOCK_MAX
        after = (volume, block + count)
    assert is_canonical(table)
    copy = np.concatenate([table[: len(table) // 2], table[len(table) // 2 :]])
    one = chain_hash(HASH_ZERO, epoch.generation, epoch.number, 0, 1, table)
    assert one == chain_hash(HASH_ZERO, epoch.generation, epoch.number, 0, 1, copy)
