"""A volume of a node as a mounted ext4, by the product's own commands."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from tests.system.power import run
from tests.system.support import Site


class Attached:
    """The first volume of "pg" at a site, mounted at `mount`."""

    def __init__(self, site: Site, root: Path) -> None:
        self.mount = root / "mount"
        self._site = site
        for each in (root, self.mount):
            each.mkdir()
            each.chmod(0o755)  # PostgreSQL's own user comes through here, whatever the umask.

    def attach(self, *, make_file_system: bool = False) -> None:
        """Mount it; the file system's journal is replayed if it was dropped."""
        self._site.uri()  # After a start it is opened first.
        if make_file_system:
            run("mkfs.ext4", "-q", self._site.run("attach", "pg", "--device").strip())
            self.detach()
        self._site.run("attach", "pg", str(self.mount))

    def pull(self) -> None:
        """As a plug: its process is killed, and whoever waits for the disk gets an error."""
        (found,) = self._site.json("attach", "--list")["attachments"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(found["pid"], signal.SIGKILL)

    def drop(self) -> None:
        """Nobody uses it any more: take away what was pulled."""
        assert self._site.json("detach", "pg")["is_clean"] is False

    def detach(self) -> None:
        """In order: nothing that was written stays behind."""
        assert self._site.json("detach", "pg")["is_clean"] is True

    def close(self) -> None:
        """Whatever happened, nothing is left."""
        if self._site.json("attach", "--list")["attachments"]:
            self.pull()
            self.drop()
