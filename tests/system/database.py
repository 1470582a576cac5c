"""A private PostgreSQL cluster in a directory: never the system's, ended by its own pid file."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system.support import free_port, is_root, until

USER = "postgres"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--")
"""Becomes the program, so that its pid is the one that was started."""
PROGRAMS = Path("/usr/lib/postgresql")


def require_postgres() -> Path:
    """Where PostgreSQL's programs are; skips with the reason, in CI a missing one is a failure."""
    if not is_root():
        pytest.skip("mounts and another user's database need root")
    found = sorted(PROGRAMS.glob("*/bin/initdb"))
    if not found:
        message = "PostgreSQL is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found[-1].parent


class Cluster:
    """One cluster in `directory`, reached over a Unix socket below `sockets`."""

    def __init__(self, programs: Path, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self._programs = programs
        self._sockets = sockets
        self._port = free_port()
        self._where = ("-h", str(sockets), "-p", str(self._port))
        sockets.mkdir(exist_ok=True)
        shutil.chown(sockets, USER, USER)

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs as its user; stdout."""
        done = subprocess.run(
            [*AS_USER, str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            cwd="/",
        )
        assert done.returncode == 0, (program, done.stdout, done.stderr, self.log())
        return done.stdout

    def client(self, program: str, *arguments: str) -> str:
        """Run a client program that is told where the server is; stdout."""
        return self.run(program, *self._where, *arguments)

    def client_command(self, program: str, *arguments: str) -> list[str]:
        """The command line of one that is to run beside the test."""
        return [*AS_USER, str(self._programs / program), *self._where, *arguments]

    def create(self) -> None:
        """initdb, with checksums."""
        self.directory.mkdir()
        shutil.chown(self.directory, USER, USER)
        self.directory.chmod(0o700)
        self.run("initdb", "-D", str(self.directory), "--data-checksums", "--auth=trust")

    def start(self) -> None:
        """Start it and wait until it answers; a crash recovery comes first."""
        options = f"-p {self._port} -k {self._sockets} -c listen_addresses="
        log = str(self._sockets / "log")
        self.run("pg_ctl", "-D", str(self.directory), "-l", log, "-w", "-o", options, "start")

    def stop(self) -> None:
        """Orderly."""
        self.run("pg_ctl", "-D", str(self.directory), "-m", "fast", "-w", "stop")

    def kill(self) -> None:
        """SIGKILL to the postmaster; its children notice and end by themselves."""
        pid = int((self.directory / "postmaster.pid").read_text().split()[0])
        children = _children(pid)
        os.kill(pid, 9)
        for child in children:
            try:
                os.kill(child, 9)
            except ProcessLookupError:
                continue
        until(lambda: not any(Path(f"/proc/{each}").exists() for each in (pid, *children)))

    def ask(self, query: str, database: str = "postgres") -> str:
        """One value."""
        return self.client("psql", "-XAtc", query, database).strip()

    def log(self) -> str:
        """What the server said."""
        path = self._sockets / "log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(each) for each in path.read_text().split()] if path.exists() else []
