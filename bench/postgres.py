"""PostgreSQL on a replicated volume, beside the same on `nbdkit file` and on the bare disk.

```
 pgbench ─▶ PostgreSQL ─▶ ext4 ─▶ loop ─▶ nbdfuse ─▶ geomirror (replicating), or nbdkit file
 pgbench ─▶ PostgreSQL ─▶ the directory that the others' images lie in
```
Three clusters, made alike; in a round each is started, takes a checkpoint, is loaded for a while
and is stopped. After geomirror's turn the backlog goes out over an unlimited link and is destaged.
"""

from __future__ import annotations

import asyncio
import functools
import re
import shutil
import statistics
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.cells import Cell
from bench.database import AS_USER, Cluster, find_programs
from bench.machine import missing_tools, sync_file_system
from bench.mounted import TOOLS, Bound, Mounted, may_mount
from bench.options import Options
from bench.report import Result
from bench.rig import Rig, require_free, rig
from bench.servers import nbdkit_file
from geomirror.errors import GeomirrorError
from geomirror.limits import GIB, MIB

NAME = "postgres"
LINK = "rtt=80ms,rate=100mbit"
RATIO_MIN = 0.8
COLUMNS = ["clients", "on", "tps", "p50 ms", "p99 ms", "WAL syncs/s"]
OURS, NBDKIT, DISK = "geomirror", "nbdkit", "bare disk"
_TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Slot:
    """One turn of pgbench."""

    tps: float
    p50_ms: float
    p99_ms: float
    syncs_per_second: float


async def _run(options: Options, clients: int) -> Result:
    result = Result(NAME, f"pgbench with {clients} clients on a replicated volume over {LINK}")
    if missing := missing_tools("nbdkit", *TOOLS, AS_USER[0]):
        result.skipped_because = f"not installed: {', '.join(missing)}"
        return result
    programs = find_programs()
    if programs is None or not may_mount():
        result.skipped_because = "it needs PostgreSQL, root and /dev/fuse"
        return result
    scale, rounds = options.choose(20, 4), options.choose_rounds(5, 1)
    seconds = options.choose_seconds(30.0, 3.0)
    size, journal = options.choose(4 * GIB, 512 * MIB), options.choose(8 * GIB, GIB)
    require_free(options.directory, 2 * journal + 4 * size)
    result.settings = {"rounds": rounds, "scale": scale, "slot_seconds": seconds, "link": LINK}
    found: list[dict[str, Slot]] = []
    async with AsyncExitStack() as stack:
        public = _public()
        stack.callback(shutil.rmtree, public)
        lab = await stack.enter_async_context(rig(options.directory / "lab", LINK))
        await lab.create(str(size), str(journal))
        server = nbdkit_file(options.directory, size)
        await server.start()
        stack.push_async_callback(server.stop)
        clusters: dict[str, Cluster] = {}
        for name, disk in (
            (OURS, Mounted(public / OURS, lab.uri)),
            (NBDKIT, Mounted(public / NBDKIT, server.uri)),
            (DISK, Bound(public / "disk", options.directory / "disk")),
        ):
            stack.push_async_callback(disk.unmount)
            await disk.mount()
            cluster = Cluster(programs, disk.path / "data", public / f"{disk.path.parent.name}.run")
            await asyncio.to_thread(_fill, cluster, scale)
            clusters[name] = cluster
        await _calm(lab, options)
        names = list(clusters)
        for number in range(rounds):
            slots: dict[str, Slot] = {}
            at = number % len(names)
            for name in names[at:] + names[:at]:
                logs = public / "logs"
                work = asyncio.to_thread(_load, clusters[name], clients, seconds, logs)
                if name == OURS:
                    async with lab.watch() as watch:
                        slots[name] = await work
                    result.judge_states(watch.states)
                else:
                    slots[name] = await work
                await _calm(lab, options)
            found.append(slots)
            document = {name: asdict(slot) for name, slot in slots.items()}
            result.rounds.append({"round": number, "clients": clients, **document})
    _conclude(result, clients, found)
    return result


def _public() -> Path:
    """A place that PostgreSQL's user gets to; only mount points and sockets lie there."""
    path = Path(tempfile.mkdtemp(prefix="geomirror-bench-"))
    path.chmod(0o755)
    return path


async def _calm(lab: Rig, options: Options) -> None:
    await lab.drain()
    await lab.settle()
    sync_file_system(options.directory)


def _fill(cluster: Cluster, scale: int) -> None:
    cluster.create()
    cluster.start()
    try:
        cluster.client("pgbench", "-i", "-q", "-s", str(scale), "postgres")
    finally:
        cluster.stop()


def _load(cluster: Cluster, clients: int, seconds: float, logs: Path) -> Slot:
    logs.mkdir()
    shutil.chown(logs, AS_USER[1].partition("=")[2])
    cluster.start()
    try:
        cluster.ask("checkpoint")
        before = int(cluster.ask("select wal_sync from pg_stat_wal"))
        threads = ("-c", str(clients), "-j", str(min(2, clients)))
        log = ("-l", "--log-prefix", str(logs / "log"))
        text = cluster.client(
            "pgbench", "-n", *threads, "-T", f"{max(1, round(seconds))}", *log, "postgres"
        )
        # A backend reports its statistics when it ends, or a second later.
        syncs = int(cluster.ask("select wal_sync from pg_stat_wal")) - before
    finally:
        cluster.stop()
    tps = _TPS.search(text)
    if tps is None:
        raise GeomirrorError(f"pgbench said no tps: {text[-500:]}")
    # Fields: client, transaction, latency in µs, …
    latencies = [
        int(line.split()[2]) for path in logs.iterdir() for line in path.read_text().splitlines()
    ]
    shutil.rmtree(logs)
    p50, p99 = (float(value) / 1000 for value in np.percentile(latencies, (50, 99)))
    return Slot(float(tps[1]), p50, p99, syncs / seconds)


def _conclude(result: Result, clients: int, found: list[dict[str, Slot]]) -> None:
    result.columns = COLUMNS
    label = f"{clients} clients"
    for name, bound in ((NBDKIT, RATIO_MIN), (DISK, None)):
        ratios = [slots[OURS].tps / slots[name].tps for slots in found]
        if bound is None:
            result.median(f"{label}: tps, ratio to {name}", ratios, "x")
        else:
            result.at_least(f"{label}: tps, ratio to {name}", ratios, bound)
        tails = [slots[OURS].p99_ms / slots[name].p99_ms for slots in found]
        result.median(f"{label}: p99, ratio to {name}", tails, "x")
    for name in found[0]:
        keys = ("tps", "p50_ms", "p99_ms", "syncs_per_second")
        medians = [statistics.median(getattr(slots[name], key) for slots in found) for key in keys]
        result.rows.append([str(clients), name, *medians])


CELLS = [
    Cell(NAME, functools.partial(_run, clients=clients), f"clients_{clients}") for clients in (4, 8)
]
