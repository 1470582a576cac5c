"""What `status`, `check` and `timeline` say of history that is not what it should be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from geomirror.cli.check import CRITICAL, OK, WARNING, judge
from geomirror.cli.timeline import _text
from geomirror.cli.view import _nearest
from geomirror.environment import SECOND
from geomirror.limits import PRODUCTION
from geomirror.node.history_report import clock_steps, history_object
from geomirror.volume.points import Point, Points
from tests.volume.rollback_rig import RollbackRig

TIME = "2026-01-31T12:03:20.000Z"
PEER = {"node": "west-1", "disk_state": "UpToDate", "rpo_seconds": 0.1, "state": "Stream"}


def resource(**more: Any) -> dict[str, Any]:
    return {"peers": [PEER], "history": {"alarm": ""}, "branches": {"alarm": ""}, **more}


def test_monitoring_warns_of_history_and_branches() -> None:
    assert judge(resource(), 60, 300)[0] == OK
    for part in ("history", "branches"):
        code, text = judge(resource(**{part: {"alarm": "is in a bad way"}}), 60, 300)
        assert code == WARNING
        assert f"{part} here: is in a bad way" in text
        code, text = judge(resource(**{part: {"alarm": "is bad"}, "peers": []}), 60, 300)
        assert code == WARNING
        assert "is bad" in text
        assert "no other copy" in text


def test_monitoring_is_critical_about_a_copy_that_refuses() -> None:
    peer = {**PEER, "state": "Refused", "reason": "the disk of x was put back"}
    code, text = judge(resource(peers=[peer]), 60, 300)
    assert code == CRITICAL
    assert "put back" in text


def test_a_timeline_tells_of_stretches_and_clock_steps() -> None:
    level = {"step_seconds": 1.0, "points": 1, "from_epoch": 7, "to_epoch": 7}
    stretch = {"from_epoch": 4, "to_epoch": 6, "reason": "undo file x is damaged"}
    step = {"after_epoch": 6, "seconds": 3600.0, "from_time": TIME, "to_time": TIME}
    text = _text(
        {
            "resource": "pg",
            "node": "west-1",
            "points": [],
            "points_total": 1,
            "levels": [{**level, "from_time": TIME, "to_time": TIME}],
            "marks": [],
            "marks_ahead": [{"mark": "before-upgrade", "epoch": 9}],
            "clock_steps": [step],
            "undo": {
                "stored_bytes": 1,
                "budget_bytes": 2,
                "unusable": [stretch, {**stretch, "from_epoch": None}],
            },
        },
        everything=False,
    )
    assert "no point before epoch 6: epochs 5-6: undo file x is damaged" in text
    assert "no point before epoch 6: epochs 6: undo file x is damaged" in text
    assert 'mark "before-upgrade" (epoch 9) is not applied there yet' in text
    assert "the primary's clock was set back by 1 h after epoch 6" in text


def test_a_view_tells_why_it_is_not_exactly_what_was_asked_for() -> None:
    later = {"epoch": 9, "time": TIME}
    assert _nearest({"why": "", "later": None}) == ""
    assert "epoch 9" in _nearest({"why": "a resync", "later": later})
    assert _nearest({"why": "nothing newer is here", "later": None}).endswith(
        "nothing newer is here"
    )


def test_steps_of_the_clock_are_listed() -> None:
    walls = (10, 11, 12, 5, 6, 5.5, 700)
    points = [Point(n, int(wall * SECOND)) for n, wall in enumerate(walls)]
    (found,) = clock_steps(Points.of(points))
    assert (found["after_epoch"], found["seconds"]) == (2, 7.0)


def test_a_status_has_what_history_costs_and_how_far_it_reaches() -> None:
    rig = RollbackRig(9900)
    rig.history(12)
    found = history_object(rig.engine, PRODUCTION)
    assert found["points"] == len(rig.engine.undo.passes())
    assert found["alarm"] == ""
    assert (found["unusable"], found["lost_marks"]) == ([], [])
    assert found["stored_bytes"] == rig.engine.undo.stored_bytes()
    name = rig.engine.undo.passes()[-1].name
    rig.store.flip_bit(name, 8 * 140)
    rig.engine.undo.check(rig.engine.undo.passes()[-1])
    found = history_object(rig.engine, PRODUCTION)
    assert f"undo file {name} is damaged" in found["alarm"]
    assert found["points"] == 1, "the newest one stays"


@pytest.mark.parametrize("stored", [0.94, 0.96])
def test_a_budget_is_an_alarm_when_it_cuts_history_short(stored: float) -> None:
    rig = RollbackRig(9901)
    rig.history(12)
    assert rig.engine.superblock.role == "primary", "its last hour may take twice the budget"
    bytes_max = int(rig.engine.undo.stored_bytes() / stored / 2)
    found = history_object(rig.engine, replace(PRODUCTION, undo_bytes_max=bytes_max))
    assert ("its budget is used up" in found["alarm"]) == (stored > 0.95)
