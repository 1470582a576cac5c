"""The actors of the demo, and what its acts share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomirror.errors import GeomirrorError
from geomirror.lab.demo_image import DemoImage
from geomirror.lab.demo_ledger import Ledger
from geomirror.lab.demo_report import Report
from geomirror.lab.demo_sampler import Sampler
from geomirror.lab.demo_view import View
from geomirror.lab.lab_io import Lab, LabNode

WAIT_S_MAX = 60
POLL_S = 0.1
GOOD = ("UpToDate", "Consistent")
"""Disk states of a copy that follows; under load it is seldom up to date in an instant."""


@dataclass
class Stage:
    """Three nodes, one volume, one history of writes."""

    lab: Lab
    directory: Path
    """Images that are looked at lie here."""
    resource: str
    primary: LabNode
    """Where the volume is written at the beginning, and at the end."""
    first: LabNode
    second: LabNode
    image: DemoImage
    ledger: Ledger
    view: View
    report: Report
    uri: str
    """Of the writable volume."""

    @property
    def nodes(self) -> tuple[LabNode, LabNode, LabNode]:
        """The primary of the beginning, then the two secondaries."""
        return self.primary, self.first, self.second

    def sampler(self, node: LabNode) -> Sampler:
        """Watches lag and links, as `node` sees them, while it is entered."""
        return Sampler(self.lab, node, self.resource, self.view)

    async def run(self, node: LabNode, *arguments: str) -> Any:
        """Run a command of ours at a node, and show it; its document."""
        self.view.command(node.name, f"geomirror {' '.join(arguments)}")
        return await node.cli(*arguments, "--json", timeout_s=WAIT_S_MAX + 20)

    async def wait_applied(self, node: LabNode) -> None:
        """Until every copy has all that is completed now.

        :raises GeomirrorError: it has not after a minute.
        """
        wait = ("wait", self.resource, "--applied", "--timeout", str(WAIT_S_MAX))
        await node.cli(*wait, timeout_s=WAIT_S_MAX + 20)

    async def status(self, node: LabNode) -> dict[str, Any]:
        """The resource as a node sees it."""
        document = await node.call("status", {"name": self.resource})
        found: dict[str, Any] = document["resources"][0]
        return found

    async def until_served(self, node: LabNode) -> None:
        """A daemon that was just started answers a moment before it serves its resources.

        :raises GeomirrorError: it does not after a minute.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + WAIT_S_MAX
        while (await self.status(node))["state"] in ("opening", "failed"):
            if loop.time() > give_up:
                raise GeomirrorError(f"{node.name} does not serve {self.resource}")
            await asyncio.sleep(POLL_S)

    async def peer(self, node: LabNode, name: str) -> dict[str, Any]:
        """How a node sees another one; empty while it does not."""
        peers = (await self.status(node))["peers"]
        return next((peer for peer in peers if peer["node"] == name), {})

    async def until_peer(self, node: LabNode, name: str) -> dict[str, Any]:
        """Wait until `name` streams from `node`; the peer. GeomirrorError after a minute."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + WAIT_S_MAX
        while True:
            peer = await self.peer(node, name)
            if peer.get("state") == "Stream" and peer.get("disk_state") in GOOD:
                return peer
            if loop.time() > give_up:
                state, reason = peer.get("state"), peer.get("reason")
                raise GeomirrorError(f"{name} does not follow {node.name}: {state} {reason}")
            await asyncio.sleep(POLL_S)
