"""The batch parser: every rule of validation, every cutting of the stream, every hostile byte."""

from __future__ import annotations

import contextlib
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import RemoteProtocolError
from geomirror.nbd import constants as c
from geomirror.nbd.request_parser import RECEIVE_BYTES, SLACK_BYTES, RequestParser, buffer_bytes

SIZE = 1 << 20
PAYLOAD_MAX = 256 << 10
UNBOUNDED = (1 << 40, 1 << 20)

Taken = tuple[int, int, int, int, int, bytes | None]


def request(
    command: int,
    cookie: int,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    payload: bytes = b"",
) -> bytes:
    head = struct.pack(">IHHQQI", c.REQUEST_MAGIC, flags, command, cookie, offset, length)
    return head + payload


def write(cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return request(c.CMD_WRITE, cookie, offset, len(payload), flags, payload)


def parser(**options) -> RequestParser:
    options = {"size_bytes": SIZE, "payload_bytes_max": PAYLOAD_MAX} | options
    return RequestParser(
        memoryview(bytearray(buffer_bytes(options["payload_bytes_max"]))), **options
    )


def drain(target: RequestParser) -> tuple[list[Taken], list[tuple[int, int, int]]]:
    """(requests, asides as (command, cookie, errno)) until nothing more is complete."""
    requests: list[Taken] = []
    asides: list[tuple[int, int, int]] = []
    while True:
        found = target.take(*UNBOUNDED)
        if not found and not target.asides:
            return requests, asides
        for one in found:
            payload = bytes(one.payload) if one.payload is not None else None
            requests.append((one.command, one.flags, one.cookie, one.offset, one.length, payload))
        asides += [(one.command, one.cookie, error) for one, error in target.asides]
        target.asides.clear()


def feed(target: RequestParser, data: bytes, step: int = 1 << 30):
    requests: list[Taken] = []
    asides: list[tuple[int, int, int]] = []
    at = 0
    while at < len(data):
        space = target.writable()
        assert len(space) > 0
        part = data[at : at + min(step, len(space))]
        space[: len(part)] = part
        target.received(len(part))
        at += len(part)
        found, aside = drain(target)
        requests += found
        asides += aside
    return requests, asides


MIX = b"".join(
    [
        write(1, 0, b"a" * 4096),
        request(c.CMD_READ, 2, 512, 7),
        write(3, 1, b"b", c.CMD_FLAG_FUA),
        request(c.CMD_FLUSH, 4),
        write(5, SIZE - 1, b"too long"),  # refused, and its payload is consumed
        request(c.CMD_TRIM, 6, 0, SIZE, c.CMD_FLAG_FUA),
        request(c.CMD_WRITE_ZEROES, 7, 3, 9, c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO),
        request(c.CMD_CACHE, 8, 0, 4096),
        request(99, 9, 0, 10),
        request(c.CMD_READ, 10, 0, 0),
        write(0xFFFFFFFFFFFFFFFF, 9, b"z" * 30),
    ]
)
MIX_REQUESTS: list[Taken] = [
    (c.CMD_WRITE, 0, 1, 0, 4096, b"a" * 4096),
    (c.CMD_READ, 0, 2, 512, 7, None),
    (c.CMD_WRITE, c.CMD_FLAG_FUA, 3, 1, 1, b"b"),
    (c.CMD_FLUSH, 0, 4, 0, 0, None),
    (c.CMD_TRIM, c.CMD_FLAG_FUA, 6, 0, SIZE, None),
    (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO, 7, 3, 9, None),
    (c.CMD_WRITE, 0, 0xFFFFFFFFFFFFFFFF, 9, 30, b"z" * 30),
]
MIX_ASIDES = [
    (c.CMD_WRITE, 5, errno.ENOSPC),
    (c.CMD_CACHE, 8, 0),
    (99, 9, errno.EINVAL),
    (c.CMD_READ, 10, 0),
]


@pytest.mark.parametrize("step", [1, 2, 27, 28, 29, 1000, 1 << 30])
def test_requests_are_the_same_however_the_stream_is_cut(step: int) -> None:
    assert feed(parser(), MIX, step) == (MIX_REQUESTS, MIX_ASIDES)


def test_all_requests_of_one_read_are_one_batch() -> None:
    target = parser()
    target.writable()[: len(MIX)] = MIX
    target.received(len(MIX))
    assert len(target.take(*UNBOUNDED)) == len(MIX_REQUESTS)


def test_every_truncation_gives_a_prefix_and_waits() -> None:
    stream = write(1, 0, b"x" * 40) + request(c.CMD_READ, 2, 0, 1) + write(3, SIZE, b"refused")
    whole = feed(parser(), stream)
    for end in range(len(stream)):
        requests, asides = feed(parser(), stream[:end])
        assert requests == whole[0][: len(requests)]
        assert asides == whole[1][: len(asides)]


FUA, NO_HOLE, DF, ONE, FAST = 1, 2, 4, 8, 16
RULES = [
    # command, flags, offset, length, errno
    (c.CMD_READ, FUA, SIZE - 1, 1, 0),
    (c.CMD_READ, 0, SIZE - 1, 2, errno.EINVAL),
    (c.CMD_READ, 0, SIZE, 0, 0),
    (c.CMD_READ, 0, SIZE + 1, 0, errno.EINVAL),
    (c.CMD_READ, 0, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, errno.EINVAL),
    (c.CMD_READ, 0, 0, PAYLOAD_MAX, 0),
    (c.CMD_READ, 0, 0, PAYLOAD_MAX + 1, errno.EINVAL),
    (c.CMD_READ, DF, 0, 1, errno.EINVAL),  # not negotiated
    (c.CMD_READ, NO_HOLE, 0, 1, errno.EINVAL),
    (c.CMD_WRITE, FUA, SIZE - 1, 1, 0),
    (c.CMD_WRITE, 0, SIZE - 1, 2, errno.ENOSPC),
    (c.CMD_WRITE, 0, 0xFFFFFFFFFFFFFFFF, 1, errno.ENOSPC),
    (c.CMD_WRITE, 0, 0, 0, 0),
    (c.CMD_WRITE, 0, 0, PAYLOAD_MAX + 1, errno.EINVAL),
    (c.CMD_WRITE, FAST, 0, 1, errno.EINVAL),
    (c.CMD_WRITE, 1 << 15, 0, 1, errno.EINVAL),
    (c.CMD_FLUSH, FUA, 0, 0, 0),
    (c.CMD_FLUSH, 0, 1, 0, errno.EINVAL),
    (c.CMD_FLUSH, 0, 0, 1, errno.EINVAL),
    (c.CMD_TRIM, FUA, 0, SIZE, 0),
    (c.CMD_TRIM, 0, 1, SIZE, errno.EINVAL),
    (c.CMD_TRIM, NO_HOLE, 0, 1, errno.EINVAL),
    (c.CMD_WRITE_ZEROES, FUA | NO_HOLE | FAST, 0, SIZE, 0),
    (c.CMD_WRITE_ZEROES, 0, 1, SIZE, errno.ENOSPC),
    (c.CMD_WRITE_ZEROES, 0, 0, 0xFFFFFFFF, errno.ENOSPC),
    (c.CMD_WRITE_ZEROES, ONE, 0, 1, errno.EINVAL),
    (c.CMD_CACHE, 0, 0, SIZE, 0),
    (c.CMD_CACHE, FAST, 0, 1, errno.EINVAL),
    (c.CMD_CACHE, 0, SIZE, 1, errno.EINVAL),
    (c.CMD_BLOCK_STATUS, ONE, 0, SIZE, errno.EINVAL),  # context not negotiated
    (8, 0, 0, 1, errno.EINVAL),
    (0xFFFF, 0, 0, 0, errno.EINVAL),
]


@pytest.mark.parametrize(("command", "flags", "offset", "length", "error"), RULES)
@pytest.mark.parametrize("step", [5, 1 << 30])
def test_a_bad_request_is_refused_and_the_next_one_is_served(
    command: int, flags: int, offset: int, length: int, error: int, step: int
) -> None:
    payload = bytes(length) if command == c.CMD_WRITE else b""
    stream = request(command, 7, offset, length, flags, payload) + write(8, 0, b"next")
    requests, asides = feed(parser(), stream, step)
    assert requests[-1] == (c.CMD_WRITE, 0, 8, 0, 4, b"next")
    if error:
        assert asides == [(command, 7, error)]
        assert len(requests) == 1
    else:
        assert len(requests) + len(asides) == 2
        assert all(found[2] == 0 for found in asides)


@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES])
def test_a_read_only_export_refuses_every_change(command: int) -> None:
    payload = b"data" if command == c.CMD_WRITE else b""
    stream = request(command, 1, 0, 4, 0, payload) + request(c.CMD_READ, 2, 0, 4)
    requests, asides = feed(parser(is_read_only=True), stream)
    assert asides == [(command, 1, errno.EPERM)]
    assert [found[2] for found in requests] == [2]


