"""Encoding of replies, simple and structured; and the rules of a block status reply.

Error texts go only into structured chunks; a simple reply has room for the number alone.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence

from geomirror.nbd.constants import (
    NAME_BYTES_MAX,
    REPLY_BLOCK_STATUS,
    REPLY_ERROR,
    REPLY_FLAG_DONE,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    wire_error,
)

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA_CHUNK = struct.Struct(">IHHQIQ")
_ERROR = struct.Struct(">IH")
_CONTEXT = struct.Struct(">I")
_SUCCESS_PREFIX = struct.pack(">II", SIMPLE_REPLY_MAGIC, 0)
_COOKIE = struct.Struct(">Q")
_MANY_REPLIES = 8
"""From so many on they are made all at once."""


def success_reply(cookie: int) -> bytes:
    """Simple reply without an error; a READ's data follows it."""
    return _SUCCESS_PREFIX + _COOKIE.pack(cookie)


def success_replies(cookies: Sequence[int]) -> bytes | bytearray:
    """Simple replies without an error, one after the other."""
    if len(cookies) == 1:
        return _SUCCESS_PREFIX + _COOKIE.pack(cookies[0])
    if len(cookies) < _MANY_REPLIES:
        pack = _COOKIE.pack
        return _SUCCESS_PREFIX + _SUCCESS_PREFIX.join([pack(cookie) for cookie in cookies])
    numbers = array("Q", cookies)
    if sys.byteorder == "little":
        numbers.byteswap()
    replies = bytearray((_SUCCESS_PREFIX + bytes(8)) * len(numbers))
    memoryview(replies).cast("Q")[1::2] = memoryview(numbers)
    return replies


def simple_header(cookie: int, _offset: int, _length: int) -> bytes:
    """What precedes a READ's data in a simple reply; as `data_header`."""
    return _SUCCESS_PREFIX + _COOKIE.pack(cookie)


def simple_error(cookie: int, error: int) -> bytes:
    """Simple reply with an errno."""
    return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, wire_error(error), cookie)


def data_header(cookie: int, offset: int, length: int) -> bytes:
    """Header of the only content chunk of a READ, DONE included; `length` data bytes follow.

    One chunk serves every READ, so DF is honoured without looking at it.
    """
    return _DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_OFFSET_DATA, cookie, length + 8, offset
    )


def empty_chunk(cookie: int) -> bytes:
    """A successful reply without content: the answer to a READ of nothing."""
    return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_NONE, cookie, 0)


def error_chunk(cookie: int, error: int, message: str = "") -> bytes:
    """Structured reply with an errno and a text, DONE included."""
    text = message.encode()[:NAME_BYTES_MAX]
    head = _CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_ERROR, cookie, _ERROR.size + len(text)
    )
    return head + _ERROR.pack(wire_error(error), len(text)) + text


def block_status_chunk(cookie: int, context: int, extents: bytes, *, is_last: bool = True) -> bytes:
    """What one context says, DONE included in the last one of a reply.

    :param extents: of `encode_extents`, at least one.
    """
    assert extents
    flags = REPLY_FLAG_DONE if is_last else 0
    length = _CONTEXT.size + len(extents)
    head = _CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, REPLY_BLOCK_STATUS, cookie, length)
    return head + _CONTEXT.pack(context) + extents


def encode_extents(extents: Sequence[tuple[int, int]]) -> bytes:
    """(length, flags) pairs as they are in a block status chunk."""
    flat = [number for extent in extents for number in extent]
    return struct.pack(f">{len(flat)}I", *flat)


def fit_extents(
    extents: Sequence[tuple[int, int]], length: int, count_max: int
) -> list[tuple[int, int]]:
    """Bring an export's (length, flags) list into what the protocol allows.

    Equal neighbours are merged, empty extents dropped, the rest is cut at `length` bytes or at
    `count_max` extents.
    """
    fitted: list[tuple[int, int]] = []
    left = length
    for extent_bytes, flags in extents:
        taken = min(extent_bytes, left)
        if taken <= 0:
            continue
        left -= taken
        if fitted and fitted[-1][1] == flags:
            fitted[-1] = (fitted[-1][0] + taken, flags)
        elif len(fitted) == count_max:
            break
        else:
            fitted.append((taken, flags))
    assert fitted, "an export described no byte"
    return fitted
