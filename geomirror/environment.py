"""Clock and entropy: the only module that imports `time`, `random` and `secrets`.

Cores receive `now_ns` (monotonic), `wall_ns` (Unix time, may step) and an `Entropy` as arguments,
so that a simulation can run them with a simulated clock and a seeded generator.
"""

from __future__ import annotations

import random
import secrets
import time
from typing import Protocol

US = 1_000
MS = 1_000_000
"""Nanoseconds in a millisecond."""
SECOND = 1_000_000_000
"""Nanoseconds in a second."""


class Clock(Protocol):
    """Source of both times."""

    def now_ns(self) -> int:
        """Monotonic time in ns; comparable within one process only."""

    def wall_ns(self) -> int:
        """Unix time in ns; may step in either direction. Never used for ordering or leases."""


class Entropy(Protocol):
    """Source of randomness: identities, salts, keys and jitter."""

    def token_bytes(self, length: int) -> bytes:
        """`length` random bytes; cryptographically strong in production."""

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high], for jitter."""


class SystemClock:
    """The machine's clocks: the functions themselves, since a flush asks four times."""

    now_ns = staticmethod(time.monotonic_ns)
    wall_ns = staticmethod(time.time_ns)


class SystemEntropy:
    """The kernel's random generator."""

    def token_bytes(self, length: int) -> bytes:
        """`length` bytes from the kernel."""
        return secrets.token_bytes(length)

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high]."""
        return secrets.SystemRandom().uniform(low, high)


class SeededEntropy:
    """Repeatable randomness for simulations and the lab; never for secrets."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def token_bytes(self, length: int) -> bytes:
        """`length` repeatable bytes."""
        return self._random.randbytes(length)

    def uniform(self, low: float, high: float) -> float:
        """A repeatable float in [low, high]."""
        return self._random.uniform(low, high)
