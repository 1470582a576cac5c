"""WebSocket as a carrier: bytes go in and come out; strangers and giants are turned away."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.environment import SeededEntropy
from geomirror.errors import LinkError, RefusedError, RemoteProtocolError
from geomirror.limits import MIB
from geomirror.tunnel.http_head import Head, HeadReader
from geomirror.tunnel.websocket import (
    FRAME_BYTES_MAX,
    WebSocketFrames,
    answer_upgrade,
    check_upgrade,
    mask,
    new_key,
    upgrade_request,
)


def end(*, is_client: bool) -> WebSocketFrames:
    return WebSocketFrames(is_client=is_client, entropy=SeededEntropy(is_client))


def feed(frames: WebSocketFrames, data: bytes, piece: int = 1 << 30) -> tuple[bytes, list[bytes]]:
    replies: list[bytes] = []
    found = b""
    for at in range(0, len(data), piece):
        found += b"".join(frames.receive(data[at : at + piece], replies.append))
    return found, replies


@settings(max_examples=60)
@given(
    parts=st.lists(
        st.one_of(st.binary(max_size=300), st.integers(0, 70_000).map(bytes)), max_size=5
    ),
    piece=st.integers(1, 4000),
    is_client=st.booleans(),
)
def test_bytes_come_out_as_they_went_in(parts, piece, is_client):
    source, target = end(is_client=is_client), end(is_client=not is_client)
    wire = b"".join(source.encode(part) for part in parts)
    assert feed(target, wire, piece) == (b"".join(parts), [])


@given(st.binary(max_size=200), st.binary(min_size=4, max_size=4), st.integers(0, 70))
def test_a_mask_is_the_xor_of_the_rfc(data, key, position):
    expected = bytes(byte ^ key[(position + at) % 4] for at, byte in enumerate(data))
    assert mask(data, key, position) == expected


def test_only_the_client_masks_and_its_masks_differ():
    client, server = end(is_client=True), end(is_client=False)
    assert client.encode(b"hello") != client.encode(b"hello")
    assert server.encode(b"hello") == b"\x82\x05hello"
    with pytest.raises(RemoteProtocolError, match="mask of the wrong side"):
        feed(end(is_client=True), client.encode(b"hello"))
    with pytest.raises(RemoteProtocolError, match="mask of the wrong side"):
        feed(end(is_client=False), server.encode(b"hello"))


def test_messages_in_parts_with_pings_between_them_are_one_stream():
    target = end(is_client=True)
    wire = b"\x02\x03abc" + b"\x89\x02hi" + b"\x00\x02de" + b"\x80\x01f" + b"\x82\x00" + b"\x8a\x00"
    for piece in (1, 1 << 20):
        found, replies = feed(end(is_client=True), wire, piece)
        assert found == b"abcdef"
        assert len(replies) == 1 and feed(end(is_client=False), replies[0]) == (b"", [])
    with pytest.raises(RemoteProtocolError, match="within another"):
        feed(target, b"\x80\x01x")
    with pytest.raises(RemoteProtocolError, match="within another"):
        feed(end(is_client=True), b"\x02\x01x\x82\x01y")


def test_a_close_ends_it_and_is_answered():
    source, target = end(is_client=False), end(is_client=True)
    found, replies = feed(target, source.encode(b"x") + source.close() + b"\x82\x01z")
    assert found == b"x" and target.is_ended and len(replies) == 1
    feed(source, replies[0])
    assert source.is_ended


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"\x81\x02hi", "message of text"),
        (b"\xc2\x02hi", "unknown kind"),
        (b"\x83\x02hi", "unknown kind"),
        (b"\x8b\x00", "unknown kind"),
        (b"\x82\x7e\x00\x05hello", "too many bytes"),
        (b"\x82\x7f" + (100).to_bytes(8, "big"), "too many bytes"),
        (b"\x89\x7e\x00\x80", "control frame"),
        (b"\x09\x00", "control frame"),
        (b"\x82\x7f" + (FRAME_BYTES_MAX + 1).to_bytes(8, "big"), "over 16777216"),
        (b"\x82\x7f" + b"\xff" * 8, "over 16777216"),
    ],
)
def test_hostile_frames_are_refused_at_their_head(frame, message):
    for piece in (1, 1 << 20):
        with pytest.raises(RemoteProtocolError, match=message):
            feed(end(is_client=True), frame, piece)


def test_a_giant_message_is_handed_on_and_never_kept():
    target = end(is_client=True)
    chunk = bytes(64 * 1024)
    passed = sum(map(len, target.receive(b"\x02\x7f" + MIB.to_bytes(8, "big"), lambda _: None)))
    for at in range(200 * MIB // len(chunk)):
        if at and at % (MIB // len(chunk)) == 0:
            target.receive(b"\x00\x7f" + MIB.to_bytes(8, "big"), lambda _: None)
        pieces = target.receive(chunk, lambda _: None)
        assert len(pieces) == 1
        passed += len(pieces[0])
    assert passed == 200 * MIB


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_taken_or_refused(data, is_client):
    for piece in (1 << 20, 1):
        with contextlib.suppress(RemoteProtocolError):
            found, _ = feed(end(is_client=is_client), data, piece)
            assert len(found) <= len(data)


def head_of(data: bytes) -> Head:
    head = HeadReader().receive(data)
    assert head is not None
    return head


def test_the_upgrade_as_in_the_rfc():
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    request = upgrade_request("server.example", "/chat", key)
    reply = answer_upgrade(head_of(request), "/chat")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in reply
    check_upgrade(head_of(reply), key)
    with pytest.raises(RemoteProtocolError, match="not that of a WebSocket"):
        check_upgrade(head_of(reply), new_key(SeededEntropy(1)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET /x", b"GET /y"),
        (b"GET /x", b"POST /x"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"Upgrade: websocket", b"Upgrade: h2c"),
        (b"Connection: Upgrade", b"Connection: close"),
        (b"Version: 13", b"Version: 8"),
        (b"==\r\n", b"\r\n"),
        (b"Host: h\r\n", b""),
        (b"Host: h\r\n", b"Host: h\r\nHost: i\r\n"),
        (b"Host: h\r\n", b"Host: h\r\nContent-Length: 5\r\n"),
        (b"Host: h\r\n", b"Host: h\r\nTransfer-Encoding: chunked\r\n"),
    ],
)
def test_a_stranger_who_asks_for_something_else_is_refused(old, new):
    request = upgrade_request("h", "/x", new_key(SeededEntropy(1)))
    answer_upgrade(head_of(request), "/x")
    changed = request.replace(old, new)
    assert changed != request
    with pytest.raises((RefusedError, RemoteProtocolError)):
        answer_upgrade(head_of(changed), "/x")


def test_a_server_that_does_not_upgrade_is_named():
    with pytest.raises(LinkError, match="answers 404"):
        check_upgrade(head_of(b"HTTP/1.1 404 Not Found\r\n\r\n"), "k")
    right = b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    for more in (b"Sec-WebSocket-Extensions: permessage-deflate\r\n", b""):
        with pytest.raises(RemoteProtocolError):
            check_upgrade(head_of(right + more + b"\r\n"), "k")
