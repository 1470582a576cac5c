"""Replies, from both ends: what the server encodes, the client understands, however cut."""

from __future__ import annotations

import contextlib
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import (
    FencedError,
    GeomirrorError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
    UnreachableError,
    UsageError,
)
from geomirror.nbd import constants as c
from geomirror.nbd import structured
from geomirror.nbd.client_handshake import Address, handshake, parse_uri
from geomirror.nbd.negotiation import Negotiation, Phase
from geomirror.nbd.protocol import canonical_names
from geomirror.nbd.reply_parser import Pending, ReplyParser
from tests.nbd.ram_export import RamExport


def asked() -> tuple[ReplyParser, bytearray]:
    """A parser that waits for a READ (1), a WRITE (2) and a BLOCK_STATUS (3)."""
    parser, data = ReplyParser(), bytearray(100)
    parser.pending[1] = Pending(c.CMD_READ, 1000, 100, None, memoryview(data))
    parser.pending[2] = Pending(c.CMD_WRITE, 0, 5, None)
    parser.pending[3] = Pending(c.CMD_BLOCK_STATUS, 0, 4096, None)
    return parser, data


def feed(parser: ReplyParser, data: bytes, step: int) -> list[Pending]:
    done: list[Pending] = []
    at = 0
    while at < len(data):
        space = parser.writable()
        assert len(space) > 0
        part = data[at : at + min(step, len(space))]
        space[: len(part)] = part
        done += parser.received(len(part))
        at += len(part)
    return done


def chunk(kind: int, cookie: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(body)) + body


CONTENT = bytes(range(100))


@pytest.mark.parametrize("step", [1, 3, 16, 1 << 20])
def test_what_the_server_encodes_the_client_understands(step: int) -> None:
    for head in (structured.success_reply(1), structured.data_header(1, 1000, 100)):
        parser, data = asked()
        first = structured.encode_extents([(4000, 0), (96, 3)])
        second = structured.encode_extents([(4096, 1)])
        stream = structured.block_status_chunk(3, 1, first, is_last=False)
        stream += structured.block_status_chunk(3, 7, second)
        stream += head + CONTENT + structured.error_chunk(2, errno.ENOSPC, "journal is full")
        done = feed(parser, stream, step)
        assert [request.command for request in done] == [
            c.CMD_BLOCK_STATUS,
            c.CMD_READ,
            c.CMD_WRITE,
        ]
        assert done[0].extents == {1: [(4000, 0), (96, 3)], 7: [(4096, 1)]}
        assert data == CONTENT
        assert (done[2].error, done[2].message) == (errno.ENOSPC, "journal is full")
        assert parser.pending == {}


def test_a_read_may_come_in_chunks_in_any_order_with_holes() -> None:
    parser, data = asked()
    data[:] = b"\xff" * 100
    stream = chunk(c.REPLY_OFFSET_DATA, 1, struct.pack(">Q", 1060) + CONTENT[60:])
    stream += chunk(c.REPLY_OFFSET_HOLE, 1, struct.pack(">QI", 1000, 60))
    assert feed(parser, stream, 7) == []
    done = feed(parser, chunk(c.REPLY_NONE, 1, b"", c.REPLY_FLAG_DONE), 7)
    assert len(done) == 1
    assert data == bytes(60) + CONTENT[60:]


