"""What keeps a copy of a volume at the other end of a link: the interface, and the simplest ones.

Each is set up the way its manual says, with what helps it: an idle network and the first copy for
free. The writer's disk is an NBD export at `uri`; the copy is an image file.
"""

from __future__ import annotations

import asyncio
import os
import signal
from abc import ABC, abstractmethod
from pathlib import Path

from bench.stamps import REGION_BYTES, Plan, Stamps
from geomirror.errors import GeomirrorError
from geomirror.lab.packet_emulator_io import PacketEmulator
from geomirror.lab.process_io import Child, run

NBD_PORT = 10809
RSYNC_PORT = 8730
START_S_MAX = 20.0
PASS_S_MAX = 900.0
"""Of one copy of everything."""
PAUSE_S = 0.05
"""Between two passes of a loop."""


class Mirror(ABC):
    """One kind of mirror; made, used and closed in turn."""

    name = ""
    has_copy = True

    def __init__(self, directory: Path, wan: PacketEmulator, plan: Plan) -> None:
        directory.mkdir()
        self.directory = directory
        self.wan = wan
        self.plan = plan
        self.uri = ""
        self.passes = 0
        """Of a loop that copies again and again."""
        self.restarts = 0
        """How often it had to be set right by hand, so to say."""

    @abstractmethod
    async def prepare(self, image: Path) -> None:
        """Start everything with this content on both sides; the link has no limits yet."""

    async def begin(self) -> None:  # noqa: B027 - most mirror by themselves once prepared
        """Mirror from now on."""

    @abstractmethod
    async def scan(self) -> Stamps | None:
        """The copy as it is in this moment; None if it cannot be read."""

    @abstractmethod
    async def close(self) -> None:
        """End everything."""

    def child(self, name: str, node: str, *command: str) -> Child:
        """A program at one end of the link."""
        inside = self.wan.node(node).command(*command)
        return Child(name, inside, self.directory / f"{name}.log", os.environ)


class FileMirror(Mirror):
    """The copy is a file that programs at the other end write to."""

    def __init__(self, directory: Path, wan: PacketEmulator, plan: Plan) -> None:
        super().__init__(directory, wan, plan)
        self.source = directory / "source.img"
        self.target = directory / "target.img"
        self.children: list[Child] = []
        self._loop: asyncio.Task[None] | None = None

    async def prepare(self, image: Path) -> None:
        for path in (self.source, self.target):
            await checked("cp", "--sparse=always", str(image), str(path))

    async def started(self, child: Child, path: Path | None = None) -> None:
        """Start it and wait for its socket; it is ended with the mirror."""
        await child.start()
        self.children.append(child)
        if path is not None:
            await child.wait_until(path.exists, what="listening", timeout_s=START_S_MAX)

    async def serve_source(self) -> None:
        """The writer's disk: nbdkit over the source file."""
        socket = self.directory / "source.sock"
        command = ("nbdkit", "--foreground", "--unix", str(socket), "file", str(self.source))
        await self.started(self.child("source", "a", *command), socket)
        self.uri = f"nbd+unix:///?socket={socket}"

    async def serve_target(self) -> str:
        """The copy: nbdkit over the target file at the other end; its URI."""
        address, ready = str(self.wan.node("b").ipv4), self.directory / "target.pid"
        where = ("--ipaddr", address, "--port", str(NBD_PORT), "--pidfile", str(ready))
        command = ("nbdkit", "--foreground", *where, "file", str(self.target))
        await self.started(self.child("target", "b", *command), ready)
        return f"nbd://{address}:{NBD_PORT}"

    def start_loop(self, *command: str) -> None:
        """Run a command at the near end again and again; one that fails is simply run again."""
        inside = self.wan.node("a").command(*command)

        async def loop() -> None:
            while True:
                output = await run(inside, timeout_s=PASS_S_MAX)
                self.passes += 1
                if output.returncode != 0:
                    self.restarts += 1
                    with (self.directory / "loop.log").open("ab") as log:
                        log.write(output.stderr[-2000:])
                await asyncio.sleep(PAUSE_S)

        self._loop = asyncio.create_task(loop())

    async def scan(self) -> Stamps | None:
        # What is read while others write would be a mix that never existed: they stand still.
        pids = [pid for child in self.children if child.pid for pid in descendants(child.pid)]
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        try:
            with self.target.open("rb", buffering=0) as file:
                parts = [
                    os.pread(file.fileno(), REGION_BYTES, offset)
                    for offset in self.plan.region_offsets()
                ]
        finally:
            for pid in pids:
                _signal(pid, signal.SIGCONT)
        return Stamps.of(b"".join(parts))

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for child in reversed(self.children):
            await child.stop()


class NoMirror(FileMirror):
    """The writer's disk alone: what a writer feels without any mirror."""

    name = "none"
    has_copy = False

    async def prepare(self, image: Path) -> None:
        await checked("cp", "--sparse=always", str(image), str(self.source))
        await self.serve_source()

    async def scan(self) -> Stamps | None:
        return None


class RsyncMirror(FileMirror):
    """`rsync --inplace` in a loop, over rsync's own daemon, compressed."""

    name = "rsync"

    async def prepare(self, image: Path) -> None:
        await super().prepare(image)
        await self.serve_source()
        config = self.directory / "rsyncd.conf"
        module = f"[copy]\npath = {self.directory}\nread only = no\nuse chroot = no\n"
        config.write_text(f"{module}uid = {os.getuid()}\ngid = {os.getgid()}\n")
        address = str(self.wan.node("b").ipv4)
        where = (f"--config={config}", f"--address={address}", f"--port={RSYNC_PORT}")
        await self.started(self.child("rsyncd", "b", "rsync", "--daemon", "--no-detach", *where))

    async def begin(self) -> None:
        # Without --ignore-times a change within the second of the last pass would be missed.
        options = ("--inplace", "--no-whole-file", "--compress", "--ignore-times")
        limits = ("--timeout=10", "--contimeout=10")
        to = f"rsync://{self.wan.node('b').ipv4}:{RSYNC_PORT}/copy/{self.target.name}"
        self.start_loop("rsync", *options, *limits, str(self.source), to)


class NbdcopyMirror(FileMirror):
    """`nbdcopy` in a loop: everything that is allocated, over several connections."""

    name = "nbdcopy"
    _to = ""

    async def prepare(self, image: Path) -> None:
        await super().prepare(image)
        await self.serve_source()
        self._to = await self.serve_target()

    async def begin(self) -> None:
        self.start_loop("nbdcopy", self.uri, self._to)


def descendants(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for each in found:
        try:
            text = Path(f"/proc/{each}/task/{each}/children").read_text(encoding="ascii")
        except OSError:
            continue  # ended meanwhile
        found += [int(child) for child in text.split()]
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


async def checked(*command: str) -> None:
    """Run a command that must not fail."""
    output = await run(command, timeout_s=PASS_S_MAX)
    if output.returncode != 0:
        said = output.stderr.decode(errors="replace").strip()
        raise GeomirrorError(f"{' '.join(command[:3])}: {said[-500:]}")
