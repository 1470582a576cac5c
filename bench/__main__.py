"""`python -m bench`: run benchmarks, print their tables, keep their results."""

from __future__ import annotations

import asyncio
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console

from bench import (
    costs,
    failover,
    history,
    link_dead,
    link_use,
    local_writes,
    memory,
    peers,
    postgres,
    restart,
    resync,
    simulator,
    sustained,
    synchronous,
)
from bench.cells import RESULTS, ROOT, Cell, code_digest, commit, is_done, load, parameters, verdict
from bench.document import update
from bench.machine import describe, versions
from bench.options import Options
from bench.quiet import Disturbance, await_quiet
from bench.report import show, write
from geomirror.errors import GeomirrorError

BENCHMARKS: dict[str, list[Cell]] = {
    local_writes.NAME: local_writes.CELLS,
    sustained.NAME: sustained.CELLS,
    postgres.NAME: postgres.CELLS,
    peers.NAME: peers.CELLS,
    failover.NAME: failover.CELLS,
    history.NAME: history.CELLS,
    resync.NAME: resync.CELLS,
    **{
        module.NAME: [Cell(module.NAME, module.run)]
        for module in (link_dead, link_use, synchronous, restart, memory, simulator, costs)
    },
}
MEASUREMENTS = ROOT / "docs" / "measurements.md"
SHORT_RESULTS = Path("build/bench")
QUIET_S_MAX = 60.0
"""How long a full run waits before a cell for a quiet machine."""


@click.command()
@click.option("--short", "is_short", is_flag=True, help="Small sizes, few rounds: does it work?")
@click.option(
    *("--only", "names"),
    type=click.Choice([*BENCHMARKS, *(c.label for cells in BENCHMARKS.values() for c in cells)]),
    metavar="NAME",
    multiple=True,
    help="Just this benchmark or cell (see --list); may be given more than once.",
)
@click.option(
    *("--out", "out"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the results, one NAME.json a cell. Default: bench/results, or build/bench "
    "with --short.",
)
@click.option(
    *("--directory", "where"),
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="File system to measure. Default: build/bench.",
)
@click.option("--rounds", type=click.IntRange(1), help="Instead of each benchmark's own number.")
@click.option("--seconds", type=click.FloatRange(0.2), help="Length of a slot.")
@click.option(
    "--again", "is_again", is_flag=True, help="Also cells that have a result that counts."
)
@click.option("--list", "is_list", is_flag=True, help="Say which cells there are, and which count.")
@click.option("--document", is_flag=True, help="Make docs/measurements.md from bench/results.")
def main(
    is_short: bool,
    names: tuple[str, ...],
    out: Path | None,
    where: Path | None,
    rounds: int | None,
    seconds: float | None,
    is_again: bool,
    is_list: bool,
    document: bool,
) -> None:
    """Measure geomirror on this machine, cell by cell.

    A cell whose result counts and was made by the same code with the same options is not measured
    again, so an interrupted run goes on where it ended. Exit code 0 if all results count, whatever
    the figures; 1 if a cell failed or does not count. A machine that was not quiet is marked.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    out = out or (SHORT_RESULTS if is_short else RESULTS)
    work = where or SHORT_RESULTS
    for directory in (out, work):
        directory.mkdir(parents=True, exist_ok=True)
    cells = [
        cell
        for name, found in BENCHMARKS.items()
        for cell in found
        if not names or name in names or cell.label in names
    ]
    # As installed packages are: no daemon that is measured compiles its modules first.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    code, is_good = code_digest(), True
    for cell in cells:
        options = Options(work, is_short, rounds, seconds)
        has_result = is_done(cell.path(out), options, code)
        if is_list:
            console.print(f"{cell.label}: {_describe(load(cell.path(out)), has_result)}")
        elif has_result and not is_again:
            console.print(f"{cell.label}: has a result of this code; --again measures it again")
        else:
            is_good = _run(console, cell, options, out) and is_good
    if document:
        for name in dict.fromkeys(cell.benchmark for cell in cells):
            update_page(name)
    sys.exit(0 if is_good else 1)


def _describe(found: dict[str, Any] | None, is_current: bool) -> str:
    if found is None:
        return "no result"
    return f"{found['verdict']}, {found['began_utc'][:16]}" + (
        "" if is_current else "; to be measured again"
    )


def published(name: str) -> list[dict[str, Any]]:
    """Results of a benchmark's cells that may be shown."""
    found = (load(cell.path(RESULTS)) for cell in BENCHMARKS[name])
    return [each for each in found if each and each["verdict"] in ("ok", "not quiet")]


def update_page(name: str) -> None:
    """Make a benchmark's section of the page, if there are results."""
    if documents := published(name):
        update(MEASUREMENTS, documents)


def _run(console: Console, cell: Cell, options: Options, out: Path) -> bool:
    """Measure, show and keep; whether it counts, or could not be measured here."""
    with tempfile.TemporaryDirectory(prefix="work-", dir=options.directory.absolute()) as work:
        inside = Options(Path(work), options.is_short, options.rounds, options.seconds)
        try:
            found = measure(cell, inside)
        # One that fails must not end a run of hours; a mistake in a script shows its place.
        except (GeomirrorError, OSError, subprocess.SubprocessError) as error:
            console.print(f"[red]{cell.label} failed:[/red] {error!r}", highlight=False)
            return False
        except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError):
            console.print(f"[red]{cell.label} failed[/red]")
            console.print_exception(max_frames=4)
            return False
    write(cell.path(out), found)
    show(console, found)
    return bool(found["verdict"] != "does not count")


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """Run a cell and complete its result."""
    machine = describe(options.directory)
    disturbance = Disturbance(await_quiet(0 if options.is_short else QUIET_S_MAX))
    began_utc = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    began = time.monotonic()
    result = asyncio.run(cell.run(options))
    seconds = time.monotonic() - began
    disturbance.end()
    found = {
        **result.to_json(),
        "cell": cell.name,
        "options": parameters(options),
        "commit": commit(),
        "code": code_digest(),
        "began_utc": began_utc,
        "seconds": seconds,
        "machine": {**machine, **disturbance.to_json()},
        "versions": versions(),
    }
    return {**found, "verdict": verdict(found)}


if __name__ == "__main__":
    main()
