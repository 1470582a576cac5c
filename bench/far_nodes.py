"""Two geomirror nodes in the namespaces of a packet-level network."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from geomirror.errors import WaitTimeoutError
from geomirror.lab.lab_io import LabNode
from geomirror.lab.namespace_io import Namespace
from geomirror.lab.packet_emulator_io import PacketEmulator

PORT = 7701
LINK_S_MAX = 30.0


class FarNode(LabNode):
    """A daemon whose network is a namespace. Its sockets in the file system are everybody's."""

    def __init__(self, name: str, site: str, data_dir: Path, namespace: Namespace) -> None:
        self._namespace = namespace
        super().__init__(name, site, data_dir, PORT)

    @property
    def _program(self) -> list[str]:
        return self._namespace.command(*super()._program)

    @property
    def listen(self) -> str:
        """The daemon's endpoint in the packet-level network."""
        return f"{self._namespace.ipv4}:{self.port}"


@asynccontextmanager
async def far_nodes(directory: Path, wan: PacketEmulator) -> AsyncIterator[tuple[FarNode, FarNode]]:
    """A primary in namespace `a` and a secondary in `b`, joined and linked."""
    os.mkdir(directory)
    near = FarNode("east-1", "east", directory / "east-1", wan.node("a"))
    far = FarNode("west-1", "west", directory / "west-1", wan.node("b"))
    try:
        create = ("network", "create", "lab", "--site", near.site, "--node", near.name)
        await near.cli(*create, "--listen", near.listen)
        await near.start()
        token = await near.cli("token", "create", "--site", far.site, "--node", far.name)
        await far.cli("join", token.strip(), "--listen", far.listen)
        await far.start()
        await _linked(near)
        yield near, far
    finally:
        await asyncio.gather(near.stop(), far.stop())


async def _linked(node: LabNode) -> None:
    deadline = asyncio.get_running_loop().time() + LINK_S_MAX
    while not any(link["is_established"] for link in (await node.call("link.list"))["links"]):
        if asyncio.get_running_loop().time() > deadline:
            raise WaitTimeoutError(f"{node.name}: no link after {LINK_S_MAX:g} s")
        await asyncio.sleep(0.05)
