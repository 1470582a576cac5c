"""Puts figures into `docs/measurements.md`, between the marks of each benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.report import number
from geomirror.errors import NotFoundError


def update(path: Path, document: dict[str, Any]) -> None:
    """Replace the section of a benchmark.

    :raises NotFoundError: the page has no marks for it.
    """
    begin, end = (f"<!-- {word}: {document['name']} -->" for word in ("begin", "end"))
    text = path.read_text(encoding="utf-8")
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found or not found_end:
        raise NotFoundError(f"{path} has no marks for {document['name']}")
    path.write_text(f"{head}{begin}\n{render(document)}{end}{tail}", encoding="utf-8")


def render(document: dict[str, Any]) -> str:
    """The figures of a document as Markdown."""
    machine, states = document["machine"], ", ".join(document["peer_states"]) or "not watched"
    settings = ", ".join(f"{key} {value}" for key, value in document["settings"].items())
    lines = [
        f"`{document['command']}` · {document['began_utc'][:10]} · {document['seconds']:.0f} s · "
        f"load before {machine['load_average_before']} · peer: {states} · {settings}",
        "",
        "| figure | median | worst … best | bound | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    rows = document["table"]["rows"]
    if rows:
        columns = document["table"]["columns"]
        details = [_line(columns), _line(["---", "---", *["---:"] * (len(columns) - 2)])]
        details += [_line(x if isinstance(x, str) else number(x) for x in row) for row in rows]
        lines[2:2] = [*details, ""]
    marks = {True: "met", False: "**missed**", None: ""}
    for figure in document["figures"]:
        worst, best = figure["worst"], figure["best"]
        span = "" if worst is None else f"{number(worst)} … {number(best)}"
        value = f"{number(figure['value'])} {figure['unit']}".strip()
        cells = (figure["name"], value, span, figure["bound"], marks[figure["is_met"]])
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
