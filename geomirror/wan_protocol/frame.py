"""Packets: the 32-byte header that precedes every body, and the reader that finds them in a stream.

```
 reader's buffer
 ┌──────────┬────────────────┬───────────────────┐
 │ consumed │ unparsed bytes │ room for the next │
 └──────────┴────────────────┴───────────────────┘
            start            end
```
Invariant: nothing is allocated for a packet before its header has been checked (magic, version,
hash, type, length). After the first bad header the stream has no boundaries any more, so the reader
stays failed. Deliberately not here: what is inside a body (`messages`, `epoch_decode`).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from geomirror.errors import LimitExceededError, RemoteProtocolError, VersionError
from geomirror.limits import FRAME_RAW_BYTES_MAX, KIB, Limits
from geomirror.volume.store import Buffer

MAGIC = 0x4D47
VERSION = 1
KIND_MESSAGE = 1
KIND_FRAME = 2
KIND_RESYNC_FRAME = 3
KIND_PADDING = 4

HEADER_BYTES = 32
FRAME_OVERHEAD_BYTES_MAX = 16 * KIB
"""Header and entries of a frame body: about a thousand entries."""
FRAME_BODY_BYTES_MAX = FRAME_RAW_BYTES_MAX + FRAME_OVERHEAD_BYTES_MAX
READ_BUFFER_BYTES = 256 * KIB
"""One socket read: sixteen TLS records, so that the cost of a call is small against theirs."""
READ_ROOM_MIN = 64 * KIB
"""Less room than this behind the unparsed bytes and they are moved to the front."""

_FIELDS = struct.Struct("<HBBIQII")
_HASH = struct.Struct("<Q")
assert _FIELDS.size + _HASH.size == HEADER_BYTES
assert FRAME_BODY_BYTES_MAX + HEADER_BYTES + READ_ROOM_MIN <= READ_BUFFER_BYTES


class PacketHeader(NamedTuple):
    """A checked header."""

    kind: int
    session: int
    epoch: int
    sequence: int
    body_bytes: int


class Packet(NamedTuple):
    """A header and its complete body."""

    kind: int
    session: int
    epoch: int
    sequence: int
    body: bytes


def body_bytes_max(kind: int, limits: Limits) -> int:
    """Largest body of a packet of this kind, in bytes.

    :raises RemoteProtocolError: the kind is unknown.
    """
    if kind == KIND_MESSAGE:
        return limits.message_bytes_max
    if kind in (KIND_FRAME, KIND_RESYNC_FRAME, KIND_PADDING):
        return FRAME_BODY_BYTES_MAX
    raise RemoteProtocolError(f"packet of unknown type {kind}")


def pack_header(
    kind: int, body_bytes: int, *, session: int = 0, epoch: int = 0, sequence: int = 0
) -> bytes:
    """The 32 bytes that go before a body of `body_bytes` bytes."""
    fields = _FIELDS.pack(MAGIC, VERSION, kind, session, epoch, sequence, body_bytes)
    return fields + _HASH.pack(xxhash.xxh3_64_intdigest(fields))


def parse_header(data: Buffer, limits: Limits) -> PacketHeader:
    """Check the first 32 bytes of `data` and return their fields.

    :raises VersionError: another version of the packet format.
    :raises LimitExceededError: the announced body is over the limit of its type.
    :raises RemoteProtocolError: wrong magic, wrong hash, unknown type.
    """
    view = memoryview(data)
    magic, version, kind, session, epoch, sequence, body_bytes = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise RemoteProtocolError(f"not a packet: it begins with 0x{magic:04x}")
    if version != VERSION:
        raise VersionError(f"packet format {version}, this node speaks {VERSION}")
    (expected,) = _HASH.unpack_from(view, _FIELDS.size)
    if xxhash.xxh3_64_intdigest(view[: _FIELDS.size]) != expected:
        raise RemoteProtocolError("packet header does not match its hash")
    limit = body_bytes_max(kind, limits)
    if body_bytes > limit:
        raise LimitExceededError(
            f"packet of type {kind} announces {body_bytes} bytes, at most {limit} are allowed"
        )
    return PacketHeader(kind, session, epoch, sequence, body_bytes)


class PacketReader:
    """Finds the packets in a byte stream, however it is cut.

    Either copy bytes in with `feed`, or receive straight into `buffer()` and tell `advance` how
    many arrived. Memory: one read buffer, plus one message body while a larger one arrives.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray(READ_BUFFER_BYTES)
        self._start = 0
        self._end = 0
        self._header: PacketHeader | None = None
        self.failure: RemoteProtocolError | None = None
        """Why the stream ended; packets before the bad one have been returned. Check it after
        each call: a failed reader returns nothing more."""

    def buffer(self) -> memoryview:
        """Writable room, at least one byte, that stays valid until the next call."""
        wanted = HEADER_BYTES
        if self._header is not None:
            wanted += self._header.body_bytes
        if self._start == self._end:
            self._start = self._end = 0
            if wanted <= READ_BUFFER_BYTES < len(self._buffer):
                self._buffer = bytearray(READ_BUFFER_BYTES)
        is_large = wanted > len(self._buffer)
        if is_large or len(self._buffer) - max(self._end, self._start + wanted) < READ_ROOM_MIN:
            pending = self._end - self._start
            # Growing takes a new object: the old one may still be lent to the transport.
            target = bytearray(wanted + READ_ROOM_MIN) if is_large else self._buffer
            target[:pending] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = target, 0, pending
        return memoryview(self._buffer)[self._end :]

    def advance(self, count: int) -> list[Packet]:
        """Take over `count` bytes just written into `buffer()`; return the packets now complete."""
        assert 0 <= count <= len(self._buffer) - self._end
        packets: list[Packet] = []
        if self.failure is not None:
            return packets
        self._end += count
        view = memoryview(self._buffer)
        while True:
            if self._header is None:
                if self._end - self._start < HEADER_BYTES:
                    break
                try:
                    self._header = parse_header(view[self._start : self._end], self._limits)
                except RemoteProtocolError as error:
                    self.failure = error
                    self._start = self._end = 0
                    break
            header = self._header
            body_at = self._start + HEADER_BYTES
            if self._end - body_at < header.body_bytes:
                break
            body = bytes(view[body_at : body_at + header.body_bytes])
            packets.append(Packet(header.kind, header.session, header.epoch, header.sequence, body))
            self._start = body_at + header.body_bytes
            self._header = None
        return packets

    def feed(self, data: Buffer) -> list[Packet]:
        """Copy `data` in; return the packets now complete."""
        view = memoryview(data)
        packets: list[Packet] = []
        while len(view) > 0 and self.failure is None:
            room = self.buffer()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            view = view[count:]
            packets += self.advance(count)
        return packets
