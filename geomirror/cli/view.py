"""`geomirror view create|list|delete`: a resource as it was, while replication goes on."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.timeline import local
from geomirror.cli.units import format_bytes, parse_duration, parse_size
from geomirror.cli.when import WHEN_HELP, parse_when
from geomirror.errors import UsageError

QUOTA = "10G"


@click.group()
def view() -> None:
    """Look at a resource as it was at an earlier point in time.

    A view is an NBD export of one retained epoch. Replication and writers do not notice it.
    """


@view.command()
@click.argument("name", metavar="RES")
@click.option("--at", "when", metavar="T", help=f"{WHEN_HELP} Default: the newest.")
@click.option("--node", metavar="NODE", help="Of the copy on this member. Default: the one here.")
@click.option("--writable", is_flag=True, help="What is written to it is kept beside it.")
@click.option(
    "--quota",
    "quota",
    metavar="SIZE",
    help=f"Most that may be written with --writable; then writers get ENOSPC. Default: {QUOTA}.",
)
@click.option("--expires", metavar="TIME", help="End the view after this time, for example 4h.")
@json_option
@pass_app
def create(
    app: App,
    name: str,
    when: str | None,
    node: str | None,
    writable: bool,
    quota: str | None,
    expires: str | None,
) -> None:
    """Make a view of RES and print its NBD URI.

    \b
    [bold]Examples:[/bold]
      geomirror view create pg --at -10m
      geomirror view create pg --at before-upgrade --writable --quota 20G --expires 4h
      nbdcopy "$(geomirror view create pg --at 12:03:20)" /tmp/pg.img
    """
    if quota is not None and not writable:
        raise UsageError("--quota is of what is written: it goes with --writable only")
    parameters: dict[str, Any] = {
        "name": name,
        "node": node,
        "is_writable": writable,
        "quota_bytes": parse_size(quota or QUOTA),
        "expires_s": None if expires is None else parse_duration(expires),
    }
    if when is not None:
        parameters |= parse_when(when, datetime.now().astimezone())
    result = app.call("view.create", parameters, timeout_s=90)
    app.progress(
        f'view "{result["name"]}" of "{name}" on {result["node"]}: epoch {result["epoch"]}, '
        f"{local(result['time'])}{_nearest(result)}"
    )
    app.show(result, "\n".join(volume["nbd_uri"] for volume in result["volumes"]))


@view.command("list")
@click.argument("name", metavar="RES")
@click.option("--node", metavar="NODE", help="On this member. Default: the one here.")
@json_option
@pass_app
def list_views(app: App, name: str, node: str | None) -> None:
    """List the views of RES, with what was written to them."""
    result = app.call("view.list", {"name": name, "node": node})
    app.show(result, lambda: _table(result))


@view.command()
@click.argument("name", metavar="RES")
@click.argument("view_name", metavar="VIEW")
@click.option("--node", metavar="NODE", help="On this member. Default: the one here.")
@json_option
@pass_app
def delete(app: App, name: str, view_name: str, node: str | None) -> None:
    """End a view. What was written to it is gone; its clients get EIO."""
    result = app.call("view.delete", {"name": name, "view": view_name, "node": node})
    app.show(result, f'view "{view_name}" of "{name}" is deleted')


def _nearest(result: dict[str, Any]) -> str:
    """Why it is not exactly what was asked for."""
    if not result["why"]:
        return ""
    later = result["later"]
    after = f", the next point is epoch {later['epoch']}, {local(later['time'])}" if later else ""
    return f"\n  the nearest before that moment{after}: {result['why']}"


def _table(result: dict[str, Any]) -> str:
    if not result["views"]:
        return f'"{result["resource"]}" has no views here'
    rows = [
        [
            each["name"],
            str(each["epoch"]),
            local(each["time"]),
            format_bytes(each["written_bytes"]) if each["is_writable"] else "read-only",
            local(each["expires_at"]) if each["expires_at"] else "-",
            str(each["connections"]),
            each["reason"] or each["nbd_uri"],
        ]
        for each in result["views"]
    ]
    return table(["VIEW", "EPOCH", "TIME", "WRITTEN", "EXPIRES", "CLIENTS", "URI"], rows)
