"""`geomirror forward`, `unforward`: services of other nodes on ports of this one."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("local_port", metavar="LOCALPORT", type=int)
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Listen here; any other address lets other machines in.",
)
@click.option("--node", metavar="NODE", help="Only to this node. Default: the nearest that has it.")
@json_option
@pass_app
def forward(app: App, name: str, local_port: int, address: str, node: str | None) -> None:
    """Listen on LOCALPORT and lead what connects to the service NAME of another node.

    LOCALPORT 0 takes a free port and says which. If several nodes expose NAME, each
    connection goes to the one with the shortest round trip that answers. The port is there through
    restarts, and also while no node exposes NAME; a connection that leads nowhere is reset, and
    `geomirror service list` says why. More in docs/services.md.

    \b
    [bold]Examples:[/bold]
      geomirror forward ldap 3389 && ldapsearch -H ldap://127.0.0.1:3389
      geomirror forward pg 5432 --node west-1
    """
    request = {"name": name, "port": local_port, "host": address, "node": node}
    found = app.call("service.forward", request)
    app.show(found, lambda: f'{found["listen"]} leads to "{name}" {describe(found)}')


def describe(found: dict[str, Any]) -> str:
    """Where a forward leads now."""
    if found["nearest"] is None:
        return f"as soon as a node exposes it: {found['reason']}"
    rtt = found["rtt_seconds"]
    return f"of {found['nearest']}" + (f" ({rtt * 1000:.1f} ms)" if rtt else "")


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("local_port", metavar="[LOCALPORT]", type=int, required=False)
@json_option
@pass_app
def unforward(app: App, name: str, local_port: int | None) -> None:
    """Forward a service no more, at one port or at all; circuits from there are reset.

    \b
    [bold]Examples:[/bold]
      geomirror unforward ldap
      geomirror unforward ldap 3389
    """
    found = app.call("service.unforward", {"name": name, "port": local_port})
    app.show(found, f'"{name}" is not forwarded any more at {", ".join(found["listen"])}')
