"""From whatever is on a host, a plan makes what should be, with the least, and touches no other."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import LinkError
from geomirror.tunnel.membership import Member
from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_actual import (
    Actual,
    Route,
    only_ours,
    parse_addresses,
    parse_rules,
    parse_wg_dump,
)
from geomirror.tunnel.wireguard_book import TunnelBook
from geomirror.tunnel.wireguard_desired import (
    Desired,
    desired_tunnels,
    interface_names,
    interface_tag,
    usable_host,
)
from geomirror.tunnel.wireguard_keys import key_text, read_record
from geomirror.tunnel.wireguard_plan import Remove, Run, Start, plan
from tests.tunnel.tunnel_world import Device, World

AUTHORITY = bytes(range(32))
WALL_S = 1_800_000_000
DAY_S = 86_400
CIDR = "10.77.0.0/16"


def member(number: int) -> Member:
    return Member(
        network="acme",
        node_id=f"{number:02x}" * 16,
        name=f"n-{number}",
        site="s",
        roles=("member",),
        endpoints=(),
        address=f"10.77.0.{number + 1}",
        serial="1",
        version=number,
    )


OWN = member(0)
TAG = interface_tag(AUTHORITY, OWN.node_id)


def book_with(numbers: list[int], wall_s: int = WALL_S) -> TunnelBook:
    book = TunnelBook.create(SeededEntropy("own"))
    for number in range(1, 6):
        # All have their ports, whoever has told a key already.
        book.own_record(member(number).node_id, 7710, SeededEntropy(f"share {number}"))
    for number in numbers:
        other = TunnelBook.create(SeededEntropy(f"peer {number}"))
        entropy = SeededEntropy(f"share {number}")
        record = other.own_record(OWN.node_id, 7710, entropy)
        book.learn(member(number).node_id, record, wall_s * SECOND)
    return book


def desired(
    numbers: list[int],
    *,
    has_ipv6: bool = True,
    mtu: int = 1280,
    hosts: dict[int, str] | None = None,
    book: TunnelBook | None = None,
    wall_s: int = WALL_S,
) -> Desired:
    known = dict.fromkeys(numbers, "192.0.2.7") if hosts is None else hosts
    return desired_tunnels(
        own_id=OWN.node_id,
        members=[OWN, *(member(number) for number in numbers)],
        authority_hash=AUTHORITY,
        cidr=CIDR,
        book=book or book_with(numbers),
        hosts={member(number).node_id: host for number, host in known.items()},
        has_ipv6=has_ipv6,
        mtu=mtu,
        wall_ns=wall_s * SECOND,
    )


ALL_RANGES = desired([]).ranges
NOTHING = Desired(TAG, desired([]).private_key)


def converge(world: World, wanted: Desired, owned: set[str], wall_s: int = WALL_S) -> list[Any]:
    """Do the plan, as the daemon does; then there must be nothing to do."""
    steps = plan(wanted, world.actual(TAG, ALL_RANGES), owned, wall_s)
    owned |= set(wanted.addresses) - world.addresses
    for step in steps:
        world.do(step)
    assert plan(wanted, world.actual(TAG, ALL_RANGES), owned, wall_s) == []
    return steps


SETS = st.lists(st.integers(1, 5), unique=True, max_size=4)
KEYS = st.binary(min_size=32, max_size=32).map(key_text)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, set[str]]:
    """What may be there: a part of some plan, things of ours that are wrong, things of others."""
    world, owned = World(), set[str]()
    for _ in range(draw(st.integers(0, 2))):
        wanted = desired(
            draw(SETS), has_ipv6=draw(st.booleans()), mtu=draw(st.integers(1280, 9000))
        )
        steps = plan(wanted, world.actual(TAG, ALL_RANGES), owned, WALL_S)
        owned |= set(wanted.addresses) - world.addresses
        for step in steps[: draw(st.integers(0, len(steps)))]:
            world.do(step)
    for name, device in world.devices.items():
        if draw(st.booleans()):
            device.answers = draw(st.booleans())
            device.is_up = draw(st.booleans())
            device.port = draw(st.integers(0, 65535))
            for fields in device.peers.values():
                field = draw(st.sampled_from([0, 2, 6]))
                fields[field] = ["(none)", "", "10.77.0.0/16", "", "", "", "off"][field]
            for key in draw(st.lists(KEYS, max_size=2)):
                endpoint, handshake = draw(st.sampled_from(["(none)", "192.0.2.9:1"])), "0"
                device.peers[key] = ["(none)", endpoint, "(none)", handshake, "0", "0", "off"]
        if draw(st.booleans()):
            kept = draw(st.integers(0, 3))
            found = [r for r in world.routes if r.get("dev") == name]
            world.routes = [r for r in world.routes if r not in found[kept:]]
    for rule in [r for r in world.rules if draw(st.booleans())]:
        world.rules.append(dict(rule))
    return world, owned


def add_foreign(world: World) -> None:
    """As similar to ours as it can be without being ours."""
    world.devices |= {"gm0": Device(), "wg0": Device(True, 1420), "gm000000-000000": Device()}
    world.addresses |= {"10.99.0.1/32", "10.77.0.1/16", "fd99::1/128"}
    mine = {"table": "7100", "protocol": "201"}
    world.routes += [
        {"type": "unreachable", "dst": "10.99.0.0/16", **mine},
        {"type": "unreachable", "dst": "10.0.0.0/8", **mine},
        {"dst": "10.77.0.77", "dev": "wg0", "table": "7100", "protocol": "static"},
        {"dst": "10.77.0.0/16", "dev": "wg0", "table": "main", "protocol": "201"},
        {"dst": "fd99::/48", "dev": "wg0", **mine},
    ]
    rule = {"priority": 7100, "src": "all", "table": "7100", "protocol": "201"}
    world.rules += [
        {**rule, "dst": "10.99.0.0", "dstlen": 16},
        {**rule, "dst": "10.77.0.0", "dstlen": 16, "priority": 7099},
        {**rule, "dst": "10.77.0.0", "dstlen": 16, "table": "main"},
        {"priority": 32766, "src": "all", "table": "main"},
    ]


def foreign_part(world: World) -> Any:
    alone = World()
    add_foreign(alone)
    return (
        {n: d for n, d in world.devices.items() if n in alone.devices},
        world.addresses & alone.addresses,
        [r for r in world.routes if r in alone.routes],
        [r for r in world.rules if r in alone.rules],
    )


@given(worlds(), SETS, st.booleans(), st.integers(1280, 9000))
def test_any_host_becomes_as_desired_and_nothing_of_others_changes(start, numbers, ipv6, mtu):
    world, owned = start
    add_foreign(world)
    before = foreign_part(world.copy())
    wanted = desired(numbers, has_ipv6=ipv6, mtu=mtu)
    converge(world, wanted, owned)
    assert foreign_part(world) == before
    clean = World()
    add_foreign(clean)
    converge(clean, wanted, set())
    assert world.devices == clean.devices
    assert world.addresses == clean.addresses
    assert sorted(map(str, world.routes)) == sorted(map(str, clean.routes))
    assert sorted(map(str, world.rules)) == sorted(map(str, clean.rules))


@given(worlds())
def test_when_all_is_taken_away_only_the_others_are_left(start):
    world, owned = start
    add_foreign(world)
    converge(world, NOTHING, owned)
    alone = World()
    add_foreign(alone)
    assert world.devices == alone.devices
    assert world.addresses == alone.addresses
    assert sorted(map(str, world.routes)) == sorted(map(str, alone.routes))
    assert sorted(map(str, world.rules)) == sorted(map(str, alone.rules))


@given(SETS, st.data())
def test_a_crash_after_any_step_changes_nothing_in_the_end(numbers, data):
    wanted, world, owned = desired(numbers), World(), set[str]()
    steps = plan(wanted, world.actual(TAG, ALL_RANGES), owned, WALL_S)
    owned |= set(wanted.addresses)
    for step in steps[: data.draw(st.integers(0, len(steps)))]:
        world.do(step)
    converge(world, wanted, owned)
    whole = World()
    converge(whole, wanted, set())
    assert world.devices == whole.devices
    assert world.addresses == whole.addresses
    assert sorted(map(str, world.routes)) == sorted(map(str, whole.routes))


def settled(numbers: list[int]) -> tuple[World, set[str]]:
    world, owned = World(), set[str]()
    converge(world, desired(numbers), owned)
    return world, owned


def test_what_concerns_one_neighbour_touches_no_other():
    world, owned = settled([1, 2])
    steps = converge(world, desired([1, 2, 3]), owned)
    new = next(t for t in desired([1, 2, 3]).tunnels if t.node == "n-3")
    assert steps[0] == Start(new.interface)
    assert {step.interface for step in steps} == {new.interface}
    assert converge(world, desired([2, 3]), owned)[-1] == Remove(
        next(t for t in desired([1]).tunnels).interface
    )


def test_another_node_of_the_network_on_this_host_is_seen_and_left_alone():
    world, owned = settled([1, 2])
    other = interface_tag(AUTHORITY, member(1).node_id)
    before = world.copy()
    seen = world.actual(other, ALL_RANGES)
    assert seen.other_device is not None
    assert plan(Desired(other, NOTHING.private_key), seen, set(), WALL_S) == []
    assert world == before
    assert world.actual(TAG, ALL_RANGES).other_device is None
    assert converge(world, NOTHING, owned)


def test_a_wider_route_of_another_network_is_not_ours():
    routes = {Route("10.0.0.0/8"), Route("10.0.0.0/16"), Route("10.0.3.4/32", f"{TAG}1")}
    found = only_ours(Actual(routes=routes, rules=["10.0.0.0/8"]), TAG, ("10.0.0.0/16",))
    assert found.routes == routes - {Route("10.0.0.0/8")}
    assert found.rules == []


def test_what_is_the_own_address_of_somebody_else_stays_his():
    world, owned = World(), set[str]()
    world.addresses.add("10.77.0.1/32")
    converge(world, desired([1]), owned)
    assert "10.77.0.1/32" not in owned
    converge(world, NOTHING, owned)
    assert world.addresses == {"127.0.0.1/8", "::1/128", "10.77.0.1/32"}


def peer_of(world: World) -> list[str]:
    (device,) = world.devices.values()
    (fields,) = device.peers.values()
    return fields


@pytest.mark.parametrize("field", [0, 2, 6])
def test_each_setting_of_a_neighbour_is_put_right_by_one_command(field):
    world, owned = settled([1])
    good = list(peer_of(world))
    peer_of(world)[field] = ["(none)", "", "10.77.0.0/16", "", "", "", "off"][field]
    (step,) = converge(world, desired([1]), owned)
    assert step.arguments[:2] == ("wg", "syncconf")
    assert peer_of(world) == good


@pytest.mark.parametrize("name", ["private_key", "port", "peers", "mtu", "is_up"])
def test_each_setting_of_an_interface_is_put_right_by_one_command(name):
    world, owned = settled([1])
    good = world.copy()
    (device,) = world.devices.values()
    wrong = {"private_key": "(none)", "port": 1, "peers": {}, "mtu": 1500, "is_up": False}
    setattr(device, name, wrong[name])
    (step,) = converge(world, desired([1]), owned)
    assert step.interface is not None
    assert world == good


def test_a_neighbour_that_moved_is_left_where_it_was_heard():
    world, owned = settled([1])
    peer_of(world)[1:4] = ["198.51.100.4:999", peer_of(world)[2], str(WALL_S - 60)]
    assert converge(world, desired([1]), owned) == []
    # Another setting changes; the session and its endpoint go on.
    converge(world, desired([1], mtu=1400), owned)
    peer_of(world)[0] = key_text(bytes(32))
    converge(world, desired([1], mtu=1400), owned)
    assert peer_of(world)[1] == "198.51.100.4:999"
    # The session is over: where its link is counts again.
    later = WALL_S + 600
    wanted = desired([1], mtu=1400, hosts={1: "203.0.113.5"}, wall_s=later)
    steps = converge(world, wanted, owned, later)
    assert [step.arguments[0] for step in steps if isinstance(step, Run)] == ["wg"]
    assert peer_of(world)[1] == "203.0.113.5:7710"


def test_a_neighbour_that_cannot_be_dialled_is_waited_for():
    world, owned = World(), set[str]()
    converge(world, desired([1], hosts={}), owned)
    assert peer_of(world)[1] == "(none)"
    assert world.devices


def test_a_process_that_does_not_answer_is_replaced_and_its_routes_come_again():
    world, owned = settled([1])
    (name,) = world.devices
    world.devices[name].answers = False
    steps = converge(world, desired([1]), owned)
    assert steps[:2] == [Remove(name), Start(name)]
    assert sum(route.get("dev") == name for route in world.routes) == 2


def test_both_ends_compute_the_same_key_and_allow_only_the_others_addresses():
    here, there = TunnelBook.create(SeededEntropy("a")), TunnelBook.create(SeededEntropy("b"))
    a, b = member(1), member(2)
    for _ in range(2):  # a second exchange changes nothing
        to_b = here.own_record(b.node_id, 7710, SeededEntropy("x"))
        to_a = there.own_record(a.node_id, 7710, SeededEntropy("y"))
        here.learn(b.node_id, read_record(msgspec.to_builtins(to_a)), WALL_S * SECOND)
        there.learn(a.node_id, read_record(msgspec.to_builtins(to_b)), WALL_S * SECOND)
    found = [
        desired_tunnels(
            own_id=own.node_id,
            members=[a, b],
            authority_hash=AUTHORITY,
            cidr=CIDR,
            book=book,
            hosts={},
            has_ipv6=True,
            mtu=1280,
            wall_ns=WALL_S * SECOND,
        )
        for own, book in ((a, here), (b, there))
    ]
    (to_b,), (to_a,) = found[0].tunnels, found[1].tunnels
    assert to_b.pre_shared_key.reveal() == to_a.pre_shared_key.reveal()
    assert (to_b.public_key, to_a.public_key) == (there.public_key, here.public_key)
    assert to_b.allowed == found[1].addresses
    assert to_a.allowed == found[0].addresses
    assert found[0].tag != found[1].tag


def test_a_key_that_was_not_confirmed_for_a_day_is_not_used_any_more():
    book = book_with([1])
    assert desired([1], book=book, wall_s=WALL_S + DAY_S - 1).tunnels
    assert not desired([1], book=book, wall_s=WALL_S + DAY_S).tunnels


def test_a_node_that_is_no_member_any_more_has_no_tunnel():
    world, owned = settled([1, 2])
    book = book_with([1, 2])
    assert book.forget_all_but([OWN.node_id, member(2).node_id])
    assert not book.forget_all_but([OWN.node_id, member(2).node_id])
    wanted = desired([2], book=book)
    converge(world, wanted, owned)
    assert len(world.devices) == 1
    assert not any(route["dst"] == member(1).address for route in world.routes)


def test_secrets_are_in_standard_input_only():
    wanted = desired([1, 2])
    steps = plan(wanted, World().actual(TAG, ALL_RANGES), set(), WALL_S)
    hidden = [wanted.private_key, *(t.pre_shared_key for t in wanted.tunnels)]
    shown = repr(steps) + repr(wanted) + repr([s.arguments for s in steps if isinstance(s, Run)])
    for secret in hidden:
        assert key_text(secret.reveal()) not in shown
        assert secret.reveal().hex() not in shown
    given = [s.stdin.reveal().decode() for s in steps if isinstance(s, Run) and s.stdin]
    assert all(key_text(wanted.private_key.reveal()) in text for text in given)
    assert max(len(text) for text in given) < 4096  # fits a pipe at once


@given(st.lists(st.binary(min_size=16, max_size=16).map(bytes.hex), unique=True, max_size=64))
def test_names_of_interfaces_fit_the_kernel_and_are_all_different(node_ids):
    names = interface_names(TAG, node_ids)
    assert set(names) == set(node_ids)
    assert len(set(names.values())) == len(node_ids)
    assert all(len(name) <= 15 and name.startswith(TAG) for name in names.values())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("10.77.3.4", None),
        ("::ffff:10.77.3.4", None),
        (str(ALL_RANGES[1]).replace("/48", "7"), None),
        ("0.0.0.0", None),
        ("224.0.0.1", None),
        ("west.example", None),
    ],
)
def test_a_tunnel_does_not_end_inside_of_the_overlay(text, found):
    assert usable_host(text, ALL_RANGES) == found


def test_strange_output_of_tools_is_an_error_that_repeats_nothing():
    secret = key_text(bytes(range(32)))
    for text in ("", "x", f"{secret}\tx\tport\toff", f"{secret}\tx\t1\toff\nshort\tline"):
        with pytest.raises(LinkError) as caught:
            parse_wg_dump(text)
        assert secret not in str(caught.value)
    with pytest.raises(LinkError):
        parse_addresses(b"[", TAG)
    assert parse_addresses(b"", TAG) == ({}, set())
    rules = [{"priority": 7100, "src": "all", "table": "7100"}, {"priority": 7100, "dst": "all"}]
    assert parse_rules(json.dumps(rules).encode()) == []
    assert isinstance(desired([1]).private_key, Secret)
