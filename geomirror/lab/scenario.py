"""What an emulated link is like: its settings, and the text form that the command line takes.

    a-b:rtt=80ms,rate=100mbit,jitter=2ms,loss=0.5%

A link joins two nodes and has two directions; a setting without a direction goes to both. Pure:
parsing and arithmetic only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from geomirror.environment import MS, SECOND
from geomirror.errors import UsageError
from geomirror.limits import KIB, MIB

PACKET_BYTES = 1448
"""Payload of a TCP segment over Ethernet with timestamps: the unit in which loss is drawn."""

_TIME_NS = {"": MS, "ns": 1, "us": 1000, "ms": MS, "s": SECOND}
_RATE_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SIZE_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "k": KIB, "m": MIB, "kib": KIB, "mib": MIB}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class LinkSettings:
    """One direction of a link."""

    delay_ns: int = 0
    """One way."""
    jitter_ns: int = 0
    """Added or taken off the delay, uniformly; order is kept within a connection, as TCP does."""
    rate_bits_per_second: int = 0
    """Shared by all connections of this direction; 0 is unlimited."""
    loss: float = 0.0
    """Probability that a packet is lost: it stalls its own connection until it is sent again."""
    loss_cut: float = 0.0
    """Part of a connection's rate that a loss takes away for ten round trips (0.3 is like CUBIC,
    0 like BBR)."""
    queue_bytes: int = 512 * KIB
    """Bytes that wait for the rate; beyond it senders are held back, nothing is dropped."""
    window_bytes: int = 4 * MIB
    """Bytes of one connection that are on their way: TCP's window."""
    down_mode: str = "blackhole"
    """`blackhole`: connections stay open and nothing passes; `reset`: they are reset."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.loss < 1.0 or not 0.0 <= self.loss_cut < 1.0:
            raise UsageError("a link's loss and cut are below 100%")
        if min(self.delay_ns, self.jitter_ns, self.rate_bits_per_second) < 0:
            raise UsageError("a link's delay, jitter and rate are not negative")
        if self.queue_bytes < 64 * KIB or self.window_bytes < 64 * KIB:
            raise UsageError("a link's queue and window are at least 64KiB")
        if self.down_mode not in ("blackhole", "reset"):
            raise UsageError(f'a link goes down as "blackhole" or "reset", not {self.down_mode!r}')

    def to_json(self) -> dict[str, int | float | str]:
        """All fields, for the state file and the control socket."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


WAN = LinkSettings(delay_ns=40 * MS, jitter_ns=2 * MS, rate_bits_per_second=100 * 10**6, loss=0.005)
"""A middling line between two clouds on different coasts; the demo's default."""


def _scaled(text: str, units: Mapping[str, int], what: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        allowed = ", ".join(unit for unit in units if unit)
        raise UsageError(f"{what} {text!r} is not a number with one of the units {allowed}")
    return int(float(match[1]) * units[match[2].lower()])


def parse_time_ns(text: str) -> int:
    """`80ms`, `2s`, `500us`; a bare number is milliseconds. UsageError on anything else."""
    return _scaled(text, _TIME_NS, "time")


def parse_rate(text: str) -> int:
    """Bits a second of `100mbit`; `unlimited` is 0. UsageError on anything else."""
    return 0 if text in ("unlimited", "0") else _scaled(text, _RATE_BITS, "rate")


def parse_size(text: str) -> int:
    """Bytes of `512KiB`. UsageError on anything else."""
    return _scaled(text, _SIZE_BYTES, "size")


def parse_fraction(text: str) -> float:
    """`0.5%` or `0.005`. UsageError on anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in ("", "%"):
        raise UsageError(f"{text!r} is not a fraction such as 0.5% or 0.005")
    return float(match[1]) / (100 if match[2] else 1)


def parse_settings(text: str, base: LinkSettings) -> LinkSettings:
    """`rtt=80ms,rate=100mbit,...` over `base`. `rtt` is split evenly over both directions.

    :raises UsageError: an unknown key or a value without meaning.
    """
    values: dict[str, int | float | str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key == "rtt":
            values["delay_ns"] = parse_time_ns(value) // 2
        elif key == "delay":
            values["delay_ns"] = parse_time_ns(value)
        elif key == "jitter":
            values["jitter_ns"] = parse_time_ns(value)
        elif key == "rate":
            values["rate_bits_per_second"] = parse_rate(value)
        elif key in ("loss", "cut"):
            values["loss" if key == "loss" else "loss_cut"] = parse_fraction(value)
        elif key in ("queue", "window"):
            values[f"{key}_bytes"] = parse_size(value)
        elif key == "down":
            values["down_mode"] = value
        else:
            known = "rtt, delay, jitter, rate, loss, cut, queue, window, down"
            raise UsageError(f"a link has no setting {key!r}; it has {known}")
    return replace(base, **values)  # type: ignore[arg-type]


def parse_link_name(text: str, nodes: Sequence[str]) -> tuple[str, str]:
    """The two nodes of `a-b`; node names may contain hyphens themselves.

    :raises UsageError: no split gives two different known nodes.
    """
    for position, character in enumerate(text):
        left, right = text[:position], text[position + 1 :]
        if character == "-" and left != right and left in nodes and right in nodes:
            return left, right
    raise UsageError(f"{text!r} is not a link of two of the nodes {', '.join(nodes)}")


def parse_link(
    text: str, nodes: Sequence[str], base: LinkSettings
) -> tuple[str, str, LinkSettings]:
    """`a-b:rtt=80ms,...` as (a, b, settings). UsageError as the two parsers above."""
    name, _, settings = text.partition(":")
    first, second = parse_link_name(name.strip(), nodes)
    return first, second, parse_settings(settings, base)
