"""Two daemons with one identity are told from one that is restarted."""

from __future__ import annotations

from geomirror.environment import SECOND
from geomirror.wan_protocol.twins import FORGET_NS, Twins

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def test_restarts_are_no_twins() -> None:
    twins = Twins("west-1")
    for number in range(30):
        incarnation = bytes([number] * 16)
        assert twins.heard(incarnation, None, number) == ""
        assert twins.heard(incarnation, incarnation, number) == "", "its data connections"
        assert twins.last == incarnation


def test_a_late_hello_of_one_that_is_gone_is_no_twin() -> None:
    twins = Twins("west-1")
    assert twins.heard(A, None, 0) == ""
    assert twins.heard(B, A, 1) == ""
    assert twins.heard(A, B, 2) == ""
    assert twins.heard(C, None, 3) == ""


def test_two_that_replace_each_other_are_and_the_one_in_use_stays() -> None:
    twins = Twins("west-1")
    for incarnation, in_use in ((A, None), (B, A), (A, B)):
        assert twins.heard(incarnation, in_use, 0) == ""
    for second in range(30):
        now_ns = second * SECOND
        assert 'two daemons run as "west-1"' in twins.heard(B, A, now_ns)
        assert twins.heard(A, A, now_ns) == ""
        assert twins.last == A


def test_when_one_is_stopped_the_other_is_taken() -> None:
    twins = Twins("west-1")
    for incarnation, in_use in ((A, None), (B, A), (A, B)):
        twins.heard(incarnation, in_use, 0)
    assert twins.heard(B, A, SECOND)
    assert twins.heard(B, None, 2 * SECOND) == "", "the other one is gone"
    assert twins.last == B
    assert twins.heard(C, B, FORGET_NS + 2 * SECOND) == "", "a restart, later"
