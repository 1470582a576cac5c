"""`geomirror network …`"""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table


@click.group()
def network() -> None:
    """The network: all nodes that trust one authority."""


@network.command()
@click.argument("name", metavar="NAME")
@click.option("--site", required=True, metavar="SITE", help="Site of this first node.")
@click.option("--node", metavar="NODE", help="Name of this node. Default: this host's name.")
@click.option(
    "--listen", metavar="HOST:PORT", help="Where other nodes reach it. Default: port 7701."
)
@click.option(
    "--range",
    "cidr",
    metavar="CIDR",
    help="IPv4 range of the virtual addresses. Default: 10.203.0.0/16.",
)
@json_option
@pass_app
def create(
    app: App, name: str, site: str, node: str | None, listen: str | None, cidr: str | None
) -> None:
    """Create a network with this machine as its first node and authority.

    \b
    [bold]Example:[/bold]
      geomirror network create acme --site east --node east-1 --listen 192.0.2.1:7701
    """
    from geomirror.environment import SystemClock, SystemEntropy
    from geomirror.node.network_view import network_object
    from geomirror.tunnel.addresses import find_overlaps
    from geomirror.tunnel.host_routes_io import host_routes
    from geomirror.tunnel.network_io import create_network

    app.data_dir.create()
    state = create_network(
        app.data_dir.root,
        network=name,
        site=site,
        node=node,
        listen=listen,
        cidr=cidr,
        clock=SystemClock(),
        entropy=SystemEntropy(),
    )
    overlaps = [str(overlap) for overlap in find_overlaps(state.range, host_routes())]
    if overlaps:
        app.progress(
            f"warning: this host has routes that overlap the virtual addresses {state.range}: "
            f"{', '.join(overlaps)}. Replication does not use them; to use them yourself, create "
            "the network with another --range."
        )
    text = f'network "{state.network}" is created; this is node "{state.node}" at "{state.site}"\n'
    text += f'next: "geomirror --data-dir {app.data_dir.root} node run"'
    app.show({**network_object(state), "range_overlaps": overlaps}, text)


@network.command()
@json_option
@pass_app
def show(app: App) -> None:
    """Show the network as this node knows it; works without a daemon too."""
    from geomirror.node.network_view import network_object
    from geomirror.tunnel.network_state_io import load_network

    if app.client().is_running():
        result = app.call("network.show")
    else:
        result = network_object(load_network(app.data_dir.root))
    app.show(result, lambda: _shown(result))


def _shown(result: dict[str, Any]) -> str:
    head = [
        f"network    {result['network']}  range {result['range']} and {result['range_ipv6']}",
        f"authority  {result['authority'][:32]}  on {', '.join(result['authority_nodes'])}",
        f"this node  {result['node']} at {result['site']}",
        "",
    ]
    return "\n".join(head) + nodes_table(result["nodes"])


def nodes_table(nodes: list[dict[str, Any]]) -> str:
    """Nodes as a table."""
    rows = []
    for found in nodes:
        state = "self" if found.get("is_self") else "up" if found.get("is_connected") else "-"
        endpoints = ",".join(found["endpoints"]) or "(dials out)"
        roles = ",".join(found["roles"])
        addresses = [found["address"], found["address_ipv6"]]
        rows.append([found["node"], found["site"], state, *addresses, roles, endpoints])
    head = ["NODE", "SITE", "LINK", "ADDRESS", "IPV6 ADDRESS", "ROLES", "ENDPOINTS"]
    return table(head, rows)
