"""When copies are compared by themselves: intervals, turns, clocks that jump, interruptions."""

from __future__ import annotations

import pytest

from geomirror.environment import SECOND
from geomirror.errors import UsageError
from geomirror.limits import KIB, MIB
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.sync_policy import parse_policy
from geomirror.wan_protocol.verify_schedule import (
    DAY_NS,
    Copy,
    Times,
    VerifySchedule,
    choose,
    parse_schedule,
    why_anew,
)

NOW = 1_790_000_000 * SECOND
HOUR = 3600 * SECOND


def copy(name: str, times: Times, *, running: bool = False, comparable: bool = True) -> Copy:
    return Copy(name, times, running, comparable)


def seen(before_ns: int) -> Times:
    return Times.first_seen(NOW - before_ns)


def test_settings_have_defaults_and_refuse_what_they_do_not_mean():
    assert parse_schedule({}) == VerifySchedule(7 * DAY_NS, 20 * MIB, False)
    given = {"verify_every": "90s", "verify_rate": "256K", "verify_heal": "on", "ack": "durable"}
    assert parse_schedule(given) == VerifySchedule(90 * SECOND, 256 * KIB, True)
    assert parse_schedule({"verify_every": "off"}).every_ns is None
    parse_policy(given, ["b"])
    for key, value in (
        ("verify_every", "7"),
        ("verify_every", "0s"),
        ("verify_every", "367d"),
        ("verify_every", "-1d"),
        ("verify_rate", "255K"),
        ("verify_rate", "2T"),
        ("verify_rate", "fast"),
        ("verify_heal", "yes"),
    ):
        with pytest.raises(UsageError, match=f"{key}.*{value}"):
            parse_policy({key: value}, ["b"])


def test_a_copy_is_compared_an_interval_after_it_was_first_seen_and_after_each_begin():
    times = seen(DAY_NS - 1)
    assert choose(DAY_NS, [copy("b", times)], NOW) is None
    assert choose(DAY_NS, [copy("b", times)], NOW + 1) == "b"
    times.ended(NOW + 1, is_clean=False)
    assert choose(DAY_NS, [copy("b", times)], NOW + DAY_NS) is None
    assert choose(DAY_NS, [copy("b", times)], NOW + DAY_NS + 1) == "b"
    assert choose(None, [copy("b", times)], NOW + 9 * DAY_NS) is None


def test_one_at_a_time_the_longest_due_first_and_one_that_waits_keeps_nobody_up():
    late, later = copy("c", seen(3 * DAY_NS)), copy("b", seen(4 * DAY_NS))
    assert choose(DAY_NS, [late, later], NOW) == "b"
    running = later._replace(is_running=True)
    assert choose(DAY_NS, [late, running], NOW) is None
    assert choose(DAY_NS, [late, running._replace(is_comparable=False)], NOW) == "c"
    assert choose(DAY_NS, [late._replace(is_comparable=False), running], NOW) is None
    assert choose(DAY_NS, [late._replace(is_comparable=False), later], NOW) == "b"


def test_overdue_is_what_was_not_found_clean_for_two_intervals():
    times = seen(2 * DAY_NS)
    assert not times.is_overdue(DAY_NS, NOW)
    assert times.is_overdue(DAY_NS, NOW + 1)
    times.ended(NOW, is_clean=False)
    assert times.is_overdue(DAY_NS, NOW + 1), "blocks that differ are nothing to rest upon"
    times.ended(NOW, is_clean=True)
    assert not times.is_overdue(DAY_NS, NOW + 2 * DAY_NS)
    for _ in range(3):
        times.put_off(NOW + 2 * DAY_NS)
    assert choose(DAY_NS, [copy("b", times)], NOW + 2 * DAY_NS) is None
    assert times.is_overdue(DAY_NS, NOW + 2 * DAY_NS + 1), "stopping it is no comparison"


def test_a_clock_that_stood_ahead_puts_nothing_off_for_long():
    times = Times.first_seen(NOW + 400 * DAY_NS)
    assert choose(DAY_NS, [copy("b", times)], NOW) == "b"
    assert times.is_overdue(DAY_NS, NOW), "nobody knows when it was clean"
    late = copy("a", seen(3 * DAY_NS))
    assert choose(DAY_NS, [late, copy("b", times)], NOW) == "b", "it would never have its turn"
    times.ended(NOW, is_clean=True)
    assert not times.is_overdue(DAY_NS, NOW)
    a_little = Times.first_seen(NOW + HOUR)
    assert choose(DAY_NS, [copy("b", a_little)], NOW) is None
    assert a_little.due_wall_ns(DAY_NS, NOW) <= NOW + 2 * DAY_NS
    assert not a_little.is_overdue(DAY_NS, NOW)


def test_an_interrupted_one_goes_on_while_its_history_does_and_not_for_ever():
    first = GenerationRecord("aa", 1, "", 0, "", "created", "a", NOW)
    there = GenerationRecord("bb", 2, "aa", 70, "", "promoted", "b", NOW)
    back = GenerationRecord("cc", 3, "bb", 90, "", "promoted", "a", NOW)
    assert why_anew([first], "aa", 70, HOUR, DAY_NS) == ""
    assert why_anew([first, there, back], "aa", 70, HOUR, DAY_NS) == "", "there and back again"
    assert "cut off" in why_anew([first, there, back], "aa", 71, HOUR, DAY_NS)
    assert "cut off" in why_anew([first, there], "dd", 1, HOUR, DAY_NS)
    assert why_anew([first], "aa", 70, DAY_NS, SECOND) == ""
    assert "longer" in why_anew([first], "aa", 70, DAY_NS + 1, DAY_NS)
    assert why_anew([first], "aa", 70, 7 * DAY_NS, None) == ""
    assert "longer" in why_anew([first], "aa", 70, -1, DAY_NS), "of a clock that was put back"
