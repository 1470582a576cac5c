"""What attaching asks of the machine: tools run to their end, and what the kernel says it has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from geomirror.errors import StorageError
from geomirror.node.attach_plan import Facts, Mount, parse_mountinfo

_TOOLS = ("nbdfuse", "nbd-client", "losetup", "mount", "umount", "blkid")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMED_MAX = 8
"""Processes named in one message."""


def _search_path() -> str:
    # A user's PATH under sudo or cron may lack the sbin directories.
    return f"{os.environ.get('PATH', '')}:{_PATH}"


def gather_facts() -> Facts:
    """What this machine has of what attaching needs."""
    found = [tool for tool in _TOOLS if shutil.which(tool, path=_search_path())]
    return Facts(
        is_root=os.geteuid() == 0,
        tools=frozenset(found),
        has_nbd=Path("/sys/block/nbd0").exists() and Path("/dev/nbd0").exists(),
        has_fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
        has_loop=Path("/dev/loop-control").exists(),
    )


def tool_environment() -> dict[str, str]:
    """For tools: they are found, and speak the language that is read here."""
    return {**os.environ, "PATH": _search_path(), "LC_ALL": "C"}


async def run_tool(command: Sequence[str], *, may_fail: bool = False) -> str:
    """Run a tool to its end, however long that takes; its stdout.

    :raises StorageError: it failed; the message is its own. Not with `may_fail`.
    """
    # A session of its own: Ctrl-C at a terminal is ours to answer.
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=tool_environment(),
        start_new_session=True,
        cwd="/",
    )
    output, errors = await process.communicate()
    if process.returncode and not may_fail:
        said = " ".join(errors.decode(errors="replace").split())
        raise StorageError(f"{' '.join(command)}: {said or f'exit {process.returncode}'}")
    return output.decode(errors="replace").strip()


def mounts_here() -> list[Mount]:
    """All mounts that this process sees; reads nothing of the mounted."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def device_number(device: str) -> str:
    """major:minor of a block device as mountinfo has it; empty when there is none."""
    try:
        return Path("/sys/block", Path(device).name, "dev").read_text().strip()
    except OSError:
        return ""


def loop_file(device: str) -> str | None:
    """The file under a loop device; None when it is free."""
    try:
        text = Path("/sys/block", Path(device).name, "loop/backing_file").read_text()
    except OSError:
        return None
    return text.rstrip("\n")


def loops_on(file: Path) -> list[str]:
    """Loop devices on a file."""
    names = {str(file), f"{file} (deleted)"}
    found = Path("/sys/block").glob("loop*")
    return sorted(f"/dev/{path.name}" for path in found if loop_file(path.name) in names)


def nbd_devices() -> tuple[list[str], frozenset[str]]:
    """All nbd devices, and which of them are in use."""
    names = [path.name for path in Path("/sys/block").glob("nbd*")]
    busy = [name for name in names if Path("/sys/block", name, "pid").exists()]
    return names, frozenset(busy)


def users_of(path: str | None, device: str) -> list[str]:
    """Who keeps a mount or a device busy: `name (pid)`, and devices on top.

    Looks at names only: nothing of the file system, whose disk may be away, is touched.
    """
    own = os.getpid()
    found = [
        f"/dev/{entry}" for entry in _children(Path("/sys/block", Path(device).name, "holders"))
    ]
    for process in _children(Path("/proc")):
        if not process.isdigit() or int(process) == own:
            continue
        links = _links(Path("/proc", process))
        inside = [path, device] if path else [device]
        if any(link == name or link.startswith(f"{name}/") for link in links for name in inside):
            found.append(_named(process))
    return found


def _links(process: Path) -> list[str]:
    links = []
    fds = [f"fd/{fd}" for fd in _children(process / "fd")]
    for name in ("cwd", "root", "exe", *fds):
        with contextlib.suppress(OSError):
            links.append(os.readlink(process / name))
    return links


def mounted_elsewhere(device: str) -> list[str]:
    """One process of each mount namespace that has the device mounted."""
    number = device_number(device)
    namespaces: dict[str, str] = {}
    for process in _children(Path("/proc")):
        if not process.isdigit():
            continue
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace in namespaces:
                continue
            text = Path(f"/proc/{process}/mountinfo").read_text(errors="surrogateescape")
            has = any(mount.device == number for mount in parse_mountinfo(text))
            namespaces[namespace] = f"mount namespace of {_named(process)}" if has else ""
    return [text for text in namespaces.values() if text]


def _named(process: str) -> str:
    try:
        name = Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        name = "?"
    return f"{name} ({process})"


def _children(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def in_words(users: Sequence[str]) -> str:
    """For a message: some of them."""
    more = f" and {len(users) - NAMED_MAX} more" if len(users) > NAMED_MAX else ""
    return ", ".join(users[:NAMED_MAX]) + more if users else "nobody that can be seen"


def sync_device(device: str) -> None:
    """Write out what the kernel still has for a device, and flush it.

    :raises StorageError: something was not written.
    """
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError.from_os(error, operation="flush", path=device) from error
