"""What both ends of a session derive from a superblock: its number, its chain, its volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from geomirror.cluster.history import (
    DESCENDANT,
    UNRELATED,
    Comparison,
    History,
    compare,
    history,
    outranks,
)
from geomirror.errors import (
    GeomirrorError,
    PutBackError,
    RefusedError,
    RemoteProtocolError,
    SplitBrainError,
    SupersededError,
)
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import GenerationRecord, StartRecord, Superblock
from geomirror.wan_protocol.messages import (
    GenerationEntry,
    SessionAccept,
    SessionOpen,
    VolumeInfo,
)
from geomirror.wan_protocol.primary_starts import start_points


def session_number(resource_id: str) -> int:
    """The session of a resource on any link: the first four bytes of its id, never 0.

    :param resource_id: hexadecimal.
    """
    return int.from_bytes(bytes.fromhex(resource_id)[:4], "little") or 1


def chain_entries(
    superblock: Superblock, chain: Sequence[GenerationRecord] | None = None
) -> list[GenerationEntry]:
    """The generation chain (or another one) as it is sent, oldest first."""
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
        for entry in (superblock.chain if chain is None else chain)
    ]


def volume_infos(superblock: Superblock) -> list[VolumeInfo]:
    """Volumes as of the applied epoch."""
    return [VolumeInfo(v.index, v.name, v.size_bytes) for v in superblock.volumes if v.size_bytes]


def my_history(engine: Engine) -> History:
    """What this node has, as far as it can become durable; see `cluster.history`."""
    return history(
        chain_entries(engine.superblock),
        engine.committed_epoch,
        engine.committed_hash,
        has_unsealed=engine.last_changed_epoch > engine.committed_epoch,
        starts=start_points(engine.superblock.starts),
    )


def state_history(engine: Engine) -> History:
    """What this node would have to give up: of a copy that is made anew the state that is held,
    and nothing when it has none."""
    chain, held = chain_entries(engine.superblock), engine.held
    if held is not None:
        starts = start_points(engine.superblock.starts)
        return history(chain, held.epoch, bytes.fromhex(held.chain_hash), starts=starts)
    if engine.state_epoch is None:
        return history([], 0, bytes(32))
    return my_history(engine)


def claim_history(superblock: Superblock) -> History:
    """The history that outranks this member, as far as its last generation's beginning."""
    chain = chain_entries(superblock, superblock.superseded_by)
    starts = start_points(superblock.superseded_starts)
    return history(chain, chain[-1].parent_epoch, chain[-1].parent_hash, starts=starts)


def session_problem(engine: Engine, peer: str, message: SessionOpen) -> GeomirrorError | None:
    """Why this copy cannot take what `peer` offers as a primary; None if it can."""
    superblock = engine.superblock
    name = superblock.name
    if message.resource.hex() != superblock.resource_id:
        return RefusedError(f'resource "{name}" has another identity here')
    mine, highest = chain_entries(superblock), highest_chain(superblock)
    if mine and not mine == highest == message.chain:
        found = compare_with(engine, message)
        is_lower = message.chain != highest and not outranks(message.chain, highest)
        if found.relation != UNRELATED and is_lower:
            return SupersededError(
                f'"{peer}" offers token {_token(message.chain)} of "{name}", '
                f"token {_token(highest)} is known here"
            )
        if message.chain != mine and not found.may_follow:
            return SplitBrainError(
                f'"{name}" has another history here: {describe(found, engine.committed_epoch)}'
            )
    elif mine:
        found = compare_with(engine, message)
        if not found.may_follow:
            return _lost_there(engine, peer, message, found)
    # Volumes may be larger at the primary, and more: that comes with epochs not here yet.
    sizes = engine.sizes.now
    theirs = {v.index: v.size_bytes for v in message.volumes}
    if any(size > theirs.get(index, 0) for index, size in sizes.items()):
        return RefusedError(f'volumes of "{name}" differ: {sizes} here, {theirs} at the primary')
    return None


def highest_chain(superblock: Superblock) -> list[GenerationEntry]:
    """The chain with the highest claim that was heard of here, which may be the own one."""
    return chain_entries(superblock, superblock.superseded_by or superblock.chain)


def highest_starts(superblock: Superblock) -> list[StartRecord]:
    """The starts of that chain's history."""
    return superblock.superseded_starts if superblock.superseded_by else superblock.starts


def _lost_there(
    engine: Engine, peer: str, message: SessionOpen, found: Comparison
) -> GeomirrorError:
    """Of the same chain: the primary does not remember all that it has sent here (I3)."""
    name, epoch, branch = engine.superblock.name, engine.committed_epoch, found.branch
    if branch is not None and branch.epoch < message.chain[-1].parent_epoch:
        # What is here parted from it before its last generation began.
        return SplitBrainError(f'"{name}" has another history here: {describe(found, epoch)}')
    lost = f"its epoch {epoch} is another one than the one that this copy has"
    if branch is not None:
        lost = f"it has lost epochs {branch.epoch + 1}-{epoch}, which this copy has"
    return PutBackError(
        f'the disk of "{peer}", primary of "{name}", was put back to an older state: {lost}',
        hint=f'to keep what this copy has, promote it ("geomirror failover {name} --to NODE", '
        f'given at this node); to keep what is at "{peer}", do that and then '
        f'"geomirror resolve {name} --keep {peer}"',
    )


def compare_with(engine: Engine, message: SessionOpen) -> Comparison:
    """How this copy relates to what a primary offers."""
    theirs = history(message.chain, message.epoch, message.chain_hash, starts=message.starts)
    mine = my_history(engine)
    if not message.chain:
        return Comparison(DESCENDANT)
    # Of a later generation only what it began from counts here, however little it has yet.
    last = message.chain[-1]
    if message.epoch < last.parent_epoch:
        theirs = replace(theirs, epoch=last.parent_epoch, chain_hash=last.parent_hash)
    return compare(mine, theirs)


def describe(found: Comparison, epoch: int) -> str:
    """A comparison in words, for errors and status."""
    if found.branch is None:
        return f"{found.relation}, no common point is known"
    return f"{found.relation} after epoch {found.branch.epoch}, epoch {epoch} here"


def _token(chain: Sequence[GenerationEntry]) -> int:
    return chain[-1].token if chain else 0


def check_accept(message: SessionAccept) -> None:
    """Believe no position that cannot be. :raises RemoteProtocolError: it cannot."""
    is_position = 0 <= message.applied_epoch <= message.durable_epoch
    is_held = -1 <= message.held_epoch <= message.durable_epoch
    is_state = is_held and message.data_state in ("blank", "inconsistent", "consistent")
    if not is_position or not is_state or len(message.durable_hash) != 32:
        raise RemoteProtocolError(
            f"session accepted at epoch {message.durable_epoch} durable, "
            f"{message.applied_epoch} applied, {message.data_state[:20]}"
        )