def test_df_and_block_status_need_their_negotiation() -> None:
    stream = request(c.CMD_READ, 1, 0, 8, DF) + request(c.CMD_BLOCK_STATUS, 2, 0, 8, ONE)
    requests, asides = feed(parser(is_structured=True, has_contexts=True), stream)
    assert requests == [(c.CMD_READ, DF, 1, 0, 8, None)]
    assert asides == [(c.CMD_BLOCK_STATUS, 2, 0)]
    empty = request(c.CMD_BLOCK_STATUS, 3, 0, 0)
    _, asides = feed(parser(is_structured=True, has_contexts=True), empty)
    assert asides == [(c.CMD_BLOCK_STATUS, 3, errno.EINVAL)]


@pytest.mark.parametrize(("offset", "length", "error"), [(0, 512, 0), (1, 512, 22), (512, 511, 22)])
def test_alignment_is_demanded_where_an_export_needs_it(
    offset: int, length: int, error: int
) -> None:
    stream = write(1, offset, bytes(length)) + request(c.CMD_READ, 2, offset, length)
    requests, asides = feed(parser(minimum_block=512), stream)
    assert len(requests) == (0 if error else 2)
    assert [found[2] for found in asides] == ([error, error] if error else [])


def test_disc_ends_the_stream_and_what_follows_is_ignored() -> None:
    for step in (1, 1 << 30):
        target = parser()
        stream = write(1, 0, b"x") + request(c.CMD_DISCONNECT, 2) + b"garbage" * 50
        requests, asides = feed(target, stream, step)
        assert [found[2] for found in requests] == [1]
        assert asides == []
        assert target.is_disconnected


