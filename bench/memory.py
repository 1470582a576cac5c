"""Memory of a busy daemon with default settings, and what a huge volume costs."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.fio import Load, run_fio
from bench.machine import memory_bytes, missing_tools
from bench.options import Options
from bench.report import Result
from bench.rig import Rig, require_free, rig
from geomirror.limits import BLOCK_BYTES, GIB, MIB, TIB

NAME = "memory"
LINK = "rtt=40ms,rate=100mbit"
BUSY_MIB_MAX = 300.0
GROWTH_MIB_MAX = 150.0
CREATE_S_MAX = 2.0
HUGE_BYTES = 4 * TIB


async def run(options: Options) -> Result:
    """First a huge idle volume, then a busy one, in the same lab."""
    result = Result(NAME, "Memory: a sparse 4 TiB volume, and one busy resource with defaults")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    size, journal = options.choose(4 * GIB, 64 * MIB), options.choose(16 * GIB, GIB)
    require_free(options.directory, 2 * journal + 3 * size)
    rounds = options.choose_rounds(3, 1)
    result.settings = {"rounds": rounds, "volume_bytes": size, "huge_bytes": HUGE_BYTES}
    async with rig(options.directory / "lab", LINK) as lab:
        for _ in range(rounds):
            result.rounds.append(await _huge(lab))
        await _busy(lab, options, result, size, journal)
    huge = [found for found in result.rounds if found["part"] == "huge"]
    result.at_most("4 TiB: create", [x["create_seconds"] for x in huge], CREATE_S_MAX, "s")
    for node in ("primary", "secondary"):
        growth = [x[f"{node}_growth_bytes"] / MIB for x in huge[:1]]
        result.at_most(f"4 TiB: RSS growth, {node}", growth, GROWTH_MIB_MAX, "MiB")
    return result


def _rss(lab: Rig, key: str = "VmRSS") -> dict[str, int]:
    nodes = {"primary": lab.primary, "secondary": lab.secondary}
    return {name: memory_bytes(node.pid or 0, key) for name, node in nodes.items()}


async def _huge(lab: Rig) -> dict[str, Any]:
    before = _rss(lab)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await lab.create(str(HUGE_BYTES), str(GIB))
    created = loop.time() - began
    # Every part of the volume is used a little: what grows with its size has grown by then.
    step = HUGE_BYTES // 64
    load = Load(f"write:{step - BLOCK_BYTES}", BLOCK_BYTES, 1, 0, HUGE_BYTES, 64 * BLOCK_BYTES)
    await run_fio(load, lab.uri)
    await lab.drain()
    after = _rss(lab)
    await lab.delete()
    growth = {f"{name}_growth_bytes": after[name] - before[name] for name in after}
    return {"part": "huge", "create_seconds": created, **growth}


async def _busy(lab: Rig, options: Options, result: Result, size: int, journal: int) -> None:
    await lab.create(str(size), str(journal))
    seconds = options.choose_seconds(20.0, 1.0)
    # Bounded: the journal takes what the link does not, and a bitmap would be another kind of work.
    bound = int(journal * 0.8) - 256 * MIB
    load = Load("randwrite", BLOCK_BYTES, 32, seconds, size, bound)
    async with lab.watch() as watch:
        await run_fio(load, lab.uri)
        await asyncio.sleep(min(5.0, seconds))
    await lab.drain()
    peak, now = _rss(lab, "VmHWM"), _rss(lab)
    result.judge_states(watch.states)
    for node in peak:
        result.at_most(f"busy: most RSS, {node}", [peak[node] / MIB], BUSY_MIB_MAX, "MiB")
        result.note(f"busy: RSS after catching up, {node}", now[node] / MIB, "MiB")
    result.note("busy: journal filled to", watch.journal_fill_max * 100, "%")
    result.rounds.append({"part": "busy", "peak_bytes": peak, "after_bytes": now})
