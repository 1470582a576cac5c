"""Sizes, times and rates as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from geomirror.errors import UsageError

_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes from `10G`, `512MiB`, `1.5T` (powers of 1024), `10GB` (powers of 1000) or a number.

    :raises UsageError: not a size.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([KMGTP]?)(i?B)?", text.strip(), re.I | re.A)
    if match is None:
        raise UsageError(f"{text!r} is not a size", hint="write 10G, 512M or a number of bytes")
    number, prefix, suffix = match.group(1), match.group(2).upper(), (match.group(3) or "").lower()
    scale = _BINARY[prefix]
    if suffix == "b" and prefix:
        scale = 1000 ** list(_BINARY).index(prefix)
    whole, _, fraction = number.partition(".")
    size = int(whole) * scale
    if fraction:
        size += int(fraction) * scale // 10 ** len(fraction)
    return size


def parse_duration(text: str) -> float:
    """Seconds from `90`, `1.5s`, `250ms`, `10m`, `3h` or `7d`.

    :raises UsageError: not a duration.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*(ms|[smhd]?)", text.strip(), re.A)
    if match is None:
        raise UsageError(f"{text!r} is not a duration", hint="write 30s, 10m, 1h or 7d")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def format_bytes(count: float | None) -> str:
    """`1.5 GiB`; three significant digits."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    digits = 0 if unit == "B" or count >= 100 else 1
    return f"{count:.{digits}f} {unit}"


def format_seconds(seconds: float | None) -> str:
    """`0.3 s`, `42 s`, `3 min 10 s`, `3 h 10 min` or `2 d 5 h`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    steps = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
    for unit, size, inner, inner_size in steps:
        if whole >= size:
            rest = whole % size // inner_size
            return f"{whole // size} {unit} {rest} {inner}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def format_tail(tail: Mapping[str, Any]) -> str:
    """`12 epochs, 3.0 s, 1.0 MiB`, of what a history has beyond another one."""
    if tail.get("epochs") is None:
        return "not known"
    if not tail["epochs"]:
        return "nothing"
    parts = [f"{tail['epochs']} epoch{'' if tail['epochs'] == 1 else 's'}"]
    if tail["seconds"] is not None:
        parts.append(format_seconds(tail["seconds"]))
    if tail["bytes"] is not None:
        parts.append(format_bytes(tail["bytes"]))
    return ", ".join(parts)
