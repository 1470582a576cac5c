"""Nodes without sockets: resources that do nothing, and links that are function calls."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geomirror.cluster.verdict import MemberAnswer
from geomirror.environment import SystemClock, SystemEntropy
from geomirror.errors import LinkError, WaitTimeoutError
from geomirror.limits import PRODUCTION
from geomirror.node.calls import Caller, MethodRegistry
from geomirror.node.context import NodeContext
from geomirror.node.definition_push import DefinitionPush
from geomirror.node.definition_store import DefinitionStore
from geomirror.node.link_router import LinkRouter
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_changes import ResourceChanges
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.resource_host import ResourceHost
from geomirror.node.status import StatusReport
from geomirror.wan_protocol.link_events import LinkStatus
from geomirror.wan_protocol.streams_io import NO_LINK


class FakeService:
    """Remembers what it was told."""

    def __init__(self, definition: ResourceDefinition, node: NodeContext) -> None:
        self.definition = definition
        self.node = node
        self.calls: list[tuple[Any, ...]] = []
        self.is_up_to_date = True
        self.put_back_primary = ""

    @property
    def role(self) -> str:
        return "primary" if self.definition.primary == self.node.name else "secondary"

    async def start(self) -> None:
        self.calls.append(("start",))

    async def stop(self) -> None:
        self.calls.append(("stop",))

    def exports(self) -> dict[str, Any]:
        return {f"{self.definition.name}/{v.name}": self for v in self.definition.volumes}

    def status(self) -> dict[str, Any]:
        volumes = [{"name": v.name, "size_bytes": v.size_bytes} for v in self.definition.volumes]
        peers = [
            {
                "node": name,
                "state": "Stream",
                "disk_state": "UpToDate",
                "rpo_seconds": 0.0,
                "reason": "",
            }
            for name in self.definition.peers_of(self.node.name)
        ]
        return {
            "name": self.definition.name,
            "generation": "00" * 16,
            "role": self.role,
            "state": "ok",
            "journal": {"bytes_used": 0, "bytes_total": 1 << 30, "covers_seconds": None},
            "volumes": volumes,
            "position": self.position(),
            "peers": peers,
        }

    def position(self) -> dict[str, Any]:
        return {"epoch": 7, "lsn": 4096}

    async def answer(self) -> MemberAnswer:
        return MemberAnswer("fake")

    async def wait(self, kind: str, timeout_s: float) -> None:
        self.calls.append(("wait", kind))
        if not self.is_up_to_date:
            raise WaitTimeoutError(f"not {kind} after {timeout_s:g} s")

    def pause(self, peer: str | None) -> None:
        self.calls.append(("pause", peer))

    def resume(self, peer: str | None) -> None:
        self.calls.append(("resume", peer))

    def set_definition(self, definition: ResourceDefinition, *, is_forced: bool = False) -> None:
        self.definition = definition

    def link_up(self, peer: str) -> None:
        self.calls.append(("link_up", peer))

    def link_down(self, peer: str) -> None:
        self.calls.append(("link_down", peer))

    def message(self, peer: str, session: int, message: object) -> None:
        self.calls.append(("message", peer, message))

    def frame(self, peer: str, *rest: object) -> None:
        self.calls.append(("frame", peer))

    def writable(self, peer: str) -> None:
        self.calls.append(("writable", peer))


class FakeFactory:
    """Makes fake services; a directory stands for their state."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def create(self, definition: ResourceDefinition, node: NodeContext) -> FakeService:
        node.resource_dir(definition.name).joinpath("volumes").mkdir(parents=True)
        node.resource_dir(definition.name).joinpath("volumes/0.img").write_bytes(b"x")
        if self.error is not None:
            raise self.error
        return FakeService(definition, node)

    def open(self, definition: ResourceDefinition, node: NodeContext) -> FakeService:
        if self.error is not None:
            raise self.error
        return FakeService(definition, node)


@dataclass
class FakeLinks:
    """The links of one node: calls go straight into the other node's registry."""

    node: str
    network: FakeNetwork
    sent: list[tuple[str, int, object]] = field(default_factory=list)

    async def call(
        self, peer: str, method: str, parameters: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        if peer not in self.network.linked(self.node):
            raise LinkError(f"no link to {peer}")
        return await self.network.nodes[peer].methods.dispatch(
            Caller(self.node), method, parameters
        )

    def state(self, peer: str) -> LinkStatus:
        return replace(NO_LINK, is_established=peer in self.network.linked(self.node))

    def send_message(self, peer: str, session: int, message: object) -> None:
        self.sent.append((peer, session, message))


class FakeNode:
    """The parts of a node that are about resources."""

    def __init__(self, name: str, root: Path, network: FakeNetwork) -> None:
        root.mkdir(exist_ok=True)
        self.name = name
        self.root = root
        self.factory = FakeFactory()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.methods = MethodRegistry()
        self.links = FakeLinks(name, network)
        self.executor = ThreadPoolExecutor(2)
        self.router = LinkRouter()
        context = NodeContext(
            name,
            f"site-{name}",
            root,
            PRODUCTION,
            SystemClock(),
            SystemEntropy(),
            self.links,  # type: ignore[arg-type]
            lambda kind, fields: self.events.append((kind, fields)),
            self.executor,
        )
        self.store = DefinitionStore(root / "resources.json")
        self.host = ResourceHost(context, self.factory)  # type: ignore[arg-type]
        self.push = DefinitionPush(self.store, self.host, self.links)
        self.router.bind(self.host, self.push, self.methods)
        self.host.on_started = self.router.service_started
        self.status = StatusReport(
            self.host, self.store, self.push.refusals, lambda n: f"site-{n}", self.links.state
        )
        self.disconnected: list[str] = []
        calls = ResourceCalls(
            host=self.host,
            store=self.store,
            push=self.push,
            links=self.links,
            known_nodes=lambda: network.names,
            is_connected=self.router.is_up,
            describe=self.status.resource,
            disconnect=self.disconnected.append,
        )
        calls.register(self.methods)
        ResourceChanges(calls).register(self.methods)
        self.calls = calls

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self.methods.dispatch(Caller(), method, parameters)

    def service(self, name: str) -> FakeService:
        found = self.host.services[name]
        assert isinstance(found, FakeService)
        return found

    async def stop(self) -> None:
        await self.push.stop()
        self.executor.shutdown()


class FakeNetwork:
    """Some nodes; links are made and cut by name."""

    def __init__(self, root: Path, *names: str) -> None:
        self.names = list(names)
        self._links: set[frozenset[str]] = set()
        self.nodes = {name: FakeNode(name, root / name, self) for name in names}

    def linked(self, name: str) -> set[str]:
        return {other for pair in self._links if name in pair for other in pair - {name}}

    def connect(self, a: str, b: str) -> None:
        self._links.add(frozenset((a, b)))
        self.nodes[a].router.link_up(b, 0)
        self.nodes[b].router.link_up(a, 0)

    def cut(self, a: str, b: str) -> None:
        self._links.discard(frozenset((a, b)))
        self.nodes[a].router.link_down(b, "cut", 0)
        self.nodes[b].router.link_down(a, "cut", 0)

    async def settle(self) -> None:
        """Let tasks and worker threads finish what they do."""
        for _ in range(200):
            await asyncio.sleep(0.002)

    async def stop(self) -> None:
        for node in self.nodes.values():
            await node.stop()
