"""How much work a run makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Of one run of one benchmark."""

    directory: Path
    """Empty, on the file system to be measured; removed afterwards."""
    is_short: bool = False
    """Small sizes and few rounds: proves that it works, the figures mean little."""
    rounds: int | None = None
    """Overrides the benchmark's own number."""
    seconds: float | None = None
    """Overrides the length of one slot."""

    def choose(self, full: int, short: int) -> int:
        """A size that depends on the kind of run."""
        return short if self.is_short else full

    def choose_rounds(self, full: int, short: int) -> int:
        """The number of rounds."""
        return self.rounds or self.choose(full, short)

    def choose_seconds(self, full: float, short: float) -> float:
        """The length of a slot."""
        return self.seconds or (short if self.is_short else full)
