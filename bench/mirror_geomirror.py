"""geomirror as one of the mirrors: what a reader of the secondary's export sees is the copy."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from bench.far_nodes import FarNode, far_nodes
from bench.mirrors import Mirror, checked
from bench.rig import RESOURCE
from bench.stamps import REGION_BYTES, Stamps
from geomirror.errors import GeomirrorError
from geomirror.nbd.client_io import NbdClient

WAIT_S_MAX = 300.0
JOURNAL = "1G"


class GeomirrorMirror(Mirror):
    """A resource with one secondary, asynchronous, all settings at their defaults."""

    name = "geomirror"
    _near: FarNode
    _far: FarNode
    _copy_uri = ""
    states: set[str]

    async def prepare(self, image: Path) -> None:
        self.states = set()
        self._stack = AsyncExitStack()
        self._near, self._far = await self._stack.enter_async_context(
            far_nodes(self.directory / "nodes", self.wan)
        )
        await self._near.cli(
            *("resource", "create", RESOURCE, "--size", str(self.plan.volume_bytes)),
            *("--journal-size", JOURNAL, "--primary", "east-1", "--secondary", "west-1"),
        )
        self.uri = await self._export(self._near)
        await checked("nbdcopy", "--flush", str(image), self.uri)
        limit = ("--timeout", f"{WAIT_S_MAX:g}")
        await self._near.cli("wait", RESOURCE, "--applied", *limit, timeout_s=WAIT_S_MAX + 30)
        self._copy_uri = await self._export(self._far)

    async def _export(self, node: FarNode) -> str:
        document = await node.call("status", {"name": RESOURCE}, timeout_s=30.0)
        return str(document["resources"][0]["volumes"][0]["nbd_uri"])

    async def scan(self) -> Stamps | None:
        parts = []
        try:
            # A connection sees one epoch.
            async with await NbdClient.connect(self._copy_uri) as client:
                for offset in self.plan.region_offsets():
                    parts.append(bytes(await client.read(offset, REGION_BYTES)))  # noqa: PERF401
        except GeomirrorError:
            return None
        return Stamps.of(b"".join(parts))

    async def close(self) -> None:
        document = await self._near.call("status", {"name": RESOURCE}, timeout_s=30.0)
        peer = document["resources"][0]["peers"][0]
        self.restarts = int(peer["resyncs"])
        await self._stack.aclose()
