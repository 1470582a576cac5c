"""`geomirror tunnel …`"""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table


@click.group()
def tunnel() -> None:
    """The virtual network for this host's applications: WireGuard tunnels to the other nodes."""


@tunnel.command()
@json_option
@pass_app
def up(app: App) -> None:
    """Bring the tunnels up; needs the daemon, which needs root.

    They stay until `tunnel down` or the next start of the daemon; with `driver = "wireguard"` in
    the section `[tunnel]` of the configuration they come up with every start.
    """
    result = app.call("tunnel.up")
    app.show(result, lambda: _status(result))


@tunnel.command()
@json_option
@pass_app
def down(app: App) -> None:
    """Remove everything that tunnels have added to this host; works without a daemon too.

    Interfaces, addresses, routes, rules and names of this node, also what a crash has left. Nothing
    else is touched.
    """
    if app.client().is_running():
        removed = app.call("tunnel.down")["removed"]
    else:
        removed = _take_away(app)
    text = "\n".join(f"removed: {words}" for words in removed)
    app.show({"removed": removed}, text or "there was nothing of this node's tunnels on this host")


@tunnel.command("rotate-keys")
@json_option
@pass_app
def rotate_keys(app: App) -> None:
    """Replace this node's WireGuard key and its shares of all pre-shared keys.

    Neighbours with a link are told at once; connections through the tunnels go on after a new
    handshake. The tunnel to a node without a link is down until there is one.
    """
    result = app.call("tunnel.rotate_keys")
    lines = [f"new public key {result['public_key']}"]
    lines += [f"told: {', '.join(result['told'])}"] if result["told"] else []
    if result["not_told"]:
        lines.append(f"no tunnel until there is a link: {', '.join(result['not_told'])}")
    app.show(result, "\n".join(lines))


@tunnel.command()
@json_option
@pass_app
def status(app: App) -> None:
    """Show the tunnels of this node: state, addresses, interfaces, handshakes, traffic."""
    result = app.call("tunnel.status")
    app.show(result, lambda: _status(result))


def _take_away(app: App) -> list[str]:
    import asyncio

    from geomirror.node.lock_io import DaemonLock
    from geomirror.node.tunnel_host import TunnelHost
    from geomirror.node.tunnel_store import TunnelStore, tag_of, take_away
    from geomirror.tunnel.network_state_io import load_network

    state = load_network(app.data_dir.root)

    async def run() -> list[str]:
        host = TunnelHost(tag_of(state), lambda _: None)
        return await take_away(state, host, TunnelStore(app.data_dir.root))

    lock = DaemonLock(app.data_dir)
    try:
        return asyncio.run(run())
    finally:
        lock.release()


def _status(result: dict[str, Any]) -> str:
    from geomirror.cli.units import format_bytes, format_seconds

    made = f" by {result['implementation']}" if result["implementation"] else ""
    lines = [
        f"tunnels    {result['state']}{made}",
        f"this node  {result['address']}  {result['address_ipv6']}  {result['dns_name']}",
        f"network    {result['range']}  {result['range_ipv6']}",
    ]
    lines += [f"warning    {text}" for text in result["warnings"]]
    if result["reason"]:
        lines.append(f"reason     {result['reason']}")
    if result["state"] == "down":
        lines.append('next: "geomirror tunnel up", or driver = "wireguard" in [tunnel]')
    rows = [
        [
            found["node"],
            found["address"],
            found["state"],
            found["interface"] or "-",
            found["endpoint"] or "-",
            format_seconds(found["handshake_seconds"]),
            format_bytes(found["bytes_sent"]),
            format_bytes(found["bytes_received"]),
            found["reason"],
        ]
        for found in result["neighbours"]
    ]
    if rows and result["state"] != "down":
        head = ["NODE", "ADDRESS", "STATE", "INTERFACE", "ENDPOINT", "HANDSHAKE", "SENT"]
        lines += ["", table([*head, "RECEIVED", "REASON"], rows)]
    return "\n".join(lines)
