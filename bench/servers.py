"""The servers that we are compared with, over an image file on the same file system."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench.fio import Load, run_fio
from geomirror.lab.process_io import Child
from geomirror.limits import MIB


class PeerServer:
    """An NBD server of somebody else on a Unix socket; a fresh sparse image, kept between slots."""

    def __init__(self, name: str, command: list[str], directory: Path, size_bytes: int) -> None:
        self.name = name
        self.image = directory / f"{name}.img"
        self._socket = directory / f"{name}.sock"
        with self.image.open("xb") as file:
            file.truncate(size_bytes)
        values = {"image": str(self.image), "socket": str(self._socket)}
        filled = [part.format(**values) for part in command]
        self._child = Child(name, filled, directory / f"{name}.log", os.environ)

    @property
    def uri(self) -> str:
        """Address for fio."""
        return f"nbd+unix:///?socket={self._socket}"

    @property
    def pid(self) -> int:
        """Pid of the running server."""
        assert self._child.pid is not None
        return self._child.pid

    async def start(self) -> None:
        """Start it and wait for its socket."""
        self._socket.unlink(missing_ok=True)
        await self._child.start()
        await self._child.wait_until(self._socket.exists, what="listening", timeout_s=10.0)

    async def stop(self) -> None:
        """Stop it; does nothing when it does not run."""
        await self._child.stop()


def nbdkit_file(directory: Path, size_bytes: int) -> PeerServer:
    """`nbdkit file` with its defaults."""
    command = ["nbdkit", "--foreground", "--unix", "{socket}", "file", "{image}"]
    return PeerServer("nbdkit", command, directory, size_bytes)


def qemu_nbd(directory: Path, size_bytes: int) -> PeerServer:
    """`qemu-nbd` with its defaults (writeback cache) and room for eight clients."""
    command = ["qemu-nbd", "--format=raw", "--socket={socket}", "--shared=8", "--persistent"]
    return PeerServer("qemu-nbd", [*command, "{image}"], directory, size_bytes)


async def fill(uri: str, size_bytes: int) -> None:
    """Write all of a volume once, in order.

    Random writes into a file with holes would measure how a file system finds room, and leave so
    many fragments that removing the file can take minutes.
    """
    await run_fio(Load("write", MIB, 4, 0, size_bytes, io_bytes=size_bytes), uri)


async def fill_all(peers: Sequence[PeerServer], size_bytes: int) -> None:
    """The same with servers that do not run."""
    for peer in peers:
        await peer.start()
        await fill(peer.uri, size_bytes)
        await peer.stop()
