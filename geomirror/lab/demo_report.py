"""The demo's result: checks, figures, and a chart of the lag. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

BARS = " ▁▂▃▄▅▆▇█"


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of all lie (nearest rank); 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = max(1, -(-int(fraction * 1000) * len(ordered) // 1000))
    return ordered[min(rank, len(ordered)) - 1]


def squeeze(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: the maximum of each stretch, so that no peak is lost."""
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [max(values[a:b]) for a, b in itertools.pairwise(edges)]


def bars(values: Sequence[float], width: int, top: float) -> str:
    """One line of block characters, `top` being a full one."""
    scale = (len(BARS) - 1) / top if top > 0 else 0.0
    return "".join(
        BARS[min(len(BARS) - 1, 1 + int(value * scale * 0.999))] if value > 0 else BARS[0]
        for value in squeeze(values, width)
    )


def chart(values: Sequence[float], width: int, height: int, top: float) -> list[str]:
    """`height` lines, the highest first."""
    squeezed = squeeze(values, width)
    lines = []
    for row in range(height - 1, -1, -1):
        line = ""
        for value in squeezed:
            eighths = int(value / top * height * 8 + 0.5) - row * 8 if top > 0 else 0
            line += BARS[max(0, min(8, eighths))]
        lines.append(line)
    return lines


@dataclass
class Report:
    """Everything the demo found out."""

    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Why a check failed."""
    acts: dict[str, list[str]] = field(default_factory=dict)
    """Names of the checks that were made in each part, in order."""
    _act: str = "the demo"

    def begin_act(self, title: str) -> int:
        """Checks made from now on belong to this part; its number."""
        self._act = title
        self.acts.setdefault(title, [])
        return len(self.acts)

    def check(self, name: str, passed: bool, note: str = "") -> bool:
        """Record a check. One that failed once stays failed."""
        if name not in self.checks:
            self.acts.setdefault(self._act, []).append(name)
        self.checks[name] = self.checks.get(name, True) and passed
        if not passed:
            self.notes[name] = note
        return passed

    @property
    def passed(self) -> bool:
        """Whether there were checks and all hold."""
        return bool(self.checks) and all(self.checks.values())

    def to_json(self) -> dict[str, object]:
        """The report file."""
        return {
            "schema_version": 1,
            "passed": self.passed,
            "checks": self.checks,
            "figures": self.figures,
            "notes": self.notes,
            "acts": self.acts,
        }
