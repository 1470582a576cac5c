"""Handshake phase of the client: attach to one export of a fixed newstyle server.

The whole dialogue is one generator: it yields the bytes to send and how many bytes it wants next,
and returns what the server told. So it reads like the dialogue and knows no socket.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from geomirror.errors import (
    GeomirrorError,
    LimitExceededError,
    NotFoundError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
    UsageError,
)
from geomirror.nbd import constants as c

TCP_PORT = 10809
"""The port that IANA assigned to NBD."""

_PAYLOAD_BYTES_MAX = 32 << 20
"""Longest READ or WRITE sent, whatever the server would take."""
_REPLY = struct.Struct(">QIII")
_REFUSALS: dict[int, type[GeomirrorError]] = {
    c.REP_ERR_POLICY: RefusedError,
    c.REP_ERR_UNKNOWN: NotFoundError,
    c.REP_ERR_SHUTDOWN: UnreachableError,
}

Dialogue = Generator[tuple[bytes, int], bytes, "ServerExport"]
"""Yields (bytes to send, count of bytes wanted); is sent exactly that many."""
_Replies = Generator[tuple[bytes, int], bytes, list[tuple[int, bytes]]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where an export is: a Unix socket path, or host and port."""

    export: str
    path: str | None
    host: str
    port: int


@dataclass(slots=True)
class ServerExport:
    """What the server told of the export."""

    name: str
    description: str = ""
    size_bytes: int = 0
    flags: int = 0
    """`constants.EXPORT_*`."""
    is_structured: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    """Metadata contexts that were granted, by id."""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = _PAYLOAD_BYTES_MAX

    @property
    def has_allocation_context(self) -> bool:
        """True when the server tells what is allocated."""
        return c.ALLOCATION_CONTEXT in self.contexts.values()

    @property
    def is_read_only(self) -> bool:
        """True when writes will be refused."""
        return bool(self.flags & c.EXPORT_READ_ONLY)

    @property
    def is_multi_conn(self) -> bool:
        """True when a flush on one connection covers all connections."""
        return bool(self.flags & c.EXPORT_CAN_MULTI_CONN)


def parse_uri(uri: str) -> Address:
    """Take `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST[:PORT]/EXPORT` apart.

    :raises UsageError: anything else.
    """
    try:
        parts = urlsplit(uri)
        port = parts.port or TCP_PORT
    except ValueError as error:
        raise UsageError(f'"{uri}" is not an NBD URI: {error}') from error
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) != 1 or parts.netloc:
            raise UsageError(
                f'"{uri}" does not name one socket',
                hint="write nbd+unix:///EXPORT?socket=PATH",
            )
        return Address(export, sockets[0], "", 0)
    if parts.scheme == "nbd" and parts.hostname:
        return Address(export, None, parts.hostname, port)
    raise UsageError(
        f'"{uri}" is not an NBD URI',
        hint="write nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT",
    )


def handshake(
    name: str, *, wants_structured: bool, contexts: Sequence[str] = (c.ALLOCATION_CONTEXT,)
) -> Dialogue:
    """Attach to export `name`.

    :param contexts: metadata contexts to ask for.
    :raises RefusedError, NotFoundError, UnreachableError: what the server answered.
    :raises RemoteProtocolError: it is no fixed newstyle NBD server.
    """
    hello = yield b"", 18
    magic, option_magic, server_flags = struct.unpack(">QQH", hello)
    is_fixed = server_flags & c.FLAG_FIXED_NEWSTYLE
    if (magic, option_magic) != (c.HELLO_MAGIC, c.OPTION_MAGIC) or not is_fixed:
        raise RemoteProtocolError("the server does not speak fixed newstyle NBD")
    flags = server_flags & (c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
    export = ServerExport(name)
    first = struct.pack(">I", flags)
    encoded = struct.pack(">I", len(name.encode())) + name.encode()
    if wants_structured:
        replies = yield from _option(first, c.OPT_STRUCTURED_REPLY, b"")
        first = b""
        export.is_structured = replies[-1][0] == c.REP_ACK
    if export.is_structured:
        query = encoded + struct.pack(">I", len(contexts))
        for context in contexts:
            query += struct.pack(">I", len(context.encode())) + context.encode()
        replies = yield from _option(b"", c.OPT_SET_META_CONTEXT, query)
        export.contexts = {
            int.from_bytes(data[:4], "big"): data[4:].decode(errors="replace")
            for kind, data in replies
            if kind == c.REP_META_CONTEXT
        }
    wanted = struct.pack(">HHHH", 3, c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE)
    replies = yield from _option(first, c.OPT_GO, encoded + wanted)
    kind, text = replies[-1]
    if kind != c.REP_ACK:
        raise _REFUSALS.get(kind, RemoteProtocolError)(
            f'export "{name}" is refused by the server: {text.decode(errors="replace")}'
        )
    for kind, data in replies:
        if kind == c.REP_INFO:
            _learn(export, data)
    if not export.flags & c.EXPORT_HAS_FLAGS:
        raise RemoteProtocolError("the server told no size for the export")
    return export


def _option(prefix: bytes, option: int, data: bytes) -> _Replies:
    """Send one option; all replies to it, the last being ACK or an error."""
    send = prefix + struct.pack(">QII", c.OPTION_MAGIC, option, len(data)) + data
    replies: list[tuple[int, bytes]] = []
    while True:
        head = yield send, _REPLY.size
        send = b""
        magic, answered, kind, length = _REPLY.unpack(head)
        if magic != c.OPTION_REPLY_MAGIC or answered != option:
            raise RemoteProtocolError(f"the reply to NBD option {option} is not one")
        if length > c.OPTION_BYTES_MAX or len(replies) >= c.OPTIONS_MAX:
            raise LimitExceededError(f"the reply to NBD option {option} is too long")
        body = (yield b"", length) if length else b""
        replies.append((kind, body))
        if kind == c.REP_ACK or kind & c.REP_ERROR_BIT:
            return replies


def _learn(export: ServerExport, info: bytes) -> None:
    """Note one INFO reply; unknown kinds are ignored."""
    kind, value = int.from_bytes(info[:2], "big"), info[2:]
    try:
        if kind == c.INFO_EXPORT:
            export.size_bytes, export.flags = struct.unpack(">QH", value)
        elif kind == c.INFO_NAME:
            export.name = value.decode()
        elif kind == c.INFO_DESCRIPTION:
            export.description = value.decode()
        elif kind == c.INFO_BLOCK_SIZE:
            export.minimum_block, export.preferred_block, payload = struct.unpack(">III", value)
            export.maximum_payload = min(payload, _PAYLOAD_BYTES_MAX)
            if payload < 4096 or not export.minimum_block:
                raise RemoteProtocolError(f"NBD block sizes {struct.unpack('>III', value)}")
    except (struct.error, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"NBD info {kind} is malformed: {error}") from error
