"""What a copy says of its history: how far back it reaches, its points, and what is wrong with it.

All of it runs on the event loop, over thousands of points: what is of all of them comes from
columns, and only a bounded number is put into words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from geomirror.environment import SECOND
from geomirror.limits import Limits
from geomirror.node.rfc3339 import rfc3339
from geomirror.volume.arrays import run_heads, run_tails
from geomirror.volume.engine import Engine
from geomirror.volume.marks import MarkTable
from geomirror.volume.points import CLOCK_SLACK_NS, Point, Points
from geomirror.volume.undo_columns import Numbers
from geomirror.volume.undo_faults import Stretch
from geomirror.volume.undo_levels import ages_in, steps_of
from geomirror.wan_protocol.history_upkeep import (
    STRETCHES_TOLD_MAX,
    loss_marks,
    peers_out_of_reach,
)

ALMOST_FULL = 0.95
"""Part of the budget from which on a short history is one that the budget makes short."""
REACH_S_MIN = 3600.0
"""What the finest level promises."""
CLOCK_STEPS_MAX = 100
"""Steps of the clock that are told, the newest."""


def history_object(engine: Engine, limits: Limits) -> dict[str, Any]:
    """`history` of a resource in `status --json`."""
    epoch = engine.state_epoch
    history = engine.undo.history
    start, end = (0, 0) if epoch is None else history.kept_range(epoch)
    oldest = history.whole[start] if start < end else None
    reach_s = 0.0 if epoch is None else history.reach_ns(epoch, limits.undo_levels) / SECOND
    stretches = _stretches(engine)
    marks = [mark.name for mark in loss_marks(engine)]
    # A primary keeps its last hour beyond the budget.
    factor = ALMOST_FULL * (2 if engine.superblock.role == "primary" else 1)
    is_full = history.stored_bytes >= factor * limits.undo_bytes_max or (
        len(history.whole) >= factor * limits.undo_passes_max
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
        "points": end - start or int(bool(epoch)),
        "oldest_epoch": oldest.to_epoch if oldest else epoch,
        "oldest_time": _time(oldest.wall_ns if oldest else engine.state_wall_ns),
        "reach_seconds": round(reach_s, 3),
        "stored_bytes": history.stored_bytes,
        "budget_bytes": limits.undo_bytes_max,
        "unusable": [stretch_object(each) for each in stretches],
        "lost_marks": marks,
        "alarm": "; ".join(alarms),
    }


def undo_object(engine: Engine, limits: Limits) -> dict[str, Any]:
    """`undo` of `timeline --json`: what history costs, and why it does not reach back further."""
    return {
        "stored_bytes": engine.undo.stored_bytes(),
        "budget_bytes": limits.undo_bytes_max,
        "passes": len(engine.undo.history.passes),
        "passes_max": limits.undo_passes_max,
        "unusable": [stretch_object(each) for each in _stretches(engine)],
    }


def timeline_object(
    points: Points,
    limits: Limits,
    *,
    earliest: tuple[int, int] = (0, 0),
    latest: tuple[int | None, int | None] = (None, None),
    before_epoch: int | None = None,
    count_max: int | None = None,
) -> dict[str, Any]:
    """The part of `timeline --json` that is about points, those of one answer.

    :param points: all of the copy's. :param earliest: epoch and Unix ns of the first one wanted.
    :param latest: of the last one. :param before_epoch: those from it on were answered already.
    :param count_max: points wanted; never more than limits allow are answered, the newest.
    """
    epochs, walls = points.epochs, points.walls_ns
    steps = steps_of(ages_in(walls, limits.undo_levels), limits.undo_levels)
    wanted = (epochs >= earliest[0]) & (walls >= earliest[1])
    if latest[0] is not None:
        wanted &= epochs <= latest[0]
    if latest[1] is not None:
        wanted &= walls <= latest[1]
    places = wanted.nonzero()[0]
    left = places if before_epoch is None else places[epochs[places] < before_epoch]
    allowed = limits.timeline_points_max
    count = min(len(left), allowed if count_max is None else min(count_max, allowed))
    page = left[len(left) - count :].tolist()
    return {
        "points": [_point(points[at], int(steps[at]) / SECOND) for at in page],
        "points_total": len(places),
        "points_before": len(left) - count,
        "levels": _levels(points, places, steps),
        "marks": [each for at in points.marked if wanted[at] for each in _marks(points[at])],
        "clock_steps": clock_steps(points),
    }


def marks_ahead(marks: MarkTable, state_epoch: int | None) -> list[dict[str, Any]]:
    """Marks whose state this copy will have, once it is applied."""
    reached = -1 if state_epoch is None else state_epoch
    return [
        {"mark": mark.name, "epoch": mark.epoch, "time": rfc3339(mark.wall_ns)}
        for mark in marks.marks()
        if mark.epoch > reached and marks.is_held(mark)
    ]


def _levels(points: Points, places: Numbers, steps: Numbers) -> list[dict[str, Any]]:
    """Stretches of points that are as far apart, the newest first."""
    if not len(places):
        return []
    heads = run_heads(np.not_equal(steps[places][1:], steps[places][:-1]))
    tails = run_tails(heads, len(places))
    found = []
    for head, tail in zip(heads.tolist(), tails.tolist(), strict=True):
        first, last = points[places[head]], points[places[tail]]
        found.append(
            {
                "step_seconds": int(steps[places[head]]) / SECOND,
                "points": tail - head + 1,
                "from_epoch": first.epoch,
                "to_epoch": last.epoch,
                "from_time": rfc3339(first.wall_ns),
                "to_time": rfc3339(last.wall_ns),
            }
        )
    return found[::-1]


def _point(point: Point, step_s: float) -> dict[str, Any]:
    return {
        "epoch": point.epoch,
        "time": rfc3339(point.wall_ns),
        "step_seconds": step_s,
        "marks": list(point.marks),
        "since": point.since,
    }


def _marks(point: Point) -> list[dict[str, Any]]:
    time = rfc3339(point.wall_ns)
    return [{"mark": name, "epoch": point.epoch, "time": time} for name in point.marks]


def clock_steps(points: Points) -> list[dict[str, Any]]:
    """Where the primary's clock was set back: times before and after are not in order."""
    found = []
    walls = points.walls_ns
    is_back = walls[1:] < walls[:-1] - CLOCK_SLACK_NS
    for at in is_back.nonzero()[0].tolist()[-CLOCK_STEPS_MAX:]:
        before, after = points[at], points[at + 1]
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


def _stretches(engine: Engine) -> list[Stretch]:
    epoch = engine.state_epoch
    if epoch is None:
        return []
    return engine.undo.history.unusable(epoch, engine.state_wall_ns)[-STRETCHES_TOLD_MAX:]


def _words(each: Stretch) -> str:
    first = "…" if each.from_epoch is None else each.from_epoch
    return f"no point before epoch {each.to_epoch} (epochs {first}-{each.to_epoch}: {each.reason})"


def _time(wall_ns: int) -> str | None:
    return rfc3339(wall_ns) if wall_ns else None
