"""A whole network on one machine: real daemons, joined by token, behind emulated links.

    async with Lab(directory, nodes=[("east", "east-1"), ("west", "west-1")],
                   links={("east-1", "west-1"): "rtt=80ms,rate=100mbit"}) as lab:
        await lab.node("east-1").cli("status", "--json")
        await lab.link("east-1", "west-1").down()
        await lab.node("west-1").kill()

Every process is a child of this one and dies with it, however it ends. A directory that already
holds these nodes is started again as it is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli_w

from geomirror.errors import GeomirrorError, NotFoundError, UsageError
from geomirror.lab import control_io
from geomirror.lab.emulator_control_io import EmulatorClient
from geomirror.lab.ports_io import free_ports
from geomirror.lab.process_io import Child, Output, run
from geomirror.lab.scenario import LinkSettings, parse_settings

SOCKET_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket on Linux."""
START_TIMEOUT_S = 30.0
"""For a process of the lab to be ready; two busy cores need a few seconds."""
NODES_MAX = 16
"""Each node is a process of some 60 MiB."""


class LabNode:
    """One daemon of a lab."""

    def __init__(self, name: str, site: str, data_dir: Path, port: int) -> None:
        self.name = name
        self.site = site
        self.data_dir = data_dir
        self.port = port
        self.kills = 0
        environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        environment.pop("GEOMIRROR_DATA_DIR", None)
        self._environment = environment
        command = [*self._program, "node", "run"]
        self._child = Child(f"node {name}", command, data_dir.parent / f"{name}.log", environment)

    @property
    def _program(self) -> list[str]:
        return [sys.executable, "-m", "geomirror", "--data-dir", str(self.data_dir)]

    @property
    def listen(self) -> str:
        """The daemon's own endpoint; peers dial the emulator's instead."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Pid while the daemon runs."""
        return self._child.pid

    @property
    def log(self) -> Path:
        """What the daemon printed."""
        return self._child.log

    async def cli(self, *arguments: str, timeout_s: float = 60.0) -> Any:
        """Run a command against this node: decoded output with `--json`, else its text.

        :raises GeomirrorError: it failed; the message is what it printed.
        """
        output = await self.cli_output(*arguments, timeout_s=timeout_s)
        if output.returncode != 0:
            # With `--json` an error is a document on standard output.
            printed = (output.stderr or output.stdout).decode(errors="replace").strip()
            command = " ".join(arguments[:3])
            raise GeomirrorError(
                f"{self.name}: {command} failed with exit code {output.returncode}: {printed}"
            )
        text = output.stdout.decode()
        return json.loads(text) if "--json" in arguments else text

    async def cli_output(self, *arguments: str, timeout_s: float = 60.0) -> Output:
        """Run a command against this node and return its exit code and output, whatever it is."""
        return await run([*self._program, *arguments], timeout_s=timeout_s)

    async def call(
        self, method: str, parameters: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> dict[str, Any]:
        """Call a method of the daemon's control socket."""
        return await control_io.call(self.data_dir, method, parameters or {}, timeout_s=timeout_s)

    async def start(self) -> None:
        """Start the daemon and wait until it answers."""
        path = control_io.control_socket(self.data_dir)
        if path.exists():
            path.unlink()  # left behind by a kill; the daemon makes a new one
        await self._child.start()
        await self._child.wait_until(
            lambda: control_io.is_listening(control_io.control_socket(self.data_dir)),
            what="listening on its control socket",
            timeout_s=START_TIMEOUT_S,
        )

    async def kill(self) -> None:
        """SIGKILL the daemon: the crash of a process."""
        self.kills += 1
        await self._child.kill()

    async def stop(self) -> bool:
        """SIGTERM the daemon; whether it ended by itself."""
        return await self._child.stop()

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Merge sections into the node's `geomirror.toml`."""
        path = self.data_dir / "geomirror.toml"
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for section, values in changes.items():
            table[section] = {**table.get(section, {}), **values}
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        path.chmod(0o600)

    def to_json(self) -> dict[str, object]:
        """What the state file and `lab status` say."""
        return {
            "name": self.name,
            "site": self.site,
            "data_dir": str(self.data_dir),
            "listen": self.listen,
            "pid": self.pid,
            "log": str(self.log),
        }


class LabLink:
    """One emulated link, by its two nodes."""

    def __init__(self, client: EmulatorClient, first: str, second: str) -> None:
        self.nodes = (first, second)
        self._client = client

    async def set(self, settings: str, *, source: str | None = None) -> None:
        """Change settings (`rtt=...,rate=...`) of both directions or of the one out of `source`."""
        await self._call("set", settings=settings, source=source)

    async def down(self, *, source: str | None = None) -> None:
        """Black-hole the link, or only the direction out of `source`."""
        await self._call("down", source=source)

    async def up(self) -> None:
        """Let it pass again."""
        await self._call("up")

    async def reset(self) -> None:
        """Reset its connections."""
        await self._call("reset")

    async def flap(self, *, down_s: float, period_s: float, count: int) -> None:
        """Start a schedule of `count` outages; returns at once. 0 ends the schedule."""
        await self._call("flap", down_s=down_s, period_s=period_s, count=count)

    async def _call(self, method: str, **parameters: Any) -> None:
        await self._client.call(method, link=list(self.nodes), **parameters)


class Lab:
    """Nodes, links and the emulator; an asynchronous context manager."""

    def __init__(
        self,
        directory: Path,
        *,
        nodes: Sequence[tuple[str, str]],
        links: Mapping[tuple[str, str], LinkSettings | str] | None = None,
        default: LinkSettings | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 1,
    ) -> None:
        """`nodes` are (site, name); pairs that `links` does not name get `default` (no delay).

        :param config: sections added to every node's `geomirror.toml`.
        :raises UsageError: names are not unique, or a link names an unknown node.
        """
        names = [name for _, name in nodes]
        if not 1 <= len(names) == len(set(names)) <= NODES_MAX:
            raise UsageError(f"a lab has 1 to {NODES_MAX} nodes with different names")
        self.directory = directory.absolute()
        self.seed = seed
        self._config = config or {}
        self._default = default or LinkSettings()
        self._links = dict(self._resolve_links(names, links or {}))
        ports = free_ports(len(nodes))
        self._nodes = {
            name: LabNode(name, site, self.directory / name, port)
            for (site, name), port in zip(nodes, ports, strict=True)
        }
        self.emulator_socket = self._choose_socket()
        self.emulator = EmulatorClient(self.emulator_socket)
        command = [sys.executable, "-m", "geomirror.lab.emulator_control_io"]
        self._emulator_child = Child(
            "link emulator",
            [*command, str(self.emulator_socket), str(seed)],
            self.directory / "links.log",
            os.environ,
        )

    @property
    def nodes(self) -> list[LabNode]:
        """All nodes, in the order given."""
        return list(self._nodes.values())

    @property
    def link_names(self) -> list[tuple[str, str]]:
        """The two nodes of every link."""
        return list(self._links)

    def node(self, name: str) -> LabNode:
        """A node by name. NotFoundError."""
        if name not in self._nodes:
            raise NotFoundError(f"the lab has no node {name!r}; it has {', '.join(self._nodes)}")
        return self._nodes[name]

    def link(self, first: str, second: str) -> LabLink:
        """The link of two nodes. NotFoundError."""
        self.node(first)
        self.node(second)
        return LabLink(self.emulator, first, second)

    async def __aenter__(self) -> Lab:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the emulator, make the network if it is not there, start the daemons.

        :raises GeomirrorError: a step failed; what runs already is left to `stop`.
        """
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        self.emulator_socket.unlink(missing_ok=True)  # of an emulator that was killed
        await self._start_emulator()
        first, *others = self.nodes
        # A data directory appears with its first file; an empty one is not a node yet.
        is_new = not first.data_dir.exists()
        if is_new:
            await first.cli(
                *("network", "create", "lab", "--site", first.site),
                *("--node", first.name, "--listen", first.listen),
            )
        await self._configure(first)
        await first.start()
        await asyncio.gather(*(self._join(first, node) for node in others))

    async def stop(self) -> None:
        """Stop every daemon in an orderly way, then the emulator."""
        await asyncio.gather(*(node.stop() for node in self.nodes))
        await self._emulator_child.stop()
        self.emulator_socket.unlink(missing_ok=True)
        if self.emulator_socket.parent != self.directory:
            self.emulator_socket.parent.rmdir()

    async def status(self) -> dict[str, object]:
        """Processes and links."""
        return {
            "schema_version": 1,
            "directory": str(self.directory),
            "nodes": [node.to_json() for node in self.nodes],
            "links": await self.emulator.call("status"),
        }

    async def _start_emulator(self) -> None:
        await self._emulator_child.start()
        await self._emulator_child.wait_until(
            lambda: control_io.is_listening(self.emulator_socket),
            what="listening",
            timeout_s=START_TIMEOUT_S,
        )
        for (first, second), settings in self._links.items():
            await self.emulator.call("add_link", link=[first, second], settings=settings.to_json())

    async def _join(self, first: LabNode, node: LabNode) -> None:
        if not node.data_dir.exists():
            arguments = ("token", "create", "--site", node.site, "--node", node.name)
            token = (await first.cli(*arguments)).strip()
            await node.cli("join", token, "--listen", node.listen)
        await self._configure(node)
        await node.start()

    async def _configure(self, node: LabNode) -> None:
        peers: dict[str, Any] = {}
        for other in self.nodes:
            if other is not node:
                port = await self.emulator.call(
                    "open_port",
                    source=node.name,
                    target=other.name,
                    host="127.0.0.1",
                    port=other.port,
                )
                peers[other.name] = {"endpoints": [f"127.0.0.1:{port}"]}
        node.configure({**self._config, "node": {"listen": node.listen}, "peers": peers})

    def _resolve_links(
        self, names: Sequence[str], links: Mapping[tuple[str, str], LinkSettings | str]
    ) -> Mapping[tuple[str, str], LinkSettings]:
        resolved = dict.fromkeys(itertools.combinations(names, 2), self._default)
        for (first, second), settings in links.items():
            pair = (first, second) if (first, second) in resolved else (second, first)
            if pair not in resolved:
                raise UsageError(f"a link joins two different nodes, not {first} and {second}")
            if isinstance(settings, str):
                settings = parse_settings(settings, self._default)
            resolved[pair] = settings
        return resolved

    def _choose_socket(self) -> Path:
        path = self.directory / "links.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
            return path
        return Path(tempfile.mkdtemp(prefix="geomirror-lab-")) / "links.sock"
