"""`geomirror node …`"""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app


@click.group()
def node() -> None:
    """This node's daemon, and the other nodes."""


@node.command()
@json_option
@pass_app
def run(app: App) -> None:
    """Run the daemon in the foreground, until SIGTERM; systemd runs this.

    SIGHUP reads the configuration again. It logs to stderr.
    """
    from geomirror.node.run_io import run_node

    run_node(app.data_dir)


@node.command()
@json_option
@pass_app
def show(app: App) -> None:
    """Show this node; works without a daemon too."""
    from geomirror.node.network_view import own_object
    from geomirror.tunnel.network_state_io import load_network

    if app.client().is_running():
        result = app.call("node.show")
    else:
        result = own_object(load_network(app.data_dir.root))
    app.show(result, lambda: "\n".join(f"{key:<24} {_text(v)}" for key, v in result.items()))


@node.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List the nodes of the network; works without a daemon too."""
    from geomirror.cli.network import nodes_table
    from geomirror.node.sightings import shown_network

    if app.client().is_running():
        result = app.call("node.list")
    else:
        network = shown_network(app.data_dir.root)
        result = {key: network[key] for key in ("nodes", "revoked")}
    app.show(result, lambda: nodes_table(result))


@node.command("check-config")
@click.argument("file", type=click.Path(exists=True, dir_okay=False), required=False)
@json_option
@pass_app
def check_config(app: App, file: str | None) -> None:
    """Check a configuration file; default: this node's.

    Exits 2 and names the key when the daemon would refuse it.
    """
    from pathlib import Path

    from geomirror.node.config_io import load_config

    path = Path(file) if file else app.data_dir.config
    load_config(path)
    is_there = path.exists()
    said = f"{path} is good" if is_there else f"{path} is not there: defaults are used"
    app.show({"file": str(path), "exists": is_there, "valid": True}, said)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
