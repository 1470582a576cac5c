"""Samples lag and counters while the demo runs, across restarts of the primary's daemon."""

from __future__ import annotations

import asyncio
from typing import Any

from geomirror.errors import GeomirrorError
from geomirror.lab.demo_view import View
from geomirror.lab.lab_io import Lab, LabNode
from geomirror.limits import MIB

INTERVAL_S = 0.5


class Counter:
    """Sum of a counter that starts again at zero with its process."""

    def __init__(self) -> None:
        self.total = 0
        self._last = 0

    def see(self, value: int) -> None:
        """The counter's present value."""
        self.total += value - self._last if value >= self._last else value
        self._last = value


class Sampler:
    """Reads `status` of the primary and of the links twice a second."""

    def __init__(self, lab: Lab, primary: LabNode, resource: str, view: View) -> None:
        self.lags: dict[str, list[float]] = {}
        """Seconds, per peer; moments at which the primary's daemon was dead are left out."""
        self.resyncs: dict[str, int] = {}
        self.modes: set[str] = set()
        self.flaps = 0
        self.link_bytes = 0
        """Everything that crossed any link: also TLS, heartbeats and joins."""
        self._lab = lab
        self._primary = primary
        self._resource = resource
        self._view = view
        self._logical: dict[str, Counter] = {}
        self._wire: dict[str, Counter] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def logical_bytes(self) -> int:
        """Bytes of blocks that were shipped, before encoding, to all peers."""
        return sum(counter.total for counter in self._logical.values())

    @property
    def wire_bytes(self) -> int:
        """Bytes that this took on the links, to all peers."""
        return sum(counter.total for counter in self._wire.values())

    @property
    def all_lags(self) -> list[float]:
        """Every sample of every peer."""
        return [value for values in self.lags.values() for value in values]

    async def __aenter__(self) -> Sampler:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def sample(self) -> None:
        """Take one sample now; a dead daemon gives none."""
        links = await self._lab.emulator.call("status")
        self.flaps = sum(link["flaps"] for link in links)
        self.link_bytes = sum(
            direction["bytes_delivered"] for link in links for direction in link["directions"]
        )
        self._view.show_links({link["name"]: link["is_up"] for link in links})
        try:
            status = await self._primary.call("status", {"name": self._resource}, timeout_s=2.0)
        except GeomirrorError:
            return
        for peer in status["resources"][0]["peers"]:
            self._take(peer)
        self._view.show_numbers(
            {
                "logical": f"{self.logical_bytes / MIB:.1f} MiB",
                "wire": f"{self.wire_bytes / MIB:.1f} MiB",
                "flaps": str(self.flaps),
                "kills": str(sum(node.kills for node in self._lab.nodes)),
            }
        )

    async def _run(self) -> None:
        while True:
            await self.sample()
            await asyncio.sleep(INTERVAL_S)

    def _take(self, peer: dict[str, Any]) -> None:
        name = str(peer["node"])
        lag = (peer.get("lag") or {}).get("seconds")
        if lag is not None:
            self.lags.setdefault(name, []).append(float(lag))
            self._view.show_lag(name, float(lag))
        self.modes.add(str(peer.get("state")))
        self.resyncs[name] = max(self.resyncs.get(name, 0), int(peer.get("resyncs") or 0))
        self._logical.setdefault(name, Counter()).see(int(peer.get("logical_bytes") or 0))
        self._wire.setdefault(name, Counter()).see(int(peer.get("wire_bytes") or 0))
