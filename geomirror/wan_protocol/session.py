"""What both ends of a session derive from a superblock: its number, its chain, its volumes."""

from __future__ import annotations

from collections.abc import Mapping

from geomirror.errors import RemoteProtocolError
from geomirror.volume.superblock import Superblock
from geomirror.wan_protocol.messages import (
    GenerationEntry,
    SessionAccept,
    SessionOpen,
    VolumeInfo,
)


def session_number(resource_id: str) -> int:
    """The session of a resource on any link: the first four bytes of its id, never 0.

    :param resource_id: hexadecimal.
    """
    return int.from_bytes(bytes.fromhex(resource_id)[:4], "little") or 1


def chain_entries(superblock: Superblock) -> list[GenerationEntry]:
    """The generation chain as it is sent, oldest first."""
    return [
        GenerationEntry(
            bytes.fromhex(entry.identity),
            entry.token,
            bytes.fromhex(entry.parent),
            entry.parent_epoch,
            bytes.fromhex(entry.parent_hash),
            entry.reason,
            entry.by,
            entry.wall_ns,
        )
        for entry in superblock.chain
    ]


def volume_infos(superblock: Superblock) -> list[VolumeInfo]:
    """Volumes as of the applied epoch."""
    return [VolumeInfo(v.index, v.name, v.size_bytes) for v in superblock.volumes if v.size_bytes]


def session_problem(superblock: Superblock, sizes: Mapping[int, int], message: SessionOpen) -> str:
    """Why a secondary with this superblock cannot take what the primary offers, "" if it can.

    :param sizes: of its volumes at its newest epoch. Volumes may be larger at the primary, and
        more: that comes with epochs that are not here yet.
    """
    if message.resource.hex() != superblock.resource_id:
        return f'resource "{superblock.name}" has another identity here'
    theirs = {v.index: v.size_bytes for v in message.volumes}
    if any(size > theirs.get(index, 0) for index, size in sizes.items()):
        return f'volumes of "{superblock.name}" differ: {sizes} here, {theirs} at the primary'
    known = [entry.identity.hex() for entry in message.chain]
    if superblock.chain and superblock.chain[-1].identity not in known:
        return f'"{superblock.name}" has another history here: diverged'
    return ""


def check_accept(message: SessionAccept) -> None:
    """Believe no position that cannot be. :raises RemoteProtocolError: it cannot."""
    is_position = 0 <= message.applied_epoch <= message.durable_epoch
    is_state = message.data_state in ("blank", "inconsistent", "consistent")
    if not is_position or not is_state or len(message.durable_hash) != 32:
        raise RemoteProtocolError(
            f"session accepted at epoch {message.durable_epoch} durable, "
            f"{message.applied_epoch} applied, {message.data_state[:20]}"
        )
