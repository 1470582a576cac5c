"""The network as JSON: for the daemon's answers and for commands without a daemon."""

from __future__ import annotations

from typing import Any

from geomirror.node.rfc3339 import rfc3339
from geomirror.tunnel.addresses import dns_name, ipv6_address, ipv6_range
from geomirror.tunnel.membership import Member
from geomirror.tunnel.network_state_io import NetworkState


def network_object(state: NetworkState) -> dict[str, Any]:
    """`network show`"""
    return {
        "network": state.network,
        "range": state.range,
        "range_ipv6": str(ipv6_range(state.authority_hash)),
        "authority": state.authority_hash.hex(),
        "authority_nodes": state.authority_names(),
        "node": state.node,
        "site": state.site,
        "nodes": [node_object(state, member) for member in state.membership.active()],
        "revoked": revoked_objects(state),
    }


def revoked_objects(state: NetworkState) -> list[dict[str, Any]]:
    """Keys that are refused for ever, oldest first."""
    return [
        {
            "node": item.name,
            "node_id": item.node_id,
            "revoked_at": rfc3339(item.wall_ns),
            "has_left": item.is_left,
        }
        for item in state.membership.revocations.revoked
    ]


def node_object(state: NetworkState, member: Member) -> dict[str, Any]:
    """One node of `node list`"""
    return {
        "node": member.name,
        "node_id": member.node_id,
        "site": member.site,
        "roles": list(member.roles),
        **address_fields(state, member),
        "endpoints": list(member.endpoints),
    }


def address_fields(state: NetworkState, member: Member) -> dict[str, Any]:
    """Where a node is on the virtual network."""
    return {
        "address": member.address,
        "address_ipv6": ipv6_address(state.authority_hash, member.node_id),
        "dns_name": dns_name(member.name, state.network),
    }


def own_object(state: NetworkState) -> dict[str, Any]:
    """`node show`"""
    member = state.membership.by_id(state.identity.node_id)
    found: dict[str, Any] = {"node": state.node, "site": state.site}
    if member is not None:
        found = node_object(state, member)
    found["network"] = state.network
    found["listen"] = state.listen
    found["certificate_expires_at"] = state.certificate.not_valid_after_utc.isoformat()
    found["data_dir"] = str(state.data_dir)
    found["api_url"] = None
    return found
