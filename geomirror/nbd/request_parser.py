"""Transmission phase, receiving side: bytes of one connection in, validated requests out.

    buffer:  | done | complete requests | a partial one | free ............... |
                    ^ _start                            ^ _end

The socket is received straight into the buffer; payloads are handed on as slices of it, without a
copy. All complete requests of a read become one list, because everything behind this point costs
per batch. The buffer never grows: it holds the largest request plus 4 MiB, and is moved to its
beginning only when more than 4 MiB of it are done.

Invariant: whenever bytes are received, a partial request starts at or below `SLACK_BYTES`, so it
always fits.

It checks everything that an export needs not check again. It does not know sockets, replies or
what an export is; requests that the connection answers itself are in `asides`.
"""

from __future__ import annotations

import errno
import struct

from geomirror.errors import RemoteProtocolError
from geomirror.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISCONNECT,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    REQUEST_BYTES,
    REQUEST_MAGIC,
)
from geomirror.nbd.protocol import Request

SLACK_BYTES = 4 << 20
"""Done bytes that stay in the buffer before the rest is moved to its beginning."""
RECEIVE_BYTES = 1 << 20
"""Most that one socket read may bring: about 250 requests of 4 KiB, still warm in the L2 cache."""
_MARGIN_BYTES = 1 << 20

_HEADER = struct.Struct(">QQQI")
"""Magic, flags and command as one number: most requests are plain writes."""
assert _HEADER.size == REQUEST_BYTES
_PLAIN_WRITE = REQUEST_MAGIC << 32 | CMD_WRITE

_NOT_FUA = ~CMD_FLAG_FUA
_KNOWN_FLAGS = {
    CMD_READ: CMD_FLAG_FUA,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_CACHE: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
}
_CHANGING = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))
_ENOSPC_BEYOND_END = frozenset((CMD_WRITE, CMD_WRITE_ZEROES))


def buffer_bytes(payload_bytes_max: int) -> int:
    """Size of the buffer that a parser needs for payloads of up to `payload_bytes_max`."""
    return payload_bytes_max + SLACK_BYTES + _MARGIN_BYTES


