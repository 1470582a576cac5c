"""What a rollback makes of a superblock: peers and volumes as they are at its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from geomirror.volume.superblock import PeerRecord, RollbackRecord, Superblock


def shrink(superblock: Superblock, sizes: Mapping[int, int]) -> None:
    """Let a superblock have volumes of these sizes; those of size 0 are gone."""
    kept = [each for each in superblock.volumes if sizes.get(each.index)]
    for each in kept:
        each.size_bytes = sizes[each.index]
    superblock.volumes = kept


def clamped(peer: PeerRecord, record: RollbackRecord) -> PeerRecord:
    """What is still true of a peer: beyond the target nothing counts."""
    epoch = record.to_epoch
    changes: dict[str, object] = {}
    if peer.durable_epoch > epoch:
        changes = {"durable_epoch": epoch, "durable_hash": record.to_hash}
    if peer.said_epoch > epoch:
        changes["said_epoch"] = epoch
    if peer.bitmap_base > epoch:
        changes["bitmap_base_hash"] = record.to_hash
    changes["bitmap_later"] = {n: h for n, h in peer.bitmap_later.items() if n <= epoch}
    for name in ("bitmap_base", "bitmap_through"):
        if getattr(peer, name) > epoch:
            changes[name] = epoch
    if peer.left_epoch > epoch + 1:
        changes["left_epoch"] = epoch + 1
    return msgspec.structs.replace(peer, **changes)


def nearest(points: Sequence[int], epoch: int) -> str:
    """In words: the possible epochs before and after one that is not."""
    earlier = [each for each in points if each < epoch]
    later = [each for each in points if each > epoch]
    names = [str(each) for each in (*earlier[-1:], *later[:1])]
    return f"the nearest states are those at {' and '.join(names)}" if names else "none is kept"
