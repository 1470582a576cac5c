"""Named network namespaces that can be cleaned up after a crash.

A name carries its owner: `gm-<pid namespace>-<pid>-<start time>-<random>-<node>`. A namespace whose
owner runs no more is a leftover; one without such a name, or of another pid namespace, is never
touched. The owner's files (`gm-…` in the runtime directory) are named alike.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import tempfile
import threading
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from geomirror.errors import NotFoundError, RefusedError, StorageError
from geomirror.lab.process_io import run
from geomirror.node.process_identity import start_time

NETNS_DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000
IP_TIMEOUT_S = 10.0
_OWNED = re.compile(r"(gm-([0-9]+)-([0-9]+)-([0-9]+)-[0-9a-f]{8})(-.*)?")


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")


def make_owner() -> str:
    """A new name that belongs to this process."""
    pid = os.getpid()
    return f"gm-{_pid_namespace()}-{pid}-{start_time(pid)}-{os.urandom(4).hex()}"


def is_leftover(name: str) -> bool:
    """Whether the name is of the form above and its owner, of this pid namespace, is gone."""
    match = _OWNED.fullmatch(name)
    if match is None or match[2] != _pid_namespace():
        return False
    return start_time(int(match[3])) != match[4]


def runtime_directory() -> Path:
    """Where owners' directories are made: short, since they hold a socket."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class Namespace:
    """A network namespace with one emulated network device."""

    name: str
    """In `ip netns list`."""
    ipv4: IPv4Address
    ipv6: IPv6Address

    @property
    def path(self) -> Path:
        """What `setns` takes."""
        return NETNS_DIRECTORY / self.name

    def to_json(self) -> dict[str, str]:
        """Name and addresses."""
        return {"namespace": self.name, "ipv4": str(self.ipv4), "ipv6": str(self.ipv6)}

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs `arguments` inside. The process that starts becomes it."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def socket(
        self, kind: socket.SocketKind = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """An IPv4 socket of this process that lives inside.

        :raises NotFoundError: the namespace is gone.
        """
        made: list[socket.socket] = []
        failed: list[OSError] = []
        libc = ctypes.CDLL(None, use_errno=True)

        def make() -> None:
            # A thread of its own: setns changes the calling thread, which ends here.
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if libc.setns(descriptor, CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                finally:
                    os.close(descriptor)
                made.append(socket.socket(socket.AF_INET, kind, protocol))
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=make, name="namespace-socket")
        thread.start()
        thread.join()
        if failed:
            raise NotFoundError(f"no socket in namespace {self.name}: {failed[0]}")
        return made[0]


async def _ip(*arguments: str) -> None:
    if shutil.which("ip") is None:
        raise NotFoundError(
            "the program ip is not installed", hint='install it with "apt-get install iproute2"'
        )
    done = await run(["ip", *arguments], timeout_s=IP_TIMEOUT_S)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise RefusedError(
            f"ip {' '.join(arguments)}: {said}",
            hint="network namespaces need root and a kernel and container that allow them",
        )


async def add_namespace(name: str) -> None:
    """Make a named network namespace.

    :raises NotFoundError: `ip` is not installed.
    :raises RefusedError: the kernel does not allow it.
    """
    await _ip("netns", "add", name)


async def _delete(name: str) -> None:
    try:
        await _ip("netns", "delete", name)
    except RefusedError:
        if (NETNS_DIRECTORY / name).exists():
            raise
        # Somebody else was quicker: every emulator that starts removes leftovers.


async def delete_namespaces(owner: str) -> None:
    """Remove the namespaces of an owner. Processes inside keep theirs, without its name."""
    assert _OWNED.fullmatch(owner), owner
    for name in _names(NETNS_DIRECTORY):
        if name.startswith(f"{owner}-"):
            await _delete(name)


async def remove_leftovers() -> list[str]:
    """Remove what crashed owners left; names of the namespaces that were removed.

    :raises StorageError: a directory cannot be removed.
    """
    removed = []
    for name in _names(NETNS_DIRECTORY):
        if is_leftover(name):
            await _delete(name)
            removed.append(name)
    for name in _names(runtime_directory()):
        path = runtime_directory() / name
        # Whoever may write to /tmp may choose a name there; only our own directories are removed.
        if is_leftover(name) and path.is_dir() and path.lstat().st_uid == os.geteuid():
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                pass  # somebody else cleans up, too
            except OSError as error:
                raise StorageError.from_os(error, operation="remove", path=str(path)) from error
    return removed
