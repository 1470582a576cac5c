"""What a resync costs after single blocks were changed all over a volume, and what a crash costs.

```
 fill ─▶ caught up ─▶ link down ─▶ 1 % of blocks ─▶ one MiB until the journal overflows
      ─▶ link up (100 Mbit/s, 200 ms) ─▶ counted until all is applied
```
`scattered`: the primary knows which regions changed. `unknown`: its bitmap is lost, so that the
whole volume is compared. `crash`, `crash_4tib`: SIGKILL of the primary with its journal intact.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

from bench.cells import Cell
from bench.fio import Load, run_fio
from bench.machine import missing_tools
from bench.options import Options
from bench.report import Result
from bench.restart import image_digest
from bench.rig import Rig, require_free, rig
from bench.servers import fill
from geomirror.errors import GeomirrorError, WaitTimeoutError
from geomirror.limits import BLOCK_BYTES, GIB, MIB, TIB

NAME = "resync"
RATE_BITS = 100_000_000
LINK = f"rtt=200ms,rate={RATE_BITS // 1_000_000}mbit"
CRASH_LINK = "rtt=40ms,rate=unlimited"
CHANGED = 0.01
WIRE_PERCENT_MAX = 3.0
USE_MIN = 0.80
JOURNAL_BYTES = 256 * MIB
"""Overflows after half of it: segments are freed whole."""
PASSES_MAX = 20
RESYNC_S_MAX = 1800.0
LOOK_S = 0.1
BESIDE_S = 5.0
"""Between the looks of a watch that is also asked for each `LOOK_S`."""
EDGE = 0.05
"""Of the data that come first and last, which do not count as "while there is data to send"."""
AWAY = ("Disconnected",)
BUSY = ("Bitmap", "Resync", "Disconnected")


async def _scattered(options: Options, *, is_known: bool, name: str) -> Result:
    what = "the changed regions are known" if is_known else "the bitmap is lost"
    result = Result(NAME, f"A resync of scattered 4 KiB blocks: {what}")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    size = options.choose(10 * GIB, 96 * MIB)
    require_free(options.directory, 3 * size + 4 * JOURNAL_BYTES)
    result.settings = {"volume_bytes": size, "changed": CHANGED, "link": LINK}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.link.set("rate=unlimited")
        await lab.create(str(size), str(JOURNAL_BYTES))
        await fill(lab.uri, size)
        await lab.drain()
        changed = int(size * CHANGED)
        load = Load("randwrite", BLOCK_BYTES, 32, 0, size, changed, is_incompressible=True)
        await _overflow(lab, load)
        await lab.settle()
        if not is_known:
            await lab.primary.stop()
            for path in lab.primary.data_dir.rglob("bitmap/*.bits"):
                path.unlink()
            await lab.primary.start()
            await lab.wait_for("Disconnected")
        found = await _resync(lab, result)
        result.rounds.append(found)
        digests = [await image_digest(node) for node in (lab.primary, lab.secondary)]
    part = found["wire_bytes"] / size
    result.at_most(
        f"{name}: bytes on the wire, both ways / volume", [part * 100], WIRE_PERCENT_MAX, "%"
    )
    result.note(f"{name}: content that crossed / volume", found["copied_bytes"] / size * 100, "%")
    what = f"{name}: frames received / link, while there are any"
    if is_known and not options.is_short:
        result.at_least(what, [found["use"]], USE_MIN)
    else:
        # Over before the window is open; or the disks decide, which are read from end to end.
        result.note(what, found["use"], "x")
    result.note(f"{name}: from link up to all applied", found["seconds"], "s")
    same = float(len(set(digests)) == 1)
    result.at_least(f"{name}: mirror identical afterwards", [same], 1, "")
    return result


async def _overflow(lab: Rig, load: Load) -> None:
    """Write this, then on one place until the journal cannot hold the peer's backlog."""
    before = (await lab.peer())["resyncs"]
    await lab.link.down()
    await lab.wait_for("Disconnected")
    await run_fio(load, lab.uri)
    for _ in range(PASSES_MAX):
        if (await lab.peer())["resyncs"] > before:
            return
        await run_fio(Load("write", MIB, 4, 0, MIB, JOURNAL_BYTES // 4), lab.uri)
        await asyncio.sleep(0.5)
    raise GeomirrorError(f"the journal has not overflowed after {PASSES_MAX} passes")


async def _resync(lab: Rig, result: Result) -> dict[str, Any]:
    """From the link's return to the end."""
    loop = asyncio.get_running_loop()
    await lab.link.set(LINK)
    wire = await _wire_bytes(lab)
    received: list[tuple[float, int]] = []
    copied, seen = 0, 0
    began = loop.time()
    # Sampled below: each look costs both daemons milliseconds, which the link then has to wait for.
    async with lab.watch(BESIDE_S) as watch:
        await lab.link.up()
        while True:
            peer = await watch.sample()
            received.append((loop.time(), await lab.received_bytes()))
            if peer["resync"] is not None:
                seen = max(seen, peer["resync"]["compared_bytes"])
                copied = max(copied, peer["resync"]["copied_bytes"])
            is_over = peer["state"] == "Stream" and peer["disk_state"] == "UpToDate"
            if is_over and peer["lag"]["epochs"] == 0:
                break
            if loop.time() - began > RESYNC_S_MAX:
                raise WaitTimeoutError(f"the resync is not over after {RESYNC_S_MAX:g} s: {peer}")
            await asyncio.sleep(LOOK_S)
    result.judge_states(watch.states, BUSY)
    return {
        "seconds": loop.time() - began,
        "wire_bytes": await _wire_bytes(lab) - wire,
        "copied_bytes": copied,
        "compared_bytes": seen,
        "frame_bytes": received[-1][1] - received[0][1],
        "use": _use(received),
    }


def _use(received: list[tuple[float, int]]) -> float:
    """Part of the link that frames took between the first and the last of the data."""
    first, last = received[0][1], received[-1][1]
    low, high = first + (last - first) * EDGE, last - (last - first) * EDGE
    inside = [each for each in received if low <= each[1] <= high]
    if len(inside) < 2 or inside[-1][0] <= inside[0][0]:
        return 0.0
    seconds = inside[-1][0] - inside[0][0]
    return (inside[-1][1] - inside[0][1]) * 8 / seconds / RATE_BITS


async def _wire_bytes(lab: Rig) -> int:
    """Bytes that crossed the link so far, both ways."""
    links = await lab.lab.emulator.call("status")
    return sum(int(way["bytes_delivered"]) for link in links for way in link["directions"])


async def _crash(options: Options, *, size: int, name: str) -> Result:
    """SIGKILL of the primary with a backlog in its journal."""
    result = Result(NAME, f"A crash of the primary, journal intact: {name}")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    backlog = options.choose(256 * MIB, 16 * MIB)
    require_free(options.directory, 8 * backlog + 4 * GIB)
    result.settings = {"volume_bytes": size, "backlog_bytes": backlog, "link": CRASH_LINK}
    async with rig(options.directory / "lab", CRASH_LINK) as lab:
        began = time.monotonic()
        await lab.create(str(size), str(options.choose(2 * GIB, GIB)))
        result.note(f"{name}: first sync of the sparse volume", time.monotonic() - began, "s")
        await lab.link.down()
        await lab.wait_for("Disconnected")
        await run_fio(Load("randwrite", BLOCK_BYTES, 32, 0, size, backlog), lab.uri)
        before = await lab.peer()
        await lab.primary.kill()
        await lab.primary.start()
        await lab.wait_for("Disconnected")
        async with lab.watch(0.02) as watch:
            await lab.link.up()
            await lab.wait_for("Stream", "Fold", "Bitmap", "Resync")
            await lab.drain()
            peer = await watch.sample()
        result.judge_states(watch.states, AWAY)
        result.rounds.append({"before": before, "after": peer})
    resynced = 0.0 if watch.resyncs == 0 else float(peer["logical_bytes"])
    result.at_most(f"{name}: bytes resynced", [resynced], 0, "")
    sent = peer["wire_bytes"] / MIB
    result.note(f"{name}: bytes streamed for {backlog // MIB} MiB of backlog", sent, "MiB")
    return result


def _cells() -> list[Cell]:
    runs: dict[str, Callable[..., Any]] = {
        "scattered": functools.partial(_scattered, is_known=True, name="scattered"),
        "unknown": functools.partial(_scattered, is_known=False, name="unknown"),
        "crash": functools.partial(_crash, size=10 * GIB, name="crash, 10 GiB"),
        "crash_4tib": functools.partial(_crash, size=4 * TIB, name="crash, 4 TiB"),
    }
    return [Cell(NAME, run, name) for name, run in runs.items()]


CELLS = _cells()
