"""Daemons as forks of a process that has imported everything: a start costs a tenth of the CPU.

```
 test ── arguments, stderr ──▶ nursery, imported once ── fork ──▶ daemon
      ◀──── pid … exit code ──                         ◀─ wait ──
```
One for each test process and only in its namespaces; it ends with the test process, and its daemons
with it. What a fork cannot show, the interpreter's own start and its argument list, is seen by the
tests that start `python -m geomirror` themselves.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

MESSAGE_BYTES_MAX = 1 << 18
START_S_MAX = 60.0


def _namespaces() -> tuple[str, ...]:
    return tuple(os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "net", "pid", "user"))


class Daemon:
    """A fork, with what `subprocess.Popen` has of it."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.exit_code(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. :raises subprocess.TimeoutExpired: it goes on."""
        give_up = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left_s = 1.0 if give_up is None else give_up - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired(["geomirror", str(self.pid)], timeout or 0.0)
            self.returncode = self._nursery.exit_code(self.pid, min(left_s, 1.0))
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The test's side."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._namespaces = _namespaces()
        self._exits: dict[int, int] = {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent.parent,
            )
        atexit.register(self._close)

    def is_here(self) -> bool:
        """Whether its forks would be in the namespaces of this process."""
        return self._process.poll() is None and self._namespaces == _namespaces()

    def start(self, arguments: list[str], stderr: int, directory: Path) -> Daemon:
        """Run `geomirror` with these arguments."""
        umask = os.umask(0)
        os.umask(umask)
        wanted = {
            "arguments": arguments,
            "directory": str(directory),
            "environment": dict(os.environ),
            "umask": umask,
        }
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [stderr]))
        self._ours.sendmsg([json.dumps(wanted).encode()], [rights])
        give_up = time.monotonic() + START_S_MAX
        while (pid := self._receive(give_up - time.monotonic())) is None:
            assert time.monotonic() < give_up, "the nursery does not answer"
        self._exits.pop(pid, None)
        return Daemon(self, pid)

    def exit_code(self, pid: int, timeout_s: float) -> int | None:
        """Of a fork that has ended; waits so long for some news."""
        if pid not in self._exits:
            self._receive(timeout_s)
        return self._exits.get(pid)

    def _receive(self, timeout_s: float) -> int | None:
        """Take all messages that are there; the pid of a fork that was asked for."""
        while select.select([self._ours], [], [], max(0.0, timeout_s))[0]:
            said: dict[str, Any] = json.loads(self._ours.recv(MESSAGE_BYTES_MAX) or "{}")
            assert said, "the nursery has ended"
            if "exit_code" not in said:
                return int(said["pid"])
            self._exits[said["pid"]] = said["exit_code"]
            timeout_s = 0.0
        return None

    def _close(self) -> None:
        self._ours.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)


_nurseries: list[Nursery] = []


def start(arguments: list[str], stderr: int, directory: Path) -> Daemon | None:
    """Start a daemon; None where only a process of its own is in the right namespaces."""
    if not _nurseries:
        _nurseries.append(Nursery())
    nursery = _nurseries[0]
    return nursery.start(arguments, stderr, directory) if nursery.is_here() else None


# The nursery's side.


def _serve(theirs: socket.socket) -> None:
    import geomirror.cli.main
    import geomirror.node.node
    import geomirror.node.run_io  # noqa: F401 - what a daemon imports

    children: dict[int, int] = {}
    """pidfd → pid"""
    while True:
        for ready in select.select([theirs, *children], [], [])[0]:
            if ready is not theirs:
                pid = children.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                theirs.send(json.dumps({"pid": pid, "exit_code": code}).encode())
                continue
            data, files, _, _ = socket.recv_fds(theirs, MESSAGE_BYTES_MAX, 1)
            if not data:
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            pid = os.fork()
            if pid == 0:
                theirs.close()
                _become(json.loads(data), files[0])
            os.close(files[0])
            children[os.pidfd_open(pid)] = pid
            theirs.send(json.dumps({"pid": pid}).encode())


def _become(wanted: dict[str, Any], stderr: int) -> NoReturn:
    """The fork: run the command and end with its exit code."""
    from geomirror.cli.main import run

    code = 70
    try:
        os.dup2(stderr, 2)
        os.chdir(wanted["directory"])
        os.umask(wanted["umask"])
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv = ["geomirror", *wanted["arguments"]]
        code = run(wanted["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
