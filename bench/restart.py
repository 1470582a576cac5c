"""SIGKILL of a primary with a backlog: time to serving, and what the stream does then.

The link is down while the backlog is written, and until the daemon serves again. Measured from the
start of the process to the answer of a read through NBD.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from bench.fio import Load, run_fio
from bench.machine import memory_bytes, missing_tools
from bench.options import Options
from bench.report import Result
from bench.rig import RESOURCE, Rig, require_free, rig
from bench.servers import fill
from geomirror.errors import GeomirrorError, WaitTimeoutError
from geomirror.lab.lab_io import LabNode
from geomirror.limits import BLOCK_BYTES, GIB, MIB
from geomirror.nbd.client_io import NbdClient

NAME = "restart"
LINK = "rtt=40ms,rate=unlimited"
SERVING_S_MAX = 3.0
WAIT_S_MAX = 120.0


async def run(options: Options) -> Result:
    """Kill, start and catch up, several times."""
    result = Result(NAME, "SIGKILL of the primary's daemon with a backlog")
    if missing_tools("fio"):
        result.skipped_because = "not installed: fio"
        return result
    backlog = options.choose(GIB, 64 * MIB)
    size, journal = options.choose(4 * GIB, 64 * MIB), options.choose(8 * GIB, GIB)
    require_free(options.directory, 2 * journal + 2 * size)
    rounds = options.choose_rounds(3, 1)
    result.settings = {"rounds": rounds, "backlog_bytes": backlog, "volume_bytes": size}
    async with rig(options.directory / "lab", LINK) as lab:
        await lab.create(str(size), str(journal))
        await fill(lab.uri, size)
        await lab.drain()
        for number in range(rounds):
            load = Load("randwrite", BLOCK_BYTES, 32, 0, size, backlog, seed=number + 1)
            result.rounds.append(await _round(lab, load, result))
        digests = [await image_digest(node) for node in (lab.primary, lab.secondary)]
    rounds_ = result.rounds
    serving = [found["seconds_to_serving"] for found in rounds_]
    result.every_below("from start to serving", serving, SERVING_S_MAX, "s")
    result.note("worst of them", max(serving), "s")
    result.at_most("resyncs, all rounds", [float(sum(x["resyncs"] for x in rounds_))], 0, "")
    resumed = all(found["has_resumed"] for found in rounds_)
    result.at_least("stream resumed at the peer's position", [float(resumed)], 1, "")
    result.at_least("mirror identical afterwards", [float(len(set(digests)) == 1)], 1, "")
    result.median("backlog in the journal", [x["backlog_bytes"] / MIB for x in rounds_], "MiB")
    result.median("catch-up", [x["seconds_to_caught_up"] for x in rounds_], "s")
    result.median("RSS when serving again", [x["rss_bytes"] / MIB for x in rounds_], "MiB")
    return result


async def _round(lab: Rig, load: Load, result: Result) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    await lab.link.down()
    await lab.wait_for("Disconnected")
    await run_fio(load, lab.uri)
    before = await lab.peer()
    await lab.primary.kill()
    began = loop.time()
    starting = asyncio.create_task(lab.primary.start())
    try:
        await _first_read(lab.uri)
        serving = loop.time() - began
    finally:
        await starting
    rss = memory_bytes(lab.pid)
    began = loop.time()
    async with lab.watch(0.02) as watch:
        await lab.link.up()
        await lab.wait_for("Stream", "Fold", "Bitmap", "Resync")
        peer = await watch.sample()
        await lab.drain()
    result.judge_states(watch.states, ("Disconnected",))
    return {
        "seconds_to_serving": serving,
        "seconds_to_caught_up": loop.time() - began,
        "resyncs": watch.resyncs,
        "has_resumed": peer["position"]["epoch"] >= before["position"]["epoch"] > 0,
        "position_before": before["position"],
        "position_after": peer["position"],
        "backlog_bytes": before["lag"]["bytes"],
        "rss_bytes": rss,
    }


async def _first_read(uri: str) -> None:
    """Return as soon as a read is answered."""
    deadline = asyncio.get_running_loop().time() + WAIT_S_MAX
    while asyncio.get_running_loop().time() < deadline:
        try:
            async with await NbdClient.connect(uri, timeout_s=5.0) as client:
                await client.read(0, BLOCK_BYTES)
                return
        except GeomirrorError:
            await asyncio.sleep(0.005)
    raise WaitTimeoutError(f"nothing is served after {WAIT_S_MAX:g} s")


async def image_digest(node: LabNode) -> str:
    """Of everything that a node's export of the volume reads."""
    status = await node.call("status", {"name": RESOURCE})
    uri = str(status["resources"][0]["volumes"][0]["nbd_uri"])
    digest = hashlib.sha256()
    async with await NbdClient.connect(uri) as client:
        async for offset, data in client.chunks():
            digest.update(offset.to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
