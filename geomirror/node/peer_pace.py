"""Whether a peer catches up: what comes in against what goes out, and how long that takes.

```
 Stream, Fold   left ÷ (out - in); never, if more comes in than goes out
 Resync         left ÷ out: what is to be compared does not grow. What is written meanwhile waits in
                the journal: if that overflows before the end, the resync goes on with more to do
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_RATE_MIN = 1.0
"""Bytes a second below which a rate says nothing."""


@dataclass(frozen=True)
class Pace:
    """Bytes and bytes per second, of contents before compression."""

    left: int
    """Until the peer has everything, or its resync is over."""
    incoming: float
    """What writers add."""
    outgoing: float | None
    """What the peer gets, or what is compared; None: nothing moves, or it is not known yet."""
    room: float | None = None
    """In a resync: what may come in before the journal overflows."""

    @property
    def is_converging(self) -> bool | None:
        """Whether that comes to an end; None: not known."""
        if self.left == 0:
            return True
        if self.outgoing is None or self.outgoing < _RATE_MIN:
            return None
        if self.room is None:
            return self.outgoing > self.incoming
        return self.incoming * self.left / self.outgoing <= self.room

    @property
    def eta_seconds(self) -> float | None:
        """When; None: not known, or never."""
        if not self.is_converging:
            return None
        if self.left == 0:
            return 0.0
        assert self.outgoing is not None
        net = self.outgoing - (self.incoming if self.room is None else 0)
        return round(self.left / net, 1)

    def describe(self) -> dict[str, Any]:
        """The keys of a peer in `status --json`."""
        return {
            "in_bytes_per_second": round(self.incoming),
            "out_bytes_per_second": None if self.outgoing is None else round(self.outgoing),
            "is_converging": self.is_converging,
            "eta_seconds": self.eta_seconds,
        }


UNKNOWN: dict[str, Any] = {
    "in_bytes_per_second": None,
    "out_bytes_per_second": None,
    "is_converging": None,
    "eta_seconds": None,
}
"""Of a peer seen from a secondary."""
