"""Links that fall back to worse paths and return to better ones, both sides in one simulation."""

from __future__ import annotations

import pytest

from geomirror.environment import MS, SECOND
from geomirror.tunnel.link_path import expand_paths
from geomirror.wan_protocol.link_decisions import Down, Up
from tests.wan_protocol.link_pair import Network, Node, disturb
from tests.wan_protocol.test_link import World, follower

PATHS = tuple(expand_paths(["{peer}:1", "wss://{peer}/x"], "p:1"))
DELAYS = (1, 20, 75, 150)


def network(seed: int, dialling: str, *, paths: tuple[str, ...] = PATHS) -> Network:
    return Network(seed, delay_ns=DELAYS[seed % 4] * MS, dialling=dialling, paths=paths)


def texts(ranks: str) -> set[str]:
    """Paths of these ranks, to either node."""
    return {PATHS[int(rank)].format(peer=peer) for rank in ranks for peer in "ab"}


def rank(node: Node) -> int | None:
    current = node.core.current
    return current.rank if current is not None else None


def kinds(node: Node) -> list[type]:
    return [type(change) for change in node.changes]


@pytest.mark.parametrize("dialling", ["a", "b", "ab"])
@pytest.mark.parametrize("lost", ["0", "01", "012"])
@pytest.mark.parametrize("is_hole", [False, True])
def test_a_link_falls_back_within_five_seconds(dialling: str, lost: str, is_hole: bool) -> None:
    for seed in range(4):
        found = network(seed, dialling)
        (found.holes if is_hole else found.refusing).update(texts(lost))
        found.run(5 * SECOND)
        for node in found.nodes.values():
            assert node.up is not None and rank(node) == len(lost), f"seed {seed}"
            assert kinds(node) == [Up], f"seed {seed}"


@pytest.mark.parametrize("dialling", ["a", "b", "ab"])
def test_a_path_that_becomes_a_hole_is_left_within_five_seconds(dialling: str) -> None:
    for seed in range(4):
        found = network(seed, dialling)
        found.run(30 * SECOND)
        assert rank(found.nodes["a"]) == 0
        found.holes |= texts("012")
        found.run(found.now_ns + 5 * SECOND + 4 * found.delay_ns)
        for node in found.nodes.values():
            assert rank(node) == 3, f"seed {seed}"
            assert kinds(node) == [Up, Down, Up]


@pytest.mark.parametrize("dialling", ["a", "b", "ab"])
def test_it_returns_when_the_direct_path_works_and_is_never_without_a_link(dialling: str) -> None:
    for seed in range(4):
        found = network(seed, dialling)
        found.refusing |= texts("01")
        found.run(20 * SECOND)
        assert rank(found.nodes["a"]) == rank(found.nodes["b"]) == 2
        found.refusing.clear()
        found.run(found.now_ns + 60 * SECOND)
        for node in found.nodes.values():
            assert rank(node) == 0 and node.sets == 1, f"seed {seed}"
            ups = sum(isinstance(change, Up) for change in node.changes)
            assert ups <= 3, f"seed {seed}"  # 2, then 1 for a moment, then 0
            for at, change in enumerate(node.changes):
                if isinstance(change, Down):
                    gap_ns = node.changed_ns[at + 1] - node.changed_ns[at]
                    assert gap_ns <= 3 * found.delay_ns + 400 * MS, f"seed {seed}"
        assert found.nodes["a"].up == found.nodes["b"].up


def test_a_path_that_flaps_is_not_followed_at_each_flap() -> None:
    found = network(1, "b", paths=PATHS[:2])
    found.holes |= texts("0")
    found.run(10 * SECOND)
    while found.now_ns < 360 * SECOND:
        found.holes.clear()
        found.run(found.now_ns + 6 * SECOND)
        found.holes |= texts("0")
        found.run(found.now_ns + 6 * SECOND)
    ups = sum(isinstance(change, Up) for change in found.nodes["a"].changes)
    assert ups <= 16, ups  # of 30 times that it came and went


@pytest.mark.parametrize("block", range(3))
def test_both_sides_agree_whatever_happens_to_the_paths(block: int) -> None:
    for seed in range(6 * block, 6 * block + 6):
        found = network(seed, ["ab", "a", "b"][seed % 3])
        for _ in range(4):
            found.holes = texts("".join(found.random.sample("0123", found.random.randrange(4))))
            found.refusing = texts("".join(found.random.sample("012", found.random.randrange(3))))
            disturb(found, found.now_ns + 8 * SECOND)
        found.holes.clear()
        found.refusing.clear()
        found.run(found.now_ns + 200 * SECOND)
        a, b = found.nodes["a"], found.nodes["b"]
        assert a.up is not None and a.up == b.up, f"seed {seed}"
        assert rank(a) == rank(b) == 0, f"seed {seed}"
        for node, other in ((a, b), (b, a)):
            assert node.sets == 1, f"seed {seed}"
            received = other.received
            node.send_message()
            found.run(found.now_ns + 2 * SECOND)
            assert other.received == received + 1, f"seed {seed}"


def test_the_leader_moves_to_a_better_set_and_not_to_an_equal_or_worse_one() -> None:
    world = World("a", "b", ())
    worse, better, equal = b"w" * 16, b"b" * 16, b"e" * 16
    world.join(worse, rank=2)
    world.join(better, rank=1)
    assert world.core.current is not None and world.core.current.link == better
    assert worse in world.closed()
    world.join(equal, rank=1)
    world.join(b"v" * 16, rank=3)
    assert world.core.current.link == better
    assert [type(c) for c in world.changes()] == [Up, Down, Up]


def test_a_leader_that_does_not_move_costs_a_set_that_is_closed() -> None:
    """An older version at the other side never says `Use` again."""
    world = follower(endpoints=("wss://a/x", "a:1"))
    while not (dials := [d for _, d in world.dialled() if d.endpoint == "wss://a/x"]):
        world.run(world.now_ns + SECOND)
    link = dials[0].link
    world.talking[link] = 40 * MS
    world.control_up(link, is_dialled=True)
    world.core.data_up(link, 0, world.now_ns)
    world.use(link, 1)
    assert world.changes() == [Up(link)]
    world.run(world.now_ns + 10 * SECOND)
    probe = world.dialled()[-1][1]
    assert probe.endpoint == "a:1" and probe.link != link
    assert world.core.given_up == b""
    world.talking[probe.link] = 40 * MS
    world.control_up(probe.link, is_dialled=True)
    world.core.data_up(probe.link, 0, world.now_ns)
    world.run(world.now_ns + 9 * SECOND)
    assert probe.link not in world.closed()
    world.run(world.now_ns + 3 * SECOND)
    assert probe.link in world.closed()
    assert world.changes() == [Up(link)]


def test_a_hello_names_the_set_that_was_given_up_only_while_there_is_none() -> None:
    world = World()
    link = world.join()
    assert world.core.given_up == b""
    world.lose(link)
    assert world.core.given_up == link
