"""What the demo shows while it runs: acts, steps, links, lag. It moves on a terminal only.

What is done is printed for good. Below it, on a terminal, the step under way, the links, the lag
and the last events are drawn again and again, in few lines, so that they fit into a small window.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from geomirror.lab.demo_report import Report, bars

WIDTH_MAX = 60
EVENTS_SHOWN = 6
STYLES = ("cyan", "magenta", "yellow", "green")
_MARKS = {True: ("  ✓ ", "green"), False: ("  ✗ ", "bold red")}


class View:
    """Progress on `console`; use as a context manager."""

    def __init__(self, console: Console, report: Report) -> None:
        self._console = console
        self._report = report
        self._begin = time.monotonic()
        self._step = ""
        self._step_begin = 0.0
        self._facts: list[str] = []
        self._events: list[Text] = []
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

    def act(self, title: str, what: str) -> None:
        """A new part begins; checks made from now on belong to it."""
        number = self._report.begin_act(title)
        heading = Text.assemble((f"\n{number} {title}", "bold"), (f"  {what}", "dim"))
        self._console.print(heading)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A step with its time; marked as failed when it raises."""
        self._step, self._step_begin, self._facts = title, time.monotonic(), []
        is_done = False
        try:
            yield
            is_done = True
        finally:
            seconds = time.monotonic() - self._step_begin
            text = Text.assemble(_MARKS[is_done], title, (f"  {seconds:.1f} s", "dim"))
            self._step = ""
            self._console.print(text)
            for fact in self._facts:
                self._console.print(Padding(Text(fact), (0, 0, 0, 6), expand=False))

    def fact(self, text: str) -> None:
        """Something found out: it stays below its step."""
        self._facts.append(text)

    def command(self, node: str, text: str) -> None:
        """A command is run at a node."""
        self._event(Text.assemble((f"{node} $ ", "dim"), (text, "bold")))

    def event(self, text: str) -> None:
        """Something happened: a fault or its end."""
        self._event(Text(text, style="dim"))

    def show_lag(self, peer: str, seconds: float) -> None:
        """One sample of a peer's lag."""
        self._lags.setdefault(peer, []).append(seconds)

    def forget_lags(self) -> None:
        """Another node is the primary from now on: its peers are others."""
        self._lags.clear()

    def show_links(self, links: Mapping[str, bool]) -> None:
        """Which links are up now."""
        self._links = dict(links)

    def show_numbers(self, numbers: Mapping[str, str]) -> None:
        """Counters, by their label."""
        self._numbers = dict(numbers)

    def _event(self, text: Text) -> None:
        clock = (f"    {time.monotonic() - self._begin:5.1f} s  ", "dim")
        line = Text.assemble(clock, text)
        self._events.append(line)
        if self._live is None:
            self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._step:
            seconds = time.monotonic() - self._step_begin
            running = (f"  {seconds:.0f} s", "dim")
            parts.append(Text.assemble(("  … ", "bold"), self._step, running))
        if self._links:
            line = Text("  links  ")
            for name, is_up in self._links.items():
                mark, style = ("━", "green") if is_up else ("╳", "bold red")
                line.append(f"{mark} {name}  ", style)
            parts.append(line)
        parts += self._render_lags()
        if self._numbers:
            text = "  ".join(f"{label} {value}" for label, value in self._numbers.items())
            parts.append(Text(f"  {text}", style="dim"))
        for event in self._events[-EVENTS_SHOWN:]:
            parts.append(_one_line(event, self._console.width))
        return Group(*parts)

    def _render_lags(self) -> list[RenderableType]:
        top = max((max(values) for values in self._lags.values() if values), default=0.0)
        width = max(10, min(WIDTH_MAX, self._console.width - 28))
        lines: list[RenderableType] = []
        for (peer, values), style in zip(self._lags.items(), STYLES, strict=False):
            line = Text(f"  lag {peer:<10} ")
            line.append(bars(values[-width:], width, max(top, 1.0)).ljust(width), style)
            line.append(f" {values[-1]:6.2f} s")
            lines.append(line)
        return lines


def _one_line(text: Text, width: int) -> Text:
    """A copy that takes one line of the terminal, whatever its width."""
    short = text.copy()
    short.truncate(width - 1, overflow="ellipsis")
    return short
