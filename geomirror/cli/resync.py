"""`geomirror resync --in-place`: a resync that has no room for undo."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.errors import UsageError


@click.command()
@click.argument("name", metavar="RES")
@click.option("--in-place", is_flag=True, help="Give up the state from before the resync.")
@click.option("--node", metavar="NODE", help="Of the copy on this member. Default: the one here.")
@click.option("--dry-run", is_flag=True, help="Only say what would be given up.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_app
def resync(app: App, name: str, in_place: bool, node: str | None, dry_run: bool, yes: bool) -> None:
    """Let a resync go on that has no room for undo.

    Resyncs begin and end by themselves. During one, a copy stays usable at the epoch from before
    it, held by undo; where that does not fit, the resync stops and says so. With --in-place that
    state and all history of the copy are given up: it is Inconsistent, and cannot be promoted,
    until the resync has ended. Making room on the disk instead loses nothing.
    """
    if not in_place:
        raise UsageError(
            "resyncs begin by themselves",
            hint="--in-place gives up the state that a resync holds; see --help",
        )
    parameters = {"name": name, "node": node}
    plan = app.call("resync.in_place", {**parameters, "is_dry_run": True})
    if dry_run:
        app.show(plan, lambda: _plan(plan))
        return
    if not yes:
        app.progress(_plan(plan))
    app.confirm(f'give up epoch {plan["epoch"]} of "{name}"', is_confirmed=yes)
    result = app.call("resync.in_place", parameters, timeout_s=90)
    app.show(
        result,
        f'the copy of "{name}" on {result["node"]} is Inconsistent until its resync has ended',
    )


def _plan(plan: dict[str, Any]) -> str:
    views = f", and its {plan['views']} views end" if plan["views"] else ""
    return (
        f"{plan['name']} on {plan['node']}: epoch {plan['epoch']} and all history before it are "
        f"given up{views}\n  until the resync ends this copy can be neither read nor promoted"
    )
