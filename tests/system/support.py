"""Real nodes on this machine for the system tests: daemons by pid, free ports, bounded waiting."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomirror.cli.main import run
from geomirror.errors import UnreachableError
from geomirror.lab.ports_io import free_port
from geomirror.nbd.client_io import NbdClient
from geomirror.node.control_client_io import ControlClient
from geomirror.node.paths import DataDir
from tests.system import nursery

MIB = 1 << 20
SEED = int(os.environ.get("GEOMIRROR_SEED", "0"))
"""Added to what chance is drawn from: a soak repeats these tests with others."""
POLL_S = 0.05
GEOMIRROR = [sys.executable, "-m", "geomirror"]
COMMAND_S_MAX = 90


def until(condition: Callable[[], Any], timeout_s: float = 30, what: str = "") -> Any:
    """Poll until the condition is true, and return its value."""
    give_up = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < give_up, f"did not happen in time: {what or condition}"
        time.sleep(POLL_S)
    return found


def has_loop() -> bool:
    """Whether an event loop runs in this thread: no command can begin its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Site:
    """One node on this machine."""

    def __init__(self, root: Path, name: str, data_dir: Path | None = None) -> None:
        self.root = root
        self.name = name
        self.data_dir = data_dir or root / name
        self.log_path = root / f"{name}.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | nursery.Fork | None = None

    is_forked = True
    """Whether commands and the daemon come out of a nursery, not each out of a new interpreter."""

    def entered(self, *arguments: str) -> list[Path]:
        """Namespaces that a process with these arguments is in, where they are not the test's."""
        return []

    # Commands.

    def command(self, *arguments: str) -> list[str]:
        """The command line of this node's `geomirror`."""
        return [*GEOMIRROR, "--data-dir", str(self.data_dir), *arguments]

    @property
    def _is_plain(self) -> bool:
        """Whether its commands run in the namespaces of this process."""
        return self.is_forked and not self.entered()

    def run(self, *arguments: str, expected: int = 0, stdin: str = "") -> str:
        """Run a command; its stdout. The exit code is checked, and that nothing crashed."""
        return self.outcome(*arguments, expected=expected, stdin=stdin)[0]

    def outcome(self, *arguments: str, expected: int, stdin: str = "") -> tuple[str, str]:
        """Run a command; its stdout and stderr."""
        done = self.finished(*arguments, stdin=stdin)
        assert done.returncode == expected, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    def finished(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        words = ["--data-dir", str(self.data_dir), *arguments]
        places = self.entered(*arguments)
        if self.is_forked:
            done = nursery.run(
                words, self.root, stdin=stdin, namespaces=places, timeout_s=COMMAND_S_MAX
            )
            if done is not None:
                return done
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
            input=stdin,
            cwd=self.root,
        )

    def set_up(self, *arguments: str) -> str:
        """A command that a story begins with, in this process as in `error`; its stdout."""
        if not self._is_plain or has_loop():
            return self.run(*arguments)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exit_code = run(["--data-dir", str(self.data_dir), *arguments])
        assert exit_code == 0, (arguments, output.getvalue())
        return output.getvalue()

    def json(self, *arguments: str, expected: int = 0) -> Any:
        """Run a command with `--json`; its document."""
        document = json.loads(self.run(*arguments, "--json", expected=expected))
        assert document["schema_version"] == 1
        return document

    def error(self, *arguments: str, expected: int, code: str) -> str:
        """Run a command that fails; its message and hint.

        In this process, but for daemons: a new one costs 0.3 s and adds only its exit code.
        """
        if arguments[:2] == ("node", "run"):
            document = self.json(*arguments, expected=expected)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exit_code = run(["--data-dir", str(self.data_dir), *arguments, "--json"])
            assert exit_code == expected, (arguments, output.getvalue())
            document = json.loads(output.getvalue())
        found = document["error"]
        assert found["code"] == code, found
        assert found["message"]
        return f"{found['message']}; {found['hint']}" if found["hint"] else str(found["message"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the daemon without starting a process."""
        return ControlClient(DataDir(self.data_dir)).call(method, parameters, timeout_s=60)

    # The daemon.

    def start(self) -> None:
        """Start the daemon and return at once."""
        assert self.process is None
        words = ["--data-dir", str(self.data_dir), "node", "run"]
        with self.log_path.open("ab") as log:
            if self.is_forked:
                places = self.entered("node", "run")
                self.process = nursery.start(
                    words, self.root, stderr=log.fileno(), namespaces=places
                )
            if self.process is None:
                command = self.command("node", "run")
                self.process = subprocess.Popen(command, stderr=log, cwd=self.root)

    def restart(self) -> None:
        """Start, and return when the daemon answers and has opened its resources, or failed to."""
        self.start()
        process = self.process
        assert process is not None
        until(lambda: self._answers() or process.poll() is not None, what=f"start of {self.name}")
        assert process.poll() is None, self.log()[-2000:]

    def _answers(self) -> bool:
        # It answers before its resources are open.
        try:
            resources = self.call("status")["resources"]
        except UnreachableError:
            return False
        return all(resource["state"] != "opening" for resource in resources)

    def failed_start(self, *, expected: int) -> str:
        """Start a daemon that must refuse to run; what it printed."""
        return self.outcome("node", "run", expected=expected)[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the daemon and wait for its end; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(15)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self.stop(signal.SIGKILL)

    def end(self) -> None:
        """Clean up: nothing of the node is left running."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        """All that the daemon logged."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def crashes(self) -> list[str]:
        """Logged exceptions: programmer's errors, whatever was done to the node."""
        return [line for line in self.log().splitlines() if "exc_type" in line or "Trace" in line]

    def rss_bytes(self) -> int:
        """Resident memory of the daemon."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    # What it says.

    def resource(self, name: str = "pg") -> Any:
        """The resource object of `status --json`."""
        return self.json("status", name)["resources"][0]

    def status(self, name: str = "pg") -> Any:
        """The same without starting a process."""
        return self.call("status", name=name)["resources"][0]

    def peer(self, name: str = "pg", peer: str | None = None) -> Any:
        """A peer's object; the first one unless it is named."""
        peers = self.status(name)["peers"]
        return next(p for p in peers if peer in (None, p["node"]))

    def uri(self, name: str = "pg", volume: int = 0) -> str:
        """Of a volume, as soon as it is served."""
        found = until(
            lambda: self.status(name)["volumes"][volume]["nbd_uri"], what=f"{name} served"
        )
        return str(found)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, oldest first."""
        client = ControlClient(DataDir(self.data_dir))
        return [e for e in client.events(follow=False, count=2000) if e["kind"] == kind]

    # Data.

    async def write(self, offset: int, data: bytes, name: str = "pg", volume: int = 0) -> None:
        """Write and flush through NBD."""
        async with await NbdClient.connect(self.uri(name, volume)) as client:
            await client.write(offset, data)
            await client.flush()

    async def read(self, offset: int, length: int, name: str = "pg", volume: int = 0) -> bytes:
        """Read through NBD."""
        async with await NbdClient.connect(self.uri(name, volume)) as client:
            return bytes(await client.read(offset, length))


class UserSite(Site):
    """A node as its users have it: each process is a new interpreter."""

    is_forked = False


@contextmanager
def some_sites(root: Path, *names: str, kind: type[Site] = Site) -> Iterator[tuple[Site, ...]]:
    """Sites whose daemons do not outlive the block."""
    found = tuple(kind(root, name) for name in names)
    try:
        yield found
    finally:
        for site in found:
            site.end()


def make_network(first: Site, *others: Site, network: str = "acme") -> None:
    """A network of running, linked nodes: `east-1`, `west-1`, `north-1`, …"""
    first.set_up(
        *("network", "create", network, "--site", "east", "--node", "east-1"),
        *("--listen", f"127.0.0.1:{first.port}"),
    )
    first.start()
    for site, place in zip(others, ("west", "north", "south"), strict=False):
        token = first.set_up("token", "create", "--site", place, "--node", f"{place}-1").strip()
        site.set_up("join", token, "--listen", f"127.0.0.1:{site.port}")
        site.start()
    for site in (first, *others):
        until(lambda site=site: count_links(site) == len(others), what=f"links of {site.name}")


def count_links(site: Site) -> int:
    """Established links of a node."""
    return sum(link["is_established"] for link in site.call("link.list")["links"])


def quick_start(a: Site, b: Site, size: str = "64M") -> None:
    """The steps of the README's quick start, with free ports; nothing waits in between.

    What the README itself says is played by `test_readme.py`.
    """
    a.run(
        *("network", "create", "acme", "--site", "east", "--node", "east-1"),
        *("--listen", f"127.0.0.1:{a.port}"),
    )
    a.start()
    token = a.run("token", "create", "--site", "west", "--node", "west-1").strip()
    b.run("join", token, "--listen", f"127.0.0.1:{b.port}")
    b.start()
    a.run(
        *("resource", "create", "pg", "--size", size),
        *("--primary", "east-1", "--secondary", "west-1", "--journal-size", "256M"),
    )


def create(
    site: Site,
    name: str,
    *more: str,
    size: str | None = "64M",
    primary: str = "east-1",
    secondary: str | None = "west-1",
) -> None:
    """Create a resource with the smallest journal."""
    command = ["resource", "create", name, "--primary", primary, "--journal-size", "256M", *more]
    if secondary is not None:
        command += ["--secondary", secondary]
    if size is not None:
        command += ["--size", size]
    site.set_up(*command)


def wait_applied(site: Site, name: str = "pg", timeout_s: float = 60) -> None:
    """Until every peer has applied all that is completed now."""
    site.call("resource.wait", name=name, kind="applied", timeout_s=timeout_s)


def is_running(pid: int) -> bool:
    """Whether a process is there and not dead; one that nobody has waited for yet is."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def is_root() -> bool:
    """Whether mounts and loop devices can be made."""
    return os.geteuid() == 0
