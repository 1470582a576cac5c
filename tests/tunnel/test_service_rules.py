"""Who may reach what, whom to ask first, how many circuits there may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from geomirror.errors import InUseError, NotFoundError, RefusedError, UsageError
from geomirror.limits import PRODUCTION
from geomirror.tunnel.circuit_table import CircuitEntry, CircuitTable
from geomirror.tunnel.service_rules import Exposure, Forward, Holder, ServiceRules, in_order

LIMITS = replace(PRODUCTION, services_max=2)
LDAP = Exposure("ldap", "127.0.0.1", 389)


def test_what_is_not_exposed_is_reached_by_nobody() -> None:
    rules = ServiceRules(LIMITS)
    with pytest.raises(NotFoundError):
        rules.exposed_to("ldap", "key-1")
    rules = rules.with_exposure(LDAP)
    assert rules.exposed_to("ldap", "key-1") == LDAP
    assert rules.without_exposure("ldap").exposures == {}
    with pytest.raises(NotFoundError):
        rules.without_exposure("smb")


def test_a_list_of_keys_shuts_out_all_others_and_hides_the_name() -> None:
    rules = ServiceRules(LIMITS).with_exposure(replace_allow("key-1", "key-2"))
    assert rules.exposed_to("ldap", "key-2").port == 389
    with pytest.raises(RefusedError):
        rules.exposed_to("ldap", "key-3")
    assert (rules.names_for("key-1"), rules.names_for("key-3")) == (["ldap"], [])


def replace_allow(*keys: str) -> Exposure:
    return Exposure("ldap", "127.0.0.1", 389, keys)


@pytest.mark.parametrize(
    "exposure",
    [
        Exposure("", "127.0.0.1", 389),
        Exposure("a b", "127.0.0.1", 389),
        Exposure("a\nb", "127.0.0.1", 389),
        Exposure("x" * 33, "127.0.0.1", 389),
        Exposure("ldap", "127.0.0.1", 0),
        Exposure("ldap", "127.0.0.1", 65536),
        Exposure("ldap", "a b", 389),
        Exposure("ldap", "", 389),
    ],
)
def test_what_cannot_be_is_refused(exposure: Exposure) -> None:
    with pytest.raises(UsageError):
        ServiceRules(LIMITS).with_exposure(exposure)


def test_numbers_are_bounded_and_a_change_is_none() -> None:
    rules = ServiceRules(LIMITS)
    for name in ("a", "b", "b"):
        rules = rules.with_exposure(Exposure(name, "::1", 1))
        rules = rules.with_forward(Forward(name, "127.0.0.1", ord(name)))
    with pytest.raises(RefusedError):
        rules.with_exposure(Exposure("c", "::1", 1))
    with pytest.raises(RefusedError):
        rules.with_forward(Forward("c", "127.0.0.1", 3))


def test_a_port_leads_to_one_service() -> None:
    rules = ServiceRules(LIMITS).with_forward(Forward("ldap", "127.0.0.1", 3389))
    rules = rules.with_forward(Forward("ldap", "127.0.0.1", 3389, "key-1"))
    assert [each.node_id for each in rules.forwards.values()] == ["key-1"]
    with pytest.raises(InUseError, match="unforward ldap 3389"):
        rules.with_forward(Forward("smb", "127.0.0.1", 3389))
    with pytest.raises(NotFoundError):
        rules.forwards_of("ldap", 1)
    assert rules.without_forwards(rules.forwards_of("ldap", None)).forwards == {}


def test_the_nearest_that_is_connected_is_asked_first() -> None:
    holders = [
        Holder("far", "k1", True, 90),
        Holder("gone", "k2", False, 1),
        Holder("new", "k3", True, 0),
        Holder("near", "k4", True, 10),
    ]
    assert [each.node for each in in_order(holders)] == ["near", "far", "new"]
    assert [each.node for each in in_order(holders, "k1")] == ["far"]
    assert in_order(holders, "k2") == []


def entry(peer: str, number: bytes) -> CircuitEntry:
    return CircuitEntry(number, peer, "ldap", True, "127.0.0.1:1", 0, b"")


def test_a_number_is_good_once_and_for_one_peer() -> None:
    table = CircuitTable(PRODUCTION)
    mine = entry("a", b"1" * 16)
    table.open(mine, 80)
    assert table.claim("b", mine.number) is None
    assert table.claim("a", b"2" * 16) is None
    assert table.claim("a", mine.number) is mine
    assert table.claim("a", mine.number) is None
    with pytest.raises(RefusedError):
        table.open(entry("a", mine.number), 80)
    assert table.close(mine)
    assert not table.close(mine)
    assert not table.has(mine)
    assert table.claim("a", mine.number) is None


def test_one_peer_cannot_take_all_circuits_and_all_cannot_take_more() -> None:
    table = CircuitTable(replace(LIMITS, circuits_peer_max=50))
    for i in range(50):
        table.open(entry("a", i.to_bytes(16)), 80)
    with pytest.raises(RefusedError, match='50 circuits with "a"'):
        table.open(entry("a", b"x" * 16), 80)
    for i in range(30):
        table.open(entry("b", i.to_bytes(16)), 80)
    with pytest.raises(RefusedError, match="80 circuits"):
        table.open(entry("c", b"x" * 16), 80)
    table.close(table.entries()[0])
    table.open(entry("c", b"x" * 16), 80)
