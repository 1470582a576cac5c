"""What a failover, a view, a rewind and a failback take.

```
 first_write   kill the primary ─▶ [ failover at the copy ─▶ a write is accepted ] ─▶ places change
 views         history ─▶ [ view at some point of it ], again and again
 rewind        random writes like a database's ─▶ [ rewind to before them ]
 failback      link dead, both write ─▶ link back ─▶ [ resolve, catch up, switchover back ]
```
What stands in brackets is measured. Volumes are sparse and large: nothing here may depend on their
size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from bench import busy_failover
from bench.cells import Cell
from bench.fio import Load, run_fio
from bench.machine import missing_tools
from bench.options import Options
from bench.promotion import (
    FIRST_WRITE_S_MAX,
    NAME,
    fail_over,
    follow,
    is_gone,
    is_whole,
    scatter,
    until,
    uri,
    write_history,
)
from bench.report import Result
from bench.rig import RESOURCE, Rig, require_free, rig
from geomirror.limits import BLOCK_BYTES, GIB, MIB, TIB
from geomirror.nbd.client_io import NbdClient

LINK = "rtt=40ms,rate=unlimited"
SPARSE_BYTES = 4 * TIB
VIEW_S_MAX = 1.0
WIRE_RATIO_MAX = 3.0
TAIL_BYTES_PER_SECOND = 5_000_000


@contextlib.asynccontextmanager
async def _with_history(options: Options, bursts: int) -> AsyncIterator[Rig]:
    """A large sparse volume with the history of so many bursts of writes."""
    journal = options.choose(2 * GIB, GIB)
    require_free(options.directory, 2 * journal + GIB)
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(SPARSE_BYTES), str(journal))
        await write_history(lab, SPARSE_BYTES, bursts)
        yield lab


# First write.


async def first_write(options: Options) -> Result:
    """Kill, promote, write; the places change every round."""
    result = Result(NAME, "Failover to the first write accepted, 4 TiB sparse, with history")
    rounds = options.choose_rounds(40, 2)
    result.settings = {"rounds": rounds, "volume_bytes": SPARSE_BYTES}
    async with _with_history(options, options.choose(20, 2)) as lab:
        primary, heir = lab.primary, lab.secondary
        for number in range(rounds):
            # Not waited for: what is durable at the heir and not in its image is a part of it.
            await scatter(await uri(primary), SPARSE_BYTES, 1000 + number)
            by = ("call", "command")[number % 2]
            found = await fail_over(primary, heir, number, by=by)
            result.rounds.append(found)
            await primary.start()
            await follow(primary, heir)
            primary, heir = heir, primary
    for kind in ("call", "command"):
        taken = sorted(x["first_write_seconds"] for x in result.rounds if x["by"] == kind)
        what = "from the command" if kind == "command" else "at the daemon"
        result.median(f"{what} to the first write, median", taken, "s")
        p99 = taken[min(len(taken) - 1, int(len(taken) * 0.99))]
        result.at_most(f"{what} to the first write, p99", [p99], FIRST_WRITE_S_MAX, "s")
    flushed = [x["flushed_seconds"] for x in result.rounds]
    result.median("until that write is flushed", flushed, "s")
    return result


# Views.


async def views(options: Options) -> Result:
    """Views of a copy at points all over its history."""
    result = Result(NAME, "Views: time to make one, and to its first read, 4 TiB sparse")
    rounds = options.choose_rounds(20, 2)
    result.settings = {"rounds": rounds, "volume_bytes": SPARSE_BYTES}
    async with _with_history(options, options.choose(60, 4)) as lab:
        node = lab.secondary
        points = (await node.call("resource.timeline", {"name": RESOURCE}))["points"]
        result.settings["points"] = len(points)
        for number in range(rounds):
            point = points[number * (len(points) - 1) // max(1, rounds - 1)]
            wanted = {"name": RESOURCE, "epoch": point["epoch"]}
            began = time.monotonic()
            view = await node.call("view.create", wanted, timeout_s=60.0)
            made = time.monotonic()
            async with await NbdClient.connect(view["nbd_uri"]) as client:
                await client.read(0, BLOCK_BYTES)
            read = time.monotonic()
            await node.call("view.delete", {"name": RESOURCE, "view": view["name"]})
            taken = {"made_seconds": made - began, "read_seconds": read - began}
            result.rounds.append({"epoch": point["epoch"], **taken})
    for key, what in (("made", "view made"), ("read", "its first read")):
        taken_s = [found[f"{key}_seconds"] for found in result.rounds]
        result.at_most(what, taken_s, VIEW_S_MAX, "s")
    return result


# Rewind.


async def rewind(options: Options) -> Result:
    """Write like a database, go back to before it."""
    result = Result(NAME, "Rewind of random 8 KiB writes")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    written = options.choose(GIB, 24 * MIB)
    size, journal = options.choose(8 * GIB, 64 * MIB), options.choose(4 * GIB, GIB)
    require_free(options.directory, journal + 2 * size + 2 * written)
    rounds = options.choose_rounds(3, 1)
    result.settings = {"rounds": rounds, "volume_bytes": size, "written_bytes": written}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal), has_secondary=False)
        for number in range(rounds):
            result.rounds.append(await _rewind(lab, size, written, number))
    taken = [found["rewind_seconds"] for found in result.rounds]
    changed = [found["changed_bytes"] for found in result.rounds]
    result.median("rewind", taken, "s")
    rates = [size / seconds / MIB for size, seconds in zip(changed, taken, strict=True)]
    result.median("changed blocks put back", rates, "MiB/s")
    return result


async def _rewind(lab: Rig, size: int, written: int, number: int) -> dict[str, Any]:
    mark = f"before-{number}"
    await scatter(lab.uri, size, number)
    await lab.primary.cli("mark", RESOURCE, mark, "--json")
    pages = Load("randwrite", 2 * BLOCK_BYTES, 8, 0, size, written, seed=number + 1)
    await run_fio(pages, lab.uri)
    await lab.settle()
    began = time.monotonic()
    command = ("rewind", RESOURCE, "--to", mark, "--yes", "--json")
    found = await lab.primary.cli(*command, timeout_s=600.0)
    taken = time.monotonic() - began
    listed = await lab.primary.cli("branch", "list", RESOURCE, "--json")
    (branch,) = [b for b in listed["branches"] if b["name"] == found["branch"]]
    await lab.primary.cli("rewind", "commit", RESOURCE, "--yes", "--json")
    changed = int(branch.get("raw_bytes") or written)
    return {"rewind_seconds": taken, "changed_bytes": changed}


# Failback.


async def failback(options: Options) -> Result:
    """Two histories that parted, and what it costs to have one again, at the first place."""
    result = Result(NAME, "Failback after both sides have written, 100 GiB sparse")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    size, journal = 100 * GIB, options.choose(4 * GIB, GIB)
    seconds = options.choose_seconds(60.0, 2.0)
    require_free(options.directory, 2 * journal + 4 * int(seconds * TAIL_BYTES_PER_SECOND) + GIB)
    rounds = options.choose_rounds(1, 1)
    result.settings = {"rounds": rounds, "volume_bytes": size, "slot_seconds": seconds}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        await write_history(lab, size, options.choose(10, 2))
        for number in range(rounds):
            result.rounds.append(await _fail_back(lab, seconds, number))
    found = result.rounds
    ratios = [x["wire_bytes"] / x["new_bytes"] for x in found]
    result.at_most("wire bytes / written at the promoted copy", ratios, WIRE_RATIO_MAX)
    both = [x["wire_bytes"] / (x["new_bytes"] + x["tail_bytes"]) for x in found]
    result.median("wire bytes / written at both", both, "x")
    result.median("until the old primary has everything", [x["seconds"] for x in found], "s")
    result.median("switchover back", [x["switchover_seconds"] for x in found], "s")
    return result


async def _fail_back(lab: Rig, seconds: float, number: int) -> dict[str, Any]:
    old, new = lab.primary, lab.secondary
    await lab.drain()
    await lab.link.down()
    tail = await _diverge(await uri(old), seconds, 2 * number + 1)
    await until("the heir knows", lambda: is_gone(new))
    await new.call("promotion.failover", {"name": RESOURCE, "to": new.name}, timeout_s=60.0)
    written = await _diverge(await uri(new), seconds, 2 * number + 2)
    crossed = await _crossed(lab)
    began = time.monotonic()
    await lab.link.up()
    branch = await follow(old, new)
    await new.cli("wait", RESOURCE, "--applied", "--timeout", "300", timeout_s=330.0)
    caught_up = time.monotonic()
    await new.cli("switchover", RESOURCE, "--to", old.name, "--json", timeout_s=120.0)
    back = time.monotonic()
    await until("the copy follows", lambda: is_whole(old))
    return {
        "tail_bytes": tail,
        "new_bytes": written,
        "wire_bytes": await _crossed(lab) - crossed,
        "seconds": caught_up - began,
        "switchover_seconds": back - caught_up,
        "branch": branch,
    }


async def _diverge(uri: str, seconds: float, seed: int) -> int:
    """Write at a steady rate; the bytes written."""
    load = Load(
        *("randwrite", BLOCK_BYTES, 4, seconds, GIB),
        is_incompressible=True,
        bytes_per_second=TAIL_BYTES_PER_SECOND,
        seed=seed,
    )
    return (await run_fio(load, uri)).requests * BLOCK_BYTES


async def _crossed(lab: Rig) -> int:
    """Bytes that have crossed the link, both ways."""
    links = await lab.lab.emulator.call("status")
    directions = [each for link in links for each in link["directions"]]
    return sum(int(each["bytes_delivered"]) for each in directions)


CELLS = [
    Cell(NAME, run, name)
    for name, run in (
        ("first_write", first_write),
        ("unapplied", busy_failover.unapplied),
        ("in_resync", busy_failover.in_resync),
        ("views", views),
        ("rewind", rewind),
        ("failback", failback),
    )
]
