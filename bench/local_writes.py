"""What a client sees of a replicated volume, against plain NBD servers on the same file system.

```
 round:  [geomirror] drain  [nbdkit]  [qemu-nbd]      order rotates, the same load and offsets
```
Replication runs during geomirror's slot. What is left of the backlog goes over an unlimited link
before the next slot, and is destaged, so that the others are not measured beside our work.

CPU is that of the daemon's process, all threads. What shipping costs is measured alone: a backlog
is written while the link is down, a restart empties the journal into the image, then the link comes
up. A slot's CPU less what it shipped is the cost of taking its writes and sealing them; until the
daemon is idle again, that of destaging them too.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.cells import Cell
from bench.fio import Load, Outcome, run_fio
from bench.machine import cpu_seconds, missing_tools, sync_file_system
from bench.options import Options
from bench.report import Result
from bench.rig import Rig, require_free, rig
from bench.servers import PeerServer, fill, fill_all, nbdkit_file, qemu_nbd
from geomirror.limits import BLOCK_BYTES, GIB, MIB

NAME = "local_writes"
LIMITED = "rtt=40ms,rate=100mbit"
UNLIMITED = "rtt=40ms,rate=unlimited"
COLUMNS = ["load", "server", "req/s", "MiB/s", "p50 µs", "p99 µs", "p99.9 µs", "CPU µs/req"]
"""Latencies of the flush cases are those of the flush."""
SETTLE_S = 2.0
"""A daemon that has just started prepares spare journal segments."""
CPU_US_PER_WRITE_MAX = 12.0
CPU_SECONDS_PER_GIB_MAX = 6.0


@dataclass(frozen=True)
class Case:
    """One load, its link, and the ratios that it should reach."""

    name: str
    link: str
    load: Load
    nbdkit_min: float | None = None
    qemu_min: float | None = None
    counts_cpu: bool = False

    @property
    def is_read(self) -> bool:
        """Whether the volume has to be filled before."""
        return "read" in self.load.pattern


def cases(options: Options) -> dict[str, Case]:
    """All loads. The area is large against what destaging gathers, small against the cache."""
    seconds = options.choose_seconds(5.0, 1.0)
    area = options.choose(4 * GIB, 32 * MIB)
    # A slot's writes must fit in the journal beside an earlier slot's tail, whatever the speed.
    small = Load("randwrite", BLOCK_BYTES, 32, seconds, area, options.choose(3 * GIB, 64 * MIB))
    flushed = replace(small, depth=1, has_flush_each=True)
    large = replace(small, pattern="write", block_bytes=MIB, depth=4)
    unbound = replace(small, io_bytes=0)
    found = (
        Case("4k_write_qd32", LIMITED, small, 0.8, 2.0, counts_cpu=True),
        Case("4k_write_qd32_unlimited_link", UNLIMITED, small, counts_cpu=True),
        Case("4k_write_flush_qd1", LIMITED, flushed, 1.0),
        Case("4k_write_flush_qd8", LIMITED, replace(flushed, jobs=8), 1.0),
        Case("1m_write_qd4", LIMITED, large, 0.5),
        Case("4k_read_qd32", LIMITED, replace(unbound, pattern="randread"), 1.0),
        Case("1m_read_qd4", LIMITED, replace(large, pattern="read", io_bytes=0), 0.6),
    )
    return {case.name: case for case in found}


@dataclass
class Slot:
    """One server under one load for a while."""

    outcome: Outcome
    cpu_seconds: float
    shipped_bytes: int = 0
    """Contents handed to the link meanwhile."""
    settled_cpu_seconds: float = 0.0
    """From its beginning until the daemon was idle."""
    settled_shipped_bytes: int = 0

    @property
    def cpu_us_per_request(self) -> float:
        """CPU of the server's process, all its threads."""
        return self.cpu_seconds * 1e6 / max(1, self.outcome.requests)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            **asdict(self.outcome),
            "cpu_us_per_request": self.cpu_us_per_request,
            "shipped_bytes": self.shipped_bytes,
        }


async def _run(options: Options, name: str) -> Result:
    """Run a case in a lab of its own."""
    title = f"A client's view, {name}: geomirror while it replicates, nbdkit file, qemu-nbd"
    result = Result(NAME, title)
    missing = missing_tools("fio", "nbdkit", "qemu-nbd")
    if missing:
        result.skipped_because = f"not installed: {', '.join(missing)}"
        return result
    case = cases(options)[name]
    size = options.choose(4 * GIB, 32 * MIB)
    journal = options.choose(12 * GIB, GIB)
    require_free(options.directory, 2 * journal + 4 * size)
    rounds = options.choose_rounds(7, 2)
    result.settings = {"rounds": rounds, "volume_bytes": size, "journal_bytes": journal}
    peers = [server(options.directory, size) for server in (nbdkit_file, qemu_nbd)]
    async with rig(options.directory / "lab", case.link) as lab:
        await lab.create(str(size), str(journal))
        await fill_all(peers, size)
        await fill(lab.uri, size)
        await lab.drain()
        await lab.restart()  # what is read is in the image then
        per_gib = await _shipping(lab, options, case, result) if case.counts_cpu else 0.0
        bench = _Comparison(options, lab, peers, case, result, per_gib)
        for number in range(rounds):
            await bench.round(number)
        bench.conclude()
    return result


