"""`geomirror timeline`: the points in time that a copy can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.cli.when import parse_when


@click.command()
@click.argument("name", metavar="RES")
@click.option("--node", metavar="NODE", help="Of the copy on this member. Default: the one here.")
@click.option("--from", "first", metavar="T", help="Points from then on; T as for view create.")
@click.option("--to", "last", metavar="T", help="Points until then.")
@click.option("--all", "everything", is_flag=True, help="Every single point.")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="The newest N single points of them."
)
@json_option
@pass_app
def timeline(
    app: App,
    name: str,
    node: str | None,
    first: str | None,
    last: str | None,
    everything: bool,
    limit: int | None,
) -> None:
    """Show which points in time of RES can be looked at.

    Points get sparser with age: one a second for an hour, every 30 s for a day, every 5 minutes
    for a week, every hour for a month, as far as the budget for history reaches. Marks stay.

    \b
    [bold]Examples:[/bold]
      geomirror timeline pg --from -10m --all
      geomirror timeline pg --to before-upgrade --limit 20
    """
    now = datetime.now().astimezone()
    wanted: dict[str, Any] = {"name": name, "node": node}
    wanted |= {
        key: parse_when(text, now)
        for key, text in (("first", first), ("last", last))
        if text is not None
    }
    is_list = everything or limit is not None
    count = limit if is_list or app.is_json else 0
    result = _pages(lambda more: app.call("resource.timeline", {**wanted, **more}), count)
    app.show(result, lambda: _text(result, everything=is_list))


def _pages(ask: Callable[[dict[str, Any]], dict[str, Any]], count: int | None) -> dict[str, Any]:
    """The newest `count` points (None: all), however many answers that takes: of the first one, and
    with the points of all, oldest first."""
    result = page = ask({} if count is None else {"count_max": count})
    points = page["points"]
    while page["points"] and page["points_before"] and (count is None or len(points) < count):
        more: dict[str, Any] = {"before_epoch": points[0]["epoch"]}
        page = ask(more if count is None else {**more, "count_max": count - len(points)})
        points = page["points"] + points
    return {**result, "points": points, "points_before": page["points_before"]}


def _text(result: dict[str, Any], *, everything: bool) -> str:
    points, undo, name = result["points"], result["undo"], result["resource"]
    head = f'"{name}" on {result["node"]}'
    ahead = [
        f'mark "{each["mark"]}" (epoch {each["epoch"]}) is not applied there yet'
        for each in result["marks_ahead"]
    ]
    if not result["points_total"]:
        return "\n".join([f"{head}: no point in time can be looked at there", *ahead])
    if everything:
        rows = [
            [str(p["epoch"]), local(p["time"]), ", ".join(p["marks"])] for p in reversed(points)
        ]
        lines = [table(["EPOCH", "TIME", "MARKS"], rows)]
        if result["points_before"]:
            before = points[0]["epoch"] - 1
            lines.append(
                f"\nthere are {result['points_before']} more before: geomirror timeline {name} "
                f"--to epoch:{before} --all"
            )
    else:
        rows = [_level(each) for each in result["levels"]]
        lines = [table(["FROM", "TO", "POINTS", "EVERY", "EPOCHS"], rows)]
        marks = [
            [each["mark"], local(each["time"]), str(each["epoch"])]
            for each in reversed(result["marks"])
        ]
        if marks:
            lines.append("\n" + table(["MARK", "TIME", "EPOCH"], marks))
    stored = f"{format_bytes(undo['stored_bytes'])} of {format_bytes(undo['budget_bytes'])}"
    lines.append(f"\nhistory: {stored}, {result['points_total']} points")
    lines += ahead
    lines += [_unusable(each) for each in undo["unusable"]]
    lines += [
        f"the primary's clock was set back by {format_seconds(each['seconds'])} after epoch "
        f"{each['after_epoch']}, {local(each['from_time'])}: choose by epoch around it"
        for each in result["clock_steps"]
    ]
    lines.append(f'look at one: geomirror view create {name} --at "-10m"')
    return "\n".join([f"{head}:", *lines])


def _unusable(each: dict[str, Any]) -> str:
    first = "" if each["from_epoch"] is None else f"{each['from_epoch'] + 1}-"
    return (
        f"no point before epoch {each['to_epoch']}: epochs {first}{each['to_epoch']}: "
        f"{each['reason']}"
    )


def _level(each: dict[str, Any]) -> list[str]:
    epochs = f"{each['from_epoch']}-{each['to_epoch']}"
    every = format_seconds(each["step_seconds"])
    times = [local(each["from_time"]), local(each["to_time"])]
    return [*times, str(each["points"]), every, epochs]


def local(text: str) -> str:
    """An RFC 3339 time as local time, to the tenth of a second."""
    moment = datetime.fromisoformat(text).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + str(moment.microsecond // 100_000)
