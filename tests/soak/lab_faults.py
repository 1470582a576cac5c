"""The faults of a lab round: chosen by chance, told in words, undone at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable

from geomirror.errors import GeomirrorError
from geomirror.lab.lab_io import LabNode
from geomirror.limits import BLOCK_BYTES
from geomirror.nbd.client_io import NbdClient
from tests.soak.scene import RESOURCE, Broken, Scene

KILL_AWAY_S = (0.0, 0.0, 1.0, 4.0)
READY_S_MAX = 60.0
FLOOD_BYTES_MAX = 280 << 20
"""More than the smallest journal, whatever is sent meanwhile."""


class Faults:
    """Plays faults on a scene until the time is over."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._frozen: set[int] = set()
        self._removed = False
        self._actions: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (3, self._outage),
            (2, self._flap),
            (2, self._change_link),
            (1, self._partition),
            (3, self._kill),
            (1, self._kill_all),
            (2, self._freeze),
            (2, self._pause),
            (2, self._change_mode),
            (1, self._remove_or_add),
            (1, self._flood),
            (3, self._look),
            (2, self._look_in_sync),
        ]

    async def play(self, seconds: float) -> None:
        """One fault after the other, with short breaks."""
        chance, loop = self._scene.chance, asyncio.get_running_loop()
        until = loop.time() + seconds
        weights = [weight for weight, _ in self._actions]
        while loop.time() < until:
            action = chance.choices(self._actions, weights)[0][1]
            await action()
            await asyncio.sleep(chance.choice((0.1, 0.5, 1.5)))

    async def heal(self) -> None:
        """Undo everything that stays: links up, nodes running, nobody paused, asynchronous."""
        scene = self._scene
        self.thaw()
        for node in scene.mirrors:
            link = scene.lab.link(scene.primary.name, node.name)
            await link.flap(down_s=0.1, period_s=1, count=0)
            await link.up()
            await link.set("rtt=10ms,rate=unlimited,loss=0,jitter=0ms")
        await self._ready(scene.primary)
        await self._make_asynchronous()
        if self._removed:
            await self._remove_or_add()
        await scene.primary.cli("resume", RESOURCE)
        scene.tell("healed")

    def thaw(self) -> None:
        """SIGCONT to whoever was stopped."""
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    @property
    def _members(self) -> list[LabNode]:
        """The mirrors that are there now."""
        return self._scene.mirrors[: -1 if self._removed else None]

    # Links.

    def _mirror(self) -> LabNode:
        return self._scene.chance.choice(self._scene.mirrors)

    async def _outage(self) -> None:
        scene, node = self._scene, self._mirror()
        link = scene.lab.link(scene.primary.name, node.name)
        source = scene.chance.choice((None, None, scene.primary.name, node.name))
        seconds = scene.chance.choice((0.3, 1.0, 3.0, 6.0))
        scene.tell(f"link to {node.name} down for {seconds:g} s, {source or 'both'}")
        await link.down(source=source)
        await asyncio.sleep(seconds)
        await link.up()

    async def _flap(self) -> None:
        scene, node = self._scene, self._mirror()
        count = scene.chance.randrange(2, 6)
        scene.tell(f"link to {node.name} flaps {count} times")
        link = scene.lab.link(scene.primary.name, node.name)
        await link.flap(down_s=0.2, period_s=0.7, count=count)
        await asyncio.sleep(0.7 * count)
        if scene.chance.random() < 0.3:
            await link.reset()

    async def _change_link(self) -> None:
        scene, node = self._scene, self._mirror()
        rtt = scene.chance.choice((1, 20, 80, 300))
        rate = scene.chance.choice(("5mbit", "20mbit", "200mbit", "unlimited"))
        loss = scene.chance.choice(("0", "0.1%", "1%"))
        settings = f"rtt={rtt}ms,rate={rate},loss={loss}"
        scene.tell(f"link to {node.name}: {settings}")
        await scene.lab.link(scene.primary.name, node.name).set(settings)

    async def _partition(self) -> None:
        scene = self._scene
        scene.tell("the primary is cut off for 2 s")
        emulator, name = scene.lab.emulator, scene.primary.name
        await emulator.call("partition", node=name, is_up=False)
        await asyncio.sleep(2)
        await emulator.call("partition", node=name, is_up=True)

    # Processes.

    async def _kill(self) -> None:
        scene = self._scene
        node, away_s = scene.chance.choice(scene.lab.nodes), scene.chance.choice(KILL_AWAY_S)
        reported = await self._reported(node)
        scene.tell(f"{node.name} killed, away for {away_s:g} s")
        await node.kill()
        await asyncio.sleep(away_s)
        await node.start()
        await self._ready(node)
        await self._require_durable(node, reported)

    async def _kill_all(self) -> None:
        scene = self._scene
        scene.tell("everybody killed at once")
        await asyncio.gather(*(node.kill() for node in scene.lab.nodes))
        await asyncio.gather(*(node.start() for node in scene.lab.nodes))
        await self._ready(scene.primary)

    async def _freeze(self) -> None:
        scene = self._scene
        node, seconds = scene.chance.choice(scene.lab.nodes), scene.chance.choice((0.5, 2.0, 5.0))
        pid = node.pid
        assert pid is not None
        scene.tell(f"{node.name} stopped for {seconds:g} s")
        os.kill(pid, signal.SIGSTOP)
        self._frozen.add(pid)
        await asyncio.sleep(seconds)
        self.thaw()

    async def _ready(self, node: LabNode) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + READY_S_MAX
        while await self._scene.resource(node) is None:
            is_removed = self._removed and node is self._scene.mirrors[-1]
            if is_removed:
                return
            if loop.time() > until:
                raise Broken(f"{node.name} does not serve after {READY_S_MAX:g} s")
            await asyncio.sleep(0.1)

    async def _reported(self, node: LabNode) -> int:
        """What a mirror has reported durable; -1 where that is no promise."""
        if node is self._scene.primary:
            return -1
        peer = await self._scene.peer(node)
        if peer is None or peer["state"] not in ("Stream", "Fold", "Paused", "Disconnected"):
            return -1
        resource = await self._scene.resource(node)
        is_whole = resource is not None and resource["state"] in ("ok", "degraded")
        return int(peer["position"]["epoch"]) if is_whole else -1

    async def _require_durable(self, node: LabNode, reported: int) -> None:
        resource = await self._scene.resource(node) if reported >= 0 else None
        if resource is None:
            return
        found = int(resource["position"]["durable_epoch"])
        if found < reported:
            raise Broken(f"O3: {node.name} reported epoch {reported} durable, and has {found}")

    # What an operator does.

    async def _pause(self) -> None:
        scene, node = self._scene, self._mirror()
        seconds = scene.chance.choice((0.5, 3.0))
        await self._ready(scene.primary)
        if await scene.peer(node) is None:
            return
        scene.tell(f"{node.name} paused for {seconds:g} s")
        await scene.primary.cli("pause", RESOURCE, "--peer", node.name)
        await asyncio.sleep(seconds)
        await scene.look(node)
        await scene.primary.cli("resume", RESOURCE, "--peer", node.name)

    async def _make_asynchronous(self) -> None:
        acks = [f"ack.{node.name}=" for node in self._members]
        words = ("copies=", "degrade_after=", *acks)
        await self._scene.primary.cli("resource", "set", RESOURCE, *words)

    async def _change_mode(self) -> None:
        scene = self._scene
        levels = ("completed", "received", "durable", "applied")
        words = [f"ack.{node.name}={scene.chance.choice(levels)}" for node in self._members]
        is_any = any(not word.endswith("completed") for word in words)
        words.append(f"copies={1 if is_any else ''}")
        words.append(f"degrade_after={scene.chance.choice(('1s', '3s', '10s'))}")
        scene.tell("mode: " + " ".join(words))
        await self._ready(scene.primary)
        await scene.primary.cli("resource", "set", RESOURCE, *words)

    async def _remove_or_add(self) -> None:
        scene, node = self._scene, self._scene.mirrors[-1]
        await self._ready(scene.primary)
        if self._removed:
            scene.tell(f"{node.name} added again")
            await self._add(node)
            self._removed = False
            return
        scene.tell(f"{node.name} removed")
        await self._make_asynchronous()
        command = ("resource", "remove-secondary", RESOURCE, node.name, "--yes")
        await scene.primary.cli(*command)
        self._removed = True
        scene.seen.pop(node.name, None)

    async def _add(self, node: LabNode) -> None:
        """Add it again; refused until it has said that it forgot its part from before."""
        loop = asyncio.get_running_loop()
        until = loop.time() + READY_S_MAX
        while True:
            try:
                await self._scene.primary.cli("resource", "add-secondary", RESOURCE, node.name)
            except GeomirrorError as error:
                if "still has its part" not in str(error) or loop.time() > until:
                    raise
                await asyncio.sleep(0.2)
            else:
                return

    async def _flood(self) -> None:
        """More than the journal holds while a mirror is away: it is resynced afterwards."""
        scene, node = self._scene, self._mirror()
        await self._ready(scene.primary)
        if await scene.peer(node) is None:
            return
        link = scene.lab.link(scene.primary.name, node.name)
        scene.tell(f"{node.name} away until its journal is given up")
        await link.down()
        try:
            await self._fill(node)
        finally:
            await link.up()

    async def _fill(self, node: LabNode) -> None:
        """Write what lies between the ledger's slots until the mirror is in bitmap mode."""
        scene, written = self._scene, 0
        resource = await scene.resource(scene.primary)
        assert resource is not None
        offsets = scene.ledger.offsets
        room = offsets[1] - offsets[0] - BLOCK_BYTES
        async with await NbdClient.connect(resource["volumes"][0]["nbd_uri"], depth=16) as client:
            while written < FLOOD_BYTES_MAX:
                data = scene.chance.randbytes(room)
                chosen = scene.chance.choices(offsets, k=256)
                writes = (client.write(at + BLOCK_BYTES, data) for at in chosen)
                await asyncio.gather(*writes)
                written += 256 * room
                peer = await scene.peer(node)
                if peer is not None and peer["state"] == "Bitmap":
                    break
        scene.tell(f"{written >> 20} MiB written, {peer['state'] if peer else 'gone'}")

    # Looking.

    async def _look(self) -> None:
        node = self._mirror()
        with contextlib.suppress(GeomirrorError):
            # It may restart, be removed or close its export meanwhile; Broken is no such error.
            await self._scene.look(node)
            self._scene.tell(f"{node.name} looked at")

    async def _look_in_sync(self) -> None:
        """Cut a mirror off that counts as in sync: it has what was confirmed before."""
        scene, node = self._scene, self._mirror()
        before = await scene.peer(node)
        if before is None or not before["in_sync"]:
            return
        confirmed = scene.ledger._confirmed_before
        after = await scene.peer(node)
        if after is None or not after["in_sync"]:
            return
        scene.tell(f"{node.name} in sync, cut off and looked at")
        link = scene.lab.link(scene.primary.name, node.name)
        await link.down()
        try:
            await self._settled(node)
            await scene.look(node, confirmed_before=confirmed)
        finally:
            await link.up()

    async def _settled(self, node: LabNode) -> None:
        """Until everything durable is applied."""
        for _ in range(100):
            resource = await self._scene.resource(node)
            position = resource["position"] if resource is not None else None
            if position and position["applied_epoch"] == position["durable_epoch"]:
                return
            await asyncio.sleep(0.1)
