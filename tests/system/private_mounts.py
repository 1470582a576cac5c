"""Attachments of a node in a mount namespace of their own: a failed test leaves nothing mounted."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy  # noqa: F401 - see `own_mounts`
import pytest

from geomirror.node.attach_client import list_attachments
from geomirror.node.paths import DataDir
from tests.system import nursery
from tests.system.support import Site, is_root, until

TOOLS = ("nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "mount", "umount", "blkid", "unshare")


def require_attach() -> None:
    """Skip with the reason where nothing can be attached."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not is_root() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounts and loop devices need root and /dev/fuse")


_CLONE_NEWNS = 0x20000


@contextlib.contextmanager
def own_mounts() -> Iterator[None]:
    """This thread, and what it starts, in a mount namespace of its own.

    Other namespaces that are made meanwhile copy all mounts, and would keep ours busy. The way back
    is refused to whoever shares it with a thread that began inside: numpy's begin when a command in
    this process imports it, so it is imported before.
    """
    nursery.begin()
    system = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        assert system.unshare(_CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        yield
    finally:
        assert system.setns(before, _CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        os.close(before)


class MountSite(Site):
    """A node whose commands, but not its daemon, run in a private mount namespace."""

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(root, name)
        command = ["unshare", "--mount", "--propagation", "private", "sleep", "infinity"]
        self._holder = subprocess.Popen(command)
        ours = os.readlink("/proc/self/ns/mnt")
        until(lambda: os.readlink(f"/proc/{self._holder.pid}/ns/mnt") != ours, what="a namespace")
        self._inside = ["nsenter", "--target", str(self._holder.pid), "--mount", "--wd=/"]

    def command(self, *arguments: str) -> list[str]:
        """In the namespace, unless it is the daemon."""
        inside = [] if arguments[:2] == ("node", "run") else self._inside
        return [*inside, *super().command(*arguments)]

    def entered(self, *arguments: str) -> list[Path]:
        """In the namespace, unless it is the daemon."""
        is_daemon = arguments[:2] == ("node", "run")
        return [] if is_daemon else [Path(f"/proc/{self._holder.pid}/ns/mnt")]

    def inside(self, *command: str | Path, may_fail: bool = False) -> str:
        """Run a tool in the namespace; its output."""
        done = subprocess.run(
            [*self._inside, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert may_fail or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def start_inside(self, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a process in the namespace."""
        return subprocess.Popen([*self._inside, *map(str, command)])

    def seen(self, path: Path) -> Path:
        """A path of the namespace as this process reaches it."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def error_inside(
        self, *arguments: str, expected: int, code: str, as_nobody: bool = False
    ) -> str:
        """Run a command there that fails; its message and hint."""
        if as_nobody:
            command = self.command(*arguments, "--json")
            command[len(self._inside) : len(self._inside)] = ["setpriv", "--euid=65534"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        else:
            done = self.finished(*arguments, "--json")
        assert done.returncode == expected, (arguments, done.stdout, done.stderr)
        found = json.loads(done.stdout)["error"]
        assert found["code"] == code, found
        return f"{found['message']}; {found['hint']}"

    def known(self, name: str) -> dict[str, Any]:
        """What the attachment's file says."""
        path = self.data_dir / "attachments" / name / "attachment.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def attached(self) -> list[dict[str, Any]]:
        """What `attach --list` prints, without starting a process."""
        return list_attachments(DataDir(self.data_dir))

    def leftovers(self) -> list[str]:
        """What attachments of this node have left on this machine."""
        mark = str(self.data_dir)
        found = []
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if mark in path.read_text():
                    found.append(f"{path}: {path.read_text()}")
        text = Path(f"/proc/{self._holder.pid}/mountinfo").read_text()
        found += [line for line in text.splitlines() if mark in line or str(self.root) in line]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                is_own = mark.encode() in b" ".join(words)
                if is_own and (b"attach" in words or words[0].endswith(b"nbdfuse")):
                    found.append(f"{path}: {words}")
        return found

    def end(self) -> None:
        """Nothing is left: attachments are killed by their pids, then the namespace ends."""
        for path in self.data_dir.glob("attachments/*/*"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._kill_attachment(path)
        super().end()
        self._holder.kill()
        self._holder.wait()

    def _kill_attachment(self, path: Path) -> None:
        found = json.loads((path / "attachment.json").read_text())
        for pid in (found["pid"], found["helper_pid"]):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if str(self.data_dir).encode() in words:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        if found["device"]:
            self.inside("umount", "--lazy", found["device"], may_fail=True)
            backing = Path("/sys/block", Path(found["device"]).name, "loop/backing_file")
            if str(self.data_dir) in backing.read_text():
                self.inside("losetup", "--detach", found["device"], may_fail=True)
