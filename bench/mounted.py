"""An NBD export as a mounted ext4: nbdfuse, a loop device, mount. Needs root and /dev/fuse."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from geomirror.errors import GeomirrorError
from geomirror.lab.process_io import Child

TOOLS = ("nbdfuse", "losetup", "mkfs.ext4", "mount", "umount")
RUN_S_MAX = 300.0
READY_S_MAX = 20.0


def may_mount() -> bool:
    """Whether this process may do it."""
    return os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


def checked(*command: str | Path) -> str:
    """Run a tool to its end; what it printed. GeomirrorError when it failed."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()[-500:]
        raise GeomirrorError(f"{' '.join(map(str, command[:3]))}: {said}")
    return done.stdout.strip()


def _unmount(path: Path, *options: str) -> None:
    # ismount() says no of a FUSE mount whose process is dead.
    if str(path) in Path("/proc/mounts").read_text(encoding="utf-8"):
        checked("umount", *options, path)


class Mounted:
    """A new file system on an export, mounted at `path`."""

    def __init__(self, directory: Path, uri: str) -> None:
        self.path = directory / "mount"
        self._fuse = directory / "fuse"
        self._loop = ""
        for each in (directory, self.path, self._fuse):
            each.mkdir()
            each.chmod(0o755)  # PostgreSQL's own user comes through here, whatever the umask.
        command = ["nbdfuse", str(self._fuse), uri]
        self._nbdfuse = Child("nbdfuse", command, directory / "nbdfuse.log", os.environ)

    async def mount(self) -> None:
        """Make the file system and mount it."""
        device = self._fuse / "nbd"
        await self._nbdfuse.start()
        await self._nbdfuse.wait_until(device.exists, what="mounted", timeout_s=READY_S_MAX)
        # Without direct I/O everything would lie in the page cache twice.
        self._loop = checked("losetup", "--direct-io=on", "--find", "--show", device)
        checked("mkfs.ext4", "-q", "-E", "nodiscard", self._loop)
        checked("mount", self._loop, self.path)

    async def unmount(self) -> None:
        """Take everything down, from the top; may be called again, and after a failure."""
        _unmount(self.path)
        if self._loop:
            with contextlib.suppress(GeomirrorError):
                checked("losetup", "--detach", self._loop)
            self._loop = ""
        await self._nbdfuse.stop()
        _unmount(self._fuse, "-l")  # after a kill the mount of FUSE is left


class Bound:
    """A directory of the measured file system, reachable for another user at `path`."""

    def __init__(self, directory: Path, below: Path) -> None:
        self.path = directory / "mount"
        self._below = below
        for each in (directory, self.path, below):
            each.mkdir()
            each.chmod(0o755)

    async def mount(self) -> None:
        """Bind it: directories above it may be closed to others."""
        checked("mount", "--bind", self._below, self.path)

    async def unmount(self) -> None:
        """Take it away; may be called again."""
        _unmount(self.path)