@pytest.mark.parametrize(
    "stream",
    [
        b"\0" * 16,
        structured.success_reply(99),
        chunk(c.REPLY_NONE, 99, b"", 1),
        chunk(c.REPLY_OFFSET_DATA, 1, struct.pack(">Q", 999) + b"x"),
        chunk(c.REPLY_OFFSET_DATA, 1, struct.pack(">Q", 1099) + b"xx"),
        chunk(c.REPLY_OFFSET_DATA, 2, struct.pack(">Q", 0) + b"x"),
        struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, 0, c.REPLY_OFFSET_DATA, 1, 4) + bytes(8),
        struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, 0, c.REPLY_ERROR, 1, 0xFFFFFFFF),
        chunk(c.REPLY_OFFSET_HOLE, 1, struct.pack(">QI", 1000, 101)),
        chunk(c.REPLY_OFFSET_HOLE, 1, b"short"),
        chunk(c.REPLY_BLOCK_STATUS, 3, b"short"),
        structured.block_status_chunk(3, 1, bytes(8), is_last=False) * 2,
        chunk(c.REPLY_NONE, 1, b"x", 1),
        chunk(77, 1, b"x"),
    ],
)
def test_an_answer_to_nothing_we_asked_is_a_protocol_error(stream: bytes) -> None:
    for step in (1, 1 << 20):
        with pytest.raises(RemoteProtocolError):
            feed(asked()[0], stream, step)


@given(st.binary(max_size=200))
def test_noise_from_a_server_raises_nothing_but_a_protocol_error(noise: bytes) -> None:
    for head in (b"", struct.pack(">IHHQ", c.STRUCTURED_REPLY_MAGIC, 0, 1, 1)):
        with contextlib.suppress(RemoteProtocolError):
            feed(asked()[0], head + noise, 1 << 20)


def test_a_structured_error_ends_with_its_text() -> None:
    parser, _ = asked()
    done = feed(parser, structured.error_chunk(1, errno.EIO, "x" * 9000), 1 << 20)
    assert len(done[0].message) == c.NAME_BYTES_MAX


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, RefusedError),
        (errno.EINVAL, UsageError),
        (errno.ENOSPC, NoSpaceError),
        (errno.ESHUTDOWN, FencedError),
        (errno.EIO, StorageError),
        (errno.EOVERFLOW, StorageError),
    ],
)
def test_errors_are_typed_and_keep_the_errno(number: int, kind: type[GeomirrorError]) -> None:
    error = Pending(c.CMD_WRITE, 4096, 512, None, error=number).to_error()
    assert type(error) is kind
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == number
    assert "write at 4096+512" in str(error)


def test_only_defined_errnos_reach_the_wire() -> None:
    found = {number: c.wire_error(number) for number in errno.errorcode}
    assert set(found.values()) == {1, 5, 12, 22, 28, 75, 95, 108}
    assert found[errno.EROFS] == errno.EPERM
    assert found[errno.EDQUOT] == errno.ENOSPC
    assert found[errno.EBADF] == errno.EIO


@pytest.mark.parametrize(
    ("extents", "length", "is_one", "expected"),
    [
        ([(100, 0)], 100, False, [(100, 0)]),
        ([(50, 0), (50, 0)], 100, False, [(100, 0)]),
        ([(50, 0), (50, 3)], 100, True, [(50, 0)]),
        ([(20, 3), (30, 3), (50, 0)], 100, True, [(50, 3)]),
        ([(50, 0), (500, 3)], 100, False, [(50, 0), (50, 3)]),
        ([(0, 3), (10, 0)], 100, False, [(10, 0)]),
        ([(100, 0), (50, 3)], 100, False, [(100, 0)]),
    ],
)
def test_extents_are_brought_into_what_the_protocol_allows(
    extents: list[tuple[int, int]], length: int, is_one: bool, expected: list[tuple[int, int]]
) -> None:
    assert structured.fit_extents(extents, length, 1 if is_one else 100) == expected


def test_extents_are_bounded() -> None:
    many = [(1, number % 2) for number in range(c.EXTENTS_MAX + 10)]
    assert len(structured.fit_extents(many, len(many), c.EXTENTS_MAX)) == c.EXTENTS_MAX


# ---- the client's handshake against the server's


