"""One call to a daemon's control socket: HTTP over a Unix socket, without a process per call.

The demo samples the lag twice a second; a command line each time would cost more than the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomirror.errors import UnreachableError
from geomirror.node.error_json import error_from_object

ANSWER_BYTES_MAX = 16 << 20
"""Largest answer that is read."""


def control_socket(data_dir: Path) -> Path:
    """Where the daemon of a data directory listens; a long path moves its sockets elsewhere."""
    try:
        directory = Path((data_dir / "sockets").read_text(encoding="utf-8").strip())
    except OSError:
        directory = data_dir
    return directory / "control.sock"


def is_listening(path: Path) -> bool:
    """Whether a Unix socket takes connections: its file appears a moment before that."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def call(
    data_dir: Path, method: str, parameters: Mapping[str, Any], *, timeout_s: float
) -> dict[str, Any]:
    """Result of a control method.

    :raises UnreachableError: no daemon, or no whole answer in time.
    :raises GeomirrorError: the daemon's own error, with its class.
    """
    try:
        raw = await asyncio.wait_for(_exchange(data_dir, method, parameters), timeout_s)
        head, _, body = raw.partition(b"\r\n\r\n")
        if b"chunked" in head.lower():
            body = _join_chunks(body)
        answer = json.loads(body)
    except (OSError, ValueError, TimeoutError) as error:
        raise UnreachableError(f"the daemon in {data_dir} does not answer: {error}") from error
    if "error" in answer:
        raise error_from_object(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result


async def _exchange(data_dir: Path, method: str, parameters: Mapping[str, Any]) -> bytes:
    body = json.dumps(dict(parameters)).encode()
    reader, writer = await asyncio.open_unix_connection(str(control_socket(data_dir)))
    try:
        head = (
            f"POST /v1/call/{method} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        parts, size = [], 0
        while size < ANSWER_BYTES_MAX and (part := await reader.read(1 << 16)):
            parts.append(part)
            size += len(part)
        return b"".join(parts)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _join_chunks(body: bytes) -> bytes:
    parts = []
    while body:
        line, _, rest = body.partition(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        parts.append(rest[:size])
        body = rest[size + 2 :]
    return b"".join(parts)
