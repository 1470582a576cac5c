"""Puts figures into `docs/measurements.md`, between the marks of each benchmark."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.report import disturbance, number
from geomirror.errors import NotFoundError

_MARKS = {True: "met", False: "**missed**", None: ""}


def update(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """Replace the section of a benchmark by the figures of its cells, in this order.

    :raises NotFoundError: the page has no marks for it.
    """
    name = documents[0]["name"]
    begin, end = (f"<!-- {word}: {name} -->" for word in ("begin", "end"))
    text = path.read_text(encoding="utf-8")
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found or not found_end:
        raise NotFoundError(f"{path} has no marks for {name}")
    path.write_text(f"{head}{begin}\n{render(documents)}{end}{tail}", encoding="utf-8")


def section(path: Path, name: str) -> str:
    """What the page says between the marks of a benchmark."""
    text = path.read_text(encoding="utf-8")
    return text.partition(f"<!-- begin: {name} -->\n")[2].partition(f"<!-- end: {name} -->")[0]


def render(documents: Sequence[dict[str, Any]]) -> str:
    """The figures of a benchmark's cells as Markdown: one head, one table of each kind."""
    lines = [_head(documents), ""]
    for document in documents:
        if document["verdict"] == "not quiet":
            name = document["cell"] or document["name"]
            lines += [f"**Not quiet** ({name}): {disturbance(document['machine'])}.", ""]
    rows = [row for document in documents for row in document["table"]["rows"]]
    if rows:
        columns = documents[0]["table"]["columns"]
        lines += [_line(columns), _line(["---", "---", *["---:"] * (len(columns) - 2)])]
        lines += [_line(x if isinstance(x, str) else number(x) for x in row) for row in rows]
        lines.append("")
    lines += ["| figure | median | worst … best | bound | |", "| --- | ---: | ---: | ---: | --- |"]
    for figure in (figure for document in documents for figure in document["figures"]):
        worst, best = figure["worst"], figure["best"]
        span = "" if worst is None else f"{number(worst)} … {number(best)}"
        value = f"{number(figure['value'])} {figure['unit']}".strip()
        lines.append(
            _line((figure["name"], value, span, figure["bound"], _MARKS[figure["is_met"]]))
        )
    return "\n".join(lines) + "\n"


def _head(documents: Sequence[dict[str, Any]]) -> str:
    first = documents[0]
    settings = {
        key: value
        for key, value in first["settings"].items()
        if all(document["settings"].get(key) == value for document in documents)
    }
    states = sorted({state for document in documents for state in document["peer_states"]})
    days = sorted({document["began_utc"][:10] for document in documents})
    commits = sorted({document["commit"] for document in documents})
    load = max(document["machine"]["load_average_before"] for document in documents)
    parts = [
        f"`{command(first['name'], first['options'])}`",
        " and ".join(days),
        f"commit {', '.join(commits)}",
        f"{sum(document['seconds'] for document in documents):.0f} s",
        f"load before ≤ {load}",
        f"peer: {', '.join(states) or 'not watched'}",
        ", ".join(f"{key} {value}" for key, value in settings.items()),
    ]
    return " · ".join(part for part in parts if part)


def command(name: str, options: dict[str, Any]) -> str:
    """What measures it again."""
    flags = " --short" if options["is_short"] else ""
    flags += f" --rounds {options['rounds']}" if options["rounds"] else ""
    flags += f" --seconds {options['seconds']:g}" if options["seconds"] else ""
    return f"python -m bench --only {shlex.quote(name)}{flags}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
