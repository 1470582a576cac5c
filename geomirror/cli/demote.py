"""`geomirror demote`: makes the primary a secondary, without a successor."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.errors import RefusedError


@click.command()
@click.argument("name", metavar="RES")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1, max=3600),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long copies may take to catch up; after that everything stays as it is.",
)
@click.option("--dry-run", is_flag=True, help="Only say which copies would have everything.")
@json_option
@pass_app
def demote(app: App, name: str, timeout_s: float, dry_run: bool) -> int:
    """Stop the primary in an orderly way: nobody writes until a copy is promoted.

    All writers are refused once every copy that is streaming has everything. Then any of them,
    this node's too, can be promoted without loss: geomirror failover RES --to NODE. Exits 5 when
    no copy is streaming, 6 when they do not catch up in time; then nothing was changed.
    """
    parameters = {"name": name, "timeout_s": timeout_s, "is_dry_run": dry_run}
    if not dry_run:
        app.progress(f"stopping writers of {name} once its copies have everything")
    found = app.call("promotion.demote", parameters, timeout_s=timeout_s + 60)
    app.show(found, lambda: _text(found, is_dry_run=dry_run))
    return 0 if found["is_possible"] else RefusedError.exit_code


def _text(found: dict[str, Any], *, is_dry_run: bool) -> str:
    name, node, heirs = found["name"], found["node"], ", ".join(found["heirs"])
    if found["refusal"]:
        return f"{name}: {node} cannot stop being the primary: {found['refusal']}"
    if is_dry_run:
        lines = [f"{name}: {node} would stop accepting writes once {heirs} has everything"]
        for heir, lag in found["lag"].items():
            behind = f"{lag['epochs']} epochs, {format_bytes(lag['bytes'])}"
            lines.append(f"  {heir} is {behind}, {format_seconds(lag['seconds'])} behind")
        return "\n".join(lines)
    return (
        f"{name}: {node} is a secondary at epoch {found['epoch']}; nobody is the primary\n"
        f"  to do      geomirror failover {name} --to NODE, for example {found['heirs'][0]}"
    )
