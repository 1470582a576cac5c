"""Pieces: how the bytes of a circuit and its ends look on the wire (docs/wire_format.md, Circuits).

```
 length u24 · kind u8 · data        DATA 1 … 64 KiB · END 0 · DONE 0
```
TLS guards the bytes; the kind is here because TLS closes both directions at once, and because a
circuit that ends has to be told from one that is lost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from geomirror.errors import LimitExceededError, RemoteProtocolError
from geomirror.limits import KIB

DATA, END, DONE = 1, 2, 3
PIECE_BYTES_MAX = 64 * KIB
"""Part of the format: data of one piece."""
NUMBER_BYTES = 16
"""The one-use number with which a circuit's connection begins."""
_HEADER = struct.Struct("<I")
HEADER_BYTES = _HEADER.size


def pack(kind: int, data: bytes | memoryview = b"") -> bytes:
    """One piece, at most `PIECE_BYTES_MAX` of data."""
    assert len(data) <= PIECE_BYTES_MAX
    return b"".join((_HEADER.pack(kind << 24 | len(data)), data))


class PieceReader:
    """Finds the pieces in what arrives. Data is passed on as it comes, a piece is never held."""

    def __init__(self) -> None:
        self._header = b""
        self._left = 0
        """Data of the present piece that has not come yet."""

    def feed(self, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(kind, data) of what is in `view`; DATA may be a part of a piece. Read it to the end.

        :raises RemoteProtocolError: an unknown kind, or a length that it cannot have.
        :raises LimitExceededError: a piece over the limit; nothing was allocated for it.
        """
        while len(view):
            if self._left:
                part = view[: self._left]
                self._left -= len(part)
                yield DATA, part
                view = view[len(part) :]
                continue
            missing = HEADER_BYTES - len(self._header)
            self._header += bytes(view[:missing])
            view = view[missing:]
            if len(self._header) == HEADER_BYTES:
                (word,) = _HEADER.unpack(self._header)
                self._header = b""
                kind, length = word >> 24, word & 0xFFFFFF
                _check(kind, length)
                self._left = length
                if kind != DATA:
                    yield kind, view[:0]


def _check(kind: int, length: int) -> None:
    if kind not in (DATA, END, DONE):
        raise RemoteProtocolError(f"a circuit carries a piece of the unknown kind {kind}")
    if length > PIECE_BYTES_MAX:
        raise LimitExceededError(f"a piece of {length} bytes, at most {PIECE_BYTES_MAX} may be")
    if (kind == DATA) != (length > 0):
        raise RemoteProtocolError(f"a piece of kind {kind} with {length} bytes")
