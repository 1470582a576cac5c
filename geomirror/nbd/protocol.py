"""What an export, a connection and a request are to each other: the NBD package's interface.

    socket ──> RequestParser ──> Export.submit(handle, [Request, ...], sink)
                                        │ now or later, in any order
    socket <── connection  <── ReplySink.reply / reply_read

Requests reach an export validated: range, flags, alignment, read-only and payload size are checked
once, in `request_parser`. Zero lengths, CACHE, BLOCK_STATUS and refusals never reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

Buffer = bytes | bytearray | memoryview


class Request(msgspec.Struct, gc=False, eq=False):
    """One validated request: READ, WRITE, FLUSH, TRIM or WRITE_ZEROES (`constants.CMD_*`).

    A struct is made in a third of a dataclass's time, and the garbage collector does not see it.
    """

    command: int
    flags: int
    """`constants.CMD_FLAG_*`. FUA may be set on every command."""
    cookie: int
    """The client's u64; goes back in the reply."""
    offset: int
    length: int
    """Bytes, at least 1, except for FLUSH where it is 0."""
    payload: memoryview | None
    """`length` bytes of a WRITE, else None. Valid only until `submit` returns: copy what waits."""


ReadAnswer = tuple[int, int, Sequence[Buffer]]
"""(cookie, offset, buffers) of a READ, as for `ReplySink.reply_read`."""


class ReplySink(Protocol):
    """The connection, as an export sees it. All methods belong to the event loop's thread."""

    @property
    def is_closed(self) -> bool:
        """True when the client is gone; replies are then dropped silently."""

    def reply(self, request_cookie: int, error: int = 0, message: str = "") -> None:
        """Answer a request; a READ only with an error.

        :param error: errno for the client; one that NBD does not define becomes EIO.
        :param message: for people; clients with structured replies get it (`stale`, `fenced`).
        """

    def reply_many(self, cookies: Sequence[int]) -> None:
        """Answer many requests, none of them a READ, with success: cheaper than one by one."""

    def reply_read(
        self, cookie: int, offset: int, buffers: Sequence[Buffer], error: int = 0
    ) -> None:
        """Answer a READ with all its bytes, or with an error.

        :param buffers: exactly the requested length together; must not change afterwards.
        """

    def reply_reads(self, answers: Iterable[ReadAnswer]) -> None:
        """Answer many READs, each with all its bytes: cheaper than one by one."""

    def pause_reading(self) -> None:
        """Take no further requests, because too much waits in the export."""

    def resume_reading(self) -> None:
        """Take requests again; the next `submit` comes from a later turn of the loop."""


class Export(Protocol):
    """One volume, view or test disk that clients can attach to."""

    @property
    def name(self) -> str:
        """Canonical name, at most 4096 bytes of UTF-8."""

    @property
    def description(self) -> str:
        """One line for people, shown by `nbdinfo`."""

    @property
    def size_bytes(self) -> int:
        """Size now; a connection keeps the one it saw when it attached."""

    @property
    def is_read_only(self) -> bool:
        """True when WRITE, TRIM and WRITE_ZEROES must be refused with EPERM."""

    @property
    def is_multi_conn(self) -> bool:
        """True when a FLUSH on one connection covers the completed writes of all of them."""

    @property
    def minimum_block(self) -> int:
        """Required alignment in bytes: a power of 2 of at most 64 KiB; 1 allows everything."""

    @property
    def preferred_block(self) -> int:
        """Alignment in bytes that is served fastest."""

    @property
    def maximum_payload(self) -> int:
        """Longest READ or WRITE in bytes; `limits.nbd_payload_bytes_max` caps it."""

    def open(self, sink: ReplySink) -> object:
        """Attach a connection; returns the handle for `submit` and `close`.

        :raises RefusedError: the client is told the message (single writer, fenced, stale, ...).
        """

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        """Take all complete requests of one socket read; answer each exactly once, now or later.

        Must not block and must not raise: an error is an answer.
        """

    def close(self, handle: object) -> None:
        """The connection is gone. Called exactly once.

        Waiting requests of this handle take effect before a later `open` returns, or never: a
        client that reconnects must not see an old write land on top of a new one.
        """

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """`base:allocation` of a range as (length, `STATE_*` flags), ascending from `offset`.

        Bounded work: it may end early, but describes at least one byte.

        :raises GeomirrorError: answered with its `nbd_errno`.
        """


def canonical_names(exports: Iterable[tuple[str, Export]]) -> list[tuple[str, str]]:
    """(name, description) of every export, aliases left out, sorted."""
    return sorted((name, export.description) for name, export in exports if name == export.name)
