"""The nodes, the ledger and what has been seen: what faults and judges of a round share."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

from geomirror.lab.demo_ledger import Ledger
from geomirror.lab.demo_nbd import judge_export
from geomirror.lab.lab_io import Lab, LabNode

RESOURCE = "disk"
STATUS_S_MAX = 60.0


class Broken(AssertionError):
    """A promise is broken; the text says which."""


@dataclass
class Scene:
    """A round under way."""

    lab: Lab
    chance: random.Random
    ledger: Ledger
    faults: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    """Node → newest write that its copy has shown."""
    began: float = 0.0

    @property
    def primary(self) -> LabNode:
        """Where the writer writes."""
        return self.lab.nodes[0]

    @property
    def mirrors(self) -> list[LabNode]:
        """The others."""
        return self.lab.nodes[1:]

    def tell(self, what: str) -> None:
        """Note a fault with its time."""
        seconds = asyncio.get_running_loop().time() - self.began
        self.faults.append(f"{seconds:.1f} s: {what}")

    async def resource(self, node: LabNode) -> dict[str, Any] | None:
        """The resource's status at a node, None while the node does not have it."""
        document = await node.call("status", {"name": None}, timeout_s=STATUS_S_MAX)
        found = [r for r in document["resources"] if r["name"] == RESOURCE]
        return found[0] if found and found[0].get("position") else None

    async def peer(self, node: LabNode) -> dict[str, Any] | None:
        """How the primary sees a mirror."""
        resource = await self.resource(self.primary)
        peers = resource["peers"] if resource is not None else []
        return next((p for p in peers if p["node"] == node.name), None)

    async def look(self, node: LabNode, *, confirmed_before: int = 0) -> None:
        """Read a mirror at one moment and judge it.

        :param confirmed_before: what was confirmed before this moment has to be there.
        """
        resource = await self.resource(node)
        if resource is None or resource["state"] == "inconsistent":
            return
        uri = resource["volumes"][0]["nbd_uri"]
        if uri is None:
            return
        ledger = self.ledger
        confirmed, ledger._confirmed_before = ledger._confirmed_before, confirmed_before
        try:
            verdict = await judge_export(uri, ledger)
        finally:
            ledger._confirmed_before = max(confirmed, ledger._confirmed_before)
        if verdict.sequence_max == 0 and verdict.broken_slots:
            return  # The first sync has not begun to be applied.
        if not verdict.is_legal_cut:
            raise Broken(f"O1: {node.name} is no moment of the history: {verdict!r:.300}")
        if confirmed_before and verdict.missing_confirmed:
            raise Broken(f"O8: {node.name} lacks confirmed writes: {verdict.missing_confirmed[:5]}")
        if verdict.sequence_max < self.seen.get(node.name, 0):
            raise Broken(f"O2: {node.name} went back: {self.seen} to {verdict.sequence_max}")
        self.seen[node.name] = verdict.sequence_max
