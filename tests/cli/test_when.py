"""Points in time as people write them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.cli.when import parse_when
from geomirror.errors import UsageError

NOW = datetime(2026, 7, 10, 12, 0, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def utc(*parts: int) -> dict[str, Any]:
    return {"wall_ns": int(datetime(*parts, tzinfo=UTC).timestamp()) * 10**9}  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch:812", {"epoch": 812}),
        ("before-upgrade", {"mark": "before-upgrade"}),
        ("-10m", utc(2026, 7, 10, 11, 50, 30)),
        ("-1.5h", utc(2026, 7, 10, 10, 30, 30)),
        ("12:03:20", utc(2026, 7, 10, 10, 3, 20)),
        ("9:05", utc(2026, 7, 10, 7, 5, 0)),
        ("2026-07-01T08:00:00Z", utc(2026, 7, 1, 8)),
        ("2026-07-01T08:00:00+02:00", utc(2026, 7, 1, 6)),
        ("2026-01-31 12:00", utc(2026, 1, 31, 11)),
        ("2026-07-01", utc(2026, 6, 30, 22)),
        ("2026-07-01t08:00:00z", utc(2026, 7, 1, 8)),
        ("2026-07-01T08:00:00-05:30", utc(2026, 7, 1, 13, 30)),
        ("2026-10-25T02:30:00+01:00", utc(2026, 10, 25, 1, 30)),
        ("2026-10-25 03:00", utc(2026, 10, 25, 2)),
        ("2026-03-29 01:59:59", utc(2026, 3, 29, 0, 59, 59)),
        ("2026-03-29 03:00", utc(2026, 3, 29, 1)),
        ("epoch:9223372036854775807", {"epoch": (1 << 63) - 1}),
        ("-100000d", {"wall_ns": 0}),
    ],
)
def test_what_is_meant(text: str, expected: dict[str, Any]) -> None:
    assert parse_when(text, NOW.astimezone()) == expected


@pytest.mark.parametrize(
    "text", ["", "epoch:", "epoch:-1", "epoch:x", "24:00", "12:60", "2026-13-01", "-", "-soon"]
)
def test_what_is_no_point_in_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_when(text, NOW.astimezone())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "2026-10-25 02:30",
            "is twice: clocks are set back then; write 2026-10-25T02:30:00+02:00 ",
        ),
        ("2026-03-29T02:30:00", "does not exist: clocks are set forward then; try 2026-03-29T"),
        ("9999-12-31T00:00:00Z", "is out of the range of times"),
        ("0001-01-01", "is out of the range of times"),
        ("epoch:9223372036854775808", "is not an epoch"),
        ("epoch:" + "9" * 400, "is not an epoch"),
        ("2026-01-31T23:59:60Z", "is not RFC 3339"),
        ("2026-01-31T12:00:00+25:00", "is not RFC 3339"),
    ],
)
def test_a_moment_that_is_none_or_two_says_what_to_write(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_when(text, NOW.astimezone())
    assert said in str(caught.value)


@pytest.mark.parametrize(("day", "text"), [((2026, 10, 25), "02:15"), ((2026, 3, 29), "2:15:30")])
def test_a_time_of_today_is_refused_in_the_hour_that_clocks_are_changed(day, text) -> None:
    now = datetime(*day, 12, 0, tzinfo=UTC).astimezone()
    with pytest.raises(UsageError, match="clocks are set"):
        parse_when(text, now)


@given(st.text(max_size=30))
def test_any_text_is_one_point_or_refused(text: str) -> None:
    try:
        found = parse_when(text, NOW.astimezone())
    except UsageError:
        return
    assert len(found) == 1
