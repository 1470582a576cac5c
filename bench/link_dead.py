"""Whether a client notices that the link is dead, until the journal is nearly full.

Slots with the link up and dead alternate under the same load. The backlog grows from slot to slot,
and all of them together fill four fifths of the journal. A dead slot begins at the moment at which
the link dies, so that the time until this is noticed is part of it.
"""

from __future__ import annotations

from dataclasses import asdict

from bench.fio import Load, Outcome, run_fio
from bench.machine import missing_tools, sync_file_system
from bench.options import Options
from bench.report import Result
from bench.rig import Rig, require_free, rig
from bench.servers import fill as fill_volume
from geomirror.limits import BLOCK_BYTES, GIB, MIB

NAME = "link_dead"
LINK = "rtt=80ms,rate=100mbit"
P50_RATIO_MAX = 1.05
P99_RATIO_MAX = 1.25
JOURNAL_PART = 0.8
"""Of the journal that all slots together fill; at 0.9 the peer goes to its bitmap."""


async def run(options: Options) -> Result:
    """Alternate dead and up."""
    result = Result(NAME, "A dead link: latency of 4 KiB writes at depth 32, dead against up")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    rounds = options.choose_rounds(10, 2)
    journal = options.choose(16 * GIB, GIB)
    size = options.choose(4 * GIB, 32 * MIB)
    require_free(options.directory, 2 * journal + 3 * size)
    share = int(journal * JOURNAL_PART / (2 * rounds))
    seconds = options.choose_seconds(5.0, 1.0)
    result.settings = {"rounds": rounds, "journal_bytes": journal, "volume_bytes": size}
    ratios: dict[str, list[float]] = {"p50_us": [], "p99_us": [], "p999_us": [], "iops": []}
    fill = 0.0
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        await fill_volume(lab.uri, size)
        await lab.drain()
        for number in range(rounds):
            load = Load("randwrite", BLOCK_BYTES, 32, seconds, size, share, seed=number + 1)
            found: dict[str, Outcome] = {}
            for name in ("up", "dead") if number % 2 else ("dead", "up"):
                sync_file_system(options.directory)
                found[name], filled = await _slot(lab, load, result, is_dead=name == "dead")
                fill = max(fill, filled)
            for key, values in ratios.items():
                values.append(getattr(found["dead"], key) / getattr(found["up"], key))
            slots = {name: asdict(outcome) for name, outcome in found.items()}
            result.rounds.append({"round": number, **slots})
    result.at_most("p50, dead / up", ratios["p50_us"], P50_RATIO_MAX)
    result.at_most("p99, dead / up", ratios["p99_us"], P99_RATIO_MAX)
    result.median("p99.9, dead / up", ratios["p999_us"], "x")
    result.median("IOPS, dead / up", ratios["iops"], "x")
    for name in ("up", "dead"):
        for key in ("p50_us", "p99_us"):
            values = [slots[name][key] for slots in result.rounds]
            result.median(f"{key.removesuffix('_us')}, {name}", values, "µs")
    result.note("journal filled to", fill * 100, "%")
    return result


async def _slot(lab: Rig, load: Load, result: Result, *, is_dead: bool) -> tuple[Outcome, float]:
    if is_dead:
        await lab.link.down()
    async with lab.watch() as watch:
        outcome = await run_fio(load, lab.uri)
    if is_dead:
        # While it is away a peer's mode is not shown; a bitmap would show as a resync afterwards.
        await lab.link.up()
        watch.states.add(await lab.wait_for("Stream", "Fold", "Bitmap", "Resync"))
    result.judge_states(watch.states, ("Disconnected",))
    if watch.resyncs:
        result.invalid_because.append(f"{watch.resyncs} resyncs")
    return outcome, watch.journal_fill_max
