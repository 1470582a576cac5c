"""What a hostile NBD server tells our client: typed errors, nothing outside of what was asked."""

from __future__ import annotations

import errno
import struct

from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.nbd import constants as c
from geomirror.nbd.client_handshake import ServerExport, handshake
from geomirror.nbd.reply_parser import Pending, ReplyParser
from tests.fuzz.source import Source, chunks, require_equal

_CHUNK = struct.Struct(">IHHQI")
_REPLY = struct.Struct(">QIII")
_PENDING = (
    (c.CMD_READ, 0, 512),
    (c.CMD_READ, 4096, 70_000),
    (c.CMD_WRITE, 0, 512),
    (c.CMD_BLOCK_STATUS, 0, 1 << 20),
    (c.CMD_FLUSH, 0, 0),
)
BODY_BYTES_MAX = 9 << 20
"""2^20 extents of 8 bytes, what the protocol allows in one chunk."""


def chunk(kind: int, cookie: int, body: bytes = b"", flags: int = 1) -> bytes:
    """One chunk of a structured reply."""
    head = _CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(body))
    return head + body


WORDS = [
    *(chunk(kind, 0) for kind in (0, 1, 2, 5, c.REPLY_ERROR, c.REPLY_ERROR_OFFSET)),
    struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 1),
    *(_REPLY.pack(c.OPTION_REPLY_MAGIC, option, 1, 0) for option in (7, 8, 10)),
]


def seeds() -> list[bytes]:
    """Good replies of every kind, and a good handshake."""
    data = struct.pack(">Q", 0) + b"d" * 256
    stories = [
        struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 0) + b"r" * 512,
        struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, errno.ENOSPC, 2),
        chunk(c.REPLY_OFFSET_DATA, 0, data, 0)
        + chunk(c.REPLY_OFFSET_HOLE, 0, struct.pack(">QI", 256, 256)),
        chunk(c.REPLY_BLOCK_STATUS, 3, struct.pack(">IIIII", 1, 4096, 3, 4096, 0)),
        chunk(c.REPLY_ERROR, 1, struct.pack(">IH", errno.EIO, 3) + b"bad"),
        chunk(c.REPLY_NONE, 4) + chunk(c.REPLY_OFFSET_DATA, 1, struct.pack(">Q", 4096) + b"e" * 99),
    ]
    hello = struct.pack(">QQH", c.HELLO_MAGIC, c.OPTION_MAGIC, 3)
    info = struct.pack(">HQH", c.INFO_EXPORT, 1 << 20, 0x1ED)
    sizes = struct.pack(">HIII", c.INFO_BLOCK_SIZE, 512, 4096, 1 << 25)
    replies = [(8, 1, b""), (10, 4, b"\0\0\0\1base:allocation"), (10, 1, b"")]
    replies += [(7, 3, info), (7, 3, sizes), (7, 3, b"\0\1name"), (7, 1, b"")]
    hello += b"".join(
        _REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(body)) + body
        for option, kind, body in replies
    )
    return [bytes([0, 2, 30, 9]) + story for story in stories] + [b"\1" + hello]


def run(data: bytes) -> None:
    """A handshake, or replies to five requests in flight, whole and in pieces."""
    source = Source(data)
    if source.flag():
        _shake_hands(source.rest())
        return
    sizes = [source.number() + 1 for _ in range(source.below(4))]
    stream = source.rest()
    whole = _replies([stream])
    require_equal("replies by cut", whole, _replies(chunks(stream, [1])))
    require_equal("replies by cut", whole, _replies(chunks(stream, sizes or [9])))


def _replies(pieces: list[bytes]) -> tuple[object, ...]:
    parser = ReplyParser()
    memories = []
    for cookie, (command, offset, length) in enumerate(_PENDING):
        memory = bytearray(b"?" * (length + 16)) if command == c.CMD_READ else bytearray()
        memories.append(memory)
        target = memoryview(memory)[8 : 8 + length] if memory else None
        parser.pending[cookie] = Pending(command, offset, length, None, target)
    done: list[object] = []
    error = ""
    for piece in pieces:
        try:
            while piece:
                room = parser.writable()
                assert 0 < len(room) <= BODY_BYTES_MAX
                count = min(len(room), len(piece))
                room[:count], piece = piece[:count], piece[count:]
                for each in parser.received(count):
                    done.append((each.command, each.offset, each.error, each.message, each.extents))
                    assert isinstance(each.to_error(), GeomirrorError)
                if parser.failure is not None:
                    raise parser.failure
        except RemoteProtocolError as failure:
            error = str(failure)
            break
    for memory in memories:
        if memory:
            assert memory[:8] == memory[-8:] == b"?" * 8, "written beyond the reader's memory"
    assert len(done) + len(parser.pending) == len(_PENDING)
    return done, error, b"".join(map(bytes, memories))


def _shake_hands(stream: bytes) -> None:
    dialogue = handshake("disk", wants_structured=True)
    _sent, wanted = next(dialogue)
    at = 0
    try:
        while at + wanted <= len(stream):
            assert wanted <= c.OPTION_BYTES_MAX, "asked for more than an option may have"
            piece, at = stream[at : at + wanted], at + wanted
            _sent, wanted = dialogue.send(piece)
    except StopIteration as end:
        export: ServerExport = end.value
        assert export.flags & c.EXPORT_HAS_FLAGS
        assert 0 < export.maximum_payload <= 32 << 20
        assert export.minimum_block >= 1
    except GeomirrorError:
        pass
