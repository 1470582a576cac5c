"""A volume of a node as a mounted file system: nbdfuse, a loop device, ext4."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.system.power import run, wait_for
from tests.system.support import Site


class Attached:
    """The first volume of "pg" at a site, mounted at `mount`."""

    def __init__(self, site: Site, root: Path) -> None:
        root.mkdir()
        self.mount = root / "mount"
        self._fuse = root / "fuse"
        self._site = site
        self._loop = ""
        self._nbdfuse: subprocess.Popen[bytes] | None = None
        self.mount.mkdir()
        self._fuse.mkdir()

    def attach(self, *, make_file_system: bool = False) -> None:
        """Mount it; the file system's journal is replayed if it was dropped."""
        self._nbdfuse = subprocess.Popen(["nbdfuse", str(self._fuse), self._site.uri()])
        wait_for(self._fuse / "nbd")
        self._loop = run("losetup", "--find", "--show", self._fuse / "nbd")
        if make_file_system:
            run("mkfs.ext4", "-q", self._loop)
        run("mount", self._loop, self.mount)

    def drop(self) -> None:
        """The server below is dead: take down what still stands on it."""
        if self._nbdfuse is not None:
            self._nbdfuse.kill()
        self._take_down()

    def detach(self) -> None:
        """In order: nothing that was written stays behind."""
        run("umount", self.mount)
        self._take_down()

    def _take_down(self) -> None:
        if os.path.ismount(self.mount):
            run("umount", self.mount)
        if self._loop:
            run("losetup", "--detach", self._loop)
            self._loop = ""
        if self._nbdfuse is not None:
            self._nbdfuse.terminate()
            self._nbdfuse.wait()
            self._nbdfuse = None
        subprocess.run(["umount", "-l", str(self._fuse)], capture_output=True, check=False)

    def close(self) -> None:
        """Whatever happened, nothing is left."""
        self.drop()
