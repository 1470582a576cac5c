"""`geomirror switchover`: hands the primary's role over without losing anything."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.errors import RefusedError

TIMEOUT_S = 60.0


@click.command()
@click.argument("name", metavar="RES")
@click.option("--to", metavar="NODE", required=True, help="The secondary that becomes the primary.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1, max=3600),
    default=TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long it may take to catch up; after that everything stays as it is.",
)
@click.option("--dry-run", is_flag=True, help="Only say whether it is possible.")
@json_option
@pass_app
def switchover(app: App, name: str, to: str, timeout_s: float, dry_run: bool) -> int:
    """Make a secondary the primary; nothing is lost.

    Writers go on until the heir has nearly caught up; then they wait while the rest is sent, ten
    seconds at most. The old primary becomes a secondary of the new one. Its NBD clients get an
    error (attach at the new primary). Exits 5 when the heir cannot take over, 6 when it does not
    catch up in time; then nothing was changed.
    """
    parameters = {"name": name, "to": to, "timeout_s": timeout_s, "is_dry_run": dry_run}
    if not dry_run:
        app.progress(f"handing {name} over to {to}; writers go on until it has caught up")
    found = app.call("promotion.switchover", parameters, timeout_s=timeout_s + 60)
    app.show(found, lambda: _dry(found) if dry_run else _done(found))
    return 0 if found["is_possible"] else RefusedError.exit_code


def _dry(found: dict[str, Any]) -> str:
    name, to, lag = found["name"], found["to"], found["lag"]
    if found["refusal"]:
        return f"{name}: {to} cannot take over: {found['refusal']}"
    behind = f"{lag['epochs']} epochs, {format_bytes(lag['bytes'])}"
    age = format_seconds(lag["seconds"])
    return f"{name}: {to} can take over from {found['from']}; it is {behind}, {age} behind"


def _done(found: dict[str, Any]) -> str:
    return (
        f"{found['name']}: {found['primary_now']} is the primary now, generation "
        f"{found['generation'][:8]} (token {found['token']}) from epoch {found['epoch']}; "
        f"nothing was lost\n"
        f"  writable   {found['nbd_uri']}  at {found['primary_now']}"
    )
