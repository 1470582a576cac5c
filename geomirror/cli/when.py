"""Points in time as people write them: `12:03:20`, `-10m`, RFC 3339, `epoch:812`, or a mark."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from geomirror.cli.units import parse_duration
from geomirror.errors import UsageError

WHEN_HELP = (
    "RFC 3339 (2026-01-31T12:03:20Z; without a zone: local time), HH:MM[:SS] today, "
    "-10m (that long ago), epoch:N, or a mark's name. The nearest point at or before it is taken."
)
EPOCH_MAX = (1 << 63) - 1
_SECONDS_MAX = EPOCH_MAX // 10**9
"""Of Unix time: what nanoseconds in 63 bits reach, in the year 2262."""
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d{1,6})?))?", re.A)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.A)


def parse_when(text: str, now: datetime) -> dict[str, Any]:
    """The parameters `epoch`, `wall_ns` or `mark` of a method that takes a point in time.

    :param now: local time, of the system's zone.
    :raises UsageError: it looks like a time and is none.
    """
    text = text.strip()
    if text.startswith("epoch:"):
        number = text.removeprefix("epoch:")
        is_number = number.isascii() and number.isdigit() and len(number) <= 19
        if not is_number or int(number) > EPOCH_MAX:
            raise UsageError(f"{text!r} is not an epoch", hint="write epoch:812")
        return {"epoch": int(number)}
    if text.startswith("-"):
        return _wall(text, now.timestamp() - parse_duration(text[1:]))
    match = _CLOCK.fullmatch(text)
    if match is not None:
        hour, minute, second = int(match[1]), int(match[2]), float(match[3] or 0)
        if hour > 23 or minute > 59 or second >= 60:
            raise UsageError(f"{text!r} is no time of the day", hint="write HH:MM:SS")
        # Without a zone, so that the system's rules of summer time apply to that very moment.
        moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0, tzinfo=None)
        return _wall(text, _timestamp(text, moment) + second)
    if _DATE.match(text):
        try:
            moment = datetime.fromisoformat(text.upper())
        except ValueError as error:
            raise UsageError(
                f"{text!r} is not RFC 3339: {error}", hint="write 2026-01-31T12:03:20Z"
            ) from None
        return _wall(text, _timestamp(text, moment))
    if not text:
        raise UsageError("no point in time is given", hint=WHEN_HELP)
    return {"mark": text}


def _timestamp(text: str, moment: datetime) -> float:
    """Unix time of a moment; of local time without a zone it has to be just one.

    :raises UsageError: clocks are changed there, so that it is none or two; or it is out of range.
    """
    try:
        first, second = moment.timestamp(), moment.replace(fold=1).timestamp()
        if moment.tzinfo is not None or first == second:
            return first
        is_real = datetime.fromtimestamp(first) == moment
    except (ValueError, OverflowError, OSError):
        raise _out_of_range(text) from None
    either = " or ".join(
        datetime.fromtimestamp(each).astimezone().isoformat(timespec="seconds")
        for each in (first, second)
    )
    if is_real:
        raise UsageError(f"{text!r} is twice: clocks are set back then", hint=f"write {either}")
    raise UsageError(f"{text!r} does not exist: clocks are set forward then", hint=f"try {either}")


def _wall(text: str, seconds: float) -> dict[str, Any]:
    if seconds > _SECONDS_MAX:
        raise _out_of_range(text)
    return {"wall_ns": max(0, round(seconds * 1e6)) * 1000}


def _out_of_range(text: str) -> UsageError:
    return UsageError(f"{text!r} is out of the range of times", hint="write 2026-01-31T12:03:20Z")
