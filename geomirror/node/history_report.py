"""What a copy says of its history: how far back it reaches, and what is wrong with it."""

from __future__ import annotations

from typing import Any

from geomirror.environment import SECOND
from geomirror.limits import Limits
from geomirror.node.rfc3339 import rfc3339
from geomirror.volume.engine import Engine
from geomirror.volume.points import CLOCK_SLACK_NS, Point, clock_runs
from geomirror.volume.undo_faults import Stretch
from geomirror.volume.undo_levels import ages_of
from geomirror.wan_protocol.history_upkeep import loss_marks, peers_out_of_reach

ALMOST_FULL = 0.95
"""Part of the budget from which on a short history is one that the budget makes short."""
REACH_S_MIN = 3600.0
"""What the finest level promises."""


def history_object(engine: Engine, limits: Limits) -> dict[str, Any]:
    """`history` of a resource in `status --json`."""
    epoch = engine.state_epoch
    history = engine.undo.history
    kept = () if epoch is None else history.kept(epoch)
    reach_s = ages_of([each.wall_ns for each in kept])[0] / SECOND if kept else 0.0
    stored = sum(each.stored_bytes for each in history.passes if not each.is_part)
    stretches = [] if epoch is None else history.unusable(epoch, engine.state_wall_ns)
    marks = [mark.name for mark in loss_marks(engine)]
    # A primary keeps its last hour beyond the budget.
    factor = ALMOST_FULL * (2 if engine.superblock.role == "primary" else 1)
    is_full = stored >= factor * limits.undo_bytes_max or (
        len(history.passes) >= factor * limits.undo_passes_max
    )
    alarms = [_words(each) for each in stretches]
    alarms += [f'mark "{name}" cannot be shown any more' for name in marks]
    alarms += [
        f'it does not lead back to what "{name}" has (epoch {had}): should that be promoted, this '
        "copy is made anew"
        for name, had in peers_out_of_reach(engine)
    ]
    if is_full and reach_s < REACH_S_MIN:
        alarms.append(f"its budget is used up: it reaches back {reach_s:.0f} s only")
    return {
        "points": len(kept) or int(bool(epoch)),
        "oldest_epoch": kept[0].to_epoch if kept else epoch,
        "oldest_time": _time(kept[0].wall_ns if kept else engine.state_wall_ns),
        "reach_seconds": round(reach_s, 3),
        "stored_bytes": stored,
        "budget_bytes": limits.undo_bytes_max,
        "unusable": [stretch_object(each) for each in stretches],
        "lost_marks": marks,
        "alarm": "; ".join(alarms),
    }


def undo_object(engine: Engine, limits: Limits) -> dict[str, Any]:
    """`undo` of `timeline --json`: what history costs, and why it does not reach back further."""
    history, epoch = engine.undo.history, engine.state_epoch
    stretches = [] if epoch is None else history.unusable(epoch, engine.state_wall_ns)
    return {
        "stored_bytes": sum(each.stored_bytes for each in history.passes),
        "budget_bytes": limits.undo_bytes_max,
        "passes": len(history.passes),
        "passes_max": limits.undo_passes_max,
        "unusable": [stretch_object(each) for each in stretches],
    }


def clock_steps(points: list[Point]) -> list[dict[str, Any]]:
    """Where the primary's clock was set back: times before and after are not in order."""
    found = []
    for _, last in clock_runs(points)[:-1]:
        before, after = points[last], points[last + 1]
        if after.wall_ns < before.wall_ns - CLOCK_SLACK_NS:
            found.append(
                {
                    "after_epoch": before.epoch,
                    "seconds": (before.wall_ns - after.wall_ns) / SECOND,
                    "from_time": _time(before.wall_ns),
                    "to_time": _time(after.wall_ns),
                }
            )
    return found


def stretch_object(each: Stretch) -> dict[str, Any]:
    """Epochs that undo does not lead back across."""
    return {
        "from_epoch": each.from_epoch,
        "to_epoch": each.to_epoch,
        "from_time": _time(each.from_wall_ns),
        "to_time": _time(each.to_wall_ns),
        "kind": each.fault,
        "reason": each.reason,
    }


def _words(each: Stretch) -> str:
    first = "…" if each.from_epoch is None else each.from_epoch
    return f"no point before epoch {each.to_epoch} (epochs {first}-{each.to_epoch}: {each.reason})"


def _time(wall_ns: int) -> str | None:
    return rfc3339(wall_ns) if wall_ns else None
