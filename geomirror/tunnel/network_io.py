"""What an operator does with a network, as functions; the commands and the daemon call these."""

from __future__ import annotations

import socket
from pathlib import Path

from geomirror.environment import Clock, Entropy
from geomirror.limits import PRODUCTION, Limits
from geomirror.tunnel.authority import DEFAULT_RANGE, Authority, check_range, choose_address
from geomirror.tunnel.authority_io import (
    create_token,
    list_tokens,
    rename_node,
    revoke_node,
    revoke_token,
    set_endpoints,
)
from geomirror.tunnel.certificates import ROLE_AUTHORITY, ROLE_MEMBER, load_certificate
from geomirror.tunnel.enrollment import Desk, Enrolled
from geomirror.tunnel.identity import NodeIdentity
from geomirror.tunnel.join_io import join, own_endpoints, renew_by_join
from geomirror.tunnel.membership import Member, Membership
from geomirror.tunnel.names import check_name, propose_name, split_endpoint
from geomirror.tunnel.network_state_io import (
    NetworkState,
    check_unused,
    keep_network,
    load_network,
)
from geomirror.tunnel.token import TokenBook

__all__ = [
    "DEFAULT_LISTEN",
    "NetworkState",
    "create_network",
    "create_token",
    "join",
    "list_tokens",
    "load_network",
    "rename_node",
    "renew_by_join",
    "revoke_node",
    "revoke_token",
    "set_endpoints",
]

DEFAULT_LISTEN = "0.0.0.0:7701"
"""Where the first node listens unless told otherwise: others must reach it to join."""


def create_network(
    data_dir: Path,
    *,
    network: str,
    site: str,
    node: str | None,
    listen: str | None,
    cidr: str | None,
    clock: Clock,
    entropy: Entropy,
    limits: Limits = PRODUCTION,
) -> NetworkState:
    """Create a network with this node as its authority and first member.

    :param node: None makes a name of the host name.
    :param listen: None is `DEFAULT_LISTEN`.
    :param cidr: range of virtual addresses; None is `authority.DEFAULT_RANGE`.
    :raises RefusedError: the data directory belongs to a network already.
    :raises ConfigError: a name, the endpoint or the range is not acceptable.
    """
    check_unused(data_dir)
    check_name(network, "network")
    check_name(site, "site")
    name = propose_name(socket.gethostname()) if node is None else check_name(node, "node")
    listen = listen or DEFAULT_LISTEN
    endpoints = own_endpoints(listen, _main_address(split_endpoint(listen)[0]))
    addresses = check_range(cidr or DEFAULT_RANGE)
    authority = Authority.create(network, clock.wall_ns(), entropy)
    identity = NodeIdentity.create(entropy)
    founder = Member(
        network=network,
        node_id=identity.node_id,
        name=name,
        site=site,
        roles=(ROLE_AUTHORITY, ROLE_MEMBER),
        endpoints=endpoints,
        address=choose_address(identity.public_key, addresses, ()),
        serial="",
        version=1,
    )
    desk = Desk(
        authority, TokenBook(), Membership(network, authority.public_key, limits), addresses, limits
    )
    welcome = desk.issue_to(identity.public_key, founder, clock.wall_ns(), entropy)
    certificate = load_certificate(welcome.certificate.encode("ascii"))
    enrolled = Enrolled(network, authority.certificate, certificate, addresses, desk.membership)
    return keep_network(
        data_dir, enrolled, identity, listen=listen, authority=authority, limits=limits
    )


def _main_address(host: str) -> str:
    """The address that this machine would use towards the Internet; sends nothing."""
    family, target = (
        (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return "::1" if ":" in host else "127.0.0.1"
        found: str = probe.getsockname()[0]
        return found
