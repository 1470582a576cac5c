"""Control messages: the codec's case table, and the rules for other versions of a peer."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.cluster.standing import LeftOut, Standing
from geomirror.errors import LimitExceededError, RemoteProtocolError, VersionError
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol import messages
from geomirror.wan_protocol.frame import KIND_FRAME, KIND_MESSAGE, Packet
from geomirror.wan_protocol.messages import (
    Acknowledge,
    Announce,
    AnnounceAcknowledge,
    Call,
    EpochCommit,
    GenerationEntry,
    Goodbye,
    Hello,
    MarkEntry,
    Marks,
    Message,
    Ping,
    Pong,
    Reply,
    ResyncAcknowledge,
    ResyncAsk,
    ResyncBegin,
    ResyncDigests,
    ResyncEnd,
    SessionAccept,
    SessionOpen,
    SessionRefuse,
    StartEntry,
    Use,
    VerifyAnswer,
    VerifyAsk,
    VerifyPin,
    VolumeInfo,
    decode_message,
    encode_message,
)
from geomirror.wan_protocol.negotiation import make_hello, read_hello
from tests.volume.hexdump import VECTORS, load

ENTRY = GenerationEntry(b"i" * 16, 3, b"p" * 16, 9, b"h" * 32, "created", "east-1", 12)
STANDING = Standing(
    *("0f" * 16, 1, 7, 2**60, 1041, 2**33, 4096, 1041),
    *({"west-1": "durable", "colo-1": "received"}, 1, -1, True, ["west-1"]),
    {"colo-1": LeftOut(1040, 2**60)},
)
EXAMPLES: list[Message] = [
    make_hello("east-1", b"i" * 16, b"l" * 16, -1, 77, b"k" * 16),
    Use(2**40),
    Ping(2**62),
    Pong(1),
    Goodbye("the node stops"),
    Call(1, "resource.list", b"{}"),
    Reply(1, 5, "no such resource", b"", "see status"),
    SessionOpen(
        *(7, b"r" * 16, "pg", [ENTRY], [VolumeInfo(0, "0", 2**40)], 12, b"h" * 32, b"i" * 16),
        [StartEntry(b"s" * 16, 0, bytes(32)), StartEntry(b"i" * 16, 9, b"h" * 32)],
    ),
    SessionAccept(7, b"g" * 16, 4, b"h" * 32, 3, "consistent", [(5, b"\x05")], 2**26),
    SessionRefuse(7, 11, "two histories", [ENTRY], [StartEntry(b"s" * 16, 0, bytes(32))]),
    EpochCommit(7, 5, 5, b"g" * 16, 100, 200, 9, 3, 40, 163_840, b"h" * 32, b"", True),
    Marks(7, [MarkEntry("before-upgrade", b"g" * 16, 5, 2**60, True)]),
    Acknowledge(7, 5, 4, b"h" * 32, 3, 5, b"\x02", 2**33, 2**26),
    ResyncBegin(7, b"g" * 16, 9, b"h" * 32, 2**30, 1, [], 2**64 - 1),
    ResyncAsk(7, 1, 3, 16, [(0, 4096, 256), (1, 0, 2)]),
    ResyncDigests(7, 1, 3, 256, b"d" * 32),
    ResyncEnd(7, 1, 12, 40),
    ResyncAcknowledge(7, 1, 30, 2**21, 2**26, True),
    Announce(7, STANDING),
    AnnounceAcknowledge(7, 2**40),
    VerifyPin(7, 12, 1041),
    VerifyAsk(7, 12, 13, 1, 2**30, 300, 256, b"d" * 32, 20 << 20),
    VerifyAnswer(7, 12, 13, 300, [(1, b"b" * 704)], 2**20, ""),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    body = encode_message(message)
    assert decode_message(body) == message
    assert decode_message(memoryview(body)) == message
    assert len(body) <= PRODUCTION.message_bytes_max


@pytest.mark.parametrize(
    ("kind", "vector"), [(ResyncAsk, "resync_ask_v1"), (ResyncDigests, "resync_digests_v1")]
)
def test_golden_vectors_are_read_for_ever(kind: type[Message], vector: str) -> None:
    body = load((VECTORS / f"{vector}.hex").read_text())
    (example,) = [each for each in EXAMPLES if type(each) is kind]
    assert decode_message(body) == example
    assert encode_message(example) == body


def test_every_message_has_an_example() -> None:
    assert {type(example) for example in EXAMPLES} == set(messages.AnyMessage.__args__)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_truncated_message_is_refused(message: Message) -> None:
    body = encode_message(message)
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            decode_message(body[:length])
    with pytest.raises(RemoteProtocolError):
        decode_message(body + b"\x00")


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_flipped_bit_gives_another_message_or_a_typed_error(message: Message) -> None:
    body = encode_message(message)
    for bit in range(len(body) * 8):
        bad = bytearray(body)
        bad[bit // 8] ^= 1 << (bit % 8)
        with contextlib.suppress(RemoteProtocolError):
            assert decode_message(bytes(bad)) is not None


def test_a_peer_of_the_next_version_may_add_fields_and_one_of_the_last_may_lack_them() -> None:
    newer = msgspec.msgpack.encode(["Reply", 1, 0, "", b"{}", "hint", "a field of tomorrow"])
    assert decode_message(newer) == Reply(1, 0, "", b"{}", "hint")
    older = msgspec.msgpack.encode(["Reply", 1, 0, "", b"{}"])
    assert decode_message(older) == Reply(1, 0, "", b"{}", "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["Nonsense", 1]),
        msgspec.msgpack.encode(["Ping"]),
        msgspec.msgpack.encode(["Ping", "now"]),
        msgspec.msgpack.encode(["Ping", 1.5]),
        msgspec.msgpack.encode({"Ping": 1}),
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(body)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused_with_a_typed_error(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(body)


def hello_packet(**changes: object) -> Packet:
    hello = make_hello("a", b"i" * 16, b"l" * 16, 2, 0, b"")
    changed = msgspec.structs.replace(hello, **changes)
    return Packet(KIND_MESSAGE, 0, 0, 0, encode_message(changed))


def test_a_hello_is_accepted_with_unknown_features_and_a_newer_version() -> None:
    hello = read_hello(hello_packet(features=["x"], version=5, version_min=1), "a", PRODUCTION)
    assert isinstance(hello, Hello) and hello.index == 2


@pytest.mark.parametrize(
    ("packet", "kind"),
    [
        (hello_packet(node="b"), RemoteProtocolError),
        (hello_packet(version_min=2, version=2), VersionError),
        (hello_packet(version_min=0, version=0), VersionError),
        (hello_packet(link=b"l" * 17), RemoteProtocolError),
        (hello_packet(incarnation=b""), RemoteProtocolError),
        (hello_packet(after=b"x"), RemoteProtocolError),
        (hello_packet(role="control"), RemoteProtocolError),
        (hello_packet(index=-1), RemoteProtocolError),
        (hello_packet(index=8), RemoteProtocolError),
        (Packet(KIND_MESSAGE, 0, 0, 0, encode_message(Ping(1))), RemoteProtocolError),
        (Packet(KIND_FRAME, 0, 0, 0, b""), RemoteProtocolError),
    ],
)
def test_a_wrong_hello_is_refused(packet: Packet, kind: type[Exception]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read_hello(packet, "a", PRODUCTION)
    assert type(caught.value) is kind
    assert not isinstance(caught.value, LimitExceededError)
