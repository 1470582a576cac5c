"""The bad things that happen while the demo writes, in order, as parts of its duration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from geomirror.lab.demo_nbd import judge_export
from geomirror.lab.demo_stage import Stage
from geomirror.lab.lab_io import LabNode


class Faults:
    """Plays the plan once."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._plan: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (0.06, lambda: self._outage(stage.first, 2.0)),
            (0.18, lambda: self._kill(stage.second, "secondary", away_s=1.5)),
            (0.32, lambda: self._outage(stage.second, 3.0)),
            (0.45, lambda: self._kill(stage.primary, "primary", away_s=0.0)),
            (0.58, self._stable_read),
            (0.68, self._partition),
            (0.82, self._flaps),
        ]

    async def play(self, seconds: float) -> None:
        """Run the plan; returns when it is over and every link is up."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for part, action in self._plan:
            await asyncio.sleep(max(0.0, begin + part * seconds - loop.time()))
            await action()
        await asyncio.sleep(max(0.0, begin + seconds - loop.time()))

    async def _outage(self, peer: LabNode, seconds: float) -> None:
        view, primary = self._stage.view, self._stage.primary
        link = self._stage.lab.link(primary.name, peer.name)
        view.event(f"link {primary.name} - {peer.name} down, a black hole")
        await link.down()
        await asyncio.sleep(seconds)
        await link.up()
        view.event(f"link {primary.name} - {peer.name} up after {seconds:g} s")

    async def _partition(self) -> None:
        stage = self._stage
        stage.view.event(f"{stage.primary.name} cut off from everybody")
        await stage.lab.emulator.call("partition", node=stage.primary.name, is_up=False)
        await asyncio.sleep(2.5)
        await stage.lab.emulator.call("partition", node=stage.primary.name, is_up=True)
        stage.view.event(f"{stage.primary.name} back after 2.5 s")

    async def _flaps(self) -> None:
        stage = self._stage
        stage.view.event("all links of the primary flap: 3 times 0.4 s")
        for peer in (stage.first, stage.second):
            link = stage.lab.link(stage.primary.name, peer.name)
            await link.flap(down_s=0.4, period_s=1.2, count=3)
        await asyncio.sleep(4.5)

    async def _kill(self, node: LabNode, role: str, away_s: float) -> None:
        stage = self._stage
        stage.view.event(f"SIGKILL to the {role} {node.name}, pid {node.pid}")
        await node.kill()
        await asyncio.sleep(away_s)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await node.start()
        seconds = loop.time() - begin
        stage.report.figures[f"restart_seconds_{role}"] = round(seconds, 3)
        stage.view.event(f"{node.name} answers again {seconds:.1f} s after its start")
        await stage.until_served(node)

    async def _stable_read(self) -> None:
        """Hold one secondary still while the writer goes on: it must be a cut of the history."""
        stage = self._stage
        await stage.primary.cli("pause", stage.resource, "--peer", stage.first.name)
        status = await stage.first.cli("status", stage.resource, "--json")
        found = status["resources"][0]
        verdict = await judge_export(found["volumes"][0]["nbd_uri"], stage.ledger)
        stage.report.check(
            "mirror_under_load_is_a_moment_of_the_history",
            verdict.is_legal_cut,
            f"broken {verdict.broken_slots[:3]}, missing {verdict.missing_before[:3]}",
        )
        behind = stage.ledger.write_count - verdict.sequence_max
        stage.view.event(
            f"{stage.first.name} held at epoch {found['position']['epoch']}: "
            f"a moment of the primary, {behind} writes ago"
        )
        await stage.primary.cli("resume", stage.resource, "--peer", stage.first.name)
