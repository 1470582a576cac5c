"""A disk in RAM behind the `Export` interface, for tests and for measuring the front end alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from geomirror.errors import RefusedError
from geomirror.nbd.constants import (
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    STATE_HOLE,
    STATE_ZERO,
)
from geomirror.nbd.protocol import ReplySink, Request


@dataclass
class RamExport:
    """`held` set to a list keeps requests unanswered until `release`."""

    name: str = "ram"
    size_bytes: int = 1 << 20
    description: str = "a disk in RAM"
    is_read_only: bool = False
    is_multi_conn: bool = True
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = 32 << 20
    is_single_writer: bool = False
    fail_errno: int = 0
    fail_message: str = ""
    data: bytearray = field(default_factory=bytearray, repr=False)
    held: list[tuple[Request, bytes, ReplySink]] | None = field(default=None, repr=False)
    open_count: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    flags_seen: set[tuple[int, int]] = field(default_factory=set)
    batches: list[int] | None = None

    def __post_init__(self) -> None:
        if not self.data:
            self.data = bytearray(self.size_bytes)

    def open(self, sink: ReplySink) -> object:
        if self.is_single_writer and self.open_count:
            raise RefusedError(f'export "{self.name}" has a writer already')
        self.open_count += 1
        return object()

    def close(self, handle: object) -> None:
        self.open_count -= 1

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        if self.batches is not None:
            self.batches.append(len(requests))
        if self.held is not None:
            for request in requests:
                self.held.append((request, bytes(request.payload or b""), sink))
            return
        done: list[int] = []
        data, counts = self.data, self.counts
        for request in requests:
            counts[request.command] += 1
            if request.flags:
                self.flags_seen.add((request.command, request.flags))
            if self.fail_errno:
                sink.reply(request.cookie, self.fail_errno, self.fail_message)
            elif request.command == CMD_WRITE:
                data[request.offset : request.offset + request.length] = request.payload
                done.append(request.cookie)
            elif request.command == CMD_READ:
                end = request.offset + request.length
                sink.reply_read(
                    request.cookie, request.offset, [bytes(memoryview(data)[request.offset : end])]
                )
            else:
                if request.command != CMD_FLUSH:
                    data[request.offset : request.offset + request.length] = bytes(request.length)
                done.append(request.cookie)
        if done:
            sink.reply_many(done)

    def release(self, count: int | None = None) -> None:
        """Serve held requests, newest first: replies may come in any order."""
        assert self.held is not None
        held, self.held = self.held, None
        serve = len(held) if count is None else count
        for request, payload, sink in reversed(held[:serve]):
            if request.payload is not None:
                request.payload = memoryview(payload)
            self.submit(None, [request], sink)
        self.held = held[serve:]

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """4 KiB granularity; zeros count as holes."""
        if self.fail_errno:
            raise RefusedError("no status", hint="none")
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            step = min(4096 - offset % 4096, end - offset)
            is_zero = not any(self.data[offset : offset + step])
            found.append((step, STATE_HOLE | STATE_ZERO if is_zero else 0))
            offset += step
        return found
