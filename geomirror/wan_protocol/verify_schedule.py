"""When copies are compared without being asked, and whether an interrupted comparison goes on.

| setting        | values                                          | default |
| -------------- | ----------------------------------------------- | ------- |
| `verify_every` | `off`, or 1 s to 366 d: `90s`, `12h`, `7d`       | `7d`    |
| `verify_rate`  | bytes a second at each side, 256K to 1T: `20M`   | `20M`   |
| `verify_heal`  | `on`, `off`: are blocks that differ written again | `off`   |

```
 first seen ──── every ────▶ due ─▶ compared ──── every, from its begin ────▶ due …
 clean, or first seen ─────────── 2 × every ───────────▶ overdue, until the next clean one
```
Times are those of the wall clock, since an interval outlives the daemon. A clock that stood ahead
once puts nothing off for longer than one more interval.
Deliberately not here: how copies are compared (`verifying`), and what is kept of it (the node).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from geomirror.environment import SECOND
from geomirror.errors import UsageError
from geomirror.limits import KIB, MIB, TIB
from geomirror.volume.generations import is_on_chain
from geomirror.volume.superblock import GenerationRecord

EVERY, RATE, HEAL = "verify_every", "verify_rate", "verify_heal"
SETTINGS = (EVERY, RATE, HEAL)
OFF = "off"
DAY_NS = 24 * 3600 * SECOND
EVERY_NS = 7 * DAY_NS
"""Media errors are found within days, and a TiB at the rate below is read in less than one."""
EVERY_NS_MAX = 366 * DAY_NS
RATE_BYTES = 20 * MIB
"""A fraction of what a single disk reads; on the link it is some 300 bytes a second."""
RATE_MIN = 256 * KIB
"""Bytes per second; slower ones would keep an epoch for too long."""
RATE_BYTES_MAX = TIB
OVERDUE_INTERVALS = 2
_UNITS = {"s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND, "d": DAY_NS}
_SIZES = {"": 1, "K": KIB, "M": MIB, "G": 1024 * MIB, "T": TIB}
_DURATION = re.compile(r"([0-9]{1,9})([smhd])")
_RATE = re.compile(r"([0-9]{1,13})([KMGT]?)")


@dataclass(frozen=True)
class VerifySchedule:
    """The settings of a resource, checked."""

    every_ns: int | None = EVERY_NS
    """None: off."""
    bytes_per_second: int = RATE_BYTES
    heals: bool = False


def parse_schedule(settings: Mapping[str, str]) -> VerifySchedule:
    """The schedule of a resource; other settings are not looked at.

    :raises UsageError: a value that is none.
    """
    heals = settings.get(HEAL, OFF)
    if heals not in ("on", OFF):
        raise UsageError(f"{HEAL}: {heals!r} is none of on, off")
    every, rate = settings.get(EVERY), settings.get(RATE)
    return VerifySchedule(
        EVERY_NS if every is None else _every_ns(every),
        RATE_BYTES if rate is None else _rate(rate),
        heals == "on",
    )


def _every_ns(value: str) -> int | None:
    if value == OFF:
        return None
    match = _DURATION.fullmatch(value)
    found = int(match[1]) * _UNITS[match[2]] if match is not None else 0
    if not SECOND <= found <= EVERY_NS_MAX:
        raise UsageError(
            f'{EVERY}: {value!r} is not "off" or a duration from 1s to 366d',
            hint="for example 7d or 12h",
        )
    return found


def _rate(value: str) -> int:
    match = _RATE.fullmatch(value)
    found = int(match[1]) * _SIZES[match[2]] if match is not None else 0
    if not RATE_MIN <= found <= RATE_BYTES_MAX:
        raise UsageError(
            f"{RATE}: {value!r} is not a number of bytes from 256K to 1T", hint="for example 20M"
        )
    return found


class Times(msgspec.Struct):
    """What a primary keeps of a copy, across restarts; Unix times in ns."""

    first_wall_ns: int
    """When this node, as a primary, had the copy first."""
    counts_wall_ns: int
    """The interval counts from here."""
    clean_wall_ns: int | None = None
    """Begin of the last comparison that came to its end and found nothing."""

    @classmethod
    def first_seen(cls, wall_ns: int) -> Times:
        """Of a copy that is new to this primary."""
        return cls(wall_ns, wall_ns)

    def ended(self, started_wall_ns: int, *, is_clean: bool) -> None:
        """A comparison, whoever asked for it, came to its end."""
        self.counts_wall_ns = started_wall_ns
        if is_clean:
            self.clean_wall_ns = started_wall_ns

    def put_off(self, wall_ns: int) -> None:
        """An operator stopped one: the next one an interval later. It may be overdue by then."""
        self.counts_wall_ns = wall_ns

    def due_wall_ns(self, every_ns: int, wall_ns: int) -> int:
        """When the next one begins."""
        if self.is_ahead(every_ns, wall_ns):
            return wall_ns
        return self.counts_wall_ns + every_ns

    def is_ahead(self, every_ns: int, wall_ns: int) -> bool:
        """The clock stood ahead when it began: nobody knows how long ago that is."""
        return self.counts_wall_ns > wall_ns + every_ns

    def is_overdue(self, every_ns: int, wall_ns: int) -> bool:
        """Whether nothing was found clean for longer than it should be."""
        clean = self.clean_wall_ns
        last = self.first_wall_ns if clean is None else clean
        # A time that far ahead says nothing.
        return not wall_ns - OVERDUE_INTERVALS * every_ns <= last <= wall_ns + every_ns


class Copy(NamedTuple):
    """A copy as the schedule looks at it."""

    name: str
    times: Times
    is_running: bool
    is_comparable: bool
    """Something can be compared with it right now."""


def choose(every_ns: int | None, copies: Iterable[Copy], wall_ns: int) -> str | None:
    """The copy to begin with now, None for none; the longest due first, and one at a time: disks
    that are read for one comparison are not read for another. One that waits keeps nobody up."""
    known = list(copies)
    if every_ns is None or any(each.is_running and each.is_comparable for each in known):
        return None
    due = [
        # What is due since nobody knows when comes first: it would be the last one for ever.
        (not each.times.is_ahead(every_ns, wall_ns), moment, each.name)
        for each in known
        if each.is_comparable and not each.is_running
        if (moment := each.times.due_wall_ns(every_ns, wall_ns)) <= wall_ns
    ]
    return min(due)[-1] if due else None


def why_anew(
    chain: Sequence[GenerationRecord],
    generation: str,
    epoch: int,
    interrupted_ns: int,
    every_ns: int | None,
) -> str:
    """Why an interrupted comparison does not go on where it was, "" if it does.

    What was compared stays compared while the history goes on from there, also after a change of
    the primary and back. It does not count for ever: a copy is to be looked at within an interval
    (a day at least).

    :param chain: this node's now.
    :param generation: in hexadecimal, in which `epoch` was the newest that it compared.
    :param interrupted_ns: how long ago it was interrupted.
    """
    if not is_on_chain(chain, generation, epoch):
        return "what it had compared was cut off when the primary changed"
    if not 0 <= interrupted_ns <= max(DAY_NS, every_ns or EVERY_NS):
        return "it was interrupted for longer than an interval"
    return ""
