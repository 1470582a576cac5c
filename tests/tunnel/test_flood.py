"""Flooding of membership records: nodes that are connected end with the same, in any order."""

from __future__ import annotations

import random

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geomirror.environment import SECOND, SeededEntropy
from geomirror.limits import PRODUCTION
from geomirror.tunnel.authority import Authority
from geomirror.tunnel.flood import RETRY_NS_MAX, RETRY_NS_MIN, Flood
from geomirror.tunnel.membership import (
    Member,
    Membership,
    Revocations,
    Revoked,
    Signed,
    fingerprint_of,
    sign_member,
    sign_revocations,
)

AUTHORITY = Authority.create("acme", 10**18, SeededEntropy("flood"))
OLD, NEW = b"old", b"new"


def member(node_id: str, version: int, **options: object) -> Signed:
    found = Member(
        network="acme",
        node_id=node_id,
        name=f"{node_id}-{version}",
        site="west",
        roles=("member",),
        endpoints=(),
        address="10.203.0.1",
        serial="1",
        version=version,
    )
    return sign_member(AUTHORITY, msgspec.structs.replace(found, **options))


def revocations(number: int, *node_ids: str) -> Signed:
    revoked = tuple(Revoked(node_id, node_id, number) for node_id in node_ids)
    return sign_revocations(AUTHORITY, Revocations("acme", number, revoked))


# One version twice, and one number twice: an authority that was put back from a backup.
RECORDS = [
    *(member(node_id, version) for version, node_id in enumerate("abcabdd", start=1)),
    member("a", 5, name="twin"),
    member("b", 8, revoked=True),
    revocations(1, "b"),
    revocations(1, "c"),
    revocations(2, "b", "c"),
    revocations(2, "d"),
]


def holding(records: list[Signed]) -> Membership:
    found = Membership("acme", AUTHORITY.public_key, PRODUCTION)
    found.merge(records)
    return found


class World:
    """Some nodes; calls are slow, overtake each other, and some are lost on the way back."""

    def __init__(self, count: int, chance: random.Random) -> None:
        self.chance = chance
        self.now_ns = 0
        self.nodes = [holding([]) for _ in range(count)]
        self.floods = [Flood() for _ in range(count)]
        self.links: set[tuple[int, int]] = set()
        self.under_way: list[tuple[int, int, list[Signed]]] = []
        self.calls = 0

    def connect(self, a: int, b: int) -> None:
        for one, other in ((a, b), (b, a)):
            self.links.add((one, other))
            self.floods[one].link_up(str(other))

    def step(self) -> bool:
        """One thing happens; False: nothing is left to happen."""
        for at, flood in enumerate(self.floods):
            peer = flood.next_exchange(self.nodes[at].fingerprint(), self.now_ns)
            if peer is not None:
                self.under_way.append((at, int(peer), self.nodes[at].updates()))
                self.calls += 1
        if self.under_way:
            where = self.chance.randrange(len(self.under_way))
            self.exchange(*self.under_way.pop(where))
            return True
        timers = [
            due
            for node, flood in zip(self.nodes, self.floods, strict=True)
            if (due := flood.get_timer(node.fingerprint())) is not None
        ]
        if timers:
            self.now_ns = max(self.now_ns, min(timers))
        return bool(timers)

    def exchange(self, caller: int, peer: int, updates: list[Signed]) -> None:
        self.nodes[peer].merge(updates)
        self.floods[peer].heard(str(caller), self.nodes[peer].fingerprint())
        if self.chance.random() < 0.1:
            self.floods[caller].failed(str(peer), self.now_ns)
        else:
            reply = self.nodes[peer].updates()
            self.nodes[caller].merge(reply)
            self.floods[caller].heard(str(peer), fingerprint_of(reply))
        self.floods[caller].ended(str(peer))


