"""How much of a link the stream uses, and how old the mirror is when the link is half used.

Use: incompressible writes faster than the link, for long enough that the backlog never ends; the
frames that the peer received per second, against the link's rate. Lag: the same writes at half
of the rate.
"""

from __future__ import annotations

import asyncio
import statistics

from bench.fio import Load, run_fio
from bench.machine import cpu_seconds, missing_tools
from bench.options import Options
from bench.report import Result
from bench.rig import Rig, require_free, rig
from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, GIB, MIB, PRODUCTION

NAME = "link_use"
RATE_BITS = 100_000_000
RTT_S = 0.080
LINK = f"rtt={RTT_S * 1000:g}ms,rate={RATE_BITS // 1_000_000}mbit"
USE_MIN = 0.90
WARM_UP_S_MAX = 3.0
"""From the first frame until the window is open and the link's own queue is full."""


async def run(options: Options) -> Result:
    """Both measurements in one lab."""
    result = Result(NAME, "A link of 100 Mbit/s and 80 ms: use, and lag under half load")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    size, journal = options.choose(4 * GIB, 128 * MIB), options.choose(4 * GIB, GIB)
    require_free(options.directory, 2 * journal + 2 * size)
    seconds = options.choose_seconds(10.0, 2.0)
    rounds = options.choose_rounds(3, 1)
    result.settings = {"rounds": rounds, "slot_seconds": seconds, "link": LINK}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        uses = [await _use(lab, seconds, size, result) for _ in range(rounds)]
        lags = [await _lag(lab, seconds, size, result) for _ in range(rounds)]
    result.at_least("frames received / link", [use[0] for use in uses], USE_MIN)
    result.median("all bytes that crossed / link", [use[1] for use in uses], "x")
    result.median("primary's CPU while the link is full", [use[2] * 100 for use in uses], "%")
    bound = RTT_S + 1.5 * PRODUCTION.epoch_age_ns / SECOND
    result.at_most("median lag under half load", [lag[0] for lag in lags], bound, "s")
    result.median("p99 of the lag under half load", [lag[1] for lag in lags], "s")
    return result


async def _use(lab: Rig, seconds: float, size: int, result: Result) -> tuple[float, float, float]:
    # Twice what the link takes: the stream never runs dry, and the journal stays far from full.
    warm_up = min(WARM_UP_S_MAX, 2 * seconds)
    load = Load(
        *("write", MIB, 4, seconds + warm_up + 1, size),
        is_incompressible=True,
        bytes_per_second=2 * RATE_BITS // 8,
    )
    loop, before = asyncio.get_running_loop(), await lab.received_bytes()
    writing = asyncio.create_task(run_fio(load, lab.uri))
    try:
        await lab.began(before)
        await asyncio.sleep(warm_up)
        async with lab.watch(1.0) as watch:
            began, crossed, cpu = loop.time(), await lab.link_bytes(), cpu_seconds(lab.pid)
            frames = await lab.received_bytes()
            await asyncio.sleep(seconds)
            crossed = await lab.link_bytes() - crossed
            frames = await lab.received_bytes() - frames
            elapsed, cpu = loop.time() - began, cpu_seconds(lab.pid) - cpu
    finally:
        await writing
    result.judge_states(watch.states)
    possible = RATE_BITS / 8 * elapsed
    found = {"frame_bytes": frames, "link_bytes": crossed, "seconds": elapsed}
    result.rounds.append({"part": "use", **found})
    await lab.drain()
    return frames / possible, crossed / possible, cpu / elapsed


async def _lag(lab: Rig, seconds: float, size: int, result: Result) -> tuple[float, float]:
    warm_up, window = min(1.0, seconds / 4), max(0.5, seconds - 2.0)
    # A watch that outlives the load would count the idle time as no lag.
    load = Load(
        *("randwrite", BLOCK_BYTES, 4, warm_up + window + 1, size),
        is_incompressible=True,
        bytes_per_second=RATE_BITS // 8 // 2,
    )
    before = await lab.received_bytes()
    writing = asyncio.create_task(run_fio(load, lab.uri))
    try:
        await lab.began(before)
        await asyncio.sleep(warm_up)
        async with lab.watch(0.05) as watch:
            await asyncio.sleep(window)
    finally:
        await writing
    result.judge_states(watch.states)
    lags = sorted(watch.lag_seconds)
    median, p99 = statistics.median(lags), lags[int(len(lags) * 0.99)]
    found = {"samples": len(lags), "median_seconds": median, "p99_seconds": p99}
    result.rounds.append({"part": "lag", **found})
    await lab.drain()
    return median, p99
