"""`geomirror network …`"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.timeline import local
from geomirror.cli.units import format_seconds


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
    app.note("network.create", {"network": name, "site": site, "node": state.node})
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
    """Show the network as this node knows it; works without a daemon too.

    CERTIFICATE: how long the one is good that the node showed last; it renews itself at half of
    its 24 hours. LAST SEEN: the last time with a link to it, also before a restart.
    """
    from geomirror.node.sightings import shown_network

    if app.client().is_running():
        result = app.call("network.show")
    else:
        result = shown_network(app.data_dir.root)
    app.show(result, lambda: _shown(result))


def _shown(result: dict[str, Any]) -> str:
    head = [
        f"network    {result['network']}  range {result['range']} and {result['range_ipv6']}",
        f"authority  {result['authority'][:32]}  on {', '.join(result['authority_nodes'])}",
        f"this node  {result['node']} at {result['site']}",
        "",
    ]
    return "\n".join(head) + nodes_table(result)


def nodes_table(result: dict[str, Any]) -> str:
    """Nodes as a table, and those whose keys are refused."""
    from geomirror.environment import SystemClock

    now_s = SystemClock().wall_ns() / 1e9
    rows = []
    for found in result["nodes"]:
        state = "self" if found["is_self"] else "up" if found.get("is_connected") else "-"
        rows.append(
            [
                found["node"],
                found["site"],
                state,
                found["address"],
                found["address_ipv6"],
                ",".join(found["roles"]),
                _left(found["certificate_expires_at"], now_s),
                "now" if state in ("self", "up") else _ago(found["last_seen_at"], now_s),
                ",".join(found["endpoints"]) or "(dials out)",
            ]
        )
    head = ["NODE", "SITE", "LINK", "ADDRESS", "IPV6 ADDRESS", "ROLES", "CERTIFICATE", "LAST SEEN"]
    lines = [table([*head, "ENDPOINTS"], rows)]
    for gone in result["revoked"]:
        verb = "left" if gone["has_left"] else "was revoked"
        lines.append(f"{gone['node']} {verb} {local(gone['revoked_at'])}; key {gone['node_id']}")
    return "\n".join(lines)


def _left(expires_at: str | None, now_s: float) -> str:
    """How long a certificate is still good; it is renewed at half of its life."""
    if expires_at is None:
        return "-"
    left_s = datetime.fromisoformat(expires_at).timestamp() - now_s
    return f"{format_seconds(left_s)} left" if left_s > 0 else "expired"


def _ago(seen_at: str | None, now_s: float) -> str:
    if seen_at is None:
        return "never"
    return f"{format_seconds(max(0.0, now_s - datetime.fromisoformat(seen_at).timestamp()))} ago"
