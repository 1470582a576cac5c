"""The audit log: every administrative act on this node: who asked, when, and what came of it.

`DATA_DIR/audit.ndjson`, mode 0600, one JSON object a line, only ever appended to:

    {"time", "who", "act", "parameters", "result", "error"}

`who` is the local user that the kernel names at the other end of the control socket, or the node at
the other end of a link. The line is durable before the answer is given; where it cannot be written
(full disk) the act counts all the same and an event says so: a failover must not wait for a log.
Parameters have no secrets, and everything is JSON, so that no name forges a line. A file that has
reached `AUDIT_BYTES_MAX` becomes `audit.1.ndjson`, in place of the one before.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from geomirror.environment import SystemClock
from geomirror.errors import GeomirrorError, StorageError
from geomirror.limits import KIB, MIB
from geomirror.node.calls import Caller
from geomirror.node.error_json import error_object
from geomirror.node.rfc3339 import rfc3339

AUDIT_BYTES_MAX = 16 * MIB
"""Of one file; some 60,000 acts. Two files are kept."""
PARAMETERS_BYTES_MAX = 4 * KIB
"""Of one act, as JSON; of longer ones only the beginning is kept."""

ACTS = frozenset(
    {
        "branch.drop",
        "drill.begin",
        "mark.create",
        "mark.delete",
        "membership.leave",
        "node.leave",
        "node.rename",
        "node.revoke",
        "promotion.demote",
        "promotion.failover",
        "promotion.resolve",
        "promotion.switchover",
        "resource.add_secondary",
        "resource.create",
        "resource.delete",
        "resource.pause",
        "resource.remove_secondary",
        "resource.resume",
        "resource.set",
        "resync.in_place",
        "rewind.begin",
        "rewind.commit",
        "rewind.rollback",
        "service.expose",
        "service.forward",
        "service.unexpose",
        "service.unforward",
        "tunnel.down",
        "tunnel.rotate_keys",
        "tunnel.up",
        "verify.start",
        "verify.stop",
        "view.create",
        "view.delete",
        "volume.add",
        "volume.resize",
    }
)
"""Methods that an operator asks for and that change something. What nodes do to each other as a
consequence is not among them; an act that is forwarded is in the log of both nodes."""


def audit_path(data_dir: Path) -> Path:
    """The newest file."""
    return data_dir / "audit.ndjson"


def local_user(uid: int) -> str:
    """`name (uid N)`"""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "?"
    return f"{name} (uid {uid})"


def append_act(
    data_dir: Path,
    act: str,
    parameters: Mapping[str, Any],
    *,
    who: str | None = None,
    error: GeomirrorError | None = None,
) -> None:
    """Append one line, durably. Blocking.

    :param who: None: the user of this process.
    :raises StorageError: it could not be written.
    """
    kept: Any = dict(parameters)
    text = json.dumps(kept)
    if len(text) > PARAMETERS_BYTES_MAX:
        kept = text[:PARAMETERS_BYTES_MAX]
    record = {
        "time": rfc3339(SystemClock().wall_ns()),
        "who": who or local_user(os.getuid()),
        "act": act,
        "parameters": kept,
        "result": "done" if error is None else "failed",
        "error": None if error is None else error_object(error),
    }
    path = audit_path(data_dir)
    try:
        _append(path, json.dumps(record).encode() + b"\n")
    except OSError as cause:
        raise StorageError.from_os(cause, operation="append to", path=str(path)) from cause


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        # One write: lines of a command and of the daemon do not mix.
        os.write(descriptor, line)
        os.fsync(descriptor)
        if os.fstat(descriptor).st_size >= AUDIT_BYTES_MAX:
            os.replace(path, path.with_name("audit.1.ndjson"))
    finally:
        os.close(descriptor)


def read_acts(data_dir: Path, count: int) -> list[dict[str, Any]]:
    """The newest acts, oldest first; a line that a crash cut off is left out.

    :raises StorageError: a file cannot be read.
    """
    path = audit_path(data_dir)
    found: list[dict[str, Any]] = []
    for file in (path.with_name("audit.1.ndjson"), path):
        try:
            lines = file.read_bytes().splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError.from_os(error, operation="read", path=str(file)) from error
        found += [act for line in lines[-count:] if (act := _parsed(line)) is not None]
    return found[-count:] if count else []


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class AuditLog:
    """Notes acts as they end; on the event loop, the file on a worker thread.

    :param emit: publishes an event.
    """

    def __init__(self, data_dir: Path, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._data_dir = data_dir
        self._emit = emit

    async def note(
        self, caller: Caller, act: str, parameters: Mapping[str, Any], error: GeomirrorError | None
    ) -> None:
        """Append an act; what is none is left out."""
        if act not in ACTS:
            return
        who = f"node {caller.peer}" if caller.peer is not None else caller.user or None
        try:
            await asyncio.to_thread(
                append_act, self._data_dir, act, parameters, who=who, error=error
            )
        except StorageError as failure:
            self._emit("audit_failed", {"act": act, "who": who, "reason": str(failure)})
