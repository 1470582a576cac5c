"""The result of a benchmark: figures with their bounds, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 2
GOOD_STATES = frozenset({"Stream", "Fold"})
"""States of a peer in which a run counts; a resync or a bitmap is another kind of work."""


@dataclass(frozen=True)
class Figure:
    """One number. `bound` is empty when there is nothing to hold."""

    name: str
    value: float
    unit: str
    bound: str = ""
    is_met: bool | None = None
    worst: float | None = None
    best: float | None = None


@dataclass
class Result:
    """Everything one benchmark found out."""

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    peer_states: set[str] = field(default_factory=set)
    invalid_because: list[str] = field(default_factory=list)
    skipped_because: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    """Of `rows`: the numbers behind the figures, where a comparison has many; else none."""
    rows: list[list[str | float]] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        """Whether it ran, and under the conditions that its figures are about."""
        return not self.invalid_because and not self.skipped_because

    def note(self, name: str, value: float, unit: str) -> None:
        """A figure without a bound."""
        self.figures.append(Figure(name, value, unit))

    def at_least(self, name: str, values: Sequence[float], bound: float, unit: str = "x") -> None:
        """The median of one value a round, which should reach the bound."""
        value = statistics.median(values)
        text = f"≥ {bound:g}"
        is_met = value >= bound
        self.figures.append(Figure(name, value, unit, text, is_met, min(values), max(values)))

    def at_most(self, name: str, values: Sequence[float], bound: float, unit: str = "x") -> None:
        """The median of one value a round, which should stay within the bound."""
        value = statistics.median(values)
        text = f"≤ {bound:g}"
        is_met = value <= bound
        self.figures.append(Figure(name, value, unit, text, is_met, max(values), min(values)))

    def every_below(self, name: str, values: Sequence[float], bound: float, unit: str) -> None:
        """The median of one value a round, none of which may reach the bound."""
        value, text = statistics.median(values), f"every < {bound:g}"
        is_met = max(values) < bound
        self.figures.append(Figure(name, value, unit, text, is_met, max(values), min(values)))

    def median(self, name: str, values: Sequence[float], unit: str) -> None:
        """The median of one value a round, with its range."""
        value = statistics.median(values)
        self.figures.append(Figure(name, value, unit, "", None, min(values), max(values)))

    def judge_states(self, states: Iterable[str], allowed: Iterable[str] = ()) -> None:
        """Take note of a peer's states; others than streaming ones make the run invalid."""
        found = set(states)
        self.peer_states |= found
        strange = found - GOOD_STATES - set(allowed)
        if strange:
            self.invalid_because.append(f"the peer was in {', '.join(sorted(strange))}")

    def to_json(self) -> dict[str, Any]:
        """The document; the runner adds who, when, where and the verdict."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "title": self.title,
            "is_valid": self.is_valid,
            "invalid_because": self.invalid_because,
            "skipped_because": self.skipped_because,
            "peer_states": sorted(self.peer_states),
            "settings": self.settings,
            "figures": [asdict(figure) for figure in self.figures],
            "table": {"columns": self.columns, "rows": self.rows},
            "rounds": self.rounds,
        }


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def disturbance(machine: dict[str, Any]) -> str:
    """What other work there was, of all CPUs."""
    others = machine["others_part"] + machine["stolen_part"]
    return f"{machine['busy_before']:.0%} in use before, {others:.0%} by others meanwhile"


def show(console: Console, document: dict[str, Any]) -> None:
    """Print a document as a table."""
    if document["table"]["rows"]:
        console.print(_details(document))
    table = Table(title=document["title"], title_justify="left", title_style="bold")
    table.add_column("figure")
    for heading in ("median", "unit", "worst … best", "bound", ""):
        table.add_column(heading, justify="right")
    marks = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: ""}
    for figure in document["figures"]:
        worst, best = figure["worst"], figure["best"]
        span = "" if worst is None else f"{number(worst)} … {number(best)}"
        cells = (figure["name"], number(figure["value"]), figure["unit"], span, figure["bound"])
        table.add_row(*cells, marks[figure["is_met"]])
    console.print(table)
    if document["skipped_because"]:
        console.print(f"  skipped: {document['skipped_because']}")
        return
    for reason in document["invalid_because"]:
        console.print(f"  [red]does not count:[/red] {reason}")
    if document["verdict"] == "not quiet":
        console.print(f"  [red]not quiet:[/red] {disturbance(document['machine'])}")
    states = ", ".join(document["peer_states"]) or "not watched"
    console.print(f"  peer: {states}; {document['seconds']:.0f} s\n", highlight=False)


def _details(document: dict[str, Any]) -> Table:
    columns = document["table"]["columns"]
    table = Table(*columns, title=document["title"], title_justify="left", title_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in document["table"]["rows"]:
        table.add_row(*(cell if isinstance(cell, str) else number(cell) for cell in row))
    return table


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)
