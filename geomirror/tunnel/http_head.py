"""Heads of HTTP/1.1 messages, read strictly: answers of proxies, requests of anybody.

A head is a start line and header lines, each ended by CR LF, then an empty line. Whatever else
servers forgive (bare LF, folded lines, blanks before the colon) is refused: two parsers that read
one head differently are how requests get smuggled. Bounded: `HEAD_BYTES_MAX`, `HEADERS_MAX`.
Deliberately not here: bodies. Nobody who speaks with us sends one that we want.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from geomirror.errors import LimitExceededError, RemoteProtocolError
from geomirror.limits import KIB

HEAD_BYTES_MAX = 8 * KIB
"""What servers commonly take as a head; proxies answer with a few hundred bytes."""
HEADERS_MAX = 64

_END = b"\r\n\r\n"
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*\Z", re.ASCII)
_STATUS = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: .*)?\Z", re.ASCII)
_REQUEST = re.compile(r"([A-Z]{1,16}) ([!-~]{1,1024}) HTTP/1\.1\Z", re.ASCII)
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""Control characters but for the tab; CR LF has been taken away before."""


@dataclass(frozen=True)
class Head:
    """A head that was read whole."""

    start: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in their order."""

    def values(self, name: str) -> list[str]:
        """All values of a header, by its name in lower case."""
        return [value for found, value in self.headers if found == name]

    def words(self, name: str) -> set[str]:
        """The elements of a comma-separated header, in lower case."""
        parts = ",".join(self.values(name)).split(",")
        return {part.strip(" \t").lower() for part in parts} - {""}

    def status(self) -> int:
        """Of an answer. :raises RemoteProtocolError: it is none."""
        found = _STATUS.match(self.start)
        if found is None:
            raise RemoteProtocolError("what answers does not speak HTTP")
        return int(found.group(1))

    def request(self) -> tuple[str, str]:
        """Method and target. :raises RemoteProtocolError: it is no request of HTTP/1.1."""
        found = _REQUEST.match(self.start)
        if found is None:
            raise RemoteProtocolError("not an HTTP/1.1 request")
        return found.group(1), found.group(2)


class HeadReader:
    """Collects bytes until a head is complete."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.rest = b""
        """What came behind the head."""

    def receive(self, data: bytes) -> Head | None:
        """Take bytes; the head as soon as it is whole, else None.

        :raises LimitExceededError: it is longer than any honest one.
        :raises RemoteProtocolError: it is malformed. In both cases close the connection.
        """
        # Not one byte more than the bound is searched, however much comes at once.
        searched = max(0, len(self._data) - len(_END) + 1)
        room = HEAD_BYTES_MAX - len(self._data)
        self._data += data[:room]
        end = self._data.find(_END, searched)
        if end < 0:
            if len(self._data) == HEAD_BYTES_MAX:
                raise LimitExceededError(f"an HTTP head over {HEAD_BYTES_MAX} bytes")
            return None
        self.rest = bytes(self._data[end + len(_END) :]) + bytes(data[room:])
        head = bytes(self._data[:end])
        self._data.clear()
        return _parse(head)


def _parse(data: bytes) -> Head:
    start, *lines = data.split(b"\r\n")
    if len(lines) > HEADERS_MAX:
        raise LimitExceededError(f"an HTTP head with more than {HEADERS_MAX} lines")
    headers = []
    for line in (start, *lines):
        if _FORBIDDEN.search(line):
            raise RemoteProtocolError("an HTTP head with control characters")
    for line in lines:
        found = _HEADER.match(line.decode("latin-1"))
        if found is None:
            raise RemoteProtocolError("an HTTP head with a malformed line")
        headers.append((found.group(1).lower(), found.group(2)))
    return Head(start.decode("latin-1"), tuple(headers))
