"""Virtual addresses: one of each kind per key, for ever, and none twice."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import SeededEntropy
from geomirror.errors import RefusedError
from geomirror.limits import PRODUCTION
from geomirror.node.network_view import network_object, own_object
from geomirror.tunnel.addresses import (
    HostRoute,
    dns_name,
    find_overlaps,
    has_same_ipv6,
    ipv6_address,
    ipv6_range,
    parse_routes,
)
from geomirror.tunnel.authority import choose_address
from geomirror.tunnel.enrollment import Desk, Join
from geomirror.tunnel.host_routes_io import host_routes
from geomirror.tunnel.identity import NodeIdentity
from geomirror.tunnel.network_io import load_network
from geomirror.tunnel.token import TokenBook, parse_token
from tests.tunnel.network_kit import ShiftedClock, found, join_as, pair, token_of

HASHES = st.binary(min_size=32, max_size=32)
IDS = st.binary(min_size=16, max_size=16).map(bytes.hex)


@given(HASHES, IDS)
def test_an_ipv6_address_is_in_the_networks_unique_local_range(authority, node_id):
    network = ipv6_range(authority)
    assert network.prefixlen == 48
    assert network.subnet_of(ipaddress.IPv6Network("fd00::/8"))
    address = ipaddress.IPv6Address(ipv6_address(authority, node_id))
    assert address in network
    assert address.packed[6:].hex() == node_id[:20]


@given(HASHES, HASHES)
def test_two_networks_have_two_ranges(one, other):
    assert (ipv6_range(one) == ipv6_range(other)) == (one == other)


def test_an_ipv6_address_never_changes_with_a_version():
    assert ipv6_address(bytes(32), "00112233445566778899aabbccddeeff") == (
        "fd1d:c7dd:514a:11:2233:4455:6677:8899"
    )


async def test_addresses_are_the_same_for_everybody_and_after_a_restart(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        shown = {node["node"]: node for node in network_object(east.state)["nodes"]}
        assert network_object(west.state)["nodes"] == list(shown.values())
        assert len({node["address"] for node in shown.values()}) == 2
        assert len({node["address_ipv6"] for node in shown.values()}) == 2
        assert shown["west-1"]["dns_name"] == "west-1.acme.internal"
        assert own_object(west.state)["address_ipv6"] == shown["west-1"]["address_ipv6"]
        assert west.state.claims.address == shown["west-1"]["address"]
        again = network_object(load_network(west.state.data_dir))
        assert again == network_object(west.state)
        network = ipaddress.IPv6Network(again["range_ipv6"])
        assert all(ipaddress.IPv6Address(n["address_ipv6"]) in network for n in shown.values())


async def test_a_key_with_the_ipv6_address_of_another_is_not_admitted(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, _):
        key = NodeIdentity.create(SeededEntropy("twin"))
        known = east.state.membership.find("west-1")
        assert known is not None
        twin = msgspec.structs.replace(known, node_id=key.node_id[:20] + "0" * 12, name="elder")
        assert has_same_ipv6(key.node_id, [known, twin]) is twin
        assert has_same_ipv6(known.node_id, [known, twin]) is None
        text = token_of(east, "young")
        book = TokenBook.from_json(east.state.tokens_path.read_bytes())
        desk = Desk(
            east.state.require_authority(), book, east.state.membership, "10.1.0.0/16", PRODUCTION
        )
        east.state.membership._members[twin.node_id] = (twin, None)  # type: ignore[assignment]
        token = parse_token(text, PRODUCTION)
        request = Join(
            token_id=token.token_id,
            secret=token.secret.reveal(),
            request=key.request_pem(),
            node=None,
            endpoints=[],
        )
        with pytest.raises(RefusedError, match='IPv6 address of "elder"'):
            desk.join(
                request,
                observed_host="192.0.2.9",
                wall_ns=east.clock.wall_ns(),
                entropy=east.entropy,
            )


def test_a_full_range_is_said_and_the_last_address_is_still_given():
    key = NodeIdentity.create(SeededEntropy("one")).public_key
    hosts = {str(host) for host in ipaddress.IPv4Network("10.77.0.0/24").hosts()}
    last = hosts.pop()
    assert choose_address(key, "10.77.0.0/24", hosts) == last
    with pytest.raises(RefusedError, match=r"no virtual address is free in 10\.77\.0\.0/24"):
        choose_address(key, "10.77.0.0/24", hosts | {last})


async def test_joiners_never_share_an_address_even_in_a_small_range(tmp_path: Path) -> None:
    clock = ShiftedClock()
    east = found(tmp_path / "east", clock)
    east.state.range = "10.77.9.0/29"  # six hosts; no operator may choose it
    await east.start()
    try:
        for number in range(4):
            name = f"n-{number}"
            await join_as(tmp_path / name, token_of(east, name), clock)
    finally:
        await east.stop()
    members = load_network(east.state.data_dir).membership.active()
    assert len({member.address for member in members}) == 5


def test_a_nodes_name_in_the_network():
    assert dns_name("east-1", "acme") == "east-1.acme.internal"


ROUTES = """Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	0102A8C0	0003	0	0	0	00000000	0	0	0
eth0	0002A8C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
tun9	0000000A	00000000	0001	0	0	0	000000FF	0	0	0
gone
bad	zz	00000000	0001	0	0	0	00FFFFFF	0	0	0
"""


def test_the_kernels_table_is_read():
    assert [str(route.destination) for route in parse_routes(ROUTES)] == [
        "0.0.0.0/0",
        "192.168.2.0/24",
        "10.0.0.0/8",
    ]
    assert parse_routes("") == []
    assert isinstance(host_routes(), list)
    assert host_routes(Path("/nowhere")) == []


def route(text: str) -> HostRoute:
    return HostRoute(ipaddress.IPv4Network(text), "eth0")


@pytest.mark.parametrize(
    ("cidr", "inside", "wider"),
    [
        ("10.203.0.0/16", [], ["10.0.0.0/8 on eth0"]),
        ("192.168.0.0/16", ["192.168.2.0/24 on eth0"], []),
        ("192.168.2.0/24", ["192.168.2.0/24 on eth0"], []),
        ("172.20.0.0/16", [], []),
    ],
)
def test_what_of_a_host_is_in_the_way(cidr, inside, wider):
    halves = [route("0.0.0.0/1"), route("128.0.0.0/1")]
    found = find_overlaps(cidr, [*halves, *parse_routes(ROUTES.replace("tun9", "eth0"))])
    assert [str(overlap) for overlap in found if overlap.is_inside] == inside
    assert [str(overlap) for overlap in found if not overlap.is_inside] == wider
