"""Handing gathered replies to a transport: small ones joined, large ones uncopied."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from geomirror.nbd.protocol import Buffer

_JOIN_BYTES_MAX = 64 << 10
"""Larger buffers are written by themselves: copying them costs more than a system call."""


def write_replies(transport: asyncio.Transport, out: Sequence[Buffer]) -> None:
    """Write all buffers, in order; there is at least one."""
    if len(out) == 1 and isinstance(out[0], bytes):
        transport.write(out[0])
        return
    if max(map(len, out)) < _JOIN_BYTES_MAX:
        transport.write(b"".join(out))
        return
    small: list[Buffer] = []
    for buffer in out:
        if len(buffer) < _JOIN_BYTES_MAX:
            small.append(buffer)
            continue
        if small:
            transport.write(b"".join(small))
            small = []
        transport.write(memoryview(buffer))  # The standard loop would slice a copy of bytes.
    if small:
        transport.write(b"".join(small))
