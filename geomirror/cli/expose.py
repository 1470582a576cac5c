"""`geomirror expose`, `unexpose`: services of this node for others."""

from __future__ import annotations

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--port", required=True, type=int, metavar="P", help="TCP port of the service.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST",
    help="Where it listens, as this node reaches it.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="NODE[,NODE]",
    help="Only these nodes may use it, repeated. Default: every node of the network.",
)
@json_option
@pass_app
def expose(app: App, name: str, port: int, host: str, allow: tuple[str, ...]) -> None:
    """Let other nodes reach a TCP port of this one under the name NAME.

    They reach it by `geomirror forward NAME LOCALPORT`, through mutual TLS under the network's
    authority; nothing listens here because of it, and no other port can be reached. It is kept
    until `geomirror unexpose NAME`, through restarts. Given again it replaces what was said before;
    circuits of nodes that may not use it any more are reset. More in docs/services.md.

    \b
    [bold]Examples:[/bold]
      geomirror expose ldap --port 389
      geomirror expose pg --port 5432 --host 10.1.2.3 --allow west-1,north-1
    """
    nodes = [node for text in allow for node in text.split(",") if node]
    request = {"name": name, "port": port, "host": host, "allow": nodes}
    found = app.call("service.expose", request)
    who = ", ".join(found["allow"]) if found["allow"] else "every node of the network"
    text = f'"{name}" is exposed: {found["target"]}, to {who}\n'
    text += f'next, there: "geomirror forward {name} LOCALPORT"'
    app.show(found, text)


@click.command()
@click.argument("name", metavar="NAME")
@json_option
@pass_app
def unexpose(app: App, name: str) -> None:
    """Expose a service no more; its circuits are reset.

    \b
    [bold]Example:[/bold]
      geomirror unexpose ldap
    """
    app.show(app.call("service.unexpose", {"name": name}), f'"{name}" is not exposed any more')
