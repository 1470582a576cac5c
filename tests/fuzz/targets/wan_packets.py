"""Packets and messages: no boundary depends on the cut, what is accepted encodes to itself."""

from __future__ import annotations

import struct

import xxhash

from geomirror.cluster.standing import LeftOut, Standing
from geomirror.errors import RemoteProtocolError
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol import frame, messages
from geomirror.wan_protocol.frame import PacketReader, pack_header
from geomirror.wan_protocol.messages import decode_message, encode_message
from tests.fuzz.source import Source, chunks, require_equal

_FIELDS = struct.Struct("<HBBIQII")
MEMORY_MAX = (
    max(PRODUCTION.message_bytes_max, frame.FRAME_BODY_BYTES_MAX)
    + frame.HEADER_BYTES
    + frame.READ_ROOM_MIN
)


def sample_messages() -> list[messages.Message]:
    """One of each kind."""
    m, id16, hash32 = messages, bytes(16), bytes(range(32))
    out = {"b": LeftOut(6, 5)}
    standing = Standing(
        id16.hex(), 1, 4, 5, 7, 100, 8, 7, {"a": "durable"}, 1, -1, True, ["a"], out, {"a": 3}
    )
    chain = [m.GenerationEntry(id16, 1, b"", 0, b"", "created", "east-1", 5)]
    starts, volume = [m.StartEntry(id16, 3, hash32)], m.VolumeInfo(0, "0", 4096)
    return [
        m.Hello(1, 1, ["x"], "east-1", id16, id16, "control", 0, 5),
        m.Use(3),
        m.Ping(1),
        m.Pong(1),
        m.Goodbye("stop"),
        m.Call(1, "resource.define", b'{"a":1}'),
        m.Reply(1, 5, "no", b"{}", "hint"),
        m.SessionOpen(1, id16, "pg", chain, [volume], 7, hash32, id16, starts),
        m.SessionAccept(1, id16, 6, hash32, 5, "consistent", [(7, b"\3")], 1 << 20),
        m.SessionRefuse(1, 6, "no", chain, starts),
        m.EpochCommit(1, 8, 7, id16, 1, 2, 3, 4, 5, 6, hash32, hash32, True),
        m.Acknowledge(1, 8, 7, hash32, 6, 9, b"\5", 100, 200),
        m.ResyncBegin(1, id16, 7, hash32, 100, 1),
        m.ResyncAsk(1, 1, 1, 16, [(0, 0, 4)]),
        m.ResyncDigests(1, 1, 1, 0, id16 * 2),
        m.ResyncEnd(1, 1, 7, 5),
        m.ResyncAcknowledge(1, 1, 5, 6, 7, True),
        m.Announce(1, standing),
        m.AnnounceAcknowledge(1, 4),
        m.VerifyPin(1, 5, 7),
        m.VerifyAsk(1, 5, 6, 0, 0, 16, 8, hash32, 1 << 20),
        m.VerifyAnswer(1, 5, 6, 16, [(1, id16 * 8)], 4096),
    ]


def seeds() -> list[bytes]:
    """Every message, framed; a stream with all kinds of packets; headers over their limits."""
    bodies = [encode_message(each) for each in sample_messages()]
    framed = [pack_header(1, len(body), session=1) + body for body in bodies]
    stream = b"".join(framed[:4]) + pack_header(2, 3, epoch=1, sequence=2) + b"abc"
    stream += pack_header(4, 0) + framed[5]
    found = [bytes([0, 1, 9]) + stream, bytes([0, 1, 9]) + pack_header(1, 1 << 30)]
    return [*found, *(bytes([1, 1, len(body) & 255]) + body for body in bodies)]


def run(data: bytes) -> None:
    """Raw bytes, or bodies behind headers that are made right."""
    source = Source(data)
    is_framed = source.flag()
    if is_framed:
        stream = b""
        while not source.is_empty and len(stream) < 1 << 16:
            kind = source.number()
            length = source.number(1) if source.is_empty else source.number()
            body = source.take(length) if length < 255 else source.rest()
            stream += _sealed(kind, len(body), source) + body
    else:
        sizes = [source.number() + 1 for _ in range(source.below(4))]
        stream = source.rest()
    whole = _read([stream])
    require_equal("packets by cut", whole, _read(chunks(stream, [1])))
    if not is_framed:
        require_equal("packets by cut", whole, _read(chunks(stream, sizes or [31])))
    taken = b""
    for packet in whole[0]:
        taken += pack_header(
            packet.kind,
            len(packet.body),
            session=packet.session,
            epoch=packet.epoch,
            sequence=packet.sequence,
        )
        taken += packet.body
        if packet.kind == frame.KIND_MESSAGE:
            _decode(packet.body)
    assert stream.startswith(taken), "what was read is not what was sent"


def _sealed(kind: int, length: int, source: Source) -> bytes:
    fields = _FIELDS.pack(frame.MAGIC, 1, kind, 1, source.number(), source.number(), length)
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))


def _read(pieces: list[bytes]) -> tuple[list[frame.Packet], str]:
    reader = PacketReader(PRODUCTION)
    packets: list[frame.Packet] = []
    for piece in pieces:
        packets += reader.feed(piece)
        assert len(reader._buffer) <= MEMORY_MAX
    failure = reader.failure
    return packets, "" if failure is None else f"{type(failure).__name__}: {failure}"


def _decode(body: bytes) -> None:
    try:
        message = decode_message(body)
    except RemoteProtocolError:
        return
    assert decode_message(encode_message(message)) == message
