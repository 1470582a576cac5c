"""What a member says of its copy when somebody asks before a promotion."""

from __future__ import annotations

from geomirror.cluster.verdict import INCONSISTENT, MemberAnswer
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary


def answer_of(node: str, core: Primary | Secondary) -> MemberAnswer:
    """The answer of this moment; durable positions only."""
    engine, superblock = core.engine, core.engine.superblock
    wall_ns, end_lsn = _end_of_sealed(engine)
    is_primary = isinstance(core, Primary)
    held = None if engine.has_all_of_resync else engine.held
    is_usable = engine.can_return if held is not None else engine.state_epoch is not None
    is_consistent = is_primary or is_usable
    return MemberAnswer(
        node,
        is_primary=is_primary,
        generation=engine.generation.hex(),
        token=max((g.token for g in (*superblock.chain, *superblock.superseded_by)), default=0),
        epoch=engine.sealed_epoch if held is None else held.epoch,
        epoch_wall_ns=wall_ns,
        end_lsn=end_lsn,
        disk_state="Consistent" if is_consistent else INCONSISTENT,
        standing=core.standing() if isinstance(core, Primary) else core.standing,
        is_standing_heard=core.is_standing_heard if isinstance(core, Secondary) else True,
        is_settled=engine.committed_epoch == engine.sealed_epoch,
        refused_primary="" if isinstance(core, Primary) else core.put_back_primary,
    )


def _end_of_sealed(engine: Engine) -> tuple[int | None, int | None]:
    """When the sealed epoch was cut, and its end in the primary's journal."""
    superblock, sealed, held = engine.superblock, engine.sealed_epoch, engine.held
    if held is not None and not engine.has_all_of_resync:
        # A promotion would go back to the state from before the resync.
        return held.wall_ns or None, held.end_lsn or None
    if sealed == 0:
        return None, None
    if sealed == superblock.applied_epoch:
        return superblock.applied_wall_ns or None, superblock.applied_end_lsn or None
    info = engine.epoch_info(sealed)
    return info.wall_ns or None, info.end_lsn or None