async def _shipping(lab: Rig, options: Options, case: Case, result: Result) -> float:
    """CPU seconds per GiB of contents shipped, median of some rounds."""
    found: dict[str, list[float]] = {"primary": [], "secondary": []}
    area = options.choose(4 * GIB, 32 * MIB)
    load = Load("randwrite", BLOCK_BYTES, 32, 0, area, options.choose(GIB, 64 * MIB))
    for number in range(options.choose_rounds(3, 1)):
        await lab.link.down()
        await lab.wait_for("Disconnected")
        await run_fio(replace(load, seed=number + 1), lab.uri)
        await lab.restart("Disconnected")
        await asyncio.sleep(SETTLE_S)
        pids = {"primary": lab.pid, "secondary": lab.secondary.pid or 0}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        async with lab.watch() as watch:
            await lab.link.up()
            await lab.drain()
        result.judge_states(watch.states, ("Disconnected",))
        shipped = (await lab.peer())["logical_bytes"] / GIB
        for name, pid in pids.items():
            found[name].append((cpu_seconds(pid) - before[name]) / shipped)
    name = f"{case.name}: CPU s per GiB"
    result.at_most(f"{name} shipped", found["primary"], CPU_SECONDS_PER_GIB_MAX, "s")
    result.median(f"{name} received, the secondary", found["secondary"], "s")
    return statistics.median(found["primary"])


class _Comparison:
    """One case over all its rounds."""

    def __init__(
        self,
        options: Options,
        lab: Rig,
        peers: list[PeerServer],
        case: Case,
        result: Result,
        per_gib: float,
    ) -> None:
        self._options = options
        self._lab = lab
        self._peers = peers
        self._case = case
        self._result = result
        self._per_gib = per_gib
        self._rounds: list[dict[str, Slot]] = []

    async def round(self, number: int) -> None:
        """All servers once, in an order that rotates."""
        slots: dict[str, Slot] = {}
        load = replace(self._case.load, seed=number + 1)
        turns = [None, *self._peers]
        at = number % len(turns)
        for peer in turns[at:] + turns[:at]:
            sync_file_system(self._options.directory)
            if peer is None:
                slots["geomirror"] = await self._ours(load)
            else:
                await peer.start()
                slots[peer.name] = await _measured(load, peer.uri, peer.pid)
                await peer.stop()
        self._rounds.append(slots)
        document = {name: slot.to_json() for name, slot in slots.items()}
        self._result.rounds.append({"case": self._case.name, "round": number, **document})

    async def _ours(self, load: Load) -> Slot:
        lab = self._lab
        before, cpu = (await lab.peer())["logical_bytes"], cpu_seconds(lab.pid)
        async with lab.watch() as watch:
            slot = await _measured(load, lab.uri, lab.pid)
        self._result.judge_states(watch.states)
        if not self._case.is_read:
            slot.shipped_bytes = (await lab.peer())["logical_bytes"] - before
            await lab.drain()
            await lab.settle()
            slot.settled_cpu_seconds = cpu_seconds(lab.pid) - cpu
            slot.settled_shipped_bytes = (await lab.peer())["logical_bytes"] - before
        return slot

    def conclude(self) -> None:
        """Figures and table rows of all rounds."""
        case, result = self._case, self._result
        for name, bound in (("nbdkit", case.nbdkit_min), ("qemu-nbd", case.qemu_min)):
            ratios = [_ratio(slots["geomirror"], slots[name]) for slots in self._rounds]
            label = f"{case.name}: ratio to {name}"
            if bound is None:
                result.median(label, ratios, "x")
            else:
                result.at_least(label, ratios, bound)
        if case.counts_cpu:
            writes = [
                slot.cpu_us_per_request
                - slot.shipped_bytes / GIB * self._per_gib * 1e6 / max(1, slot.outcome.requests)
                for slot in (slots["geomirror"] for slots in self._rounds)
            ]
            result.at_most(f"{case.name}: CPU per write", writes, CPU_US_PER_WRITE_MAX, "µs")
            settled = [
                (slot.settled_cpu_seconds - slot.settled_shipped_bytes / GIB * self._per_gib)
                * 1e6
                / max(1, slot.outcome.requests)
                for slot in (slots["geomirror"] for slots in self._rounds)
            ]
            result.median(f"{case.name}: CPU per write, destaged", settled, "µs")
        result.columns = COLUMNS
        for name in self._rounds[0]:
            result.rows.append(self._row(name))

    def _row(self, name: str) -> list[str | float]:
        slots = [each[name] for each in self._rounds]
        rate = statistics.median(slot.outcome.bytes_per_second for slot in slots)
        has_flush = self._case.load.has_flush_each
        row: list[str | float] = [
            self._case.name,
            name,
            statistics.median(slot.outcome.iops for slot in slots),
            rate / MIB,
        ]
        for latency in ("p50_us", "p99_us", "p999_us"):
            key = f"flush_{latency}" if has_flush else latency
            row.append(statistics.median(getattr(slot.outcome, key) for slot in slots))
        row.append(statistics.median(slot.cpu_us_per_request for slot in slots))
        return row


def _ratio(ours: Slot, theirs: Slot) -> float:
    return ours.outcome.iops / max(theirs.outcome.iops, 1e-9)


async def _measured(load: Load, uri: str, pid: int) -> Slot:
    before = cpu_seconds(pid)
    outcome = await run_fio(load, uri)
    return Slot(outcome, cpu_seconds(pid) - before)


CELLS = [Cell(NAME, functools.partial(_run, name=name), name) for name in cases(Options(Path()))]
