"""What commands do about attachments: start one in the background, list all, end one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from geomirror.errors import GeomirrorError, NotFoundError, UnreachableError
from geomirror.node.attach_cleanup import clean_up
from geomirror.node.attach_plan import split_volume
from geomirror.node.attach_run import socket_path
from geomirror.node.attach_state import Attachment, AttachmentDir, attachments
from geomirror.node.attach_supervisor import Wanted, view_of
from geomirror.node.attach_upstream import Upstream
from geomirror.node.error_json import error_from_object
from geomirror.node.paths import DataDir
from geomirror.node.process_identity import start_time

VIEW_S_MAX = 5.0
"""Asking an attachment for its state."""
END_S_MAX = 30.0
"""Between the answer to a detach and the end of the process."""
_POLL_S = 0.02


def start_attachment(data_dir: DataDir, volume: str, method: str, wanted: Wanted) -> dict[str, Any]:
    """Run `geomirror attach … --foreground` in the background, until it is ready.

    :returns: the attachment, as `attach --list` shows it.
    :raises GeomirrorError: it cannot be attached; nothing is left of it.
    """
    upstream = Upstream(data_dir, *split_volume(volume))
    upstream.find()
    files = AttachmentDir.of(data_dir, upstream.resource, upstream.volume)
    files.create()
    os.close(files.lock())
    command = [sys.executable, "-m", "geomirror", "--data-dir", str(data_dir.root), "attach"]
    words = [upstream.name, wanted.mountpoint if wanted.mountpoint is not None else "--device"]
    timeout = "never" if wanted.timeout_s is None else f"{wanted.timeout_s:f}"
    words += ["--timeout", timeout, "--method", method, f"--fs-options={wanted.options}"]
    words += ["--read-only"] if wanted.is_read_only else []
    log = os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        process = subprocess.Popen(
            [*command, *words, "--foreground", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)
    assert process.stdout is not None
    with process.stdout as stream:
        document = _first_document(stream.fileno())
    if document is None or "error" in document:
        process.wait()
        if document is None:
            said = files.log.read_text(errors="replace").strip()[-2000:]
            raise GeomirrorError(f"the attachment's process ended ({process.returncode}): {said}")
        raise error_from_object(document["error"])
    del document["schema_version"]
    # It is no child of ours that has to be waited for: it outlives us.
    process.returncode = 0
    return document


def _first_document(descriptor: int) -> dict[str, Any] | None:
    """The JSON document that comes first; None when the end comes before it is whole."""
    text = b""
    while part := os.read(descriptor, 1 << 16):
        text += part
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        return found
    return None


def list_attachments(data_dir: DataDir) -> list[dict[str, Any]]:
    """All attachments of this node, as they are: asked, where a process serves them."""
    found = []
    for files in attachments(data_dir):
        attachment = files.load()
        if files.is_served():
            try:
                found.append(_ask(files, {"do": "view"}, VIEW_S_MAX))
                continue
            except UnreachableError:
                # On its way up or down, or stopped.
                if attachment is not None:
                    found.append({**view_of(attachment), "state": "unknown", "reason": None})
                continue
        if attachment is not None:
            reason = attachment.failure or f"its process {attachment.pid} is gone"
            found.append({**view_of(attachment), "state": "failed", "reason": reason})
    return found


def find_attachment(data_dir: DataDir, volume: str) -> AttachmentDir:
    """The attachment of `RES[/VOLUME]`, or at a mountpoint, or of a device.

    :raises NotFoundError: there is none.
    """
    known = [files for files in attachments(data_dir) if files.is_served() or files.load()]
    for files in known:
        attachment = files.load()
        names = [f"{files.path.parent.name}/{files.path.name}"]
        if attachment is not None:
            names += [attachment.device or "", attachment.mountpoint or ""]
        if volume in names or ("/" in volume and os.path.realpath(volume) in names):
            return files
    if "/" not in volume:
        split_volume(volume)
        mine = [files for files in known if files.path.parent.name == volume]
        if len(mine) == 1:
            return mine[0]
        if mine:
            names = [f"{volume}/{files.path.name}" for files in mine]
            raise NotFoundError(
                f'"{volume}" has {len(mine)} attached volumes', hint=", ".join(names)
            )
    raise NotFoundError(f'"{volume}" is not attached here', hint='see "geomirror attach --list"')


def detach(files: AttachmentDir, *, is_lazy: bool, is_forced: bool) -> dict[str, Any]:
    """End an attachment, or clean up after one that is dead.

    :returns: name, is_clean (all that was written is with the daemon), is_gone, cleaned (what was
        found of a dead one).
    :raises GeomirrorError: it stays; why.
    """
    name = f"{files.path.parent.name}/{files.path.name}"
    attachment = files.load()
    if files.is_served():
        request = {"do": "detach", "is_lazy": is_lazy, "is_forced": is_forced}
        result = _ask(files, request, None)
        give_up = time.monotonic() + END_S_MAX
        while result["is_gone"] and _is_alive(attachment) and time.monotonic() < give_up:
            time.sleep(_POLL_S)
        return {**result, "cleaned": []}
    lock = files.lock()
    try:
        attachment = files.load()
        is_clean = attachment is None or attachment.is_read_only
        cleaned = asyncio.run(clean_up(files, attachment))
    finally:
        os.close(lock)
    return {"name": name, "is_clean": is_clean, "is_gone": True, "cleaned": cleaned}


def _is_alive(attachment: Attachment | None) -> bool:
    return attachment is not None and start_time(attachment.pid) == attachment.start_time


def _ask(files: AttachmentDir, request: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(timeout_s)
        try:
            with socket_path(files) as path:
                channel.connect(path)
            channel.sendall(json.dumps(request).encode() + b"\n")
            with channel.makefile("rb") as stream:
                answer = json.loads(stream.readline() or b"null")
        except (OSError, ValueError) as error:
            raise UnreachableError(f"{files.path} does not answer: {error}") from error
    if answer is None:
        raise UnreachableError(f"{files.path} ended before it answered")
    if "error" in answer:
        raise error_from_object(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result
