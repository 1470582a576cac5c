"""A history of thousands of points: answered in pages that fit, and never walked for a status."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from geomirror.cli.common import App
from geomirror.cli.timeline import _pages, _text, timeline
from geomirror.environment import SECOND
from geomirror.limits import PRODUCTION
from geomirror.node.history_report import history_object, marks_ahead, timeline_object
from geomirror.node.mark_desk import MarkDesk
from geomirror.node.paths import DataDir
from geomirror.volume.marks import Mark, MarkTable
from geomirror.volume.points import At, Points, locate, points_of
from geomirror.volume.undo_history import History
from tests.volume import full_history
from tests.volume.rollback_rig import RollbackRig

G = bytes(16)
PASSES = full_history.passes()
LAST = PASSES[-1]


def marks(count: int = PRODUCTION.marks_max) -> MarkTable:
    """With names as long as they may be, at points all over the history."""
    table = MarkTable()
    for number in range(count):
        each = PASSES[number * 8]
        name = f"{number:04d}".ljust(63, "x")
        table.put(Mark(name, bytes(16), each.to_epoch, each.wall_ns))
        table.add_boundary(each.to_epoch)
    return table


def points(table: MarkTable | None = None) -> Points:
    history = History(tuple(PASSES), 0)
    return points_of(history, LAST.to_epoch, LAST.wall_ns, table or MarkTable())


class Node:
    """Answers as the method does, and measures what it answers."""

    def __init__(self, table: MarkTable) -> None:
        self.points = points(table)
        self.largest = self.count = 0

    def ask(self, wanted: dict[str, Any]) -> dict[str, Any]:
        undo = {"stored_bytes": 1, "budget_bytes": 2, "unusable": []}
        found = timeline_object(self.points, PRODUCTION, **wanted)
        answer = {"resource": "pg", "node": "west-1", **found, "marks_ahead": [], "undo": undo}
        self.largest = max(self.largest, len(json.dumps(answer, indent=1)))
        self.count += 1
        return json.loads(json.dumps(answer))  # type: ignore[no-any-return]


def test_all_points_come_in_pages_that_fit_in_a_message() -> None:
    node = Node(marks())
    found = _pages(node.ask, None)
    assert [each["epoch"] for each in found["points"]] == [each.to_epoch for each in PASSES]
    assert (found["points_total"], found["points_before"]) == (len(PASSES), 0)
    assert node.count == -(-len(PASSES) // PRODUCTION.timeline_points_max)
    assert node.largest < PRODUCTION.message_bytes_max
    assert sum(len(each["marks"]) for each in found["points"]) == PRODUCTION.marks_max
    assert len(found["marks"]) == PRODUCTION.marks_max


@pytest.mark.parametrize("count", [1, 499, 500, 501, 1200])
def test_a_number_of_them_are_the_newest(count: int) -> None:
    node = Node(marks(10))
    found = _pages(node.ask, count)
    assert [each["epoch"] for each in found["points"]] == [e.to_epoch for e in PASSES[-count:]]
    assert found["points_before"] == len(PASSES) - count
    assert "there are" in _text(found, everything=True)


def test_a_history_that_gets_coarser_between_two_pages_is_answered_once() -> None:
    """What was answered stays answered, what is merged away meanwhile does not come."""
    node = Node(marks(0))
    first = node.ask({})
    kept = History(tuple(PASSES), 0).spliced(100, 50, [PASSES[149]])
    node.points = points_of(kept, LAST.to_epoch, LAST.wall_ns, MarkTable())
    pages = iter([first])
    found = _pages(lambda wanted: next(pages, None) or node.ask(wanted), None)
    epochs = [each["epoch"] for each in found["points"]]
    assert len(set(epochs)) == len(epochs)
    assert epochs == sorted(epochs)
    assert set(epochs) <= {each.to_epoch for each in PASSES}


def test_a_range_is_by_epoch_or_by_the_clock() -> None:
    all_points = points()
    low, high = PASSES[4000], PASSES[4400]
    by_epoch = timeline_object(
        all_points, PRODUCTION, earliest=(low.to_epoch, 0), latest=(high.to_epoch, None)
    )
    by_clock = timeline_object(
        all_points, PRODUCTION, earliest=(0, low.wall_ns), latest=(None, high.wall_ns)
    )
    assert by_epoch == by_clock
    assert by_epoch["points_total"] == len(by_epoch["points"]) == 401
    assert by_epoch["levels"][0]["to_epoch"] == high.to_epoch
    nothing = timeline_object(all_points, PRODUCTION, earliest=(LAST.to_epoch + 1, 0))
    assert (nothing["points"], nothing["levels"], nothing["points_total"]) == ([], [], 0)
    answer = {"resource": "pg", "node": "w", **nothing, "marks_ahead": [], "undo": {}}
    assert "no point in time" in _text(answer, everything=True)


def test_a_mark_that_is_not_applied_yet_is_told_as_one() -> None:
    """At the primary right after it was made, where the image is seconds behind."""
    table = MarkTable([Mark("before", G, 7, 7 * SECOND), Mark("lost", G, 8, 0)], [7])
    ahead = marks_ahead(table, 5)
    assert [(each["mark"], each["epoch"]) for each in ahead] == [("before", 7)]
    assert marks_ahead(table, 7) == []
    assert marks_ahead(table, None) == ahead
    nothing = timeline_object(Points.of([]), PRODUCTION)
    answer = {"resource": "pg", "node": "w", **nothing, "marks_ahead": ahead, "undo": {}}
    told = 'mark "before" (epoch 7) is not applied there yet'
    assert _text(answer, everything=False).splitlines()[1] == told


def test_levels_are_told_without_their_points() -> None:
    found = timeline_object(points(), PRODUCTION, count_max=0)
    assert found["points"] == []
    told = [(each["step_seconds"], each["points"]) for each in found["levels"]]
    assert told == [(1.0, 3600 - 10 + 40), (30.0, 2760), (300.0, 1728), (3600.0, 552)]


class Calls(App):
    """A daemon that answers."""

    def __init__(self, node: Node) -> None:
        super().__init__(DataDir(Path("nowhere")))
        self.node = node
        self.asked: list[dict[str, Any]] = []

    def call(self, method: str, parameters: Any = None, *, timeout_s: float = 60.0) -> Any:
        self.asked.append(dict(parameters))
        known = ("before_epoch", "count_max")
        return self.node.ask({key: parameters[key] for key in known if key in parameters})


@pytest.mark.parametrize(
    ("options", "asks"),
    [([], 1), (["--limit", "3"], 1), (["--json"], 18), (["--json", "--limit", "600"], 2)],
)
def test_the_command_asks_for_what_it_shows(options: list[str], asks: int) -> None:
    app = Calls(Node(marks(3)))
    result = CliRunner().invoke(timeline, ["pg", *options], obj=app, catch_exceptions=False)
    assert result.exit_code == 0
    assert len(app.asked) == asks
    if "--json" in options:
        found = json.loads(result.stdout)
        wanted = 600 if "--limit" in options else len(PASSES)
        assert len(found["points"]) == wanted
        assert found["points_before"] == len(PASSES) - wanted
    elif options:
        assert f"there are {len(PASSES) - 3} more before" in result.stdout
    else:
        assert "2760" in result.stdout
        assert app.asked[0]["count_max"] == 0


def test_the_command_asks_for_a_range() -> None:
    app = Calls(Node(marks(0)))
    arguments = ["pg", "--from", "epoch:12", "--to", "before-upgrade"]
    CliRunner().invoke(timeline, arguments, obj=app, catch_exceptions=False)
    assert app.asked[0]["first"] == {"epoch": 12}
    assert app.asked[0]["last"] == {"mark": "before-upgrade"}


# The event loop.


@pytest.fixture
def rig() -> RollbackRig:
    """An engine with thousands of passes, and as many marks as there may be."""
    found = RollbackRig(9902)
    found.history(3)
    engine = found.engine
    engine.undo._history = History(tuple(PASSES), 0)
    engine.superblock.applied_epoch = LAST.to_epoch
    for mark in marks().marks():
        engine.marks.table.put(mark)
        engine.marks.table.add_boundary(mark.epoch)
    return found


def milliseconds(work: Any, times: int = 20) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1000


def test_what_runs_on_the_loop_takes_milliseconds(rig: RollbackRig) -> None:
    """Ten times of what they take; a walk over all passes for each mark took seconds."""
    engine = rig.engine
    found = history_object(engine, PRODUCTION)
    assert (found["points"], found["alarm"]) == (len(PASSES), "")
    assert found["reach_seconds"] > 29.9 * 86_400
    assert milliseconds(lambda: history_object(engine, PRODUCTION)) < 50
    desk = MarkDesk("pg", engine, None)  # type: ignore[arg-type]
    assert all(each["viewable"] for each in desk.describe()["marks"])
    assert milliseconds(desk.describe) < 150
    table, now_ns = engine.marks.table, LAST.wall_ns
    at = At(wall_ns=LAST.wall_ns - 86_400 * SECOND)

    def find() -> None:
        locate(points(table), at, table, now_ns)

    assert milliseconds(find) < 100
    assert milliseconds(lambda: engine.half_applied_through) < 1
    assert milliseconds(lambda: timeline_object(points(table), PRODUCTION)) < 300
