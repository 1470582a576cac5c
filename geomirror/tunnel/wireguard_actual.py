"""What is on the host of a node's tunnels, read from what `wg` and `ip` print.

Only what carries our marks gets in: interfaces by their tag, routes by table and protocol, rules by
priority and protocol, and of the addresses on the loopback device the ones that are asked for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from geomirror.errors import AuthError, LinkError
from geomirror.tunnel.decoding import decode_json
from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_keys import key_bytes

TABLE = 7100
"""Our routing table, and the priority of the rules that lead there: before the main one (32766)."""
PROTOCOL = 201
"""Mark of our routes and rules; no routing daemon has it in iproute2's list."""


@dataclass(frozen=True)
class PeerState:
    """The neighbour of an interface, as WireGuard has it."""

    public_key: str
    pre_shared_key: Secret
    endpoint: str | None
    allowed: frozenset[str]
    handshake_s: int
    """Unix seconds of the last one; 0: never."""
    bytes_received: int
    bytes_sent: int
    keepalive_s: int


@dataclass(frozen=True)
class InterfaceState:
    """One of our interfaces."""

    is_up: bool
    mtu: int
    private_key: Secret | None = None
    """None: WireGuard does not answer for it."""
    port: int = 0
    peers: tuple[PeerState, ...] = ()


@dataclass(frozen=True)
class Route:
    """A route of our table; without a device it says "unreachable"."""

    destination: str
    device: str | None = None
    source: str | None = None


@dataclass
class Actual:
    """Everything of ours on the host."""

    interfaces: dict[str, InterfaceState] = field(default_factory=dict)
    addresses: set[str] = field(default_factory=set)
    """All on the loopback device, with prefix lengths, ours or not."""
    routes: set[Route] = field(default_factory=set)
    rules: list[str] = field(default_factory=list)
    """Their targets; one may be there twice."""
    other_device: str | None = None
    """Of another node of the same network: then routes and rules are its, and not in here."""


def parse_wg_dump(text: str) -> tuple[Secret, int, tuple[PeerState, ...]]:
    """Read `wg show IF dump`: private key, port and peers.

    :raises LinkError: it is something else; nothing of it is repeated, it holds keys.
    """
    try:
        head, *rest = (line.split("\t") for line in text.splitlines())
        private = _secret(head[0])
        peers = tuple(_peer(fields) for fields in rest)
        return private, int(head[2]), peers
    except (ValueError, IndexError, AuthError):
        raise LinkError("wg printed something that cannot be read") from None


def _peer(fields: list[str]) -> PeerState:
    key, shared, endpoint, allowed, handshake, received, sent, keepalive = fields
    return PeerState(
        public_key=key,
        pre_shared_key=_secret(shared),
        endpoint=None if endpoint == "(none)" else endpoint,
        allowed=frozenset() if allowed == "(none)" else frozenset(allowed.split(",")),
        handshake_s=int(handshake),
        bytes_received=int(received),
        bytes_sent=int(sent),
        keepalive_s=0 if keepalive == "off" else int(keepalive),
    )


def _secret(text: str) -> Secret:
    return Secret(b"" if text == "(none)" else key_bytes(text))


def parse_addresses(data: bytes, tag: str) -> tuple[dict[str, InterfaceState], set[str]]:
    """Read `ip -j address show`: our interfaces (by tag), and the addresses on lo."""
    interfaces: dict[str, InterfaceState] = {}
    addresses: set[str] = set()
    for item in _objects(data):
        name = str(item.get("ifname", ""))
        if name.startswith(tag):
            flags = item.get("flags") or []
            interfaces[name] = InterfaceState("UP" in flags, int(item.get("mtu") or 0))
        if name == "lo":
            for info in item.get("addr_info") or []:
                if "local" in info:
                    addresses.add(f"{info['local']}/{info.get('prefixlen')}")
    return interfaces, addresses


def parse_table(data: bytes) -> set[Route]:
    """Read `ip -j route show table 7100` (or `ip -6 …`): the routes that are ours."""
    found = set()
    for item in _objects(data):
        if str(item.get("protocol")) != str(PROTOCOL):
            continue
        destination = _cidr(str(item.get("dst", "")))
        if item.get("type") == "unreachable":
            found.add(Route(destination))
        else:
            source = item.get("prefsrc")
            found.add(Route(destination, str(item.get("dev", "")), source and str(source)))
    return found


def parse_rules(data: bytes) -> list[str]:
    """Read `ip -j rule show` (or `ip -6 …`): targets of the rules that are ours."""
    found = []
    for item in _objects(data):
        is_ours = (
            item.get("priority") == TABLE
            and str(item.get("table")) == str(TABLE)
            and str(item.get("protocol", PROTOCOL)) == str(PROTOCOL)
        )
        if is_ours and "dst" in item:
            length = f"/{item['dstlen']}" if "dstlen" in item else ""
            found.append(_cidr(f"{item['dst']}{length}"))
    return found


def only_ours(actual: Actual, tag: str, ranges: Sequence[str]) -> Actual:
    """Without routes and rules of other nodes that run on this host, too.

    Those of other networks lead to other ranges. Two nodes of one network cannot both route its
    ranges: who finds routes to interfaces with another tag leaves all of them alone.
    """
    networks = [ipaddress.ip_network(cidr) for cidr in ranges]

    def is_inside(cidr: str) -> bool:
        found = ipaddress.ip_network(cidr)
        return any(
            found.version == net.version
            and found.network_address in net
            and found.prefixlen >= net.prefixlen
            for net in networks
        )

    routes = {route for route in actual.routes if is_inside(route.destination)}
    devices = sorted(route.device for route in routes if route.device)
    foreign = next((device for device in devices if not device.startswith(tag)), None)
    if foreign is not None:
        return Actual(actual.interfaces, actual.addresses, other_device=foreign)
    rules = [target for target in actual.rules if is_inside(target)]
    return Actual(actual.interfaces, actual.addresses, routes, rules)


def _cidr(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        # "default" and the like: not one of ours, and it must not look like one.
        return "0.0.0.0/0"


def _objects(data: bytes) -> list[dict[str, Any]]:
    unreadable = LinkError("ip printed something that is not JSON")
    found: list[dict[str, Any]] = decode_json(data or b"[]", list[dict[str, Any]], unreadable)
    return found
