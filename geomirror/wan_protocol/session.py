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
    RefusedError,
    RemoteProtocolError,
    SplitBrainError,
    SupersededError,
)
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import GenerationRecord, Superblock
from geomirror.wan_protocol.messages import (
    GenerationEntry,
    SessionAccept,
    SessionOpen,
    VolumeInfo,
)
from geomirror.wan_protocol.primary_starts import lost_epochs


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
    )


def state_history(engine: Engine) -> History:
    """What this node would have to give up: of a copy that is made anew the state that is held,
    and nothing when it has none."""
    chain, held = chain_entries(engine.superblock), engine.held
    if held is not None:
        return history(chain, held.epoch, bytes.fromhex(held.chain_hash))
    if engine.state_epoch is None:
        return history([], 0, bytes(32))
    return my_history(engine)


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
    if mine and mine == message.chain:
        problem = _lost_epochs(engine, peer, message)
        if problem is not None:
            return problem
    # Volumes may be larger at the primary, and more: that comes with epochs not here yet.
    sizes = engine.sizes.now
    theirs = {v.index: v.size_bytes for v in message.volumes}
    if any(size > theirs.get(index, 0) for index, size in sizes.items()):
        return RefusedError(f'volumes of "{name}" differ: {sizes} here, {theirs} at the primary')
    return None


def highest_chain(superblock: Superblock) -> list[GenerationEntry]:
    """The chain with the highest claim that was heard of here, which may be the own one."""
    return chain_entries(superblock, superblock.superseded_by or superblock.chain)


def _lost_epochs(engine: Engine, peer: str, message: SessionOpen) -> GeomirrorError | None:
    """Of the same generation: whether the primary remembers all that it has sent here (I3)."""
    epoch, chain_hash = engine.committed_epoch, engine.committed_hash
    generation = engine.generation.hex()
    problem = lost_epochs(engine.superblock, generation, message.starts, epoch, chain_hash)
    if message.epoch < epoch:
        problem = f"it is at epoch {message.epoch}, and epoch {epoch} is here"
    elif message.epoch == epoch and message.chain_hash != chain_hash:
        problem = f"its epoch {epoch} is another one than the one here"
    if not problem:
        return None
    name = engine.superblock.name
    return SplitBrainError(
        f'the disk of "{peer}", primary of "{name}", was put back to an older state: {problem}',
        hint="to keep what is here, stop it there and promote this copy (geomirror failover "
        f"{name} --to NODE); to keep what is there, make this copy anew (geomirror resource "
        f"remove-secondary {name}, then add-secondary)",
    )


def compare_with(engine: Engine, message: SessionOpen) -> Comparison:
    """How this copy relates to what a primary offers."""
    theirs = history(message.chain, message.epoch, message.chain_hash)
    mine = my_history(engine)
    if not message.chain:
        return Comparison(DESCENDANT)
    # Of a later generation only what it began from counts here, however little it has yet.
    begun = max(message.epoch, message.chain[-1].parent_epoch)
    return compare(mine, replace(theirs, epoch=begun))


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
