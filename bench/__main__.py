"""`python -m bench`: run benchmarks, print their tables, write their documents."""

from __future__ import annotations

import asyncio
import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console

from bench import link_dead, link_use, local_writes, memory, restart, simulator, synchronous
from bench.document import update
from bench.machine import describe, versions
from bench.options import Options
from bench.report import Result, show, write
from geomirror.errors import GeomirrorError

BENCHMARKS: dict[str, Callable[[Options], Awaitable[Result]]] = {
    module.NAME: module.run
    for module in (
        local_writes,
        link_dead,
        link_use,
        synchronous,
        restart,
        memory,
        simulator,
    )
}
MEASUREMENTS = Path(__file__).parent.parent / "docs" / "measurements.md"


@click.command()
@click.option("--short", "is_short", is_flag=True, help="Small sizes, few rounds: does it work?")
@click.option(
    *("--only", "names"),
    type=click.Choice(list(BENCHMARKS)),
    multiple=True,
    help="Just this one; may be given more than once.",
)
@click.option(
    *("--out", "out"),
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Directory of the documents NAME.json.",
)
@click.option(
    *("--directory", "where"),
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="File system to measure. Default: that of --out.",
)
@click.option("--rounds", type=click.IntRange(1), help="Instead of each benchmark's own number.")
@click.option("--seconds", type=click.FloatRange(0.2), help="Length of a slot.")
@click.option("--document", is_flag=True, help="Put what counts into docs/measurements.md.")
def main(
    is_short: bool,
    names: tuple[str, ...],
    out: Path,
    where: Path | None,
    rounds: int | None,
    seconds: float | None,
    document: bool,
) -> None:
    """Measure geomirror on this machine.

    Exit code 0 if all ran and count, whatever the figures; 1 if one failed or does not count.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    out.mkdir(parents=True, exist_ok=True)
    is_good = True
    for name in names or tuple(BENCHMARKS):
        with tempfile.TemporaryDirectory(prefix="work-", dir=(where or out).absolute()) as work:
            options = Options(Path(work), is_short, rounds, seconds)
            try:
                found = asyncio.run(_measure(name, options))
            except GeomirrorError as error:
                console.print(f"[red]{name} failed:[/red] {error}", highlight=False)
                is_good = False
                continue
        write(out / f"{name}.json", found)
        show(console, found)
        is_good = is_good and (found["is_valid"] or bool(found["skipped_because"]))
        if document and found["is_valid"] and not is_short:
            update(MEASUREMENTS, found)
    sys.exit(0 if is_good else 1)


async def _measure(name: str, options: Options) -> dict[str, Any]:
    machine = describe(options.directory)
    began = time.monotonic()
    result = await BENCHMARKS[name](options)
    flags = " --short" if options.is_short else ""
    flags += f" --rounds {options.rounds}" if options.rounds else ""
    flags += f" --seconds {options.seconds:g}" if options.seconds else ""
    return {
        **result.to_json(),
        "command": f"python -m bench --only {shlex.quote(name)}{flags}",
        "is_short": options.is_short,
        "began_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
        "machine": machine,
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
