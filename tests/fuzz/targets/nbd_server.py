"""A whole NBD connection behind its handshake: however requests are cut, the same replies.

The export is a disk in RAM. The client chooses its cookies and may use one twice, so replies are
compared as a multiset, and only where the outcome does not depend on what is answered already.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from typing import Any

from geomirror.errors import RemoteProtocolError
from geomirror.limits import PRODUCTION, Limits
from geomirror.nbd import constants as c
from geomirror.nbd.connection_io import NbdConnection
from geomirror.nbd.protocol import Export, Request
from geomirror.nbd.registry import Registry
from geomirror.nbd.request_parser import RequestParser, buffer_bytes
from tests.fuzz.loop import LOOP
from tests.fuzz.source import Source, chunks, require_equal
from tests.fuzz.targets.nbd_negotiation import name, option
from tests.nbd.ram_export import RamExport

SIZE = 64 << 10
PAYLOAD_MAX = 512
INPUT_BYTES_MAX = 1500
_REQUEST = struct.Struct(">IHHQQI")

_BUFFER = memoryview(bytearray(buffer_bytes(PAYLOAD_MAX)))
_SOCKET = socket.socket(socket.AF_UNIX)
"""What options are set on; nothing goes over it."""


def request(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """A request's header."""
    return _REQUEST.pack(c.REQUEST_MAGIC, flags, command, cookie, offset, length)


WORDS = [request(command, command, 512, 512) for command in range(9)]


def seeds() -> list[bytes]:
    """Every command, good and bad, in one stream, for every kind of export."""
    stream = (
        request(c.CMD_WRITE, 1, 512, 64)
        + b"w" * 64
        + request(c.CMD_READ, 2, 0, 500)
        + request(c.CMD_FLUSH, 3, 0, 0)
        + request(c.CMD_TRIM, 4, 4096, 8192, c.CMD_FLAG_FUA)
        + request(c.CMD_WRITE_ZEROES, 5, 0, 512, c.CMD_FLAG_NO_HOLE)
        + request(c.CMD_BLOCK_STATUS, 6, 0, SIZE)
        + request(c.CMD_CACHE, 7, 0, 4096)
        + request(c.CMD_READ, 8, SIZE - 1, 2)
        + request(c.CMD_WRITE, 9, 0, PAYLOAD_MAX + 1)
        + b"x" * (PAYLOAD_MAX + 1)
        + request(c.CMD_READ, 10, 0, 0)
        + request(99, 11, 0, 0)
        + request(c.CMD_DISCONNECT, 12, 0, 0)
    )
    return [bytes([kind, 2, 28, 100]) + stream for kind in range(16)] + [
        bytes([3, 1, 5]) + stream[-200:] + request(c.CMD_READ, 1, 0, 9) * 2
    ]


