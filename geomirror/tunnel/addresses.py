"""Virtual addresses: which ones a node has, its name, and what on a host is in their way.

    IPv4   in the network's range, chosen by the authority from the key's hash, in the certificate
    IPv6   fdAA:AAAA:AAAA : NNNN:NNNN:NNNN:NNNN:NNNN
           A: authority's key hash, 40 bits   N: node id, its first 80 bits

The IPv6 address is nothing but the two keys: whoever knows a member's key knows it, nobody can
claim another one, and no entry or certificate has to carry it.

Not done here: who gets which IPv4 address (`authority.choose_address`), and asking the host.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from geomirror.tunnel.membership import Member

IPV6_PREFIX_LENGTH = 48
"""A site prefix of RFC 4193."""
IPV6_HOST_DIGITS = 20
"""Hex digits of the node id in an address: 80 bits, which a second key does not hit by trying."""
DOMAIN = "internal"
"""Top-level domain that ICANN has set aside for private use."""
_DEFAULT_ROUTE_PREFIX_MAX = 1
"""0.0.0.0/0, and its halves, which some VPNs use instead: everybody has one."""


def ipv6_range(authority_hash: bytes) -> ipaddress.IPv6Network:
    """The network's IPv6 range: a unique local /48 made of the hash of its authority's key."""
    digest = hashlib.sha256(b"geomirror ipv6 range v1\0" + authority_hash).digest()
    prefix = b"\xfd" + digest[:5] + bytes(10)
    return ipaddress.IPv6Network((prefix, IPV6_PREFIX_LENGTH))


def ipv6_address(authority_hash: bytes, node_id: str) -> str:
    """The IPv6 address of a node: the network's prefix and the first 80 bits of its id."""
    prefix = ipv6_range(authority_hash).network_address.packed[:6]
    return str(ipaddress.IPv6Address(prefix + bytes.fromhex(node_id[:IPV6_HOST_DIGITS])))


def has_same_ipv6(node_id: str, members: Sequence[Member]) -> Member | None:
    """Another member whose key makes the same IPv6 address: never by chance."""
    host = node_id[:IPV6_HOST_DIGITS]
    others = (member for member in members if member.node_id != node_id)
    return next((member for member in others if member.node_id.startswith(host)), None)


def dns_name(node: str, network: str) -> str:
    """`NODE.NETWORK.internal`, as it is written; resolvers do not tell upper from lower case."""
    return f"{node}.{network}.{DOMAIN}"


@dataclass(frozen=True)
class HostRoute:
    """A network that this host has a route to, its own addresses' networks included."""

    destination: ipaddress.IPv4Network
    device: str


@dataclass(frozen=True)
class Overlap:
    """A route of the host that shares addresses with the network's range."""

    route: HostRoute
    is_inside: bool
    """It lies in the range and would win over the overlay, or the overlay would take its addresses
    away. Else it is wider: the range is an exception from it, and the rest goes on as before."""

    def __str__(self) -> str:
        return f"{self.route.destination} on {self.route.device}"


def parse_routes(text: str) -> list[HostRoute]:
    """Read `/proc/net/route`; lines that mean nothing are left out."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        try:
            # Printed as numbers of the host's order, which is little-endian wherever this runs.
            target, mask = (int(fields[i], 16).to_bytes(4, "little") for i in (1, 7))
            prefix = int.from_bytes(mask, "big").bit_count()
            destination = ipaddress.IPv4Network((target, prefix))
        except (ValueError, IndexError, OverflowError):
            continue
        found.append(HostRoute(destination, fields[0]))
    return found


def find_overlaps(cidr: str, routes: Sequence[HostRoute]) -> list[Overlap]:
    """What of the host's routes touches the range `cidr`; those inside come first."""
    own = ipaddress.IPv4Network(cidr)
    found = [
        Overlap(route, route.destination.subnet_of(own))
        for route in routes
        if route.destination.overlaps(own)
        and route.destination.prefixlen > _DEFAULT_ROUTE_PREFIX_MAX
    ]
    return sorted(found, key=lambda overlap: not overlap.is_inside)