def dialogue(name: str, wants_structured: bool, replies_cut: bytes = b""):
    """Both sans-IO ends talk until the client is attached."""
    disk = RamExport(name="disk", size_bytes=12345, description="the disk")
    exports = {"disk": disk}
    server = Negotiation(exports.get, lambda: canonical_names(exports.items()), lambda e: None)
    client = handshake(name, wants_structured=wants_structured)
    send, wanted = next(client)
    held = b""
    try:
        while True:
            held += send
            held = held[server.receive(memoryview(held)) :]
            assert len(server.output) >= wanted, "the client waits for what never comes"
            part = bytes(server.output[:wanted])
            del server.output[:wanted]
            send, wanted = client.send(part)
    except StopIteration as attached:
        assert server.phase is Phase.TRANSMISSION
        assert server.output == b""
        return attached.value, server


@pytest.mark.parametrize("wants_structured", [True, False])
def test_client_and_server_agree_on_the_export(wants_structured: bool) -> None:
    told, server = dialogue("disk", wants_structured)
    assert (told.name, told.description, told.size_bytes) == ("disk", "the disk", 12345)
    assert told.is_structured is wants_structured is server.is_structured
    assert told.has_allocation_context is wants_structured is bool(server.contexts)
    assert (told.minimum_block, told.preferred_block) == (1, 4096)
    assert told.is_multi_conn
    assert not told.is_read_only


def test_an_unknown_export_is_a_typed_error() -> None:
    for wants_structured in (True, False):
        with pytest.raises(NotFoundError, match='no export is named "nope"'):
            dialogue("nope", wants_structured)


REFUSED = [
    (c.REP_ERR_POLICY, RefusedError),
    (c.REP_ERR_SHUTDOWN, UnreachableError),
    (c.REP_ERR_UNSUP, RemoteProtocolError),
]


@pytest.mark.parametrize(("kind", "error"), REFUSED)
def test_refusals_are_typed(kind: int, error: type[GeomirrorError]) -> None:
    client = handshake("disk", wants_structured=False)
    next(client)
    client.send(b"NBDMAGICIHAVEOPT\x00\x03")
    _, wanted = client.send(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_GO, kind, 3))
    assert wanted == 3
    with pytest.raises(error, match="why"):
        client.send(b"why")


@pytest.mark.parametrize(
    "hello", [b"SSH-2.0-OpenSSH_9", b"NBDMAGICIHAVEOPT\x00\x02", b"NBDMAGIC" + bytes(10)]
)
def test_another_kind_of_server_is_noticed(hello: bytes) -> None:
    client = handshake("disk", wants_structured=True)
    next(client)
    with pytest.raises(RemoteProtocolError):
        client.send(hello.ljust(18, b"\0"))


@pytest.mark.parametrize(
    "head",
    [
        struct.pack(">QIII", 1, c.OPT_GO, c.REP_ACK, 0),
        struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_LIST, c.REP_ACK, 0),
        struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_GO, c.REP_INFO, 1 << 30),
        struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_GO, c.REP_ACK, 0),  # no size told
    ],
)
def test_a_server_that_breaks_the_handshake_is_noticed(head: bytes) -> None:
    client = handshake("disk", wants_structured=False)
    next(client)
    client.send(b"NBDMAGICIHAVEOPT\x00\x03")
    with pytest.raises(RemoteProtocolError):
        client.send(head)


URIS = [
    ("nbd+unix:///pg/0?socket=/run/x.sock", Address("pg/0", "/run/x.sock", "", 0)),
    ("nbd+unix:///?socket=/run/x.sock", Address("", "/run/x.sock", "", 0)),
    ("nbd+unix:///a%20b?socket=/run/a%20b", Address("a b", "/run/a b", "", 0)),
    ("nbd://host/pg/0", Address("pg/0", None, "host", 10809)),
    ("nbd://[::1]:77/", Address("", None, "::1", 77)),
    ("nbd://127.0.0.1:1234", Address("", None, "127.0.0.1", 1234)),
]


@pytest.mark.parametrize(("uri", "address"), URIS)
def test_uris(uri: str, address: Address) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    "uri",
    ["", "http://x/", "nbd://", "nbd+unix:///x", "nbd+unix://h/x?socket=/s", "nbd://h:99999/"],
)
def test_what_is_no_nbd_uri_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(uri)