def test_a_cookie_in_flight_cannot_be_read_with_twice() -> None:
    target = parser()
    double = request(c.CMD_READ, 1, 0, 8) + request(c.CMD_READ, 1, 0, 8)
    requests, asides = feed(target, double)
    assert len(requests) == 1
    assert asides == [(c.CMD_READ, 1, errno.EINVAL)]
    assert target.finish_read(1) == 8
    assert target.finish_read(1) is None
    assert feed(target, request(c.CMD_READ, 1, 0, 8))[0] != []


def test_reads_in_flight_are_bounded_by_what_their_replies_will_hold() -> None:
    target = parser()
    stream = b"".join(request(c.CMD_READ, cookie, 0, 1000) for cookie in range(100))
    target.writable()[: len(stream)] = stream
    target.received(len(stream))
    assert len(target.take(5000, 1000)) == 5
    assert target.take(5000, 1000) == []
    assert target.read_bytes == 5000
    for cookie in range(5):
        target.finish_read(cookie)
    assert len(target.take(1 << 30, 3)) == 3
    assert target.take(1 << 30, 0) == []
    assert len(target.take(1 << 30, 1000)) == 92


def test_bad_magic_serves_what_came_before_and_then_raises() -> None:
    target = parser()
    stream = write(1, 0, b"good") + b"\0" * 28
    target.writable()[: len(stream)] = stream
    target.received(len(stream))
    assert [one.cookie for one in target.take(*UNBOUNDED)] == [1]
    with pytest.raises(RemoteProtocolError, match="magic"):
        target.take(*UNBOUNDED)


@pytest.mark.parametrize("bit", range(32))
def test_each_flipped_bit_of_the_magic_is_noticed(bit: int) -> None:
    stream = bytearray(request(c.CMD_FLUSH, 1))
    stream[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        feed(parser(), bytes(stream))


def test_the_largest_payload_fits_behind_the_slack_and_no_payload_is_overwritten() -> None:
    payload_max = 32 << 20
    target = parser(size_bytes=1 << 30, payload_bytes_max=payload_max)
    small = write(1, 0, b"s" * 65536)
    big = write(2, 0, bytes(range(256)) * (payload_max // 256))
    stream = small * (SLACK_BYTES // len(small)) + big + big + small
    requests, asides = feed(target, stream, RECEIVE_BYTES)
    assert asides == []
    assert [len(found[5] or b"") for found in requests][-3:] == [payload_max, payload_max, 65536]
    assert requests[-3][5] == requests[-2][5] == big[28:]


def test_a_refused_payload_of_4_gib_is_never_held() -> None:
    target = parser()
    length = 0xFFFFFFFF
    feed(target, request(c.CMD_WRITE, 1, 0, length))
    filler = bytes(RECEIVE_BYTES)
    for _ in range(3 * buffer_bytes(PAYLOAD_MAX) // RECEIVE_BYTES):
        assert feed(target, filler) == ([], [])
        assert len(target.writable()) == RECEIVE_BYTES


REQUESTS = st.builds(
    lambda command, cookie, offset, length, flags: request(
        command,
        cookie,
        offset,
        length,
        flags,
        bytes(length) if command == c.CMD_WRITE else b"",
    ),
    st.sampled_from([0, 1, 1, 3, 4, 5, 6, 7, 9]),
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, SIZE + 10), st.integers(0, 2**64 - 1)),
    st.integers(0, 300),
    st.one_of(st.just(0), st.integers(0, 2**16 - 1)),
)


@given(st.lists(REQUESTS, max_size=20), st.lists(st.integers(1, 400), min_size=1))
def test_any_cutting_of_any_requests_is_equal_to_the_whole(
    stream: list[bytes], steps: list[int]
) -> None:
    data = b"".join(stream)
    whole = feed(parser(), data)
    target = parser()
    requests: list[Taken] = []
    asides: list[tuple[int, int, int]] = []
    at = turn = 0
    while at < len(data):
        step = steps[turn % len(steps)]
        found, aside = feed(target, data[at : at + step])
        requests += found
        asides += aside
        at, turn = at + step, turn + 1
    assert (requests, asides) == whole
    for command, _, _, offset, length, payload in requests:
        assert offset + length <= SIZE
        assert (payload is not None) == (command == c.CMD_WRITE)


@given(st.lists(REQUESTS, max_size=3), st.binary(max_size=300))
def test_noise_raises_nothing_but_a_protocol_error(stream: list[bytes], noise: bytes) -> None:
    target = parser()
    with contextlib.suppress(RemoteProtocolError):
        feed(target, b"".join(stream) + noise)
    assert len(target.writable()) > 0
