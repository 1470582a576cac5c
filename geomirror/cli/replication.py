"""`geomirror wait`, `pause` and `resume`."""

from __future__ import annotations

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.cli.units import parse_duration


@click.command()
@click.argument("name", metavar="RES")
@click.option(
    "--durable",
    "kind",
    flag_value="durable",
    default=True,
    help="On every peer's disk; the default.",
)
@click.option("--applied", "kind", flag_value="applied", help="In every peer's image.")
@click.option(
    "--timeout",
    "timeout_s",
    type=parse_duration,
    default="1h",
    show_default=True,
    metavar="SECONDS",
    help="Give up after this time, with exit code 6.",
)
@json_option
@pass_app
def wait(app: App, name: str, kind: str, timeout_s: float) -> None:
    """Wait until every peer has all that is completed now.

    A peer that is away does not have it: the command then waits until its timeout.
    """
    parameters = {"name": name, "kind": kind, "timeout_s": timeout_s}
    result = app.call("resource.wait", parameters, timeout_s=timeout_s + 15)
    epoch = result["position"].get("epoch")
    app.show(result, f'every peer of "{name}" has epoch {epoch} {kind}')


@click.command()
@click.argument("name", metavar="RES")
@click.option("--peer", metavar="NODE", help="Only this secondary. Default: all of them.")
@json_option
@pass_app
def pause(app: App, name: str, peer: str | None) -> None:
    """Hold replication back; writers do not notice, the journal takes it all.

    The secondary's image stands still, for a long stable read.
    """
    result = app.call("resource.pause", {"name": name, "peer": peer})
    app.show(result, f'replication of "{name}" to {peer or "all peers"} is paused')


@click.command()
@click.argument("name", metavar="RES")
@click.option("--peer", metavar="NODE", help="Only this secondary. Default: all of them.")
@json_option
@pass_app
def resume(app: App, name: str, peer: str | None) -> None:
    """Go on where `pause` stopped."""
    result = app.call("resource.resume", {"name": name, "peer": peer})
    app.show(result, f'replication of "{name}" to {peer or "all peers"} goes on')
