"""`geomirror link …`"""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table


@click.group()
def link() -> None:
    """Encrypted links to other nodes."""


@link.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List this node's links.

    WAY is direct, proxy (through an HTTP proxy), websocket, or websocket_proxy; the last column
    says why no better one is used, or what is wrong.
    """
    result = app.call("link.list")
    app.show(result, lambda: _listed(result))


def _listed(result: dict[str, Any]) -> str:
    from geomirror.cli.units import format_bytes, format_seconds

    rows = [
        [
            found["node"],
            found["site"],
            found["address"],
            "up" if found["is_established"] else "down",
            f"{found['rtt_seconds'] * 1000:.1f} ms" if found["rtt_seconds"] else "-",
            format_seconds(found["since_seconds"]),
            format_bytes(found["bytes_sent"]),
            format_bytes(found["bytes_received"]),
            found["way"] or "-",
            found["endpoint"] or "-",
            found["trouble"] or found["way_reason"],
        ]
        for found in result["links"]
    ]
    if not rows:
        return "no other node is known"
    head = ["NODE", "SITE", "ADDRESS", "STATE", "RTT", "SINCE", "SENT", "RECEIVED", "WAY"]
    return table([*head, "ENDPOINT", "WHY"], rows)