class Wire(asyncio.Transport):
    """The connection's other end: keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_ended = False
        self.is_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return _SOCKET if name == "socket" else default

    def write(self, data: Any) -> None:
        assert not self.is_ended
        self.written += data

    def abort(self) -> None:
        self.is_ended = True

    def close(self) -> None:
        self.is_ended = True

    def is_closing(self) -> bool:
        return self.is_ended

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class Disk(RamExport):
    """Its extents do not depend on what was written, for they may be told before older writes."""

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(min(length, 4096 - offset % 4096), offset // 4096 % 4)]


class OneExport(Registry):
    """A server with one export and one client."""

    def __init__(self, export: Export) -> None:
        self.limits: Limits = PRODUCTION
        self.export = export

    def resolve(self, name: str) -> Export | None:
        return self.export

    def names(self) -> list[tuple[str, str]]:
        return [(self.export.name, "")]

    def admit(self, connection: NbdConnection, export: Export) -> None:
        pass

    def connected(self, connection: NbdConnection) -> bool:
        return True

    def disconnected(self, connection: NbdConnection, error: Exception | None) -> None:
        pass


def run(data: bytes) -> None:
    """The parser whole and byte by byte, then the connection in two kinds of pieces."""
    source = Source(data)
    kind = source.number()
    disk = {
        "size_bytes": SIZE,
        "maximum_payload": PAYLOAD_MAX,
        "is_read_only": bool(kind & 1),
        "minimum_block": 512 if kind & 4 else 1,
    }
    sizes = [source.number() + 1 for _ in range(source.below(4))]
    stream = source.rest()
    whole = _parsed([stream], kind)
    require_equal("requests by cut", whole, _parsed(chunks(stream, [1]), kind))
    _check_requests(whole[0], kind)
    ends = []
    for pieces in ([len(stream) or 1], sizes or [1]):
        export = Disk(**disk)
        ends.append((export, LOOP.run_until_complete(_serve(export, chunks(stream, pieces), kind))))
    cookies = Counter(each[2] for each in whole[0] + whole[1])
    if all(count == 1 for count in cookies.values()):
        first, outcome = ends[0]
        for export, other in ends[1:]:
            require_equal("replies by cut", outcome, other)
            assert export.data == first.data


def _parsed(pieces: list[bytes], kind: int) -> tuple[list[Any], list[Any], str]:
    """Requests, asides and the error of a stream of which nothing is answered."""
    parser = RequestParser(
        _BUFFER,
        size_bytes=SIZE,
        payload_bytes_max=PAYLOAD_MAX,
        minimum_block=512 if kind & 4 else 1,
        is_read_only=bool(kind & 1),
        is_structured=bool(kind & 2),
        has_contexts=bool(kind & 2),
    )
    requests: list[Any] = []
    asides: list[Any] = []
    for piece in pieces:
        while piece:
            room = parser.writable()
            count = min(len(room), len(piece))
            room[:count], piece = piece[:count], piece[count:]
            parser.received(count)
            try:
                while True:
                    found = parser.take(1 << 30, 7)
                    requests += [_frozen(each) for each in found]
                    asides += [(*_frozen(each), error) for each, error in parser.asides]
                    if not found and not parser.asides:
                        break
                    parser.asides = []
            except RemoteProtocolError as error:
                return requests, asides, type(error).__name__
    return requests, asides, ""


def _frozen(one: Request) -> tuple[int, int, int, int, int, bytes]:
    payload = bytes(one.payload) if one.payload is not None else b""
    return one.command, one.flags, one.cookie, one.offset, one.length, payload


def _check_requests(requests: list[Any], kind: int) -> None:
    for command, flags, _cookie, offset, length, payload in requests:
        assert offset + length <= SIZE
        assert len(payload) == (length if command == c.CMD_WRITE else 0)
        assert length or command == c.CMD_FLUSH
        assert flags & ~(c.CMD_FLAG_FUA | 30) == 0
        if command in (c.CMD_READ, c.CMD_WRITE):
            assert length <= PAYLOAD_MAX
        if kind & 1:
            assert command in (c.CMD_READ, c.CMD_FLUSH)
        if kind & 4:
            assert (offset | length) % 512 == 0


async def _serve(export: RamExport, pieces: list[bytes], kind: int) -> tuple[object, ...]:
    """A client that negotiates, sends the pieces and takes everything: what it was told."""
    wire, connection = Wire(), NbdConnection(OneExport(export))
    connection.connection_made(wire)
    context = name("ram") + b"\0\0\0\1" + name(c.ALLOCATION_CONTEXT)
    hello = struct.pack(">I", c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
    if kind & 2:
        hello += option(c.OPT_STRUCTURED_REPLY) + option(c.OPT_SET_META_CONTEXT, context)
    await _send(connection, wire, hello + option(c.OPT_GO, name("ram") + b"\0\0"))
    assert connection.export is export
    begin = len(wire.written)
    for piece in pieces:
        await _send(connection, wire, piece)
    assert connection._in_flight == 0, "a request was not answered"
    assert connection._out == []
    is_ended = wire.is_ended
    connection.connection_lost(None)
    assert export.open_count == 0
    replies = bytes(wire.written[begin:])
    return _split(replies, bool(kind & 2)), is_ended


async def _send(connection: NbdConnection, wire: Wire, data: bytes) -> None:
    while data and not wire.is_ended:
        for _ in range(100):
            if not wire.is_paused:
                break
            await asyncio.sleep(0)
        assert not wire.is_paused or wire.is_ended, "reading is never resumed"
        room = connection.get_buffer(-1)
        count = min(len(room), len(data))
        room[:count], data = data[:count], data[count:]
        connection.buffer_updated(count)


def _split(replies: bytes, is_structured: bool) -> object:
    """The chunks of a structured stream, sorted; of a simple one only its bytes, as a multiset."""
    if not is_structured:
        return sorted(replies)
    found, at = [], 0
    while at < len(replies):
        magic = int.from_bytes(replies[at : at + 4], "big")
        if magic == c.SIMPLE_REPLY_MAGIC:
            size = 16
        else:
            assert magic == c.STRUCTURED_REPLY_MAGIC
            size = 20 + int.from_bytes(replies[at + 16 : at + 20], "big")
        found.append(replies[at : at + size])
        at += size
    assert at == len(replies)
    return sorted(found)
