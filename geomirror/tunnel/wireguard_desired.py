"""How a node's tunnels should be: interfaces, addresses, routes, made of members and keys.

    gmTTTTTT-PPPPPP   an interface for each neighbour; T: this node in its network, P: neighbour
      peer            its key, both shares, endpoint; allowed addresses: its own two and no others
    lo                this node's two addresses
    table 7100        each neighbour's addresses → its interface; the ranges → unreachable
    rule 7100         to the ranges: that table

Invariant: names carry a tag made of both keys, so that what is ours is known by its name, whatever
was forgotten. What cannot be marked by a name (addresses on lo) is in the book before it is added.

An interface per neighbour, not one for all: nothing that concerns one neighbour (a kick, an MTU,
another endpoint) touches another one, each has counters of its own, and a path through a third node
will be a change of a kernel route, not of allowed addresses on both sides at the same instant.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from geomirror.tunnel.addresses import ipv6_address, ipv6_range
from geomirror.tunnel.membership import Member
from geomirror.tunnel.names import join_endpoint
from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_book import TunnelBook
from geomirror.tunnel.wireguard_keys import key_text, pre_shared_key

KEEPALIVE_S = 5
"""Both sides send: a restarted node initiates at once instead of after 15 s, and NATs that forget
UDP after 30 s (GCP) do not."""


@dataclass(frozen=True)
class Tunnel:
    """One neighbour's interface as it should be."""

    node: str
    interface: str
    port: int
    public_key: str
    pre_shared_key: Secret
    endpoint: str | None
    """`IP:PORT`; None: only the neighbour can begin."""
    allowed: tuple[str, ...]
    """CIDR of its addresses."""

    def to_config(self, private_key: Secret, endpoint: str | None) -> Secret:
        """What `wg syncconf` reads; secret."""
        lines = [
            "[Interface]",
            f"PrivateKey = {key_text(private_key.reveal())}",
            f"ListenPort = {self.port}",
            "[Peer]",
            f"PublicKey = {self.public_key}",
            f"PresharedKey = {key_text(self.pre_shared_key.reveal())}",
            f"AllowedIPs = {', '.join(self.allowed)}",
            f"PersistentKeepalive = {KEEPALIVE_S}",
        ]
        if endpoint is not None:
            lines.append(f"Endpoint = {endpoint}")
        return Secret("\n".join([*lines, ""]).encode("ascii"))


@dataclass(frozen=True)
class Desired:
    """Everything that should be on the host; without tunnels, addresses and ranges: nothing."""

    tag: str
    """First part of the names of all our interfaces."""
    private_key: Secret
    tunnels: tuple[Tunnel, ...] = ()
    addresses: tuple[str, ...] = ()
    """This node's, with their full prefix lengths."""
    ranges: tuple[str, ...] = ()
    """The network's."""
    mtu: int = 1280


def interface_tag(authority_hash: bytes, node_id: str) -> str:
    """First part of the names of a node's interfaces; no other node of any network has it."""
    data = b"geomirror interface v1\0" + authority_hash + node_id.encode("ascii")
    return f"gm{hashlib.sha256(data).hexdigest()[:6]}-"


def interface_names(tag: str, node_ids: Iterable[str]) -> dict[str, str]:
    """Node id → name of its interface, at most 15 characters, each name once."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node_id in sorted(node_ids):
        for attempt in range(1 << 16):
            data = f"{node_id}/{attempt}".encode("ascii")
            name = tag + hashlib.sha256(data).hexdigest()[:6]
            if name not in taken:
                break
        names[node_id] = name
        taken.add(name)
    return names


def desired_tunnels(
    *,
    own_id: str,
    members: Iterable[Member],
    authority_hash: bytes,
    cidr: str,
    book: TunnelBook,
    hosts: Mapping[str, str],
    has_ipv6: bool,
    mtu: int,
    wall_ns: int,
) -> Desired:
    """What should be on the host now.

    :param members: active ones, this node among them.
    :param hosts: node id → IP address that it was reached at, without the port.
    :param has_ipv6: whether this host can have IPv6 addresses at all.
    """
    tag = interface_tag(authority_hash, own_id)
    known = {member.node_id: member for member in members}
    names = interface_names(tag, (node_id for node_id in known if node_id != own_id))

    def addresses_of(member: Member) -> tuple[str, ...]:
        ipv6 = f"{ipv6_address(authority_hash, member.node_id)}/128"
        return (f"{member.address}/32", ipv6) if has_ipv6 else (f"{member.address}/32",)

    tunnels = []
    for node_id, interface in names.items():
        neighbour = book.neighbours.get(node_id)
        if neighbour is None or not neighbour.is_usable(wall_ns):
            continue
        host = hosts.get(node_id)
        tunnels.append(
            Tunnel(
                node=known[node_id].name,
                interface=interface,
                port=neighbour.port,
                public_key=neighbour.public_key,
                pre_shared_key=pre_shared_key(
                    own_id, neighbour.share, node_id, neighbour.peer_share
                ),
                endpoint=join_endpoint(host, neighbour.peer_port) if host else None,
                allowed=addresses_of(known[node_id]),
            )
        )
    ranges = (cidr, str(ipv6_range(authority_hash))) if has_ipv6 else (cidr,)
    own = addresses_of(known[own_id])
    return Desired(tag, book.private_key, tuple(tunnels), own, ranges, mtu)


def usable_host(text: str, ranges: Iterable[str]) -> str | None:
    """An endpoint's host as an address outside of the overlay, or None.

    An endpoint inside of the ranges would send the tunnel's packets through the tunnel.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    networks = [ipaddress.ip_network(cidr) for cidr in ranges]
    if any(address.version == net.version and address in net for net in networks):
        return None
    return None if address.is_multicast or address.is_unspecified else str(address)
