"""Refused strangers and renewals: what a node does by itself, and how often."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

from geomirror.environment import SECOND
from geomirror.node.events import EVENTS_MAX, FOREIGN_EVENTS_MAX, EventRing
from geomirror.node.network_calls import NetworkCalls
from geomirror.node.refusals import BURST, INTERVAL_NS, RefusalAllowance


def test_a_flood_of_refusals_is_told_once_in_a_while_with_the_number_left_out():
    allowance = RefusalAllowance()
    start = 1_000 * SECOND
    told = [allowance.admit(start + i) for i in range(1000)]
    assert told == [0] * BURST + [None] * (1000 - BURST)
    assert allowance.admit(start + INTERVAL_NS) == 1000 - BURST
    assert allowance.admit(start + INTERVAL_NS + 1) is None
    # After a quiet time all of them are told again.
    later = start + 100 * INTERVAL_NS
    assert [allowance.admit(later) for _ in range(BURST + 1)] == [1] + [0] * (BURST - 1) + [None]


def test_strangers_do_not_push_the_nodes_own_events_out():
    ring = EventRing()
    ring.publish("fenced", "t", {})
    for _ in range(EVENTS_MAX + 100):
        ring.publish("connection_refused", "t", {}, is_foreign=True)
    ring.publish("link_up", "t", {})
    found = ring.recent()
    assert (found[0]["kind"], found[-1]["kind"]) == ("fenced", "link_up")
    assert len(found) == FOREIGN_EVENTS_MAX + 2
    assert [event["number"] for event in found] == sorted(event["number"] for event in found)
    assert [event["kind"] for event in ring.recent(2)] == ["connection_refused", "link_up"]


async def test_a_changed_membership_makes_the_node_look_at_its_certificate():
    looks = 0
    seen = asyncio.Event()

    def is_renewal_due(wall_ns: int) -> bool:
        nonlocal looks
        looks += 1
        seen.set()
        return False

    clock = SimpleNamespace(wall_ns=lambda: 0)
    calls = NetworkCalls(
        SimpleNamespace(is_renewal_due=is_renewal_due),  # type: ignore[arg-type]
        SimpleNamespace(clock=clock),  # type: ignore[arg-type]
        lambda: None,
    )
    keeping = asyncio.ensure_future(calls.keep_certificate())
    for wanted in (1, 2, 3):
        await asyncio.wait_for(seen.wait(), 5)
        seen.clear()
        assert looks == wanted
        calls.look_at_certificate()
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
