"""A **standing**: what a primary says of itself, and of who holds everything that is confirmed.

```
 primary:  change of rules or of the in-sync set ─▶ version + 1 ─▶ durable here ─▶ said to members
 members:  the latest one heard, durable, kept beyond the loss of the primary
```
Standings of one resource are ordered by (fencing token, version, time of the primary). The promise
(I15): when a primary says a standing, every write that a FLUSH has answered by then lies in epochs
up to `confirmed_epoch`; and while `is_binding`, no flush is answered against its rules before all
of its `in_sync` have a later standing durable.
Deliberately not here: who makes standings and when (`wan_protocol.peer_standings`), and what they
mean for a promotion (`verdict`).
"""

from __future__ import annotations

import msgspec

from geomirror.limits import PRODUCTION

NAME_LENGTH_MAX = 64
"""Twice that of a node's name; bounds what a hostile primary can make us keep."""
LEVELS_WAITED_FOR = ("received", "durable", "applied")
BLOCK_NS = -1
"""`degrade_after_ns` of a primary that never goes on without a peer."""


class LeftOut(msgspec.Struct, frozen=True, array_like=True):
    """Since when flushes are answered without a peer."""

    epoch: int
    """The first epoch that was confirmed without it, or may have been."""
    wall_ns: int


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """One statement; fields are only ever added at the end, with defaults."""

    generation: str
    """32 hexadecimal digits."""
    token: int
    """Fencing token of the generation."""
    version: int
    """Grows with every change of the rules or of the in-sync set, and with every start."""
    wall_ns: int
    """The primary's clock when it said this; never goes back within a version."""
    epoch: int
    """Last sealed epoch."""
    end_lsn: int
    """End of that epoch in the primary's journal."""
    open_bytes: int
    """Completed after that epoch, about."""
    confirmed_epoch: int
    """Every write that a flush had answered lies in epochs up to this one."""
    acks: dict[str, str] = msgspec.field(default_factory=dict)
    """Peers that flushes wait for → `received`, `durable` or `applied`."""
    copies: int = 0
    """How many of them must have it; 0: all that are in sync."""
    degrade_after_ns: int = 0
    """A peer that keeps a flush waiting for so long is left out; -1: never."""
    is_binding: bool = False
    """The rules are `block`, and no flush was or will be answered against them before every
    member of `in_sync` knows better."""
    in_sync: list[str] = msgspec.field(default_factory=list)
    """Peers that flushes wait for and that had everything confirmed when they were taken in."""
    left_out: dict[str, LeftOut] = msgspec.field(default_factory=dict)
    """Peers of `acks` that are not in sync, if they ever were."""
    behind_ns: dict[str, int] = msgspec.field(default_factory=dict)
    """Every peer → age of the oldest write that it has not durable, as far as the primary knows."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Later standings of a resource compare greater."""
        return (self.token, self.version, self.wall_ns)

    @property
    def change(self) -> tuple[int, int]:
        """Equal for standings with the same rules and the same in-sync set."""
        return (self.token, self.version)


def is_sane(standing: Standing) -> bool:
    """Whether a standing from outside keeps all bounds."""
    numbers = (
        *(standing.token, standing.version, standing.wall_ns, standing.epoch, standing.end_lsn),
        *(standing.open_bytes, standing.confirmed_epoch, standing.copies),
    )
    behind = standing.behind_ns
    names = [*standing.acks, *standing.in_sync, *standing.left_out, *behind]
    return (
        all(0 <= number < 1 << 63 for number in numbers)
        and BLOCK_NS <= standing.degrade_after_ns < 1 << 63
        and len(standing.generation) == 32
        and max(map(len, (standing.acks, standing.in_sync, standing.left_out, behind)))
        <= PRODUCTION.peers_max
        and all(0 < len(name) <= NAME_LENGTH_MAX for name in names)
        and all(level in LEVELS_WAITED_FOR for level in standing.acks.values())
        and all(0 <= out.epoch < 1 << 63 for out in standing.left_out.values())
        and all(0 <= out.wall_ns < 1 << 63 for out in standing.left_out.values())
        and all(0 <= age_ns < 1 << 63 for age_ns in behind.values())
    )


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Standing)


def encode_standing(standing: Standing) -> bytes:
    """As it is kept on disk and sent in calls: a JSON array of the fields, in order."""
    return _ENCODER.encode(standing)


def decode_standing(data: bytes) -> Standing | None:
    """The standing, None when this is none."""
    try:
        standing = _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return standing if is_sane(standing) else None
