"""What the demo shows while it runs: steps, links, lag. It moves on a terminal only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from geomirror.lab.demo_report import Report, bars, chart

WIDTH = 60
CHART_ROWS = 5
STYLES = ("cyan", "magenta", "yellow", "green")


class View:
    """Progress on `console`; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin = time.monotonic()
        self._steps: list[tuple[str, str, float | None]] = []
        self._events: list[str] = []
        self._lags: dict[str, list[float]] = {}
        self._links: dict[str, bool] = {}
        self._numbers: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print(self._render_steps())

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A step with its time; marked as failed when it raises."""
        begin = time.monotonic()
        self._steps.append(("…", title, None))
        index = len(self._steps) - 1
        mark = "✗"
        try:
            yield
            mark = "✓"
        finally:
            seconds = time.monotonic() - begin
            self._steps[index] = (mark, title, seconds)
            if self._live is None:
                self._console.print(self._render_step(index))

    def event(self, text: str) -> None:
        """Something happened: a fault or its end."""
        line = f"{time.monotonic() - self._begin:5.1f} s  {text}"
        self._events.append(line)
        if self._live is None:
            self._console.print(Text(f"    {line}", style="dim"))

    def show_lag(self, peer: str, seconds: float) -> None:
        """One sample of a peer's lag."""
        self._lags.setdefault(peer, []).append(seconds)

    def show_links(self, links: Mapping[str, bool]) -> None:
        """Which links are up now."""
        self._links = dict(links)

    def show_numbers(self, numbers: Mapping[str, str]) -> None:
        """Counters, by their label."""
        self._numbers = dict(numbers)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._render_steps()]
        if self._links:
            line = Text("  links  ")
            for name, is_up in self._links.items():
                line.append(f"{'━' if is_up else '╳'} {name}  ", "green" if is_up else "bold red")
            parts.append(line)
        top = max((max(values) for values in self._lags.values() if values), default=0.0)
        for (peer, values), style in zip(self._lags.items(), STYLES, strict=False):
            line = Text(f"  lag {peer:<10} ")
            line.append(bars(values[-WIDTH:], WIDTH, max(top, 1.0)), style)
            line.append(f" {values[-1]:.2f} s")
            parts.append(line)
        if self._numbers:
            text = "  ".join(f"{label} {value}" for label, value in self._numbers.items())
            parts.append(Text(f"  {text}", style="dim"))
        parts += [Text(f"    {line}", style="dim") for line in self._events[-6:]]
        return Group(*parts)

    def _render_steps(self) -> RenderableType:
        return Group(*(self._render_step(index) for index in range(len(self._steps))))

    def _render_step(self, index: int) -> Text:
        mark, title, seconds = self._steps[index]
        style = {"✓": "green", "✗": "bold red"}.get(mark, "bold")
        text = Text.assemble((f"  {mark} ", style), title)
        if seconds is not None:
            text.append(f"  {seconds:.1f} s", "dim")
        return text


def show_report(
    console: Console, report: Report, lags: Mapping[str, Sequence[float]], path: str
) -> None:
    """Chart, checks and figures."""
    top = max((max(values) for values in lags.values() if values), default=0.0)
    for (peer, values), style in zip(lags.items(), STYLES, strict=False):
        console.print(f"\n  lag of {peer}, seconds over time", highlight=False)
        lines = chart(values, WIDTH, CHART_ROWS, top)
        for row, line in enumerate(lines):
            label = top * (CHART_ROWS - row) / CHART_ROWS
            console.print(Text.assemble((f"  {label:5.1f} ┤", "dim"), (line, style)))
        console.print(Text(f"        └{'─' * WIDTH}", style="dim"))
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, passed in report.checks.items():
        mark = Text("✓ holds", style="green") if passed else Text("✗ FAILED", style="bold red")
        table.add_row(mark, name.replace("_", " "), Text(report.notes.get(name, ""), style="red"))
    console.print()
    console.print(table)
    figures = Table(box=None, padding=(0, 2), show_header=False)
    for name, value in report.figures.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
        figures.add_row(name.replace("_", " "), Text(shown, justify="right"))
    console.print()
    console.print(figures)
    verdict = Text("passed", style="bold green") if report.passed else Text("FAILED", "bold red")
    console.print(Text.assemble("\n  ", verdict, f"  {path}\n"))
