"""`geomirror attach --foreground`: the process around a supervisor: lock, signals, control socket.

Control protocol: one JSON object a connection, `{"do": "view"}` or `{"do": "detach", "is_lazy",
"is_forced"}`; the answer is `{"result": …}` or `{"error": …}`, one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from geomirror.errors import GeomirrorError, RefusedError, UsageError
from geomirror.node import attach_plan as plan
from geomirror.node import attach_tools as tools
from geomirror.node.attach_cleanup import clean_up
from geomirror.node.attach_state import AttachmentDir
from geomirror.node.attach_supervisor import Supervisor, Wanted, install_signals
from geomirror.node.attach_upstream import Upstream
from geomirror.node.error_json import error_object
from geomirror.node.log import set_up_logging
from geomirror.node.notify_io import Notifier
from geomirror.node.paths import DataDir

LINE_BYTES_MAX = 64 << 10
"""A request or answer of the control socket."""


def check_mountpoint(path: str) -> str:
    """The absolute path of a directory that can be mounted on.

    :raises RefusedError: it is none, is not empty, or something is mounted there.
    """
    absolute = os.path.abspath(path)
    if any(found.path == absolute for found in tools.mounts_here()):
        raise RefusedError(f"{absolute} has something mounted on it", hint="choose another one")
    try:
        entries = os.listdir(absolute)
    except OSError as error:
        hint = f'"mkdir {absolute}" makes it' if isinstance(error, FileNotFoundError) else ""
        raise RefusedError(f"{absolute}: {error.strerror}", hint=hint) from error
    if entries:
        raise RefusedError(f"{absolute} is not empty", hint="choose an empty directory")
    return os.path.realpath(absolute)


def run_attachment(
    data_dir: DataDir,
    volume: str,
    method: str | None,
    wanted: Wanted,
    is_ready: Callable[[dict[str, Any]], None],
) -> None:
    """Attach, say so, and serve until it is detached.

    :param method: `fuse`, `nbd`, or None for what this machine has.
    :param is_ready: called with the attachment, once it can be used.
    :raises GeomirrorError: it cannot be attached and nothing is left of it, or it died.
    """
    os.umask(0o077)
    set_up_logging("info", "auto", volume)
    method = plan.choose_method(method, tools.gather_facts(), mounts=wanted.mountpoint is not None)
    upstream = Upstream(data_dir, *plan.split_volume(volume))
    upstream.find()
    files = AttachmentDir.of(data_dir, upstream.resource, upstream.volume)
    files.create()
    lock = files.lock()
    try:
        asyncio.run(_serve(upstream, files, method, wanted, is_ready))
    finally:
        os.close(lock)


async def _serve(
    upstream: Upstream,
    files: AttachmentDir,
    method: str,
    wanted: Wanted,
    is_ready: Callable[[dict[str, Any]], None],
) -> None:
    notifier = Notifier()
    await clean_up(files, files.load())
    supervisor = Supervisor(upstream, files, method, wanted)
    with _control_socket(files) as listener:
        server = await asyncio.start_unix_server(
            lambda reader, writer: _answer(supervisor, reader, writer), sock=listener
        )
        try:
            await supervisor.attach()
            undo = install_signals(supervisor)
            try:
                is_ready(supervisor.view())
                notifier.ready(f"{upstream.name} is attached")
                await supervisor.watch()
            finally:
                undo()
        finally:
            server.close()
            # The one who asked for the end gets its answer.
            await asyncio.sleep(0)


@contextlib.contextmanager
def _control_socket(files: AttachmentDir) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as found:
        files.control.unlink(missing_ok=True)
        with socket_path(files) as path:
            found.bind(path)
        found.setblocking(False)
        yield found


@contextlib.contextmanager
def socket_path(files: AttachmentDir) -> Iterator[str]:
    """A short path of the control socket, however long the data directory's is."""
    directory = os.open(files.path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{files.control.name}"
    finally:
        os.close(directory)


async def _answer(
    supervisor: Supervisor, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        line = await reader.readline()
        answer: dict[str, Any]
        try:
            answer = {"result": await _do(supervisor, json.loads(line or b"{}"))}
        except GeomirrorError as error:
            answer = {"error": error_object(error)}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    except (OSError, ValueError):
        pass  # Who asked is gone, or did not speak our language: it is root, and nobody else.
    finally:
        writer.close()


async def _do(supervisor: Supervisor, request: dict[str, Any]) -> dict[str, Any]:
    if request.get("do") == "view":
        return supervisor.view()
    if request.get("do") == "detach":
        return await supervisor.detach(
            is_lazy=bool(request.get("is_lazy")), is_forced=bool(request.get("is_forced"))
        )
    raise UsageError(f"unknown request {request.get('do')!r}")
