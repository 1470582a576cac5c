"""The command's side of a drill: one at a time, started, listened to, ended with us."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from geomirror.errors import InUseError, NotFoundError, UnreachableError
from geomirror.nbd.client_io import NbdClient
from geomirror.node.attach_state import attachments
from geomirror.node.attach_tools import tool_environment
from geomirror.node.paths import DataDir
from geomirror.node.process_identity import death_signal

OUTPUT_CHARACTERS_MAX = 2000
"""Of the end of what a check printed, which is kept."""
MORE_S_MAX = 540.0
"""Mounting and unmounting, at their slowest; the view does not live longer."""
TOOLS = ("unshare", "nbdfuse", "mount", "umount", "blkid")
NAMESPACES = (
    "unshare",
    *("--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
    "--",
)


@dataclass(frozen=True)
class Trial:
    """What is to be tried."""

    uri: str
    volume: str
    check: str
    timeout_s: float
    mounts: bool
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of it."""

    file_system: str | None = None
    mount_reason: str = ""
    mounted_at: float | None = None
    """Of `time.monotonic`."""
    exit_code: int | None = None
    is_late: bool = False
    seconds: float | None = None
    output: str = ""


@contextlib.contextmanager
def only_drill(data_dir: DataDir, name: str) -> Iterator[None]:
    """Nobody else runs a drill of this resource from this node meanwhile.

    :raises InUseError: somebody does. :raises NotFoundError: no state of it is here.
    """
    directory = data_dir.resources / name
    try:
        descriptor = os.open(directory / "drill.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotFoundError(f"{directory}/drill.lock cannot be made: {error.strerror}") from error
    try:
        # Made by root, it has to work for the node's own user too.
        owner = os.stat(directory)
        if os.geteuid() == 0:
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InUseError(
                f'a drill of "{name}" runs on this node already',
                hint=f'see "geomirror drill {name} --history"',
            ) from None
        yield
    finally:
        os.close(descriptor)


def wait_readable(uri: str, timeout_s: float = 60.0) -> None:
    """Return when the first bytes can be read.

    :raises GeomirrorError: they cannot; the last reason.
    """

    async def read() -> None:
        async with await NbdClient.connect(uri) as client:
            await client.read(0, min(4096, client.size_bytes))

    give_up = time.monotonic() + timeout_s
    while True:
        try:
            asyncio.run(read())
            return
        except UnreachableError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def namespaces_lacking() -> str:
    """Why nothing can be mounted in a namespace; "" if it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    path = tool_environment()["PATH"]
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=path)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened"
    done = subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False)
    return " ".join(done.stderr.decode(errors="replace").split()) if done.returncode else ""


def try_out(data_dir: DataDir, trial: Trial, say: Callable[[bytes], None]) -> Outcome:
    """Run the check; it ends with this process, however that ends.

    :param say: is given what the check prints, as it comes.
    """
    reason = namespaces_lacking()
    reader, writer = os.pipe()
    plan = {
        "uri": trial.uri,
        "volume": trial.volume,
        "check": trial.check,
        "timeout_s": trial.timeout_s,
        "mounts": trial.mounts,
        "environment": dict(trial.environment),
        "is_private": not reason,
        "reason": reason,
        "others": _attached_paths(data_dir),
        "report": writer,
    }
    inside = [sys.executable, "-P", "-m", "geomirror.cli.drill_inside", json.dumps(plan)]
    try:
        process = subprocess.Popen(
            inside if reason else [*NAMESPACES, *inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            # With the words of this environment; only its PATH is longer.
            env={**os.environ, "PATH": tool_environment()["PATH"]},
            start_new_session=True,
            preexec_fn=death_signal(),
        )
    finally:
        os.close(writer)
    assert process.stdout is not None
    try:
        with process.stdout:
            return _listen(process, process.stdout.fileno(), reader, trial.timeout_s, say)
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def _attached_paths(data_dir: DataDir) -> list[str]:
    found = []
    for files in attachments(data_dir):
        attachment = files.load()
        if attachment is not None and attachment.mountpoint is not None:
            found.append(attachment.mountpoint)
        found.append(str(files.fuse))
    return found


def _listen(
    process: subprocess.Popen[bytes],
    output: int,
    reader: int,
    timeout_s: float,
    say: Callable[[bytes], None],
) -> Outcome:
    outcome, tail, lines = Outcome(), b"", b""
    give_up = time.monotonic() + timeout_s + MORE_S_MAX
    is_over, open_ends = False, {output, reader}
    while open_ends and time.monotonic() < give_up:
        is_over = is_over or process.poll() is not None
        # A process that the check left behind may keep the output open.
        ready = select.select(list(open_ends), [], [], 0.0 if is_over else 0.2)[0]
        if is_over and not ready:
            break
        for descriptor in ready:
            part = os.read(descriptor, 65536)
            if not part:
                open_ends.discard(descriptor)
            elif descriptor == reader:
                *whole, lines = (lines + part).split(b"\n")
                for line in whole:
                    _take(outcome, json.loads(line))
            else:
                say(part)
                tail = (tail + part)[-4 * OUTPUT_CHARACTERS_MAX :]
    if open_ends and not is_over and process.poll() is None:
        outcome.is_late = True
    outcome.output = tail.decode(errors="replace").replace("\0", "")[-OUTPUT_CHARACTERS_MAX:]
    return outcome


def _take(outcome: Outcome, line: dict[str, Any]) -> None:
    if "mount" in line:
        outcome.file_system = line["mount"]["file_system"]
        outcome.mount_reason = line["mount"]["reason"][:1000]
        outcome.mounted_at = time.monotonic() if outcome.file_system else None
    else:
        found = line["check"]
        outcome.exit_code, outcome.is_late = found["exit_code"], found["is_late"]
        outcome.seconds = found["seconds"]
