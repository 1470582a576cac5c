"""`geomirror failover`: what a promotion would lose. Promoting itself is not there yet."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.errors import RefusedError


@click.command()
@click.argument("name", metavar="RES")
@click.option("--to", metavar="NODE", required=True, help="The secondary whose copy is judged.")
@click.option("--dry-run", is_flag=True, help="Only say what would be lost; nothing is changed.")
@json_option
@pass_app
def failover(app: App, name: str, to: str, dry_run: bool) -> int:
    """Say what promoting a copy would lose, with the primary dead or alive.

    Run it at any member that is left: it asks the others that it can reach, and judges by what
    they know. Exits 5 when the copy cannot be promoted at all. Promoting is not there yet, so
    --dry-run is required.
    """
    if not dry_run:
        raise RefusedError(
            f'"{name}" stays as it is: promotion is not there yet',
            hint=f"geomirror failover {name} --to {to} --dry-run says what it would lose",
        )
    result = app.call("failover.assess", {"name": name, "to": to}, timeout_s=20)
    app.show(result, lambda: render(result))
    return 0 if result["is_possible"] else RefusedError.exit_code


def render(found: dict[str, Any]) -> str:
    """The document as sentences, the gravest first, then the members."""
    name, to, primary = found["name"], found["to"], found["primary"]
    lines = [f"{name}: promoting the copy at {to} (dry run, nothing is changed)"]
    if found["refusal"]:
        refusal = found["refusal"]
        lines += [f"  refused    {refusal['message']}", f"  to do      {refusal['hint']}"]
    elif found["position"]:
        position = found["position"]
        sealed = f", sealed {position['sealed_at']}" if position["sealed_at"] else ""
        lines.append(f"  from       epoch {position['epoch']}{sealed}")
        lines.append(f"  confirmed  {found['confirmed_writes']['text']}")
        lines.append(f"  lost       {_loss(found)}")
        if found["more_advanced"]:
            lines.append(f"  but        {_more(found)}")
    heard = f"last heard {primary['last_heard']}" if primary["last_heard"] else "never heard"
    state = "answers: a promotion would make two primaries" if primary["is_reachable"] else heard
    lines.append(f"  primary    {primary['node']} {state}")
    rows = [_row(member) for member in found["members"]]
    members = table(["MEMBER", "ROLE", "EPOCH", "DISK", "HEARD PRIMARY", "ANSWER"], rows)
    return "\n".join([*lines, "", *(f"  {line}" for line in members.splitlines())])


def _loss(found: dict[str, Any]) -> str:
    loss = found["loss"]
    if loss["epochs"] is None:
        return "not known"
    after = "" if loss["is_exact"] else f"; what was written after {loss['known_until']} as well"
    if loss["epochs"] == 0:
        return "nothing" + ("" if loss["is_exact"] else " that is known here") + after
    first, last = loss["first_epoch"], loss["last_epoch"]
    parts = [f"epoch {first}" if first == last else f"epochs {first}–{last}"]
    if loss["seconds"] is not None:
        parts.append(format_seconds(loss["seconds"]))
    if loss["bytes"] is not None:
        parts.append(format_bytes(loss["bytes"]))
    return ", ".join(parts) + after


def _more(found: dict[str, Any]) -> str:
    nodes, best = found["more_advanced"], found["best"]
    text = f"{', '.join(nodes)} {'has' if len(nodes) == 1 else 'have'} more"
    return f"{text}: geomirror failover {found['name']} --to {best} --dry-run"


def _row(member: dict[str, Any]) -> list[str]:
    epoch = "-" if member["epoch"] is None else str(member["epoch"])
    return [
        member["node"],
        member["role"],
        epoch,
        member["disk_state"],
        member["heard_primary_at"] or "-",
        "yes" if member["is_reachable"] else f"no: {member['reason']}",
    ]