class RequestParser:
    """Cuts one connection's byte stream into validated requests."""

    def __init__(
        self,
        buffer: memoryview,
        *,
        size_bytes: int,
        payload_bytes_max: int,
        minimum_block: int = 1,
        is_read_only: bool = False,
        is_structured: bool = False,
        has_contexts: bool = False,
    ) -> None:
        assert len(buffer) >= buffer_bytes(payload_bytes_max)
        assert minimum_block & (minimum_block - 1) == 0
        self._view = buffer
        self._start = 0
        self._end = 0
        self._skip_bytes = 0
        self._size_bytes = size_bytes
        self._writable_bytes = -1 if is_read_only else size_bytes
        self._payload_bytes_max = payload_bytes_max
        self._unaligned_mask = minimum_block - 1
        self._read_flags = CMD_FLAG_FUA | (CMD_FLAG_DF if is_structured else 0)
        self._has_contexts = has_contexts
        self.reads: dict[int, int] = {}
        """Unanswered READs: cookie → length."""
        self.read_bytes = 0
        """Sum of `reads`: what the replies will hold in memory."""
        self.asides: list[tuple[Request, int]] = []
        """(request, errno) to be answered without the export; the caller takes the list away."""
        self.has_rest = False
        """The last `take` left bytes: a partial request, or more than it was allowed to take."""
        self.is_disconnected = False
        """The client has sent DISC; nothing after it is looked at."""

    def writable(self) -> memoryview:
        """Where the next received bytes go; never empty. Ends the life of all payloads."""
        # Not in `take`: moving the rest would overwrite the payloads that it hands out.
        if self._start > SLACK_BYTES:
            self._compact()
        return self._view[self._end : self._end + RECEIVE_BYTES]

    def received(self, count: int) -> None:
        """`count` bytes of `writable()` have been filled."""
        self._end += count

    def take(self, read_bytes_max: int, count_max: int) -> list[Request]:
        """All complete requests received so far; call again while it brings any and `has_rest`.

        The payloads stay valid until the next call of `writable`.

        :param read_bytes_max: stop when the READs in flight ask for this many bytes (the last one
            may exceed it).
        :param count_max: most requests to return.
        :raises RemoteProtocolError: not a request; nothing after it can be made sense of.
        """
        if self._skip_bytes or self.is_disconnected:
            self._skip()
        view, unpack, reads, size = self._view, _HEADER.unpack_from, self.reads, self._size_bytes
        position, last, mask = self._start, self._end - REQUEST_BYTES, self._unaligned_mask
        writable, payload_max = self._writable_bytes, self._payload_bytes_max
        not_read_flags, read_bytes, end = ~self._read_flags, self.read_bytes, self._end
        requests: list[Request] = []
        append = requests.append
        while position <= last and len(requests) < count_max and read_bytes < read_bytes_max:
            head, cookie, offset, length = unpack(view, position)
            command, flags = CMD_WRITE, 0
            if head != _PLAIN_WRITE:
                if head >> 32 != REQUEST_MAGIC:
                    self._refuse_magic(head >> 32, is_first=not requests)
                    break
                command, flags = head & 0xFFFF, head >> 16 & 0xFFFF
            is_plain = 0 < length <= payload_max and not (offset | length) & mask
            body, until = position + REQUEST_BYTES, offset + length
            if command == CMD_WRITE and is_plain and until <= writable and not flags & _NOT_FUA:
                after = body + length
                if after > end:
                    break
                append(Request(CMD_WRITE, flags, cookie, offset, length, view[body:after]))
                position = after
                continue
            is_new = command == CMD_READ and is_plain and cookie not in reads
            if is_new and until <= size and not flags & not_read_flags:
                append(Request(CMD_READ, flags, cookie, offset, length, None))
                reads[cookie] = length
                read_bytes += length
                position = body
                continue
            self._start = body
            self._take_other(Request(command, flags, cookie, offset, length, None), requests)
            position = self._start
        self._start, self.read_bytes = position, read_bytes
        self.has_rest = position != self._end
        if not self.has_rest:
            self._start = self._end = 0
        return requests

    def finish_read(self, cookie: int) -> int | None:
        """The READ `cookie` is being answered: its length, or None if it is no READ in flight."""
        length = self.reads.pop(cookie, None)
        if length is not None:
            self.read_bytes -= length
        return length

    def _refuse_magic(self, magic: int, *, is_first: bool) -> None:
        # What came before is served first; the next call raises.
        if is_first and not self.asides:
            raise RemoteProtocolError(f"NBD request magic is {magic:#x}")

    def _take_other(self, request: Request, requests: list[Request]) -> None:
        """Everything but plain READs and WRITEs; `_start` is behind the header."""
        command = request.command
        if command == CMD_FLUSH and not (request.flags | request.offset | request.length):
            requests.append(request)
            return
        if command == CMD_DISCONNECT:
            self.is_disconnected = True
            self._skip()
            return
        error = self._refusal(request)
        if command == CMD_WRITE:
            # A refused payload is dropped as it arrives: it may be 4 GiB, and is never kept.
            self._skip_bytes = request.length
            self._skip()
        is_empty = request.length == 0 and command != CMD_FLUSH
        if error or is_empty or command in (CMD_CACHE, CMD_BLOCK_STATUS):
            self.asides.append((request, error))
        else:
            requests.append(request)

    def _refusal(self, request: Request) -> int:
        """The errno that a request deserves, or 0."""
        command, offset, length = request.command, request.offset, request.length
        known = self._read_flags if command == CMD_READ else _KNOWN_FLAGS.get(command)
        if known is None or request.flags & ~known:
            return errno.EINVAL
        if command in _CHANGING and self._writable_bytes < 0:
            return errno.EPERM
        if command == CMD_FLUSH:
            return errno.EINVAL if offset or length else 0
        if offset + length > self._size_bytes:
            return errno.ENOSPC if command in _ENOSPC_BEYOND_END else errno.EINVAL
        if (offset | length) & self._unaligned_mask:
            return errno.EINVAL
        if command in (CMD_READ, CMD_WRITE) and length > self._payload_bytes_max:
            return errno.EINVAL
        if command == CMD_BLOCK_STATUS and not (self._has_contexts and length):
            return errno.EINVAL
        if command == CMD_READ and request.cookie in self.reads:
            return errno.EINVAL  # Two replies with one cookie could not be told apart.
        return 0

    def _skip(self) -> None:
        """Drop what is here of a refused payload, and everything after DISC."""
        count = self._end - self._start
        if not self.is_disconnected:
            count = min(self._skip_bytes, count)
            self._skip_bytes -= count
        self._start += count

    def _compact(self) -> None:
        """Move the partial request to the beginning of the buffer."""
        rest = self._end - self._start
        self._view[:rest] = self._view[self._start : self._end]
        self._start, self._end = 0, rest
