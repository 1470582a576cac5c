"""`geomirror resolve`: of two histories keep one; the other's tail becomes a branch."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table, yes_option
from geomirror.cli.units import format_tail
from geomirror.errors import RefusedError


@click.command()
@click.argument("name", metavar="RES")
@click.option("--keep", metavar="NODE", required=True, help="The node whose history goes on.")
@yes_option
@click.option("--dry-run", is_flag=True, help="Only show the tails; nothing is changed.")
@json_option
@pass_app
def resolve(app: App, name: str, keep: str, yes: bool, dry_run: bool) -> int:
    """Of two histories keep that of NODE: the others go back to where they part, and follow it.

    What they have beyond that is saved first, as the branch orphan-GENERATION (geomirror branch
    list), and nothing of it is lost; their cost is that of the divergence, not of the volume. If
    NODE is not the primary with the highest token, but was outranked by it (superseded or diverged
    in status), it becomes the primary with a token above all: whoever was one stops. Exits 5 when
    there is nothing to resolve, or a tail cannot be given up.
    """
    parameters = {"name": name, "keep": keep}
    found = app.call("promotion.resolve", {**parameters, "is_dry_run": True})
    if not dry_run and found["is_resolved"]:
        if not app.is_json and not yes:
            click.echo(_text(found), err=True)
        app.confirm(f"Keep the history of {keep} for {name}", is_confirmed=yes)
        app.progress("saving tails as branches and going back to the branch point")
        found = app.call("promotion.resolve", parameters, timeout_s=120)
    app.show(found, lambda: _text(found))
    return 0 if found["is_resolved"] else RefusedError.exit_code


def _text(found: dict[str, Any]) -> str:
    rows = [_row(member) for member in found["members"]]
    kept = f"{found['keep'].upper()} SINCE THEN"
    members = table(["MEMBER", "BRANCH POINT", "OWN TAIL", kept, "BRANCH"], rows)
    text = f"{found['name']}: the history of {found['keep']} is kept"
    if found["insists"]:
        token = "a token above all" if found["token"] is None else f"token {found['token']}"
        text += f", and goes on there with {token}"
    writers = [
        m["node"]
        for m in found["members"]
        if (m.get("tail") or {}).get("own", {}).get("is_primary")
    ]
    if writers and found["is_dry_run"]:
        text += f"\n{', '.join(writers)} serves writers now; they will get errors"
    return f"{text}\n{members}"


def _row(member: dict[str, Any]) -> list[str]:
    tail = member.get("tail")
    if member.get("error"):
        return [member["node"], "-", member["error"], "-", "-"]
    if not tail:
        return [member["node"], "-", "none", "-", "-"]
    parted, own = tail["branch_epoch"], tail["own"]
    more = " and unsealed writes" if own["has_unsealed"] else ""
    point = "not known" if parted is None else f"epoch {parted}"
    kept = format_tail(member.get("kept_since") or {})
    return [member["node"], point, format_tail(own) + more, kept, member["branch"] or "-"]
