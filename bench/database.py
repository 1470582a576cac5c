"""A private PostgreSQL cluster in a directory: never the system's, ended by its own pid file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from geomirror.errors import GeomirrorError, WaitTimeoutError
from geomirror.lab.ports_io import free_ports

USER = "postgres"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--")
"""Becomes the program, so that its pid is the one that was started."""
PROGRAMS = Path("/usr/lib/postgresql")
RUN_S_MAX = 600.0
END_S_MAX = 30.0


def find_programs() -> Path | None:
    """Where the newest PostgreSQL's programs are."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Cluster:
    """One cluster in `directory`, reached over a Unix socket below `sockets`."""

    def __init__(self, programs: Path, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self.pid: int | None = None
        """Of the server that was started here and has not been stopped."""
        self._programs = programs
        self._sockets = sockets
        (self._port,) = free_ports(1)
        self._where = ("-h", str(sockets), "-p", str(self._port))
        sockets.mkdir(exist_ok=True)
        shutil.chown(sockets, USER, USER)

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs as its user; stdout. GeomirrorError when it fails."""
        done = subprocess.run(
            [*AS_USER, str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            timeout=RUN_S_MAX,
            check=False,
            cwd="/",
        )
        if done.returncode != 0:
            said = f"{done.stdout}{done.stderr}\n{self.log()}"
            raise GeomirrorError(f"{program} failed with exit code {done.returncode}: {said}")
        return done.stdout

    def client(self, program: str, *arguments: str) -> str:
        """Run a client program that is told where the server is; stdout."""
        return self.run(program, *self._where, *arguments)

    def client_command(self, program: str, *arguments: str) -> list[str]:
        """The command line of one that is to run beside."""
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
        self.pid = int((self.directory / "postmaster.pid").read_text().split()[0])

    def stop(self) -> None:
        """Orderly."""
        self.run("pg_ctl", "-D", str(self.directory), "-m", "fast", "-w", "stop")
        self.pid = None

    def kill(self) -> None:
        """SIGKILL to the postmaster and to its children; nothing if it does not run."""
        if (pid := self.pid) is None:
            return
        self.pid = None
        pids = [pid, *_children(pid)]
        for each in pids:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
        give_up = time.monotonic() + END_S_MAX
        while any(Path(f"/proc/{each}").exists() for each in pids):
            if time.monotonic() > give_up:
                raise WaitTimeoutError(f"PostgreSQL (pid {pid}) does not end after SIGKILL")
            time.sleep(0.05)

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
