"""`geomirror failover`: promotes a copy without its primary, after saying what that loses."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table, yes_option
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.errors import RefusedError


@click.command()
@click.argument("name", metavar="RES")
@click.option("--to", metavar="NODE", required=True, help="The secondary whose copy is promoted.")
@yes_option
@click.option("--dry-run", is_flag=True, help="Only say what would be lost; nothing is changed.")
@json_option
@pass_app
def failover(app: App, name: str, to: str, yes: bool, dry_run: bool) -> int:
    """Make a copy the primary without the old one, which is lost or cut off.

    Run it at any member that is left: it asks the others that it can reach, says what would be
    lost by what they know, and asks. The copy goes on at its last durable epoch, as a new
    generation with a higher fencing token. Copies that have no more than that follow by
    themselves; an old primary that comes back accepts no writes any more and keeps what it has.
    Exits 5 when the copy cannot be promoted, or when the primary answers (then use switchover);
    not when this node has the copy and refuses the primary, whose disk was put back to an older
    state.
    """
    parameters = {"name": name, "to": to}
    found = app.call("failover.assess", parameters, timeout_s=20)
    if dry_run or not found["is_possible"]:
        app.show(found, lambda: render(found))
        return 0 if found["is_possible"] else RefusedError.exit_code
    if not yes:
        if not app.is_json:
            click.echo(render(found), err=True)
        app.confirm(f"Promote the copy of {name} at {to}", is_confirmed=False)
    app.progress(f"promoting the copy at {to}")
    result = app.call("promotion.failover", parameters, timeout_s=60)
    app.show(result, lambda: _promoted(result))
    return 0


def _promoted(found: dict[str, Any]) -> str:
    name, node = found["name"], found["primary_now"]
    return (
        f"{name}: {node} is the primary now, generation {found['generation'][:8]} "
        f"(token {found['token']}) from epoch {found['epoch']}\n"
        f"  lost       {_loss(found)}\n"
        f"  writable   {found['nbd_uri']}  at {node}"
    )


def render(found: dict[str, Any]) -> str:
    """The document as sentences, the gravest first, then the members."""
    name, to, primary = found["name"], found["to"], found["primary"]
    lines = [f"{name}: promoting the copy at {to} (nothing is changed yet)"]
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
    lines.append(f"  primary    {primary['node']} {_state(primary, name, to)}")
    rows = [_row(member) for member in found["members"]]
    members = table(["MEMBER", "ROLE", "EPOCH", "DISK", "HEARD PRIMARY", "ANSWER"], rows)
    return "\n".join([*lines, "", *(f"  {line}" for line in members.splitlines())])


def _state(primary: dict[str, Any], name: str, to: str) -> str:
    """What the old primary does now, and what that means for the promotion."""
    if not primary["is_reachable"]:
        return f"last heard {primary['last_heard']}" if primary["last_heard"] else "never heard"
    if primary["node"] == to:
        return "answers"
    if primary["is_put_back"]:
        return (
            "answers; its disk was put back to an older state, and the copy refuses it for that: "
            f"promoted at {to} itself, the copy takes its place, and what it wrote since is a tail"
        )
    return (
        "answers, so this is refused: promoting while it writes would make two histories; "
        f"geomirror switchover {name} --to {to} loses nothing"
    )


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
