"""Failovers to a copy whose volumes are not where it is: epochs not applied, a resync under way.

```
 unapplied   a reader holds applying back, much is written ─▶ kill ─▶ [ failover, write, read ]
 in_resync   the journal overflows, a resync runs ─────────▶ kill ─▶ [ failover, write, read ]
                                                      behind them: [ until the volumes are right ]
```
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.fio import Load, run_fio
from bench.machine import missing_tools
from bench.options import Options
from bench.promotion import FIRST_WRITE_S_MAX, NAME, fail_over, follow, resource, until, uri
from bench.report import Result
from bench.rig import RESOURCE, Rig, require_free, rig
from geomirror.lab.lab_io import LabNode
from geomirror.limits import BLOCK_BYTES, GIB, MIB
from geomirror.nbd.client_io import NbdClient

LINK = "rtt=20ms,rate=unlimited"
RESYNC_LINK = "rtt=20ms,rate=400mbit"
BEHIND_S_MAX = 600.0
COPIED_PART = 0.7
"""Of a resync before the primary is killed."""


async def unapplied(options: Options) -> Result:
    """As much as a reader of the copy can hold back within its minute."""
    result = Result(NAME, "Failover with durable epochs that the copy has not applied")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    written = options.choose(GIB, 24 * MIB)
    size, journal = options.choose(4 * GIB, 64 * MIB), options.choose(4 * GIB, GIB)
    require_free(options.directory, 2 * journal + 2 * size + written)
    rounds = options.choose_rounds(4, 1)
    result.settings = {"rounds": rounds, "volume_bytes": size, "written_bytes": written}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        primary, heir = lab.primary, lab.secondary
        for number in range(rounds):
            load = Load("randwrite", BLOCK_BYTES, 32, 0, size, written, seed=number + 1)
            async with await NbdClient.connect(await uri(heir)) as reader:
                await reader.read(0, BLOCK_BYTES)
                await run_fio(load, await uri(primary))
                await primary.cli("wait", RESOURCE, "--timeout", "300", timeout_s=330.0)
                position = (await resource(heir))["position"]
                waiting = position["durable_epoch"] - position["applied_epoch"]
                found = await _measured(primary, heir, number)
            result.rounds.append({"epochs_waiting": waiting, **found})
            await primary.start()
            await follow(primary, heir)
            primary, heir = heir, primary
    _conclude(result, "unapplied", "applied")
    return result


async def in_resync(options: Options) -> Result:
    """Most of a resync is done; all that it has overwritten goes back."""
    result = Result(NAME, "Failover in the middle of a resync")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    written = options.choose(2 * GIB, 160 * MIB)
    size, journal = options.choose(4 * GIB, 256 * MIB), options.choose(GIB, 256 * MIB)
    require_free(options.directory, 2 * journal + 2 * size + 2 * written)
    rounds = options.choose_rounds(1, 1)
    result.settings = {"rounds": rounds, "volume_bytes": size, "written_bytes": written}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        # What a resync overwrites has to be read and saved: holes would cost nothing.
        await run_fio(Load("write", MIB, 4, 0, size, size), lab.uri)
        await lab.drain()
        for number in range(rounds):
            await _half_resynced(lab, Load("randwrite", 16 * BLOCK_BYTES, 8, 0, size, written))
            result.rounds.append(await _measured(lab.primary, lab.secondary, number))
    _conclude(result, "in a resync", "back")
    return result


async def _half_resynced(lab: Rig, load: Load) -> None:
    await lab.link.down()
    await lab.wait_for("Disconnected")
    await run_fio(load, lab.uri)
    await lab.set_link(RESYNC_LINK)
    await lab.link.up()

    async def is_copied() -> bool:
        peer = await lab.peer()
        resync = peer["resync"]
        return bool(resync) and resync["copied_bytes"] >= COPIED_PART * resync["total_bytes"]

    await until("most of the resync", is_copied, BEHIND_S_MAX)


async def _measured(primary: LabNode, heir: LabNode, number: int) -> dict[str, Any]:
    began = time.monotonic()
    found = await fail_over(primary, heir, number)
    promoted = time.monotonic()
    left = (await resource(heir))["behind"]
    async with await NbdClient.connect(await uri(heir)) as client:
        await client.read(number * BLOCK_BYTES, MIB)
    read = time.monotonic()

    async def is_right() -> bool:
        await asyncio.sleep(0.2)
        return (await resource(heir))["behind"] is None

    await until("the volumes are right", is_right, BEHIND_S_MAX)
    return {
        **found,
        "first_read_seconds": found["first_write_seconds"] + read - promoted,
        "behind_seconds": time.monotonic() - promoted,
        "behind_bytes": left["bytes_left"] if left else 0,
        "kill_to_first_write_seconds": promoted - began,
    }


def _conclude(result: Result, when: str, what: str) -> None:
    rounds = result.rounds
    firsts = [x["first_write_seconds"] for x in rounds]
    result.at_most(f"{when}: first write", firsts, FIRST_WRITE_S_MAX, "s")
    result.median(f"{when}: first MiB read", [x["first_read_seconds"] for x in rounds], "s")
    left = [x["behind_bytes"] / MIB for x in rounds]
    result.median(f"{when}: left at the first write", left, "MiB")
    rates = [x["behind_bytes"] / MIB / x["behind_seconds"] for x in rounds]
    result.median(f"{when}: {what} behind the writers", rates, "MiB/s")
