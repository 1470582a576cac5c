"""Commands and daemons as forks of a process that has imported everything: a tenth of the CPU.

```
 test ── arguments, files, namespaces ──▶ nursery, imported once ── fork ──▶ command or daemon
      ◀──────────── pid, exit code ─────────                     ◀─ wait ──
```
One for each test process; it ends with the test process, and its forks with it. What a fork cannot
show, the interpreter's own start and its argument list, is seen by the tests that start
`python -m geomirror` themselves.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

MESSAGE_BYTES_MAX = 1 << 18
START_S_MAX = 60.0
FILES_MAX = 8
ENTERED = ("mnt", "net")
"""Kinds of namespaces that a fork may enter."""


def _namespace(kind: str) -> str:
    return os.readlink(f"/proc/thread-self/ns/{kind}")


class Fork:
    """A forked process, with what `subprocess.Popen` has of it."""

    def __init__(self, report: int) -> None:
        self._report = report
        self._said = b""
        self.returncode: int | None = None
        pid = self._line(START_S_MAX)
        assert pid is not None, "the nursery does not answer"
        self.pid = pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._code(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. :raises subprocess.TimeoutExpired: it goes on."""
        code = self._code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(["geomirror", str(self.pid)], timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _code(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._line(timeout_s)
            if self.returncode is not None:
                os.close(self._report)
        return self.returncode

    def _line(self, timeout_s: float | None) -> int | None:
        """The next number that the nursery says of it; None when it says none in time."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._said:
            left_s = None if give_up is None else max(0.0, give_up - time.monotonic())
            if not select.select([self._report], [], [], left_s)[0]:
                return None
            part = os.read(self._report, 64)
            assert part, "the nursery has ended"
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return int(line)


class Nursery:
    """The test's side."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kept = {kind: _namespace(kind) for kind in (*ENTERED, "pid", "user")}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent.parent,
            )
        atexit.register(self._close)

    def is_here(self) -> bool:
        """Whether its forks can be where this thread is."""
        is_near = all(_namespace(kind) == self._kept[kind] for kind in ("pid", "user"))
        return self._process.poll() is None and is_near

    def start(
        self,
        arguments: Sequence[str],
        files: Sequence[int],
        directory: Path,
        namespaces: Sequence[Path],
    ) -> Fork:
        """Run `geomirror` with these arguments, its first files and working directory.

        :param namespaces: to be entered, beside those of this thread.
        """
        umask = os.umask(0)
        os.umask(umask)
        wanted = {
            "arguments": arguments,
            "directory": str(directory),
            "environment": dict(os.environ),
            "umask": umask,
        }
        moved = [kind for kind in ENTERED if _namespace(kind) != self._kept[kind]]
        paths = [*(Path(f"/proc/thread-self/ns/{kind}") for kind in moved), *namespaces]
        report, theirs = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, theirs)
            entered = [os.open(path, os.O_RDONLY) for path in paths]
            for descriptor in entered:
                stack.callback(os.close, descriptor)
            sent = array.array("i", [theirs, *files, *entered])
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)
            self._ours.sendmsg([json.dumps(wanted).encode()], [rights])
        return Fork(report)

    def _close(self) -> None:
        self._ours.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)


_nurseries: list[Nursery] = []
_making = threading.Lock()


def begin() -> Nursery:
    """Have it, in the namespaces of whoever is first: it keeps their mounts."""
    with _making:
        if not _nurseries:
            _nurseries.append(Nursery())
    return _nurseries[0]


def start(
    arguments: Sequence[str],
    directory: Path,
    *,
    files: Sequence[int] | None = None,
    stderr: int = 2,
    namespaces: Sequence[Path] = (),
) -> Fork | None:
    """Start a process; None where only one of its own is in the right namespaces.

    :param files: its stdin, stdout and stderr; else nothing, this process's, and `stderr`.
    """
    nursery = begin()
    if not nursery.is_here():
        return None
    if files is not None:
        return nursery.start(arguments, files, directory, namespaces)
    with open(os.devnull, "rb") as nothing:
        files = (nothing.fileno(), 1, stderr)
        return nursery.start(arguments, files, directory, namespaces)


def run(
    arguments: Sequence[str],
    directory: Path,
    *,
    stdin: str = "",
    namespaces: Sequence[Path] = (),
    timeout_s: float,
) -> subprocess.CompletedProcess[str] | None:
    """Run a command to its end, as `subprocess.run` does; None as of `start`.

    :raises subprocess.TimeoutExpired: it took longer, and was killed.
    """
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(os.memfd_create(name), "w+b", buffering=0))
            for name in ("stdin", "stdout", "stderr")
        ]
        files[0].write(stdin.encode())
        files[0].seek(0)
        numbers = [file.fileno() for file in files]
        fork = start(arguments, directory, files=numbers, namespaces=namespaces)
        if fork is None:
            return None
        try:
            code = fork.wait(timeout_s)
        except BaseException:
            fork.kill()
            fork.wait()
            raise
        said = []
        for file in files[1:]:
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(list(arguments), code, *said)


# The nursery's side.


def _import_all() -> None:
    """What commands and daemons import, now or later."""
    from geomirror.cli.main import PANELS

    commands = {module for panel in PANELS.values() for module in panel.values()}
    daemon = ("node", "run_io", "replica_service", "config_io", "log", "nbd_listeners")
    for name in (*sorted(commands), *(f"geomirror.node.{name}" for name in daemon)):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # A collection in a fork would copy every page.


def _serve(requests: socket.socket) -> None:
    _import_all()
    children: dict[int, tuple[int, int]] = {}
    """pidfd → pid, and the pipe to whoever asked for it"""
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                pid, report = children.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _tell(report, code)
                os.close(report)
                continue
            data, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES_MAX, FILES_MAX)
            if not data:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            pid = os.fork()
            if pid == 0:
                _become(json.loads(data), files[1:])
            for descriptor in files[1:]:
                os.close(descriptor)
            children[os.pidfd_open(pid)] = pid, files[0]
            _tell(files[0], pid)


def _tell(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(report, f"{number}\n".encode())


def _become(wanted: dict[str, Any], files: list[int]) -> NoReturn:
    """The fork: run the command and end with its exit code."""
    from geomirror.cli.main import run

    code = 70
    try:
        for number, descriptor in enumerate(files[:3]):
            os.dup2(descriptor, number)
        for descriptor in files[3:]:
            system = ctypes.CDLL(None, use_errno=True)
            assert system.setns(descriptor, 0) == 0, os.strerror(ctypes.get_errno())
        os.closerange(3, 1 << 16)
        os.chdir(wanted["directory"])
        os.umask(wanted["umask"])
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv = ["geomirror", *wanted["arguments"]]
        code = run(wanted["arguments"])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
