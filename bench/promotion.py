"""What benchmarks of promotions have in common: history, killing, promoting, following again."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from bench.rig import RESOURCE, STATE_S_MAX, Rig
from geomirror.errors import WaitTimeoutError
from geomirror.lab.lab_io import LabNode
from geomirror.limits import BLOCK_BYTES
from geomirror.nbd.client_io import NbdClient

NAME = "failover"
FIRST_WRITE_S_MAX = 1.0
BURST_BLOCKS = 256
CATCH_UP_S_MAX = 300.0


async def scatter(uri: str, size: int, seed: int, blocks: int = BURST_BLOCKS) -> None:
    """Write single blocks all over a volume, and flush."""
    chance = random.Random(seed)
    async with await NbdClient.connect(uri) as client:
        for _ in range(blocks):
            offset = chance.randrange(size // BLOCK_BYTES) * BLOCK_BYTES
            await client.write(offset, chance.randbytes(BLOCK_BYTES))
        await client.flush()


async def write_history(lab: Rig, size: int, bursts: int) -> None:
    """Points to look back at: a burst of scattered writes each, every one applied by itself."""
    for number in range(bursts):
        await scatter(lab.uri, size, number)
        await lab.drain()


async def resource(node: LabNode) -> dict[str, Any]:
    """The resource's object of a node's status."""
    document = await node.call("status", {"name": RESOURCE}, timeout_s=30.0)
    found: dict[str, Any] = document["resources"][0]
    return found


async def uri(node: LabNode) -> str:
    """Of its volume there."""
    return str((await resource(node))["volumes"][0]["nbd_uri"])


async def until(what: str, condition: Any, timeout_s: float = STATE_S_MAX) -> None:
    """Ask again and again. WaitTimeoutError."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            raise WaitTimeoutError(f"did not happen within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.05)


async def is_gone(heir: LabNode) -> bool:
    """Whether the heir knows that the primary does not answer."""
    found = await heir.call("failover.assess", {"name": RESOURCE, "to": heir.name})
    return not found["primary"]["is_reachable"]


async def is_whole(primary: LabNode) -> bool:
    """Whether every peer streams and has everything."""
    peers = (await resource(primary))["peers"]
    return bool(peers) and all(
        (p["state"], p["disk_state"]) == ("Stream", "UpToDate") for p in peers
    )


async def is_told(old: LabNode) -> bool:
    """A primary that came back knows that it is none any more."""
    found = await resource(old)
    # One without a tail follows by itself.
    has_tail = bool(found.get("superseded")) and found["superseded"]["relation"] == "diverged"
    return found["role"] == "secondary" or (found["state"] == "superseded" and has_tail)


async def follow(old: LabNode, new: LabNode) -> str:
    """The old primary follows the new one; the branch that its tail became."""
    await until("the old primary knows", lambda: is_told(old))
    branch = ""
    if (await resource(old))["role"] == "primary":
        command = ("resolve", RESOURCE, "--keep", new.name, "--yes", "--json")
        found = await new.cli(*command, timeout_s=CATCH_UP_S_MAX)
        branches = [member.get("branch", "") for member in found["members"]]
        branch = next((each for each in branches if each), "")
    await until("the old primary follows", lambda: is_whole(new), CATCH_UP_S_MAX)
    return branch


async def fail_over(
    primary: LabNode, heir: LabNode, number: int, *, by: str = "call"
) -> dict[str, Any]:
    """Kill the primary, promote the heir, write.

    :param by: `call`: at the daemon's control socket; `command`: as it is typed.
    """
    await primary.kill()
    await until("the heir knows", lambda: is_gone(heir))
    began = time.monotonic()
    if by == "call":
        await heir.call("promotion.failover", {"name": RESOURCE, "to": heir.name}, timeout_s=60.0)
    else:
        await heir.cli("failover", RESOURCE, "--to", heir.name, "--yes", "--json")
    promoted = time.monotonic()
    async with await NbdClient.connect(await uri(heir)) as client:
        await client.write(number * BLOCK_BYTES, bytes([number + 1]) * BLOCK_BYTES)
        written = time.monotonic()
        await client.flush()
        flushed = time.monotonic()
    return {
        "by": by,
        "promoted_seconds": promoted - began,
        "first_write_seconds": written - began,
        "flushed_seconds": flushed - began,
    }
