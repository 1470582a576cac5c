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


@given(st.text(max_size=30))
def test_any_text_is_one_point_or_refused(text: str) -> None:
    try:
        found = parse_when(text, NOW.astimezone())
    except UsageError:
        return
    assert len(found) == 1
