"""`geomirror rewind`: a resource back to an earlier point, and that taken back."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, yes_option
from geomirror.cli.timeline import local
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.cli.when import WHEN_HELP, parse_when
from geomirror.errors import RefusedError, UsageError
from geomirror.node.error_json import error_from_object

_TIMEOUT_S = 660.0
_ENDS = ("commit", "rollback")


@click.command()
@click.argument("words", metavar="[commit|rollback] RES", nargs=-1, required=True)
@click.option("--to", "when", metavar="T", help=WHEN_HELP)
@click.option("--dry-run", is_flag=True, help="Only say whether it is possible, and what it costs.")
@yes_option
@json_option
@pass_app
def rewind(app: App, words: tuple[str, ...], when: str | None, dry_run: bool, yes: bool) -> int:
    """Bring RES back to an earlier point, as a new generation that begins there.

    What came later stays as a branch. `rewind rollback` brings it back (and makes a branch of what
    was written since); `rewind commit` drops it for good. No client may be connected meanwhile.
    Copies on other nodes go back, too, and keep the same branch: all of them have to be there. A
    rollback of more than a quarter of the journal, or 256 MiB, reaches them as a resync: each holds
    the point that was rewound to until it has all of it. --dry-run finds whatever would refuse the
    command, and reads all undo through for that; it exits 5 then.

    \b
    [bold]Examples:[/bold]
      geomirror rewind pg --to before-upgrade --dry-run
      geomirror rewind pg --to -10m
      geomirror rewind rollback pg --dry-run
      geomirror rewind commit pg
    """
    end = words[0] if len(words) == 2 and words[0] in _ENDS else None
    if len(words) > 2 or (len(words) == 2 and end is None):
        raise UsageError("one resource is wanted", hint="geomirror rewind RES --to T")
    name = words[-1]
    if end is not None:
        if when is not None:
            raise UsageError(f"rewind {end} takes no --to")
        if dry_run:
            return _dry_end(app, end, name)
        return _end(app, end, name, is_confirmed=yes)
    if when is None:
        raise UsageError("no point in time is given", hint=f"geomirror rewind {name} --to T")
    parameters = {"name": name, **parse_when(when, datetime.now().astimezone())}
    asked = {**parameters, "is_dry_run": True, "is_quick": not dry_run}
    plan = app.call("rewind.begin", asked, timeout_s=_TIMEOUT_S)
    if dry_run:
        app.show(plan, lambda: _plan(plan))
        return 0 if plan["is_possible"] else RefusedError.exit_code
    if not plan["is_possible"]:
        raise error_from_object(plan["refusal"])
    if not yes or _is_final(plan):
        app.progress(_plan(plan))
    app.confirm(f'rewind "{name}"', is_confirmed=yes)
    exact = {"name": name, "epoch": plan["epoch"]}
    result = app.call("rewind.begin", exact, timeout_s=_TIMEOUT_S)
    app.show(result, lambda: _done(result))
    return 0


def _end(app: App, end: str, name: str, *, is_confirmed: bool) -> int:
    if end == "commit":
        question = f'drop what the rewind of "{name}" cut off, for good'
        app.confirm(question, is_confirmed=is_confirmed)
        result = app.call("rewind.commit", {"name": name})
        text = f'"{name}" stays as it is; branch "{result["branch"]}" is dropped'
        app.show(result, text + _kept_at(result, result["branch"]))
        return 0
    result = app.call("rewind.rollback", {"name": name}, timeout_s=_TIMEOUT_S)
    since = result["branch"]
    kept = f'; what was written since is branch "{since}"' if since else ""
    text = f'"{name}" is what it was before the rewind{kept}'
    app.show(result, text + _kept_at(result, result["returned"]))
    return 0


def _kept_at(result: dict[str, Any], branch: str) -> str:
    """Copies that were not there, or have not followed yet."""
    nodes = result["kept_at"]
    if not nodes:
        return ""
    drop = f"geomirror branch drop {result['resource']} {branch} --node NODE"
    return f"\n  {', '.join(nodes)} keep their branch of it: {drop}"


def _dry_end(app: App, end: str, name: str) -> int:
    asked = {"name": name, "is_dry_run": True}
    plan = app.call(f"rewind.{end}", asked, timeout_s=_TIMEOUT_S)
    app.show(plan, lambda: _end_plan(end, plan))
    return 0 if plan["is_possible"] else RefusedError.exit_code


def _end_plan(end: str, plan: dict[str, Any]) -> str:
    name = plan["resource"]
    if not plan["is_possible"]:
        what = "nothing to commit" if end == "commit" else "cannot be brought back"
        return _refused(f"{name}: {what}", plan)
    if end == "commit":
        text = f'{name}: branch "{plan["branch"]}", {format_bytes(plan["bytes"])}, would be dropped'
        kept = f"\n  {', '.join(plan['kept_at'])} would keep it: no link" if plan["kept_at"] else ""
        return text + kept
    since = f"\n  written since and kept as a branch: {_cut(plan['cut_off'])}"
    return (
        f'{name}: back to the end of branch "{plan["returned"]}", {format_bytes(plan["bytes"])}'
        + (since if plan["cut_off"]["epochs"] else "")
    )


def _refused(what: str, plan: dict[str, Any]) -> str:
    refusal = plan["refusal"]
    lines = [f"{what}: {refusal['message']}"]
    return "\n".join(lines + ([f"  {refusal['hint']}"] if refusal.get("hint") else []))


def _plan(plan: dict[str, Any]) -> str:
    name = plan["resource"]
    if not plan["is_possible"]:
        return _refused(f"{name}: cannot be rewound", plan)
    time = f", {local(plan['time'])}" if plan["time"] else ""
    cut = plan["cut_off"]
    if not cut["epochs"]:
        return f"{name}: it is at epoch {plan['epoch']}{time} already"
    text = (
        f"{name}: back to epoch {plan['epoch']}{time}\n  cut off and kept as a branch: {_cut(cut)}"
    )
    return text + _way_back(plan)


def _cut(cut: dict[str, Any]) -> str:
    """What is taken out: epochs, seconds, bytes."""
    first, last = cut["first_epoch"], cut["last_epoch"]
    text = f"epoch {first}" if first == last else f"epochs {first}–{last}"
    if cut["seconds"] is not None:
        text += f", {format_seconds(cut['seconds'])}"
    if cut["bytes"] is not None:
        text += f", {'' if cut['is_exact'] else 'at most '}{format_bytes(cut['bytes'])}"
    return text


def _is_final(plan: dict[str, Any]) -> bool:
    """Whether the rewind cannot be taken back."""
    return bool(plan["rollback"]) and not plan["rollback"]["is_possible"]


def _way_back(plan: dict[str, Any]) -> str:
    """What there is to say of taking the rewind back, as further lines."""
    rollback = plan["rollback"]
    if rollback and rollback["refusal"]:
        refusal = rollback["refusal"]
        return f"\n  it cannot be taken back: {refusal['message']}\n    {refusal['hint']}"
    if rollback and rollback["has_resync"]:
        most = format_bytes(rollback["one_epoch_bytes_max"])
        return f"\n  taken back, it reaches copies as a resync: it is more than {most}"
    return ""


def _done(result: dict[str, Any]) -> str:
    name, branch = result["resource"], result["branch"]
    time = f", {local(result['time'])}" if result["time"] else ""
    text = f'"{name}" is at epoch {result["epoch"]}{time}'
    if result["behind"]:
        text += f"; {', '.join(result['behind'])} still has to follow"
    if branch is None:
        return text
    text += f'; what came later is branch "{branch}"'
    text += _way_back(result)
    if not _is_final(result):
        text += f"\n  geomirror rewind rollback {name}   goes back to it"
    return f"{text}\n  geomirror rewind commit {name}     drops it for good"
