"""What a flush costs that waits for another site: its latency, and how flushes share round trips.

`ack=durable` over 80 ms, unlimited rate: a 4 KiB write, then a FLUSH; one client, then eight.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace

from bench.fio import Load, run_fio
from bench.machine import missing_tools
from bench.options import Options
from bench.report import Result
from bench.rig import RESOURCE, Rig, require_free, rig
from geomirror.errors import WaitTimeoutError
from geomirror.limits import BLOCK_BYTES, GIB, MIB

NAME = "synchronous"
RTT_S = 0.080
LINK = f"rtt={RTT_S * 1000:g}ms,rate=unlimited"
LATENCY_S_MAX = RTT_S + 0.015
SHARING_MIN = 6.0
CLIENTS = 8
IN_SYNC_S_MAX = 30.0


async def run(options: Options) -> Result:
    """Alternate one client and eight."""
    result = Result(NAME, "A flush that waits until another site, 80 ms away, has it durable")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    size, journal = options.choose(GIB, 32 * MIB), options.choose(4 * GIB, GIB)
    require_free(options.directory, 2 * journal + 2 * size)
    rounds = options.choose_rounds(5, 1)
    seconds = options.choose_seconds(5.0, 1.0)
    result.settings = {"rounds": rounds, "slot_seconds": seconds, "link": LINK}
    one = Load("randwrite", BLOCK_BYTES, 1, seconds, size, has_flush_each=True)
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        await lab.primary.cli("resource", "set", RESOURCE, "ack=durable", "degrade_after=block")
        await _wait_in_sync(lab)
        for number in range(rounds):
            found = {}
            for name, jobs in (("one", 1), ("eight", CLIENTS)):
                load = replace(one, jobs=jobs, seed=number + 1)
                async with lab.watch() as watch:
                    found[name] = await run_fio(load, lab.uri)
                result.judge_states(watch.states)
            slots = {name: asdict(outcome) for name, outcome in found.items()}
            result.rounds.append({"round": number, **slots})
    ones, eights = ([each[name] for each in result.rounds] for name in ("one", "eight"))
    latencies = [each["flush_p50_us"] / 1e6 for each in ones]
    result.at_most("flush p50, one client", latencies, LATENCY_S_MAX, "s")
    result.median("flush p99, one client", [each["flush_p99_us"] / 1e6 for each in ones], "s")
    sharing = [more["iops"] / few["iops"] for few, more in zip(ones, eights, strict=True)]
    result.at_least("flushes per second, eight clients / one", sharing, SHARING_MIN)
    result.median("flush p50, eight clients", [x["flush_p50_us"] / 1e6 for x in eights], "s")
    return result


async def _wait_in_sync(lab: Rig) -> None:
    deadline = asyncio.get_running_loop().time() + IN_SYNC_S_MAX
    while not (await lab.peer())["in_sync"]:
        if asyncio.get_running_loop().time() >= deadline:
            raise WaitTimeoutError(f"the peer is not in sync after {IN_SYNC_S_MAX:g} s")
        await asyncio.sleep(0.05)
