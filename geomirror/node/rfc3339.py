"""Times as every `--json` document gives them."""

from __future__ import annotations

import datetime

from geomirror.environment import SECOND


def rfc3339(wall_ns: int) -> str:
    """`2026-01-31T12:00:00.250Z` for Unix time in ns."""
    time = datetime.datetime.fromtimestamp(wall_ns / SECOND, datetime.UTC)
    return time.isoformat("T", "milliseconds").replace("+00:00", "Z")
