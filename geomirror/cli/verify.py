"""`geomirror verify`: are the other copies the same, byte for byte?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, refuse_others
from geomirror.cli.timeline import local
from geomirror.cli.units import format_bytes, parse_size
from geomirror.errors import UnreachableError, UsageError

EXIT_DIFFERENT = 1
RATE = "20M"
POLL_S = 0.5
AWAY_S_MAX = 60.0
"""A daemon that restarts goes on with a verify; one that is away for longer is an error."""
RUNS_SHOWN = 8


@click.command()
@click.argument("name", metavar="RES")
@click.option("--peer", metavar="NODE", help="This copy only. Default: all of them.")
@click.option(
    "--rate",
    metavar="SIZE",
    help=f"Read at most so many bytes a second, at each side, for each copy. Default: {RATE}.",
)
@click.option("--no-heal", is_flag=True, help="Only say what differs; write nothing again.")
@click.option("--wait", "is_waiting", is_flag=True, help="Return at its end, with the result.")
@click.option("--stop", "is_stopping", is_flag=True, help="End what runs, and keep what it found.")
@json_option
@pass_app
def verify(
    app: App,
    name: str,
    peer: str | None,
    rate: str | None,
    no_heal: bool,
    is_waiting: bool,
    is_stopping: bool,
) -> int:
    """Compare the other copies of RES with the primary's, block by block, while they are in use.

    Both sides look at the same epoch, so that writes that go on cause no false alarm. Writers, the
    stream and applying come first. Blocks that differ are an alarm (event, status, check), and
    are written again by the primary: healing goes only from the primary to its copies, as an epoch
    like any other, so that what the copy held before can be looked at (view). A verify that is
    interrupted goes on where it was. One that runs already goes on as it was begun, unless it began
    by itself (resource set RES verify_every=7d): that one gives way. With --wait exits 0 if all is
    the same, 1 if anything differed, healed or not. More in docs/verify.md.

    \b
    [bold]Examples:[/bold]
      geomirror verify pg
      geomirror verify pg --wait --rate 100M
      geomirror verify pg --peer west-1 --no-heal --wait --json
      geomirror verify pg --stop
    """
    chosen: dict[str, Any] = {"name": name, "peer": peer}
    if is_stopping:
        given = {"wait": is_waiting, "no-heal": no_heal, "rate": rate}
        refuse_others("--stop", given, "it begins nothing", f"geomirror verify {name} --stop")
        found = app.call("verify.stop", chosen)
        app.show(found, lambda: _text(found, peer))
        return 0
    speed = parse_size(rate or RATE)
    if speed <= 0:
        raise UsageError("--rate of nothing", hint=f"geomirror verify {name} --rate 20M")
    found = app.call("verify.start", {**chosen, "bytes_per_second": speed, "heals": not no_heal})
    began = {
        each["node"]: each["verify"]["current"]["started_at"]
        for each in _of(found, peer)
        if each["verify"]["current"]
    }
    if is_waiting:
        found = _wait(app, name, peer, found)
    app.show(found, lambda: _text(found, peer))
    return _exit_code(found, peer, began) if is_waiting else 0


def _wait(app: App, name: str, peer: str | None, found: dict[str, Any]) -> dict[str, Any]:
    """Poll until nothing runs any more."""
    with _progress(app) as show:
        give_up = time.monotonic() + AWAY_S_MAX
        while any(each["verify"]["state"] == "running" for each in _of(found, peer)):
            show(_of(found, peer))
            time.sleep(POLL_S)
            try:
                found = app.call("verify.show", {"name": name})
                give_up = time.monotonic() + AWAY_S_MAX
            except UnreachableError:
                if time.monotonic() >= give_up:
                    raise
        show(_of(found, peer))
    return found


def _of(found: dict[str, Any], peer: str | None) -> list[dict[str, Any]]:
    """The copies that were asked for and that have been looked at."""
    asked = _asked(found, peer)
    return [each for each in asked if each["verify"]["current"] or each["verify"]["last"]]


def _asked(found: dict[str, Any], peer: str | None) -> list[dict[str, Any]]:
    """The copies that were asked for; an older primary says nothing of those it never compared."""
    return [each for each in found["peers"] if each["verify"] and peer in (None, each["node"])]


@contextmanager
def _progress(app: App) -> Iterator[Any]:
    """A bar for each copy on stderr; nothing with `--json`."""
    if app.is_json:
        yield lambda peers: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(peers: list[dict[str, Any]]) -> None:
            for each in peers:
                node, current = each["node"], each["verify"]["current"]
                if node not in tasks:
                    tasks[node] = bars.add_task(node, total=1, what="")
                if current is None:
                    bars.update(tasks[node], completed=1, what=each["verify"]["last"]["result"])
                    continue
                total = max(1, current["total_bytes"])
                what = f"{format_bytes(current['compared_bytes'])} of {format_bytes(total)}"
                if current["different_blocks"]:
                    what += f", {current['different_blocks']} blocks differ"
                if each["verify"]["reason"]:
                    what += f", waits: {each['verify']['reason']}"
                part = min(1.0, current["compared_bytes"] / total)
                bars.update(tasks[node], completed=part, what=what)

        yield show


def _exit_code(found: dict[str, Any], peer: str | None, began: dict[str, str]) -> int:
    """0 only if what was waited for came to its end and found nothing."""
    for each in _of(found, peer):
        last = each["verify"]["last"]
        is_ours = last["started_at"] == began.get(each["node"], last["started_at"])
        if last["result"] != "clean" or not is_ours:
            return EXIT_DIFFERENT
    return 0


def _text(found: dict[str, Any], peer: str | None) -> str:
    asked = _asked(found, peer)
    lines = [line for each in asked for line in describe(each["node"], each["verify"])]
    return "\n".join(lines) or f'nothing of "{found["name"]}" was ever compared'


def describe(node: str, verify: dict[str, Any]) -> list[str]:
    """What is known of a copy, as lines of text."""
    lines: list[str] = []
    current, last = verify["current"], verify["last"]
    if current is not None:
        compared, total = format_bytes(current["compared_bytes"]), current["total_bytes"]
        due = " (it was due)" if current.get("is_scheduled") else ""
        text = f"verify of {node}{due}: {compared} of {format_bytes(total)} compared"
        if current["different_blocks"]:
            text += f", {_differ(current)}"
        if verify["reason"]:
            text += f"; waits: {verify['reason']}"
        lines.append(text)
        lines += _runs(current)
    elif last is not None:
        when = local(last["ended_at"])
        if last["result"] == "clean":
            compared = format_bytes(last["compared_bytes"])
            return [f"verify of {node}: all of {compared} the same at {when}{_next(verify)}"]
        text = f"verify of {node}, {when}: {last['result'].replace('_', ' ')}"
        text += f", {last['reason']}" if last["reason"] else ""
        text += f", {_differ(last)}" if last["different_blocks"] else ""
        lines.append(text + _next(verify))
        lines += _runs(last)
    elif verify["reason"]:
        lines.append(f"verify of {node}: {verify['reason']}")
    elif verify.get("next_at"):
        lines.append(f"verify of {node}: not compared from here yet{_next(verify)}")
    return lines


def _next(verify: dict[str, Any]) -> str:
    """When the next one is due by itself."""
    return f"; next {local(verify['next_at'])}" if verify.get("next_at") else ""


def _differ(tally: dict[str, Any]) -> str:
    count, healed = tally["different_blocks"], tally["healed_blocks"]
    text = f"{count} block{'' if count == 1 else 's'} of 4 KiB differed"
    if tally["heals"]:
        text += f", {healed} written again"
    if tally["unhealed_blocks"]:
        text += f", {tally['unhealed_blocks']} differ again"
    return text


def _runs(tally: dict[str, Any]) -> list[str]:
    shown = tally["different"][:RUNS_SHOWN]
    lines = []
    for run in shown:
        first, last = run["block"], run["block"] + run["blocks"] - 1
        what = f"block {first}" if first == last else f"blocks {first} to {last}"
        lines.append(f"  volume {run['volume']}, {what}")
    named = sum(run["blocks"] for run in shown)
    if tally["different_blocks"] > named:
        lines.append(f"  and {tally['different_blocks'] - named} more, see --json")
    return lines
