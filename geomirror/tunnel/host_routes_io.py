"""Asks the kernel which IPv4 networks this host has routes to."""

from __future__ import annotations

from pathlib import Path

from geomirror.tunnel.addresses import HostRoute, parse_routes


def host_routes(path: Path = Path("/proc/net/route")) -> list[HostRoute]:
    """Routes of the main table, those of interfaces' own networks included.

    Empty where the kernel does not say: nothing is refused for what cannot be seen.
    """
    try:
        return parse_routes(path.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return []
