"""The packet reader: whole, byte by byte, every truncation, every flipped bit, hostile headers."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.errors import LimitExceededError, RemoteProtocolError, VersionError
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol import frame
from geomirror.wan_protocol.frame import HEADER_BYTES, Packet, PacketReader, pack_header

MESSAGE = Packet(frame.KIND_MESSAGE, 3, 0, 0, b"hello")
FRAME = Packet(frame.KIND_FRAME, 7, 41, 12, bytes(range(256)) * 4)
EMPTY = Packet(frame.KIND_PADDING, 0, 0, 0, b"")
RESYNC = Packet(frame.KIND_RESYNC_FRAME, 2**32 - 1, 2**64 - 1, 2**32 - 1, b"x" * 70_000)
LARGE = Packet(frame.KIND_MESSAGE, 1, 0, 0, b"m" * PRODUCTION.message_bytes_max)
PACKETS = [MESSAGE, FRAME, EMPTY, RESYNC, LARGE, FRAME, MESSAGE]


def encode(packet: Packet) -> bytes:
    header = pack_header(
        packet.kind,
        len(packet.body),
        session=packet.session,
        epoch=packet.epoch,
        sequence=packet.sequence,
    )
    return header + packet.body


def forged(kind: int, body_bytes: int, *, magic: int = 0x4D47, version: int = 1) -> bytes:
    fields = struct.pack("<HBBIQII", magic, version, kind, 1, 2, 3, body_bytes)
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))


def test_header_has_the_documented_bytes() -> None:
    header = pack_header(frame.KIND_FRAME, 9, session=1, epoch=2, sequence=3)
    assert header[:24].hex() == "474d01020100000002000000000000000300000009000000"
    assert header[24:] == struct.pack("<Q", xxhash.xxh3_64_intdigest(header[:24]))


def test_packets_come_out_whole_and_in_order() -> None:
    reader = PacketReader(PRODUCTION)
    assert reader.feed(b"".join(map(encode, PACKETS))) == PACKETS
    assert reader.failure is None


@pytest.mark.parametrize("step", [1, 2, 31, 33, 4096])
def test_packets_come_out_however_the_stream_is_cut(step: int) -> None:
    packets = [MESSAGE, FRAME, EMPTY, FRAME]
    stream = b"".join(map(encode, packets))
    reader = PacketReader(PRODUCTION)
    found: list[Packet] = []
    for at in range(0, len(stream), step):
        found += reader.feed(stream[at : at + step])
    assert found == packets


def test_a_truncated_packet_never_comes_out() -> None:
    stream = encode(MESSAGE)
    for length in range(len(stream)):
        reader = PacketReader(PRODUCTION)
        assert reader.feed(stream[:length]) == []
        assert reader.failure is None
        assert reader.feed(stream[length:]) == [MESSAGE]


def test_no_flipped_bit_of_a_header_is_accepted() -> None:
    stream = encode(FRAME)
    for bit in range(HEADER_BYTES * 8):
        bad = bytearray(stream)
        bad[bit // 8] ^= 1 << (bit % 8)
        reader = PacketReader(PRODUCTION)
        assert reader.feed(encode(MESSAGE) + bad) == [MESSAGE]
        assert isinstance(reader.failure, RemoteProtocolError)
        assert reader.feed(encode(MESSAGE)) == []


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (forged(9, 0), RemoteProtocolError),
        (forged(0, 0), RemoteProtocolError),
        (forged(frame.KIND_FRAME, 0, magic=0x4747), RemoteProtocolError),
        (forged(frame.KIND_FRAME, 0, version=2), VersionError),
        (forged(frame.KIND_FRAME, 81_921), LimitExceededError),
        (forged(frame.KIND_RESYNC_FRAME, 2**32 - 1), LimitExceededError),
        (forged(frame.KIND_MESSAGE, PRODUCTION.message_bytes_max + 1), LimitExceededError),
        (forged(frame.KIND_PADDING, 2**31), LimitExceededError),
    ],
)
def test_a_hostile_header_ends_the_stream_before_anything_is_allocated(
    header: bytes, kind: type[Exception]
) -> None:
    reader = PacketReader(PRODUCTION)
    assert reader.feed(header) == []
    assert type(reader.failure) is kind
    assert len(reader._buffer) == frame.READ_BUFFER_BYTES


def test_memory_of_a_large_message_is_given_back() -> None:
    reader = PacketReader(PRODUCTION)
    reader.feed(encode(LARGE))
    reader.feed(encode(MESSAGE))
    assert len(reader._buffer) == frame.READ_BUFFER_BYTES


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_gives_packets_or_a_failure_never_another_error(data: bytes) -> None:
    reader = PacketReader(PRODUCTION)
    packets = reader.feed(data)
    assert packets == []  # a valid header by chance has probability 2**-80
    assert (reader.failure is not None) == (len(data) >= HEADER_BYTES)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 2**32 - 1), st.integers(0, 80_000)),
        max_size=8,
    ),
    st.lists(st.integers(1, 200_000), min_size=1, max_size=8),
)
def test_any_packets_survive_any_cutting(
    shapes: list[tuple[int, int, int]], cuts: list[int]
) -> None:
    packets = [
        Packet(kind, session, length, length % 977, bytes([session % 256]) * length)
        for kind, session, length in shapes
    ]
    stream = b"".join(map(encode, packets))
    reader = PacketReader(PRODUCTION)
    found: list[Packet] = []
    at = turn = 0
    while at < len(stream):
        step = cuts[turn % len(cuts)]
        found += reader.feed(stream[at : at + step])
        at, turn = at + step, turn + 1
    assert found == packets
