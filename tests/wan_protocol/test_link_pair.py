"""Both sides of a link together, over a path that fails: they agree on which set is used.

The invariants of docs/wire_format.md, "A set is used once": a side is up on a set only as long as
the other one is, but for a bounded time; no message reaches a side that is not up on its set, and
none is dropped while both are.
"""

from __future__ import annotations

import pytest

from geomirror.environment import MS, SECOND
from geomirror.wan_protocol.link_decisions import Down, Up
from tests.wan_protocol.link_pair import Network, disturb

MISMATCH_NS_MAX = 6 * SECOND
"""Twice the longest patience; the worst of these seeds needs half of it."""


@pytest.mark.parametrize("block", range(10))
def test_both_sides_agree_whatever_happens_to_the_path(block: int) -> None:
    for seed in range(30 * block, 30 * block + 30):
        dialling = ["ab", "ab", "a", "b"][seed % 4]
        delay_ns = [1, 20, 40, 150][seed // 4 % 4] * MS
        network = Network(seed, delay_ns=delay_ns, dialling=dialling)
        disturb(network, 15 * SECOND)
        network.run(network.now_ns + 15 * SECOND)
        a, b = network.nodes["a"], network.nodes["b"]
        assert a.up is not None and a.up == b.up, f"seed {seed}"
        assert network.mismatch_ns_max <= MISMATCH_NS_MAX, f"seed {seed}"
        for node, other in ((a, b), (b, a)):
            assert node.sets == 1, f"seed {seed}"
            kinds = [type(change) for change in node.changes]
            assert kinds == ([Up, Down] * len(kinds))[: len(kinds)], f"seed {seed}"
            received = other.received
            node.send_message()
            network.run(network.now_ns + 2 * SECOND)
            assert other.received == received + 1, f"seed {seed}"


def test_one_outage_is_one_change_on_both_sides() -> None:
    for seed in range(30):
        network = Network(seed, delay_ns=40 * MS)
        network.run(5 * SECOND)
        network.cut_off("ab", network.random.randrange(1500 * MS, 6 * SECOND))
        network.run(25 * SECOND)
        a, b = network.nodes["a"], network.nodes["b"]
        assert a.up == b.up
        for node in (a, b):
            assert [type(change) for change in node.changes] == [Up, Down, Up], f"seed {seed}"


def test_a_silence_that_only_one_side_noticed_starts_both_anew() -> None:
    for seed in range(30):
        network = Network(seed, delay_ns=40 * MS)
        network.run(5 * SECOND)
        # Just about the patience: one side gives up, the other one does not.
        network.cut_off(network.random.choice(["a", "b", "ab"]), 700 * MS)
        network.run(20 * SECOND)
        a, b = network.nodes["a"], network.nodes["b"]
        assert a.up == b.up is not None
        links = [[change.link for change in n.changes if isinstance(change, Up)] for n in (a, b)]
        assert links[0] == links[1], f"seed {seed}"
        assert len(links[0]) <= 2, f"seed {seed}"
