"""Circuits give way to replication, and get everything when it does not need it."""

from __future__ import annotations

from geomirror.environment import MS, SECOND
from geomirror.limits import MIB
from geomirror.tunnel.circuit_pace import RATE_MIN, CircuitPace


def run(pace: CircuitPace, start_ns: int, seconds: int, rate: int, *, is_waiting: bool) -> list:
    """Samples every 250 ms on a link that carries `rate`; the limits."""
    found = []
    for i in range(1, 4 * seconds + 1):
        now_ns = start_ns + i * 250 * MS
        found.append(pace.sample(now_ns, rate // 4, is_waiting=is_waiting))
    return found


def test_alone_circuits_have_the_whole_link() -> None:
    assert set(run(CircuitPace(0), 0, 10, 100 * MIB, is_waiting=False)) == {None}


def test_while_frames_wait_circuits_get_a_quarter_and_all_again_a_second_later() -> None:
    pace = CircuitPace(0)
    run(pace, 0, 5, 10 * MIB, is_waiting=False)
    limits = run(pace, 5 * SECOND, 5, 10 * MIB, is_waiting=True)
    assert all(2 * MIB < limit <= 2.5 * MIB for limit in limits), limits
    after = run(pace, 10 * SECOND, 3, 10 * MIB, is_waiting=False)
    assert after[3] is not None, "an epoch comes every 250 ms: one gap is no end"
    assert after[5:] == [None] * len(after[5:])


def test_a_link_that_gets_slower_is_believed_within_seconds() -> None:
    pace = CircuitPace(0)
    run(pace, 0, 5, 100 * MIB, is_waiting=True)
    limits = run(pace, 5 * SECOND, 10, 1 * MIB, is_waiting=True)
    assert limits[-1] < MIB
    assert limits[-1] >= RATE_MIN


def test_a_dead_link_leaves_a_little_and_time_that_stands_still_changes_nothing() -> None:
    pace = CircuitPace(0)
    assert pace.sample(0, 5 * MIB, is_waiting=True) == RATE_MIN
    assert run(pace, 0, 5, 0, is_waiting=True)[-1] == RATE_MIN
