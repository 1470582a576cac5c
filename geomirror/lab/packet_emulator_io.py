"""A network of namespaces on one machine, joined by links that treat packets as a WAN does.

    async with PacketEmulator(["a", "b"], {("a", "b"): "rtt=80ms,loss=1%,reorder=1%/5ms"}) as wan:
        daemon = wan.node("a").command("geomirror", "--data-dir", "a", "node", "run")
        await wan.link("a", "b").flap(8.0)
        await wan.link("a", "b").set("mtu=1400", source="a")

Each node is a network namespace with one device; every two nodes have a link. The kernel's own TCP
and UDP run over it, so that retransmission, congestion control and path MTU are real ones. Needs
root, /dev/net/tun, `ip` and a C compiler. The process of the emulator dies with this one; what a
crash leaves behind is removed by the next `start`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Any

from geomirror.environment import SECOND
from geomirror.errors import (
    GeomirrorError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from geomirror.lab.compile_io import compile_program
from geomirror.lab.namespace_io import (
    Namespace,
    add_namespace,
    delete_namespaces,
    make_owner,
    remove_leftovers,
    runtime_directory,
)
from geomirror.lab.packet_scenario import PacketSettings, parse_packet_settings
from geomirror.lab.process_io import Child, tail

SOURCE = Path(__file__).parent / "packet_emulator.c"
TUN_DEVICE = Path("/dev/net/tun")
NODES_MAX = 16
"""Ports of the emulator."""
NODE_CHARACTERS_MAX = 60
START_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 10.0
ANSWER_BYTES_MAX = 1 << 20
FIRST_IPV4 = IPv4Address("10.88.0.1")
FIRST_IPV6 = IPv6Address("fd88::1")
DEVICE_MTU_BYTES = 1500


def may_run() -> bool:
    """Whether this process has what the kernel must give: root and the TUN device."""
    return os.geteuid() == 0 and TUN_DEVICE.exists()


class PacketLink:
    """Both directions between two nodes. `source` restricts a call to the one out of that node."""

    def __init__(self, emulator: PacketEmulator, nodes: tuple[str, str]) -> None:
        self.nodes = nodes
        self.settings = {node: PacketSettings() for node in nodes}
        """Of the direction out of each node."""
        self._emulator = emulator

    async def set(self, settings: str | PacketSettings, source: str | None = None) -> None:
        """Change what the text names, or everything; packets under way keep their times.

        :raises UsageError: the text means nothing; nothing has changed.
        """
        new = {node: self._changed(node, settings) for node in self._sources(source)}
        await self._command({node: f"set {{}} {new[node].to_command()}" for node in new})
        self.settings |= new

    async def down(self, source: str | None = None) -> None:
        """Drop everything until `up`, packets under way included."""
        await self._command(dict.fromkeys(self._sources(source), "down {}"))

    async def up(self, source: str | None = None) -> None:
        """Pass packets again; those that `stall` kept leave now, in order."""
        await self._command(dict.fromkeys(self._sources(source), "up {}"))

    async def stall(self, source: str | None = None) -> None:
        """Keep everything until `up`, and lose nothing."""
        await self._command(dict.fromkeys(self._sources(source), "stall {}"))

    async def flap(self, down_s: float, source: str | None = None) -> None:
        """Down now, and up again by itself after `down_s`; returns at once."""
        if not 0 < down_s <= 86_400:
            raise UsageError("a flap lasts from more than 0 s to a day")
        duration_ns = int(down_s * SECOND)
        await self._command(dict.fromkeys(self._sources(source), f"flap {{}} {duration_ns}"))

    async def statistics(self, source: str) -> dict[str, Any]:
        """State (`up`, `down`, `stalled`) and counters of the direction out of `source`."""
        self._sources(source)
        numbers = self._numbers(source)
        found = await self._emulator.statistics()
        return next(d for d in found["links"] if (d["from"], d["to"]) == numbers)

    def _changed(self, node: str, settings: str | PacketSettings) -> PacketSettings:
        if isinstance(settings, PacketSettings):
            return settings
        return parse_packet_settings(settings, self.settings[node])

    def _sources(self, source: str | None) -> Sequence[str]:
        if source is None:
            return self.nodes
        if source not in self.nodes:
            raise NotFoundError(f"{source} is not a node of the link {'-'.join(self.nodes)}")
        return (source,)

    def _numbers(self, source: str) -> tuple[int, int]:
        target = self.nodes[1] if source == self.nodes[0] else self.nodes[0]
        return self._emulator.number(source), self._emulator.number(target)

    async def _command(self, commands: Mapping[str, str]) -> None:
        lines = []
        for source, command in commands.items():
            numbers = self._numbers(source)
            lines.append(command.format(f"{numbers[0]} {numbers[1]}"))
        await self._emulator.call(lines)


class PacketEmulator:
    """The nodes' namespaces and the process between them. Every chance comes from `seed`."""

    def __init__(
        self,
        nodes: Sequence[str],
        links: Mapping[tuple[str, str], str | PacketSettings] | None = None,
        *,
        seed: int = 1,
        mtu_bytes: int = DEVICE_MTU_BYTES,
        is_offloading: bool = True,
        is_realtime: bool = False,
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is made yet. A link that is not named has no delay and loses nothing.

        `is_offloading=False` makes the kernel hand over single packets, with real checksums
        (slower); `is_realtime` gives the process the priority that exact times want on a busy
        machine.
        `program` is a build of `SOURCE` other than the cached one.

        :raises UsageError: fewer than 2 or more than 16 nodes, a bad name, or bad settings.
        :raises NotFoundError: a link of an unknown node.
        """
        if not 2 <= len(set(nodes)) == len(nodes) <= NODES_MAX:
            raise UsageError(f"a packet-level network has 2 to {NODES_MAX} nodes, all different")
        for node in nodes:
            if not node.replace("-", "").isalnum() or len(node) > NODE_CHARACTERS_MAX:
                raise UsageError(f"{node!r} is not a node name of letters, digits and hyphens")
        self.owner = make_owner()
        self.directory = runtime_directory() / self.owner
        """Control socket and log, while it runs."""
        self._nodes = {
            node: Namespace(f"{self.owner}-{node}", FIRST_IPV4 + i, FIRST_IPV6 + i)
            for i, node in enumerate(nodes)
        }
        self._numbers = {node: i for i, node in enumerate(nodes)}
        self._links = {
            frozenset(pair): PacketLink(self, pair) for pair in itertools.combinations(nodes, 2)
        }
        for (first, second), settings in (links or {}).items():
            link = self.link(first, second)
            for node in link.settings:
                link.settings[node] = link._changed(node, settings)
        self._options = [f"--seed={seed}", f"--mtu={mtu_bytes}"]
        self._options += [] if is_offloading else ["--no-offload"]
        self._options += ["--realtime"] if is_realtime else []
        self._program = program
        self._environment = dict(os.environ if environment is None else environment)
        self._child: Child | None = None

    async def __aenter__(self) -> PacketEmulator:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def pid(self) -> int | None:
        """Of the emulator's process, while it runs."""
        return None if self._child is None else self._child.pid

    def node(self, name: str) -> Namespace:
        """A node's namespace and addresses. NotFoundError when there is none."""
        if name not in self._nodes:
            raise NotFoundError(f"there is no node {name} in the packet-level network")
        return self._nodes[name]

    def number(self, name: str) -> int:
        """Port number of a node. NotFoundError when there is none."""
        self.node(name)
        return self._numbers[name]

    def link(self, first: str, second: str) -> PacketLink:
        """The link of two nodes. NotFoundError when there is none."""
        found = self._links.get(frozenset((first, second)))
        if found is None:
            raise NotFoundError(f"there is no link between {first} and {second}")
        return found

    async def start(self) -> None:
        """Compile if need be, make the namespaces, run; leftovers of crashes are removed.

        :raises NotFoundError: no C compiler, or no `ip`.
        :raises RefusedError: no root, no /dev/net/tun, or the kernel forbids namespaces.
        :raises GeomirrorError: the emulator did not start; the message has its log.
        """
        assert self._child is None
        if not may_run():
            raise RefusedError(
                f"a packet-level network needs root and {TUN_DEVICE}",
                hint='run it with sudo; "modprobe tun" makes the device',
            )
        program = self._program or await compile_program(SOURCE)
        await remove_leftovers()
        self.directory.mkdir(mode=0o700)
        try:
            for namespace in self._nodes.values():
                await add_namespace(namespace.name)
            await self._run(program)
            for link in self._links.values():
                for node, settings in link.settings.items():
                    await link.set(settings, node)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the process, and remove the namespaces and the directory. May be called again."""
        child, self._child = self._child, None
        try:
            if child is not None:
                await child.stop()
        finally:
            await delete_namespaces(self.owner)
            shutil.rmtree(self.directory, ignore_errors=True)

    async def statistics(self) -> dict[str, Any]:
        """What is under way, and `links`: each direction with its state and counters."""
        return (await self.call(["stats"]))[0]

    def log(self) -> str:
        """End of what the process printed: nothing, unless something is wrong."""
        return tail(self.directory / "log")

    async def call(self, lines: Iterable[str]) -> list[dict[str, Any]]:
        """Send control commands together and return their answers.

        :raises UnreachableError: the process does not answer; the message has its log.
        :raises UsageError: it refused a command.
        """
        lines = list(lines)
        answers: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(
                    self._socket_path, limit=ANSWER_BYTES_MAX
                )
                try:
                    writer.write("".join(f"{line}\n" for line in lines).encode())
                    answers += [json.loads(await reader.readline()) for _ in lines]
                finally:
                    writer.close()
                    await writer.wait_closed()
        except (OSError, ValueError, TimeoutError) as error:
            raise UnreachableError(
                f"the packet emulator does not answer: {error or 'no answer in time'}\n{self.log()}"
            ) from error
        for line, answer in zip(lines, answers, strict=True):
            if not answer["ok"]:
                raise UsageError(f"the packet emulator refused {line!r}: {answer['error']}")
        return answers

    @property
    def _socket_path(self) -> Path:
        return self.directory / "control.sock"

    async def _run(self, program: Path) -> None:
        command = [str(program), f"--control={self._socket_path}", *self._options]
        command += [f"--port={n.path},{n.ipv4}/24,{n.ipv6}/64" for n in self._nodes.values()]
        log = self.directory / "log"
        self._child = Child("packet emulator", command, log, self._environment)
        await self._child.start()
        try:
            await self._child.wait_until(
                self._socket_path.exists,
                what="its namespaces were joined",
                timeout_s=START_TIMEOUT_S,
            )
        except GeomirrorError as error:
            raise RefusedError(
                str(error), hint="it needs CAP_NET_ADMIN and a usable /dev/net/tun"
            ) from error
