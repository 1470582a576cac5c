"""The superblock's two slots: the newest valid one counts, and damage is an IntegrityError."""

from __future__ import annotations

import struct

import msgspec
from xxhash import xxh3_128_digest

from geomirror.errors import IntegrityError
from geomirror.volume.superblock import (
    BODY_BYTES_MAX,
    NAME,
    SLOT_BYTES,
    Superblock,
    SuperblockFile,
    pack_slot,
    parse_slot,
)
from tests.fuzz.source import Source
from tests.sim.disk import SimStore
from tests.volume.hexdump import VECTORS, load

_HEAD = struct.Struct("<8sIIQ16s")
_RAW, _SEALED, _OTHER_VERSION = range(3)
"""How a slot is made of a body: as it is, with a right header, or as another format version."""


def seeds() -> list[bytes]:
    """The golden vector, alone, twice, beside damage, and its parts."""
    golden = load((VECTORS / "superblock_v1.hex").read_text())
    body = golden[_HEAD.size :].rstrip(b"\0")
    raw = golden[: _HEAD.size] + body
    found = [
        bytes([kind, other]) + struct.pack("<QHQ", 7, len(body), 9) + body
        for kind in range(3)
        for other in range(3)
    ]
    return [*found, bytes([_RAW, _RAW]) + struct.pack("<QHQ", 0, len(raw), 0) + raw + raw]


def run(data: bytes) -> None:
    """Two slots of any content: load gives the newest valid one, and again after every update."""
    source = Source(data)
    kinds = (source.below(3), source.below(3))
    sequence, length, other_sequence = source.number(8), source.number(2), source.number(8)
    first = source.take(min(length, 4096))
    slots = [_slot(kinds[0], sequence, first), _slot(kinds[1], other_sequence, source.rest())]
    found = [_parse(slot) for slot in slots]
    store = SimStore(0)
    file = store.create(NAME, 2 * SLOT_BYTES)
    for index, slot in enumerate(slots):
        file.pwritev([slot], index * SLOT_BYTES)
    file.fdatasync()
    store.sync_directory()
    valid = [each for each in found if isinstance(each, Superblock)]
    subject = SuperblockFile(store)
    try:
        loaded = subject.load()
    except IntegrityError:
        assert not valid or any(each == "other version" for each in found)
        return
    newest = max(valid, key=lambda each: each.sequence)
    assert loaded.sequence == newest.sequence
    if loaded.sequence >= (1 << 64) - 2:
        return
    loaded.applied_epoch = 12345
    subject.write_job(loaded).run()
    store.crash()
    assert SuperblockFile(store).load().applied_epoch == 12345


def _parse(slot: bytes) -> Superblock | str | None:
    try:
        found = parse_slot(slot)
    except IntegrityError:
        return "other version"
    if found is not None:
        again = parse_slot(pack_slot(found, found.sequence))
        assert again is not None
        assert msgspec.json.encode(again) == msgspec.json.encode(found)
    return found


def _slot(kind: int, sequence: int, body: bytes) -> bytes:
    if kind == _RAW:
        return body[:SLOT_BYTES]
    body = body[:BODY_BYTES_MAX]
    version = 1 if kind == _SEALED else 2
    covered = struct.pack("<IIQ", version, len(body), sequence)
    return (
        _HEAD.pack(b"GMSBv1\0\0", version, len(body), sequence, xxh3_128_digest(covered + body))
        + body
    )
