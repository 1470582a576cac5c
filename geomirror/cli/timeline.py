"""`geomirror timeline`: the points in time that a copy can be looked at."""

from __future__ import annotations

import itertools
from datetime import datetime
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.units import format_bytes, format_seconds


@click.command()
@click.argument("name", metavar="RES")
@click.option("--node", metavar="NODE", help="Of the copy on this member. Default: the one here.")
@click.option("--all", "everything", is_flag=True, help="Every single point.")
@json_option
@pass_app
def timeline(app: App, name: str, node: str | None, everything: bool) -> None:
    """Show which points in time of RES can be looked at.

    Points get sparser with age: one a second for an hour, every 30 s for a day, every 5 minutes
    for a week, every hour for a month, as far as the budget for history reaches. Marks stay.
    """
    result = app.call("resource.timeline", {"name": name, "node": node})
    app.show(result, lambda: _text(result, everything))


def _text(result: dict[str, Any], everything: bool) -> str:
    points, undo = result["points"], result["undo"]
    head = f'"{result["resource"]}" on {result["node"]}'
    if not points:
        return f"{head}: no point in time can be looked at yet"
    if everything:
        rows = [
            [str(p["epoch"]), local(p["time"]), ", ".join(p["marks"])] for p in reversed(points)
        ]
        lines = [table(["EPOCH", "TIME", "MARKS"], rows)]
    else:
        lines = [table(["FROM", "TO", "POINTS", "EVERY", "EPOCHS"], _levels(points))]
        marks = [
            [mark, local(p["time"]), str(p["epoch"])]
            for p in reversed(points)
            for mark in p["marks"]
        ]
        if marks:
            lines.append("\n" + table(["MARK", "TIME", "EPOCH"], marks))
    stored = f"{format_bytes(undo['stored_bytes'])} of {format_bytes(undo['budget_bytes'])}"
    lines.append(f"\nhistory: {stored}, {len(points)} points")
    lines += [_unusable(each) for each in undo["unusable"]]
    lines += [
        f"the primary's clock was set back by {format_seconds(each['seconds'])} after epoch "
        f"{each['after_epoch']}, {local(each['from_time'])}: choose by epoch around it"
        for each in result["clock_steps"]
    ]
    lines.append(f'look at one: geomirror view create {result["resource"]} --at "-10m"')
    return "\n".join([f"{head}:", *lines])


def _unusable(each: dict[str, Any]) -> str:
    first = "" if each["from_epoch"] is None else f"{each['from_epoch'] + 1}-"
    return (
        f"no point before epoch {each['to_epoch']}: epochs {first}{each['to_epoch']}: "
        f"{each['reason']}"
    )


def _levels(points: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each level, the newest first."""
    rows = []
    for step, group in itertools.groupby(reversed(points), key=lambda p: p["step_seconds"]):
        found = list(group)
        first, last = found[-1], found[0]
        epochs = f"{first['epoch']}-{last['epoch']}"
        every = format_seconds(step)
        rows.append([local(first["time"]), local(last["time"]), str(len(found)), every, epochs])
    return rows


def local(text: str) -> str:
    """An RFC 3339 time as local time, to the tenth of a second."""
    moment = datetime.fromisoformat(text).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + str(moment.microsecond // 100_000)
