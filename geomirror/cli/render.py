"""`status` as text: a table of resources and peers, then the plain sentences."""

from __future__ import annotations

from typing import Any

from geomirror.cli.advice import advise
from geomirror.cli.common import table
from geomirror.cli.timeline import local
from geomirror.cli.units import format_bytes, format_seconds
from geomirror.cli.verify import describe as describe_verify


def render_status(document: dict[str, Any]) -> str:
    """The whole of `geomirror status`."""
    lines = [f"node {document['node']} at site {document['site']}", ""]
    if not document["resources"]:
        lines.append('no resources; make one with "geomirror resource create"')
    for resource in document["resources"]:
        lines += [*render_resource(resource, document["node"]), ""]
    return "\n".join(lines).rstrip()


def render_resource(resource: dict[str, Any], node: str) -> list[str]:
    """One resource: what it is here, its peers, its volumes, what to do."""
    position = resource["position"] or {}
    journal = resource["journal"]
    head = f"{resource['name']}  {resource['role']}  {resource['state']}"
    if position:
        head += f"  epoch {position['epoch']}"
    lines = [head]
    for volume in resource["volumes"]:
        size = format_bytes(volume["size_bytes"])
        lines.append(f"  volume {volume['name']}  {size}  {volume['nbd_uri'] or '(not served)'}")
        if volume.get("nbd_tcp_uri"):
            lines.append(f"    also {volume['nbd_tcp_uri']}")
    if journal:
        text = f"  journal {format_bytes(journal['bytes_used'])} of "
        text += format_bytes(journal["bytes_total"])
        if journal.get("covers_seconds"):
            text += f", covers {format_seconds(journal['covers_seconds'])} at this churn"
        lines.append(text)
    lines += _in_sync(resource)
    lines += _last_drills(resource)
    if resource["peers"]:
        peers = table(
            ["PEER", "SITE", "STATE", "DISK", "ACK", "EPOCH", "BEHIND", "RPO", "RATE", "RESYNCS"],
            [_peer_row(peer) for peer in resource["peers"]],
        )
        lines += [f"  {line}" for line in peers.splitlines()]
    for peer in resource["peers"]:
        if peer.get("verify"):
            lines += [f"  {line}" for line in describe_verify(peer["node"], peer["verify"])]
    for found in advise(resource, node):
        lines += [
            f"  state: {found.state}",
            f"  means: {found.meaning}",
            f"  to do: {found.action}",
        ]
    return lines


def _peer_row(peer: dict[str, Any]) -> list[str]:
    lag, position = peer.get("lag") or {}, peer.get("position") or {}
    rate = peer.get("rate_bytes_per_second")
    return [
        peer["node"],
        peer["site"],
        peer["state"],
        peer.get("disk_state") or "-",
        _acknowledgement(peer),
        str(position.get("epoch", "-")),
        format_bytes(lag.get("bytes")),
        format_seconds(peer.get("rpo_seconds")),
        f"{format_bytes(rate)}/s" if rate else "-",
        "-" if peer.get("resyncs") is None else str(peer["resyncs"]),
    ]


def _in_sync(resource: dict[str, Any]) -> list[str]:
    """Who has everything that is confirmed; nothing for an asynchronous resource."""
    sync = resource.get("sync")
    if not sync or sync["mode"] == "asynchronous":
        return []
    parts = [f"in sync: {', '.join(sync['in_sync']) or 'nobody'}"]
    if sync["out_of_sync"]:
        out = [
            one["node"] + (f" since {one['since']}" if one["since"] else "")
            for one in sync["out_of_sync"]
        ]
        parts.append(f"out of sync: {', '.join(out)}")
    if resource["role"] == "secondary":
        parts.append(f"as the primary said {sync['as_of']}")
    lines = ["  " + "; ".join(parts)]
    if sync.get("pending"):
        nodes = ", ".join(sync["pending"]["waits_for"])
        lines.append(f"  changed settings are not in force before {nodes} knows of them")
    return lines


def _last_drills(resource: dict[str, Any]) -> list[str]:
    """When a drill of this copy passed last, and of others as they said."""
    found = resource.get("last_drill")
    lines = [_last_drill(found, "")] if found else []
    elsewhere = resource.get("drills_elsewhere") or []
    return lines + [_last_drill(each, f" at {each['node']}") for each in elsewhere]


def _last_drill(found: dict[str, Any], where: str) -> str:
    if found["result"] == "passed":
        rto = format_seconds(found["rto_seconds"])
        return f"  drill{where} passed {local(found['started_at'])}, usable after {rto}"
    began = f" {local(found['started_at'])}" if found["started_at"] else ""
    passed = local(found["last_passed_at"]) if found["last_passed_at"] else "never"
    said = f"{found['result']}, {found['reason']}"
    return f"  last drill{where}{began}: {said}; last passed: {passed}"


def _acknowledgement(peer: dict[str, Any]) -> str:
    """What flushes wait for at a peer, and whether they do now."""
    ack = peer.get("ack") or "-"
    return f"{ack}, out of sync" if peer.get("in_sync") is False else ack
