"""Two nodes of a lab with one resource, and a watch on the peer's state."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.machine import cpu_seconds
from geomirror.errors import GeomirrorError, WaitTimeoutError
from geomirror.lab.lab_io import Lab, LabLink, LabNode

RESOURCE = "disk"
NODES = (("east", "east-1"), ("west", "west-1"))
DRAIN_S_MAX = 900.0
STATE_S_MAX = 30.0
SETTLE_S_MAX = 120.0
SETTLE_S = 1.5
"""Longer than the second without writes after which destaging begins."""
IDLE_MAX = 0.08
"""Part of a CPU that an idle daemon takes at most."""


class Watch:
    """Samples the primary's status while something else runs."""

    def __init__(self, rig: Rig, interval_s: float) -> None:
        self.states: set[str] = set()
        self.lag_seconds: list[float] = []
        self.journal_fill_max = 0.0
        self.resyncs = 0
        self._rig = rig
        self._interval_s = interval_s

    async def sample(self) -> dict[str, Any]:
        """Take one sample; returns the peer's object of the status."""
        resource = await self._rig.status()
        peer: dict[str, Any] = resource["peers"][0]
        self.states.add(peer["state"])
        self.resyncs = max(self.resyncs, int(peer["resyncs"]))
        self.lag_seconds.append(float(peer["lag"]["seconds"]))
        journal = resource["journal"]
        fill = journal["bytes_used"] / journal["bytes_total"]
        self.journal_fill_max = max(self.journal_fill_max, fill)
        return peer

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(self._interval_s)


class Rig:
    """A running lab: the primary is `east`, its volume is at `uri`."""

    def __init__(self, lab: Lab, link: str) -> None:
        self.lab = lab
        self.settings = link
        self.uri = ""
        self.has_secondary = False

    @property
    def primary(self) -> LabNode:
        """The node that is measured."""
        return self.lab.nodes[0]

    @property
    def secondary(self) -> LabNode:
        """Its mirror."""
        return self.lab.nodes[1]

    @property
    def pid(self) -> int:
        """Pid of the primary's daemon."""
        assert self.primary.pid is not None
        return self.primary.pid

    @property
    def link(self) -> LabLink:
        """The link of the two nodes."""
        return self.lab.link(self.primary.name, self.secondary.name)

    async def create(self, size: str, journal: str, *, has_secondary: bool = True) -> None:
        """Create the resource; return when the peer streams, if there is to be one."""
        peers = ("--secondary", self.secondary.name) if has_secondary else ()
        self.has_secondary = has_secondary
        await self.primary.cli(
            *("resource", "create", RESOURCE, "--size", size, "--journal-size", journal),
            *("--primary", self.primary.name, *peers, "--json"),
        )
        self.uri = (await self.status())["volumes"][0]["nbd_uri"]
        if has_secondary:
            await self.wait_for("Stream")

    async def delete(self) -> None:
        """Delete the resource on both nodes."""
        await self.primary.cli("resource", "delete", RESOURCE, "--yes")

    async def status(self) -> dict[str, Any]:
        """The resource's object of the primary's status."""
        document = await self.primary.call("status", {"name": RESOURCE}, timeout_s=30.0)
        found: dict[str, Any] = document["resources"][0]
        return found

    async def peer(self) -> dict[str, Any]:
        """The peer's object of it."""
        found: dict[str, Any] = (await self.status())["peers"][0]
        return found

    async def wait_for(self, *states: str) -> str:
        """Wait until the peer is in one of the states; which one. WaitTimeoutError."""
        deadline = asyncio.get_running_loop().time() + STATE_S_MAX
        state = ""
        while asyncio.get_running_loop().time() < deadline:
            # Just after its start a node has the resource but does not serve it yet.
            peers = (await self.status())["peers"]
            state = str(peers[0]["state"]) if peers else "opening"
            if state in states:
                return state
            await asyncio.sleep(0.05)
        reason = peers[0]["reason"] if peers else ""
        raise WaitTimeoutError(f"the peer is {state}, not {' or '.join(states)}: {reason}")

    async def set_link(self, settings: str) -> None:
        """Change the link for good."""
        self.settings = settings
        await self.link.set(settings)

    async def drain(self) -> None:
        """Let the peer catch up over an unlimited link, so that the next slot is undisturbed."""
        await self.link.set("rate=unlimited")
        limit = ("--timeout", str(round(DRAIN_S_MAX)))
        await self.primary.cli("wait", RESOURCE, "--applied", *limit, timeout_s=DRAIN_S_MAX + 30)
        await self.link.set(self.settings)

    async def settle(self) -> None:
        """Wait until the primary's daemon has nothing to do: what was written is destaged."""
        deadline = asyncio.get_running_loop().time() + SETTLE_S_MAX
        before = cpu_seconds(self.pid)
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(SETTLE_S)
            now = cpu_seconds(self.pid)
            if now - before < SETTLE_S * IDLE_MAX:
                return
            before = now
        raise WaitTimeoutError(f"the primary is not idle after {SETTLE_S_MAX:g} s")

    async def restart(self, *states: str) -> None:
        """Stop the primary in order, which empties its journal into the image, and start it.

        Returns when the peer is in one of `states`; if none is given, when it streams.
        """
        await self.primary.stop()
        await self.primary.start()
        await self.wait_for(*(states or ("Stream", "Fold")))

    async def received_bytes(self) -> int:
        """Bodies of frames that the secondary has received since its start."""
        document = await self.secondary.call("status", {"name": RESOURCE}, timeout_s=30.0)
        return int(document["resources"][0]["peers"][0]["wire_bytes"])

    async def began(self, before: int) -> None:
        """Wait until the secondary has received more than `before`: a load arrives. The tool that
        makes it takes up to two seconds to start. WaitTimeoutError."""
        deadline = asyncio.get_running_loop().time() + STATE_S_MAX
        while await self.received_bytes() <= before:
            if asyncio.get_running_loop().time() > deadline:
                raise WaitTimeoutError(f"nothing has arrived after {STATE_S_MAX:g} s of load")
            await asyncio.sleep(0.02)

    async def link_bytes(self) -> int:
        """Bytes that have crossed the link from the primary to the secondary."""
        links = await self.lab.emulator.call("status")
        return sum(
            int(direction["bytes_delivered"])
            for link in links
            for direction in link["directions"]
            if str(direction["name"]).startswith(f"{self.primary.name}>")
        )

    @asynccontextmanager
    async def watch(self, interval_s: float = 0.5) -> AsyncIterator[Watch]:
        """Watch the peer during the block; a sample that fails fails the block."""
        watch = Watch(self, interval_s)
        task = asyncio.create_task(watch.run())
        try:
            yield watch
            if task.done():
                task.result()
            await watch.sample()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def rig(directory: Path, link: str) -> AsyncIterator[Rig]:
    """A lab of two nodes in a new directory, without a resource yet."""
    pair = (NODES[0][1], NODES[1][1])
    async with Lab(directory, nodes=NODES, links={pair: link}) as lab:
        yield Rig(lab, link)


def require_free(directory: Path, needed_bytes: int) -> None:
    """GeomirrorError when the file system has less room than a benchmark is going to use."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < needed_bytes:
        raise GeomirrorError(f"{directory} has {free >> 20} MiB free, {needed_bytes >> 20} needed")
