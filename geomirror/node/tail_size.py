"""How much a member has since an epoch, as far as its journal tells."""

from __future__ import annotations

from typing import Any

from geomirror.environment import SECOND
from geomirror.volume.engine import Engine

UNKNOWN_TAIL: dict[str, Any] = {"epochs": None, "seconds": None, "bytes": None}


def tail_size(engine: Engine, epoch: int | None) -> dict[str, Any]:
    """`epochs`, `seconds` and `bytes` (of journal) after an epoch; null: not known any more.

    :param epoch: None: where histories part is not known.
    """
    if epoch is None or epoch > engine.committed_epoch:
        return dict(UNKNOWN_TAIL)
    has_open = engine.open_epoch_since_wall_ns is not None
    found: dict[str, Any] = {"epochs": engine.committed_epoch - epoch + has_open}
    if not found["epochs"]:
        return {**found, "seconds": 0.0, "bytes": 0}
    first = engine.epochs_after(epoch, 1)
    has_all = bool(first) and first[0].first_number == epoch + 1
    is_open_only = epoch == engine.committed_epoch
    begin_ns = _wall_ns(engine, epoch) or (first[0].wall_ns if has_all else 0)
    superblock = engine.superblock
    last = engine.epochs_after(engine.committed_epoch - 1, 1)
    end_ns = max(
        [superblock.applied_wall_ns, *(row.wall_ns for row in last)]
        + ([engine.last_wall_ns] if has_open else [])
    )
    is_timed = 0 < begin_ns <= end_ns
    return {
        **found,
        "seconds": round((end_ns - begin_ns) / SECOND, 3) if is_timed else None,
        "bytes": engine.bytes_recorded(epoch) + is_open_only * engine.open_epoch_bytes
        if has_all or is_open_only
        else None,
    }


def _wall_ns(engine: Engine, epoch: int) -> int:
    """When an epoch was cut; 0: not known."""
    superblock = engine.superblock
    if epoch == superblock.applied_epoch:
        return superblock.applied_wall_ns
    rows = engine.epochs_after(epoch - 1, 1)
    if rows and rows[0].number == epoch:
        return rows[0].wall_ns
    ends = {each.to_epoch: each.wall_ns for each in engine.undo.history.passes}
    return ends.get(epoch, 0)
