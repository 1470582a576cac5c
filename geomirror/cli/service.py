"""`geomirror service …`: what the network offers, and what goes through it."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table


@click.group()
def service() -> None:
    """TCP services of nodes, reached through the overlay."""


@service.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List every service that this node knows of, what it exposes and what it forwards."""
    found = app.call("service.list")
    app.show(found, lambda: _listed(found))


@service.command()
@json_option
@pass_app
def circuits(app: App) -> None:
    """List the forwarded connections that are open now."""
    found = app.call("service.circuits")
    app.show(found, lambda: _circuits(found))


def _listed(found: dict[str, Any]) -> str:
    from geomirror.cli.units import format_bytes

    parts = []
    if found["services"]:
        parts.append(table(["SERVICE", "STATE", "NODES"], [_row(s) for s in found["services"]]))
    if found["exposures"]:
        rows = [
            [each["name"], each["target"], ",".join(each["allow"] or ["(all)"]), *_counts(each)]
            for each in found["exposures"]
        ]
        parts.append(table(["EXPOSED", "TARGET", "TO", *_COUNTS], rows))
    if found["forwards"]:
        parts.append(table(["FORWARDED", "LISTENS AT", "TO", *_COUNTS], _forwards(found)))
    for each in found["held_back"]:
        rate = format_bytes(each["bytes_per_second"])
        parts.append(f"circuits to {each['node']} get {rate}/s: replication waits for the link")
    if found["older_nodes"]:
        nodes = ", ".join(found["older_nodes"])
        parts.append(f"{nodes}: a version without services; update it")
    return "\n\n".join(parts) or "no service is known: geomirror expose NAME --port P"


def _row(service: dict[str, Any]) -> list[str]:
    nodes = []
    for each in service["holders"]:
        rtt = each["rtt_seconds"]
        state = "this node" if each["is_self"] else f"{rtt * 1000:.1f} ms" if rtt else "up"
        nodes.append(f"{each['node']} ({state if each['is_connected'] else 'not connected'})")
    return [service["name"], service["state"], ", ".join(nodes)]


def _forwards(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for each in found["forwards"]:
        to = each["nearest"] or each["node"] or "(nobody)"
        counts = _counts(each)
        if each["error"]:
            counts[-1] = f"does not listen: {each['error']['message']}"
        elif each["reason"]:
            counts[-1] = each["reason"]
        rows.append([each["name"], each["listen"], to, *counts])
    return rows


_COUNTS = ["OPEN", "TOTAL", "SENT", "RECEIVED", "LAST ERROR"]


def _counts(each: dict[str, Any]) -> list[str]:
    from geomirror.cli.units import format_bytes

    return [
        str(each["circuits_open"]),
        str(each["circuits"]),
        format_bytes(each["bytes_sent"]),
        format_bytes(each["bytes_received"]),
        each["last_error"],
    ]


def _circuits(found: dict[str, Any]) -> str:
    from geomirror.cli.units import format_bytes, format_seconds

    rows = [
        [
            each["service"],
            f"to {each['node']}" if each["direction"] == "forward" else f"from {each['node']}",
            each["place"],
            format_seconds(each["seconds"]) if each["is_open"] else "opening",
            format_bytes(each["bytes_sent"]),
            format_bytes(each["bytes_received"]),
        ]
        for each in found["circuits"]
    ]
    if not rows:
        return "no circuit is open"
    return table(["SERVICE", "NODE", "AT", "SINCE", "SENT", "RECEIVED"], rows)