@example(7, 319269862)  # an answer was lost, and what was known of the neighbour fitted by chance
@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**9))
def test_connected_nodes_end_with_the_same_records_and_then_are_quiet(
    count: int, seed: int
) -> None:
    chance = random.Random(seed)
    world = World(count, chance)
    for at in range(1, count):
        world.connect(at, chance.randrange(at))
    for _ in range(chance.randrange(count)):
        a, b = chance.sample(range(count), 2)
        world.connect(a, b)
    news = [*RECORDS, *chance.sample(RECORDS, 4)]
    chance.shuffle(news)
    while news or world.step():
        if news and chance.random() < 0.5:
            world.nodes[chance.randrange(count)].merge([news.pop()])
        else:
            world.step()
        assert world.calls < 5000
    wanted = holding(RECORDS)
    assert {node.fingerprint() for node in world.nodes} == {wanted.fingerprint()}
    assert all(node.to_json() == wanted.to_json() for node in world.nodes)
    for node, flood in zip(world.nodes, world.floods, strict=True):
        assert flood.untold(node.fingerprint()) == []
        assert flood.next_exchange(node.fingerprint(), 10**18) is None


def test_of_two_lists_with_one_number_the_longer_stays_whichever_came_first() -> None:
    longer = revocations(2, "b", "c")
    for records in ([longer, revocations(2, "d")], [revocations(2, "d"), longer]):
        found = holding(records)
        assert [found.is_revoked(node_id) for node_id in "bcd"] == [True, True, False]
    assert holding([longer, revocations(1, "a", "b", "c", "d")]).revocations.number == 2


def test_the_fingerprint_tells_records_apart_and_not_their_order() -> None:
    assert fingerprint_of(RECORDS) == fingerprint_of(reversed(RECORDS))
    seen = {fingerprint_of([record]) for record in RECORDS}
    assert len(seen) == len(RECORDS)
    # The newest version alone is not the same as all that came before it.
    assert (
        holding([member("a", 1), member("b", 2)]).fingerprint()
        != holding([member("b", 2)]).fingerprint()
    )


def test_a_neighbour_is_asked_when_its_link_comes_up_and_when_something_changed() -> None:
    flood = Flood()
    assert flood.next_exchange(OLD, 0) is None
    flood.link_up("b")
    assert flood.next_exchange(OLD, 0) == "b"
    assert flood.next_exchange(OLD, 0) is None  # under way
    flood.heard("b", OLD)
    flood.ended("b")
    assert (flood.told(OLD), flood.untold(OLD)) == (["b"], [])
    assert flood.next_exchange(OLD, 0) is None
    assert flood.next_exchange(NEW, 0) == "b"
    assert flood.untold(NEW) == ["b"]
    flood.link_down("b")
    flood.heard("b", NEW)
    flood.ended("b")
    assert (flood.told(NEW), flood.untold(NEW)) == ([], [])


def test_a_change_in_the_middle_of_an_exchange_makes_another_one() -> None:
    flood = Flood()
    flood.link_up("b")
    assert flood.next_exchange(OLD, 0) == "b"
    assert flood.next_exchange(NEW, 0) is None
    flood.heard("b", OLD)
    flood.ended("b")
    assert flood.next_exchange(NEW, 0) == "b"


def test_a_neighbour_that_refuses_is_asked_again_less_and_less_often() -> None:
    flood, now_ns, pauses = Flood(), 0, []
    flood.link_up("b")
    for _ in range(9):
        assert flood.next_exchange(OLD, now_ns) == "b"
        flood.failed("b", now_ns)
        flood.ended("b")
        assert flood.next_exchange(OLD, now_ns) is None
        due_ns = flood.get_timer(OLD)
        assert due_ns is not None
        pauses.append(due_ns - now_ns)
        now_ns = due_ns
    assert pauses[:4] == [RETRY_NS_MIN, 2 * RETRY_NS_MIN, 4 * RETRY_NS_MIN, 8 * SECOND]
    assert pauses[-1] == RETRY_NS_MAX
    flood.heard("b", OLD)
    assert flood.get_timer(OLD) is None
