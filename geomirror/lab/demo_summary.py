"""The end of the demo: what it comes to, the lag as a chart, checks by act, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from geomirror.lab.demo_compare import OF_A_COPY
from geomirror.lab.demo_report import Report, chart
from geomirror.lab.demo_view import STYLES, WIDTH_MAX
from geomirror.limits import MIB

CHART_ROWS = 5
_GAP = 2
_Figures = Mapping[str, float]


def show_report(
    console: Console, report: Report, lags: Mapping[str, Sequence[float]], path: str
) -> None:
    """Chart, checks, figures, and last what they come to."""
    _show_lags(console, lags)
    for title, names in report.acts.items():
        _show_checks(console, report, title, names)
    console.print()
    console.print(Padding(_figures(report.figures, console.width - 2), (0, 0, 0, 2)))
    console.print()
    for subject, text in sentences(report.figures):
        line = Table.grid(padding=(0, 2))
        line.add_column(width=11, style="bold")
        line.add_column()
        line.add_row(subject, text)
        console.print(Padding(line, (0, 0, 0, 2)))
    held = sum(report.checks.values())
    verdict = Text("passed", style="bold green") if report.passed else Text("FAILED", "bold red")
    counted = f"  {held} of {len(report.checks)} checks hold"
    console.print(Text.assemble("\n  ", verdict, counted, (f"  {path}\n", "dim")))


def sentences(figures: _Figures) -> list[tuple[str, str]]:
    """(subject, sentence) of what the figures say, as far as the demo got."""
    found: list[tuple[str, str]] = []
    if "writes" in figures and "flaps" in figures:
        found.append(
            (
                "mirrored",
                f"{figures['writes']:,.0f} writes through {figures['flaps']:.0f} outages and "
                f"{figures['kills']:.0f} kills of daemons; median lag "
                f"{figures['lag_seconds_p50']:.2f} s; confirmed writes lost: "
                f"{figures['lost_confirmed_writes']:.0f}",
            )
        )
    if "view_seconds" in figures:
        found.append(
            (
                "view",
                f"the copy as it was before the mistake, readable after "
                f"{figures['view_seconds']:.1f} s, while writing went on",
            )
        )
    if "failover_seconds" in figures:
        found.append(
            (
                "failover",
                f"{figures['failover_seconds']:.1f} s from the command to the first write; "
                f"{figures['failover_lost_writes']:,.0f} writes of the cut-off primary were not "
                "shipped yet",
            )
        )
    if "failback_bytes" in figures:
        found.append(
            (
                "failback",
                f"{_mib(figures, 'failback_bytes')} crossed the links for "
                f"{_mib(figures, 'divergence_bytes')} of divergence, not the "
                f"{_mib(figures, 'image_bytes')} of the volume, in "
                f"{figures['failback_seconds']:.1f} s",
            )
        )
    if "switchover_seconds" in figures:
        found.append(
            (
                "switchover",
                f"{figures['switchover_seconds']:.1f} s from the command to the first write, "
                "nothing lost",
            )
        )
    return found


def _mib(figures: _Figures, name: str) -> str:
    return f"{figures[name] / MIB:.1f} MiB"


def _show_lags(console: Console, lags: Mapping[str, Sequence[float]]) -> None:
    top = max((max(values) for values in lags.values() if values), default=0.0)
    width = max(10, min(WIDTH_MAX, console.width - 12))
    for (peer, values), style in zip(lags.items(), STYLES, strict=False):
        console.print(f"\n  lag of {peer} under load and faults, seconds", highlight=False)
        for row, line in enumerate(chart(values, width, CHART_ROWS, top)):
            label = top * (CHART_ROWS - row) / CHART_ROWS
            console.print(Text.assemble((f"  {label:5.1f} ┤", "dim"), (line, style)))
        console.print(Text(f"        └{'─' * width}", style="dim"))


def _show_checks(console: Console, report: Report, title: str, names: Sequence[str]) -> None:
    """One paragraph an act; a check that failed has a line of its own, with the reason."""
    if not names:
        return
    held = [name for name in names if report.checks[name]]
    mark = ("✓", "green") if len(held) == len(names) else ("✗", "bold red")
    count = (f"  {len(held)} of {len(names)} checks hold", "dim")
    console.print(Text.assemble("\n  ", mark, " ", (title, "bold"), count))
    said = " · ".join(_grouped(held))
    console.print(Padding(Text(said, style="dim"), (0, 0, 0, 4), expand=False))
    for name in names:
        if not report.checks[name]:
            text = f"✗ {name.replace('_', ' ')}: {report.notes.get(name, '')}"
            console.print(Padding(Text(text, style="red"), (0, 0, 0, 4), expand=False))


def _grouped(names: Sequence[str]) -> list[str]:
    """The names in words; what holds of one copy in one phrase."""
    phrases: dict[str, list[str]] = {}
    for name in names:
        subject = next((name.removesuffix(each) for each in OF_A_COPY if name.endswith(each)), "")
        words = name.removeprefix(subject).removeprefix("_").replace("_", " ")
        phrases.setdefault(subject or name, []).append(words)
    return [
        words[0] if subject in names else f"{subject.replace('_', ' ')}: {', '.join(words)}"
        for subject, words in phrases.items()
    ]


def _figures(figures: _Figures, width: int) -> Table:
    """Name and value, in as many columns as fit."""
    cells = [
        (name.replace("_", " "), f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
        for name, value in figures.items()
    ]
    columns = next(count for count in (3, 2, 1) if count == 1 or _width(cells, count) <= width)
    rows = -(-len(cells) // columns)
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    padded = cells + [("", "")] * (rows * columns - len(cells))
    for row in range(rows):
        table.add_row(*(part for at in range(columns) for part in padded[row + at * rows]))
    return table


def _width(cells: Sequence[tuple[str, str]], columns: int) -> int:
    """Of the table of figures in so many columns."""
    rows = -(-len(cells) // columns)
    parts = [cells[at : at + rows] for at in range(0, len(cells), rows)]
    widths = [
        max(len(name) for name, _ in part) + _GAP + max(len(value) for _, value in part)
        for part in parts
    ]
    return sum(widths) + _GAP * (len(widths) - 1)
