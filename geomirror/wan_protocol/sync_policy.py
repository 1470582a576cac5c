"""What a flush waits for: per peer `ack`, how many `copies`, and what happens when one is away.

| setting         | values                                      | default     |
| --------------- | ------------------------------------------- | ----------- |
| `ack`           | `completed`, `received`, `durable`, `applied` | `completed` |
| `ack.NODE`      | the same, for one peer                      | that of `ack` |
| `copies`        | peers that must have it, 1 to 63, or `all`  | `all`       |
| `degrade_after` | seconds like `5s`, 0 to 3600, or `block`    | `5s`        |

`completed` is asynchronous: no flush waits for that peer. The names are those of DRBD's protocols
A (completed), B (received) and C (durable); `applied` also waits until readers of the peer see it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from geomirror.environment import MS, SECOND
from geomirror.errors import UsageError
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol.rejoin_policy import AUTO_REJOIN, check_auto_rejoin
from geomirror.wan_protocol.verify_schedule import SETTINGS as VERIFY_SETTINGS
from geomirror.wan_protocol.verify_schedule import parse_schedule

COMPLETED = "completed"
RECEIVED = "received"
DURABLE = "durable"
APPLIED = "applied"
LEVELS = (COMPLETED, RECEIVED, DURABLE, APPLIED)
DEGRADE_AFTER_NS = 5 * SECOND
DEGRADE_AFTER_S_MAX = 3600
_SECONDS = re.compile(r"^(\d{1,4}(?:\.\d{1,3})?)s?$")


@dataclass(frozen=True)
class SyncPolicy:
    """The settings of one resource, checked."""

    acks: Mapping[str, str] = field(default_factory=dict)
    """Peers that flushes wait for → level; asynchronous ones are absent."""
    copies: int | None = None
    """How many of them must have it; None: all."""
    degrade_after_ns: int | None = DEGRADE_AFTER_NS
    """A peer that keeps a flush waiting for so long is waited for no more; None: for ever."""

    is_synchronous: bool = field(init=False)
    """Whether a flush waits for anybody."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_synchronous", bool(self.acks))

    @property
    def is_blocking(self) -> bool:
        """Whether nothing is ever confirmed without enough of them."""
        return self.is_synchronous and self.degrade_after_ns is None

    def level(self, peer: str) -> str:
        """The `ack` of a peer."""
        return self.acks.get(peer, COMPLETED)


ASYNCHRONOUS = SyncPolicy()


def parse_policy(settings: Mapping[str, str], peers: Iterable[str]) -> SyncPolicy:
    """The policy of a resource with these secondaries.

    :raises UsageError: an unknown setting, level, node or number.
    """
    names = list(peers)
    levels = dict.fromkeys(names, _level("ack", settings.get("ack", COMPLETED)))
    copies: int | None = None
    degrade_after_ns: int | None = DEGRADE_AFTER_NS
    for key, value in settings.items():
        kind, _, node = key.partition(".")
        if kind == "ack" and node:
            if node not in levels:
                raise UsageError(f'setting {key}: "{node}" is no secondary of the resource')
            levels[node] = _level(key, value)
        elif key == "copies":
            copies = _copies(value)
        elif key == "degrade_after":
            degrade_after_ns = _degrade_after_ns(value)
        elif key == AUTO_REJOIN:
            check_auto_rejoin(value)
        elif key != "ack" and key not in VERIFY_SETTINGS:
            others = ", ".join((AUTO_REJOIN, *VERIFY_SETTINGS))
            raise UsageError(
                f"unknown setting {key!r}",
                hint=f"known are ack, ack.NODE, copies, degrade_after, {others}",
            )
    parse_schedule(settings)
    acks = {name: level for name, level in levels.items() if level != COMPLETED}
    if copies is not None and copies > len(acks):
        raise UsageError(
            f"copies {copies}: only {len(acks)} secondaries are synchronous",
            hint="raise ack of more secondaries, or lower copies",
        )
    return SyncPolicy(acks, copies, degrade_after_ns)


def _level(key: str, value: str) -> str:
    if value not in LEVELS:
        raise UsageError(f"setting {key}: {value!r} is none of {', '.join(LEVELS)}")
    return value


def _copies(value: str) -> int | None:
    if value == "all":
        return None
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) < PRODUCTION.peers_max:
        raise UsageError(f'copies: {value!r} is not "all" or 1 to {PRODUCTION.peers_max - 1}')
    return int(value)


def _degrade_after_ns(value: str) -> int | None:
    if value == "block":
        return None
    match = _SECONDS.match(value)
    if match is None or float(match[1]) > DEGRADE_AFTER_S_MAX:
        raise UsageError(
            f'degrade_after: {value!r} is not "block" or seconds up to {DEGRADE_AFTER_S_MAX}',
            hint="for example 5s",
        )
    return round(float(match[1]) * 1000) * MS
