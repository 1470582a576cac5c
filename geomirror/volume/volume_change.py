"""Volumes grow and are added while a resource is in use: what a RESIZE record says.

A change belongs to one epoch, like a write. Its new bytes read as zeros: the record stands for a
TRIM of them as well, so what a backing device holds beyond the old end is never seen.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from geomirror.errors import IntegrityError
from geomirror.limits import SECTOR_BYTES, Limits

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
BACKING_BYTES_MAX = 4096
"""Of one path: the kernel's PATH_MAX."""
_CANONICAL = struct.Struct("<HHIQQ")


class VolumeChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """One volume's growth; added ones grow from 0."""

    index: int
    name: str
    old_size_bytes: int
    size_bytes: int
    backings: dict[str, str] = {}
    """Of an added volume: node -> path, where it is not a file in the node's data directory."""
    is_forced: bool = False
    """Of an added volume: a backing that holds data is overwritten."""

    @property
    def is_addition(self) -> bool:
        """The volume was not there before."""
        return self.old_size_bytes == 0


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(list[VolumeChange])


def encode_changes(changes: Sequence[VolumeChange]) -> bytes:
    """As they are in RESIZE and EPOCH records: JSON."""
    return _ENCODER.encode(changes) if changes else b""


def decode_changes(data: bytes, what: str) -> tuple[VolumeChange, ...]:
    """What `encode_changes` made.

    :param what: names the record in an error.
    :raises IntegrityError: it did not make this.
    """
    if not data:
        return ()
    try:
        changes = _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{what} has volume changes that cannot be read") from error
    if any(not 0 <= each.old_size_bytes < each.size_bytes for each in changes):
        raise IntegrityError(f"{what} has a volume change that is no growth")
    return tuple(changes)


def canonical_changes(changes: Sequence[VolumeChange]) -> bytes:
    """What the chain hash covers of them; empty when there are none."""
    parts: list[bytes] = []
    for each in changes:
        name = each.name.encode()
        fields = (each.index, len(name), 0, each.old_size_bytes, each.size_bytes)
        parts += [_CANONICAL.pack(*fields), name]
    return b"".join(parts)


def merge_changes(changes: Iterable[VolumeChange]) -> tuple[VolumeChange, ...]:
    """One change per volume, by index, equal in effect to all of them, oldest first."""
    merged: dict[int, VolumeChange] = {}
    for each in changes:
        before = merged.get(each.index)
        if before is not None:
            assert each.old_size_bytes == before.size_bytes
            each = msgspec.structs.replace(before, size_bytes=each.size_bytes)
        merged[each.index] = each
    return tuple(merged[index] for index in sorted(merged))


def change_problem(
    change: VolumeChange, names: Mapping[int, str], sizes: Mapping[int, int], limits: Limits
) -> str:
    """Why a change cannot follow these names and sizes, "" if it can."""
    size, index = change.size_bytes, change.index
    if not re.fullmatch(NAME_PATTERN, change.name):
        return f"volume name {change.name[:80]!r} is not allowed"
    if size % SECTOR_BYTES or not 0 < size <= limits.volume_bytes_max:
        return f'volume "{change.name}" of {size} bytes: a multiple of {SECTOR_BYTES} is wanted'
    if any(len(path.encode()) > BACKING_BYTES_MAX for path in change.backings.values()):
        return f'volume "{change.name}": a backing path of over {BACKING_BYTES_MAX} bytes'
    if index in sizes:
        if names[index] != change.name or sizes[index] != change.old_size_bytes:
            return f'volume "{change.name}" was {change.old_size_bytes} bytes, not {sizes[index]}'
        return "" if size > sizes[index] else f'volume "{change.name}" would not grow'
    if change.old_size_bytes or index != len(sizes) or index >= limits.volumes_max:
        return f'volume {index} "{change.name}" cannot be added to {len(sizes)} volumes'
    return f'there is a volume "{change.name}"' if change.name in names.values() else ""
