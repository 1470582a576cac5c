"""What a packet-level link is like: its settings and their text form.

    rtt=80ms,rate=100mbit,jitter=2ms,loss=0.5%,burst=2%/20,reorder=1%/5ms,duplicate=0.1%

The grammar is that of `scenario.py` as far as both levels know a setting. `cut`, `window` and
`down` are missing: here the kernel's own TCP decides what a loss or an outage means. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from geomirror.environment import SECOND
from geomirror.errors import UsageError
from geomirror.lab.scenario import parse_fraction, parse_rate, parse_size, parse_time_ns
from geomirror.limits import GIB, KIB

TIME_NS_MAX = 60 * SECOND
"""Longest delay, jitter or reordering."""
RATE_MAX = 100 * 10**9
"""Bits a second."""
QUEUE_BYTES_MAX = 1 * GIB
MTU_BYTES_MIN = 68
"""Smallest that IPv4 allows."""
MTU_BYTES_MAX = 65535
BURST_PACKETS_MAX = 1_000_000


@dataclass(frozen=True)
class PacketSettings:
    """One direction of a link, as packets meet it."""

    delay_ns: int = 0
    """One way."""
    jitter_ns: int = 0
    """Added to or taken off the delay, uniformly; order is kept."""
    rate_bits_per_second: int = 0
    """Of IP packets, headers included; 0 is unlimited."""
    queue_bytes: int = 512 * KIB
    """Bytes that wait for the rate; a packet over it is dropped."""
    loss: float = 0.0
    """Probability that a packet is lost, independent of the others."""
    burst_loss: float = 0.0
    """Part of all packets that is lost in bursts, besides `loss`."""
    burst_packets: float = 1.0
    """Mean length of a burst."""
    reorder: float = 0.0
    """Part of the packets that is late by `reorder_ns`, so that others overtake it."""
    reorder_ns: int = 0
    duplicate: float = 0.0
    """Part of the packets that arrives twice."""
    corrupt: float = 0.0
    """Part of the TCP and UDP packets with a flipped payload bit that their checksum hides."""
    mtu_bytes: int = 0
    """Larger packets vanish, and no ICMP message tells the sender; 0 is any size."""

    def __post_init__(self) -> None:
        for name in ("loss", "burst_loss", "reorder", "duplicate", "corrupt"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"a link's {name} is between 0% and 100%")
        for name in ("delay_ns", "jitter_ns", "reorder_ns"):
            if not 0 <= getattr(self, name) <= TIME_NS_MAX:
                raise UsageError(f"a link's times are at most {TIME_NS_MAX // SECOND} s")
        if not 0 <= self.rate_bits_per_second <= RATE_MAX:
            raise UsageError("a link's rate is at most 100gbit")
        if not 0 < self.queue_bytes <= QUEUE_BYTES_MAX:
            raise UsageError("a link's queue is at least 1 byte and at most 1GiB")
        if self.mtu_bytes and not MTU_BYTES_MIN <= self.mtu_bytes <= MTU_BYTES_MAX:
            raise UsageError(f"a link's mtu is from {MTU_BYTES_MIN} to {MTU_BYTES_MAX} bytes")
        if not 1.0 <= self.burst_packets <= BURST_PACKETS_MAX:
            raise UsageError(f"a link's bursts are from 1 to {BURST_PACKETS_MAX} packets long")
        if self._enter() > 1.0:
            raise UsageError(
                f"bursts of {self.burst_packets:g} packets cannot lose {self.burst_loss:.0%}",
                hint="make the bursts longer",
            )

    def _enter(self) -> float:
        """Probability that the next packet begins a burst (Gilbert's model)."""
        if not self.burst_loss:
            return 0.0
        good = 1.0 - self.burst_loss
        return self.burst_loss / (self.burst_packets * good) if good else 2.0

    def to_command(self) -> str:
        """The words of the emulator's `set` command; all settings, each time."""
        words: dict[str, int | float] = {
            "delay": self.delay_ns,
            "jitter": self.jitter_ns,
            "rate": self.rate_bits_per_second,
            "queue": self.queue_bytes,
            "loss": self.loss,
            "burst_enter": self._enter(),
            "burst_leave": 1.0 / self.burst_packets,
            "reorder": self.reorder,
            "reorder_by": self.reorder_ns,
            "duplicate": self.duplicate,
            "corrupt": self.corrupt,
            "mtu": self.mtu_bytes,
        }
        return " ".join(f"{key}={value!r}" for key, value in words.items())

    def to_json(self) -> dict[str, int | float]:
        """All fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _parse_one(key: str, value: str) -> dict[str, int | float]:
    first, has_second, second = value.partition("/")
    if key == "burst":
        packets = 1.0
        if has_second:
            try:
                packets = float(second)
            except ValueError:
                raise UsageError(f"{value!r} is not a burst loss such as 2%/20") from None
        return {"burst_loss": parse_fraction(first), "burst_packets": packets}
    if key == "reorder":
        chance = parse_fraction(first)
        if chance and not has_second:
            raise UsageError(f"{value!r} does not say how late packets are, as 1%/5ms does")
        return {"reorder": chance, "reorder_ns": parse_time_ns(second) if has_second else 0}
    if key in ("loss", "duplicate", "corrupt"):
        return {key: parse_fraction(value)}
    if key in ("rtt", "delay", "jitter"):
        time_ns = parse_time_ns(value) // (2 if key == "rtt" else 1)
        return {"jitter_ns" if key == "jitter" else "delay_ns": time_ns}
    if key == "rate":
        return {"rate_bits_per_second": parse_rate(value)}
    if key == "queue":
        return {"queue_bytes": parse_size(value)}
    if key == "mtu":
        return {"mtu_bytes": 0 if value in ("0", "unlimited") else parse_size(value)}
    known = "rtt, delay, jitter, rate, queue, loss, burst, reorder, duplicate, corrupt, mtu"
    raise UsageError(f"a packet-level link has no setting {key!r}; it has {known}")


def parse_packet_settings(text: str, base: PacketSettings) -> PacketSettings:
    """`rtt=80ms,loss=1%,...` over `base`. `rtt` is split evenly over both directions.

    :raises UsageError: an unknown key or a value without meaning.
    """
    values: dict[str, int | float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        values |= _parse_one(key, value)
    return replace(base, **values)  # type: ignore[arg-type]
