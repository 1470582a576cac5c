"""Decoding of bytes that others wrote: one place that knows all the ways it can fail."""

from __future__ import annotations

from typing import Any

import msgspec

from geomirror.errors import GeomirrorError

# Besides its own errors, msgspec raises UnicodeDecodeError (a ValueError) for text that is not
# UTF-8 and RecursionError for nesting of some thousand levels, also in fields that it skips.
_FAILURES = (msgspec.MsgspecError, ValueError, RecursionError)


def decode_json(data: bytes, kind: Any, error: GeomirrorError) -> Any:
    """Decode JSON as `kind`. :raises GeomirrorError: `error`, without a cause that quotes data."""
    try:
        return msgspec.json.decode(data, type=kind)
    except _FAILURES:
        raise error from None


def decode_msgpack(data: bytes, kind: Any, error: GeomirrorError) -> Any:
    """Decode MessagePack as `kind`. :raises GeomirrorError: `error`, as above."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except _FAILURES:
        raise error from None


def convert(value: Any, kind: Any, error: GeomirrorError) -> Any:
    """Check plain objects as `kind`. :raises GeomirrorError: `error`, as above."""
    try:
        return msgspec.convert(value, type=kind)
    except (*_FAILURES, TypeError):
        raise error from None
