"""Random writing that never pauses: what a client gets when destaging has to keep up.

```
 slot:  warm up, beyond what may wait for destage | flush | measured, and the flush that ends it
```
Nobody profits from the page cache: the time of a slot ends when a FLUSH has been answered, and what
was written before it began has been flushed, too. What geomirror has yet to destage at its end is
as much as at its beginning; until that is in the image, more time goes by, which is shown.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.cells import Cell
from bench.fio import Load, Outcome, run_fio
from bench.machine import cpu_seconds, missing_tools, sync_file_system
from bench.options import Options
from bench.report import Result
from bench.rig import SETTLE_S, Rig, require_free, rig
from bench.servers import PeerServer, fill, fill_all, nbdkit_file, qemu_nbd
from geomirror.limits import BLOCK_BYTES, GIB, MIB, PRODUCTION
from geomirror.nbd.client_io import NbdClient

NAME = "sustained"
LINK = "rtt=40ms,rate=100mbit"
COLUMNS = ["case", "server", "MB/s", "p50 µs", "p99 µs", "p99.9 µs", "flush s", "CPU µs/write"]
FLUSH_S_MAX = 600.0
PAUSE_S = 2.0
"""For the disk, between slots."""


@dataclass(frozen=True)
class Slot:
    """One server's turn."""

    outcome: Outcome
    flush_seconds: float
    cpu_seconds: float
    """Of the server's process, from the first measured write until the flush was answered."""
    settle_seconds: float = 0.0
    """From then until everything was destaged."""

    @property
    def bytes_per_second(self) -> float:
        """With the flush."""
        return self.outcome.requests * BLOCK_BYTES / (self.outcome.seconds + self.flush_seconds)

    @property
    def cpu_us_per_write(self) -> float:
        """With the flush."""
        return self.cpu_seconds * 1e6 / max(1, self.outcome.requests)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        more = ("flush_seconds", "cpu_us_per_write", "settle_seconds", "bytes_per_second")
        return {**asdict(self.outcome), **{key: getattr(self, key) for key in more}}


async def _run(options: Options, name: str) -> Result:
    title = f"4 KiB writes at depth 32 without a pause, {name}: geomirror, nbdkit file, qemu-nbd"
    result = Result(NAME, title)
    if missing := missing_tools("fio", "nbdkit", "qemu-nbd"):
        result.skipped_because = f"not installed: {', '.join(missing)}"
        return result
    size, journal = options.choose(4 * GIB, 32 * MIB), options.choose(12 * GIB, GIB)
    warm_up = options.choose(PRODUCTION.dirty_bytes_max + 256 * MIB, 32 * MIB)
    measured = options.choose(2 * GIB, 64 * MIB)
    require_free(options.directory, 2 * journal + 4 * size)
    rounds = options.choose_rounds(5, 1)
    result.settings = {
        "rounds": rounds,
        "volume_bytes": size,
        "warm_up_bytes": warm_up,
        "measured_bytes": measured,
    }
    load = Load("randwrite", BLOCK_BYTES, 32, 0, size, measured)
    peers = [server(options.directory, size) for server in (nbdkit_file, qemu_nbd)]
    found: list[dict[str, Slot]] = []
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal), has_secondary=name == "replicating")
        await fill_all(peers, size)
        await fill(lab.uri, size)
        if lab.has_secondary:
            await lab.drain()
        await lab.settle()
        for number in range(rounds):
            slots: dict[str, Slot] = {}
            turns: list[PeerServer | None] = [None, *peers]
            at = number % len(turns)
            for peer in turns[at:] + turns[:at]:
                sync_file_system(options.directory)
                await asyncio.sleep(PAUSE_S)
                turn = replace(load, seed=2 * number + 1)
                if peer is None:
                    slots["geomirror"] = await _ours(lab, turn, warm_up, result)
                else:
                    await peer.start()
                    slots[peer.name] = await _slot(turn, warm_up, peer.uri, peer.pid)
                    await peer.stop()
            found.append(slots)
            document = {key: slot.to_json() for key, slot in slots.items()}
            result.rounds.append({"round": number, **document})
    _conclude(result, name, found)
    return result


async def _ours(lab: Rig, load: Load, warm_up: int, result: Result) -> Slot:
    if not lab.has_secondary:
        return await _settled(lab, await _slot(load, warm_up, lab.uri, lab.pid))
    async with lab.watch() as watch:
        slot = await _slot(load, warm_up, lab.uri, lab.pid)
    result.judge_states(watch.states)
    slot = await _settled(lab, slot)
    await lab.drain()
    await lab.settle()
    return slot


async def _settled(lab: Rig, slot: Slot) -> Slot:
    if lab.has_secondary:
        # While the link is in use the daemon is never idle: only its own disk is to be awaited.
        await lab.link.down()
        await lab.wait_for("Disconnected")
    began = time.monotonic()
    await lab.settle()
    if lab.has_secondary:
        await lab.link.up()
        await lab.wait_for("Stream", "Fold")
    # The last look, at which nothing happened any more, does not count.
    return replace(slot, settle_seconds=max(0.0, time.monotonic() - began - SETTLE_S))


async def _slot(load: Load, warm_up: int, uri: str, pid: int) -> Slot:
    if warm_up:
        await run_fio(replace(load, io_bytes=warm_up, seed=load.seed + 1), uri)
        await _flush(uri)
    before = cpu_seconds(pid)
    outcome = await run_fio(load, uri)
    flush_seconds = await _flush(uri)
    return Slot(outcome, flush_seconds, cpu_seconds(pid) - before)


async def _flush(uri: str) -> float:
    """Seconds until everything that was written is durable."""
    async with await NbdClient.connect(uri) as client:
        began = time.monotonic()
        async with asyncio.timeout(FLUSH_S_MAX):
            await client.flush()
        return time.monotonic() - began


def _conclude(result: Result, case: str, found: list[dict[str, Slot]]) -> None:
    result.columns = COLUMNS
    ours = [slots["geomirror"] for slots in found]
    for name in ("nbdkit", "qemu-nbd"):
        theirs = [slots[name] for slots in found]
        pairs = list(zip(ours, theirs, strict=True))
        rates = [us.bytes_per_second / them.bytes_per_second for us, them in pairs]
        result.median(f"{case}: ratio of MB/s to {name}", rates, "x")
        tails = [us.outcome.p99_us / max(0.001, them.outcome.p99_us) for us, them in pairs]
        result.median(f"{case}: ratio of p99 to {name}", tails, "x")
    settle = [slot.settle_seconds for slot in ours]
    result.median(f"{case}: until all is destaged, geomirror", settle, "s")
    for name in found[0]:
        slots = [each[name] for each in found]
        row: list[str | float] = [case, name]
        row += [
            statistics.median(slot.bytes_per_second for slot in slots) / 1e6,
            *(
                statistics.median(getattr(slot.outcome, key) for slot in slots)
                for key in ("p50_us", "p99_us", "p999_us")
            ),
            statistics.median(slot.flush_seconds for slot in slots),
            statistics.median(slot.cpu_us_per_write for slot in slots),
        ]
        result.rows.append(row)


CELLS = [Cell(NAME, functools.partial(_run, name=name), name) for name in ("alone", "replicating")]
