"""A file system whose power can be cut: ext4 on a loop device on nbdfuse on memory.

SIGKILL of a daemon never finds a missing fsync, since the page cache outlives it. Here nbdfuse is
killed: what the file system had not written down is gone, as after a power failure. The disk itself
keeps every write that reached it, in order.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from geomirror.errors import GeomirrorError
from geomirror.lab.compile_io import compile_program
from geomirror.nbd.client_io import NbdClient
from tests.system.support import Site, is_root

BLOCK = 4096
SLOT_BLOCKS = 8
SLOTS = 96
TASKS = 4
SHIM = Path(__file__).parent / "no_sync.c"
TOOLS = ("nbdkit", "nbdfuse", "losetup", "mkfs.ext4", "mount", "umount")


def require_power() -> None:
    """Skip with the reason where no such disk can be made."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not is_root() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounts and loop devices need root and /dev/fuse")


def run(*command: str | Path) -> str:
    """Run a tool to its end; its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout.strip()


def wait_for(path: Path) -> None:
    """Until a path is there."""
    give_up = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < give_up, f"{path} does not appear"
        time.sleep(0.02)


class PowerDisk:
    """The disk and, while it is on, its mounted file system at `mount`."""

    def __init__(self, root: Path, size: str = "1G") -> None:
        self.mount = root / "disk"
        self._fuse = root / "fuse"
        self._socket = root / "disk.sock"
        self._loop = ""
        self._nbdfuse: subprocess.Popen[bytes] | None = None
        self.mount.mkdir()
        self._fuse.mkdir()
        command = ["nbdkit", "--foreground", "--unix", str(self._socket), "memory", size]
        self._nbdkit = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(self._socket)
        self._plug()
        run("mkfs.ext4", "-q", "-m", "0", self._loop)
        run("mount", self._loop, self.mount)

    def _plug(self) -> None:
        uri = f"nbd+unix:///?socket={self._socket}"
        self._nbdfuse = subprocess.Popen(["nbdfuse", str(self._fuse), uri])
        wait_for(self._fuse / "nbd")
        self._loop = run("losetup", "--find", "--show", self._fuse / "nbd")

    def power_on(self) -> None:
        """Mount what is left; the file system's own journal is replayed."""
        self._plug()
        run("mount", self._loop, self.mount)

    def cut(self) -> None:
        """From now on nothing reaches the disk. Whoever has files open there has to end next."""
        assert self._nbdfuse is not None
        self._nbdfuse.kill()
        self._nbdfuse.wait()
        self._nbdfuse = None

    def unplug(self) -> None:
        """Take the dead file system away; nobody uses it any more."""
        if self._loop:
            if os.path.ismount(self.mount):
                run("umount", self.mount)
            run("losetup", "--detach", self._loop)
            self._loop = ""
        subprocess.run(["umount", "-l", str(self._fuse)], capture_output=True, check=False)

    def close(self) -> None:
        """Nothing is left of it."""
        if self._nbdfuse is not None:
            self.cut()
        self.unplug()
        self._nbdkit.terminate()
        self._nbdkit.wait()


class PowerSite(Site):
    """A node on such a disk."""

    has_no_sync = False
    """Its fsync and fdatasync do nothing: a disk cache that lies, or a bug."""

    def start(self) -> None:
        """Start the daemon and return at once."""
        if not self.has_no_sync:
            super().start()
            return
        assert self.process is None
        # Loaded into an interpreter when it starts: no fork has it.
        shim = asyncio.run(compile_program(SHIM, flags=("-shared", "-fPIC"), cache=self.root))
        environment = {**os.environ, "LD_PRELOAD": str(shim)}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("node", "run"), stderr=log, cwd=self.root, env=environment
            )


class Load:
    """Clients that overwrite slots, flush now and then, and know what was confirmed.

    Every block carries its version, so a slot that was half overwritten is judged block by block.
    """

    def __init__(self, seed: int) -> None:
        self.flushes = 0
        self._chance = random.Random(seed)
        self._version = [0] * SLOTS
        """Highest version that was ever sent."""
        self._completed = [0] * SLOTS
        self.confirmed = [0] * SLOTS
        """Highest version that a flush has confirmed."""

    async def run(self, uri: str) -> None:
        """Write until the server is gone."""
        tasks = [asyncio.create_task(self._write(uri, number)) for number in range(TASKS)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(
                result, GeomirrorError | OSError
            ):
                raise result

    async def _write(self, uri: str, number: int) -> None:
        async with await NbdClient.connect(uri) as client:
            while True:
                for _ in range(self._chance.randrange(1, 6)):
                    slot = self._chance.randrange(number, SLOTS, TASKS)
                    self._version[slot] += 1
                    version = self._version[slot]
                    await client.write(slot * SLOT_BLOCKS * BLOCK, _content(slot, version))
                    self._completed[slot] = version
                completed = list(self._completed)
                await client.flush()
                self.flushes += 1
                self.confirmed = list(map(max, self.confirmed, completed))

    async def lost(self, uri: str) -> list[str]:
        """What is not there although it was confirmed, or was never written."""
        found: list[str] = []
        async with await NbdClient.connect(uri) as client:
            data = bytes(await client.read(0, SLOTS * SLOT_BLOCKS * BLOCK))
        for slot in range(SLOTS):
            # A completed write that went with the power, confirmed by nothing, is not confirmed by
            # a flush of the next life.
            self._completed[slot] = self._version[slot]
            for block in range(SLOT_BLOCKS):
                at = (slot * SLOT_BLOCKS + block) * BLOCK
                version = int.from_bytes(data[at + 8 : at + 16], "little")
                self._completed[slot] = min(self._completed[slot], version)
                expected = _content(slot, version)[:BLOCK] if version else bytes(BLOCK)
                if data[at : at + BLOCK] != expected:
                    found.append(f"slot {slot} block {block} holds what was never written")
                elif not self.confirmed[slot] <= version <= self._version[slot]:
                    found.append(
                        f"slot {slot} block {block}: version {version}, confirmed "
                        f"{self.confirmed[slot]}, sent {self._version[slot]}"
                    )
        return found


def _content(slot: int, version: int) -> bytes:
    head = slot.to_bytes(8, "little") + version.to_bytes(8, "little")
    return (head * (BLOCK // 16)) * SLOT_BLOCKS
