"""Handshake phase of the server: a client's options in, replies and one attached export out.

    FLAGS ──> OPTIONS ──┬─ GO, EXPORT_NAME ──> TRANSMISSION
               ^        ├─ ABORT ────────────> CLOSED
               │        └─ STARTTLS ─────────> UPGRADING
               └──── secured() ────────────────────┘

An option is looked at only when all of its data is here, and its data is bounded before that; an
option that we do not know, or that is wrong, costs the client an error reply and nothing else.
EXPORT_NAME cannot carry an error, so it ends the connection instead.

Of TLS only the order of things is here. What was negotiated in the clear is forgotten by the step.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

from geomirror.errors import GeomirrorError, LimitExceededError, RefusedError, RemoteProtocolError
from geomirror.nbd import constants as c
from geomirror.nbd.contexts import available, select, with_ids
from geomirror.nbd.protocol import Export

_HELLO = struct.pack(
    ">QQH", c.HELLO_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES
)
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
BUFFER_BYTES = _OPTION.size + c.OPTION_BYTES_MAX
"""What a connection must be able to hold while it negotiates."""


class Phase(enum.Enum):
    """Where a handshake is."""

    FLAGS = enum.auto()
    OPTIONS = enum.auto()
    UPGRADING = enum.auto()
    """STARTTLS is granted: the next bytes are TLS; call `secured` when it is up."""
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


class TlsMode(enum.Enum):
    """What a listener wants of its clients."""

    OFF = enum.auto()
    ALLOW = enum.auto()
    """STARTTLS is granted, and not asked for."""
    REQUIRE = enum.auto()
    """Nothing is told or granted before it."""


class _RefusedOption(Exception):
    """An option gets an error reply; never leaves this module."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


class Negotiation:
    """One client's handshake.

    :param resolve: export of a name (the empty name is the default export), or None.
    :param names: (name, description) of the exports to list.
    :param attach: opens an export for this connection; its `GeomirrorError` refuses the option.
    :param payload_bytes_max: longest READ or WRITE to announce, if the export's own is longer.
    :param tls: whether STARTTLS is granted, or even needed.
    """

    def __init__(
        self,
        resolve: Callable[[str], Export | None],
        names: Callable[[], list[tuple[str, str]]],
        attach: Callable[[Export], None],
        payload_bytes_max: int = 32 << 20,
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self._tls = tls
        self._resolve = resolve
        self._names = names
        self._attach = attach
        self._payload_bytes_max = payload_bytes_max
        self._is_fixed = False
        self._wants_zeroes = True
        self._option_count = 0
        self._context_export: str | None = None
        self._only: str | None = None
        self.output = bytearray(_HELLO)
        """Bytes to send; the caller empties it."""
        self.phase = Phase.FLAGS
        self.export: Export | None = None
        self.size_bytes = 0
        """The export's size as this client was told; fixed for the connection."""
        self.is_structured = False
        self.contexts: dict[str, int] = {}
        """Metadata contexts that were set, name → id; for BLOCK_STATUS on `export`."""
        self.is_secure = False
        """TLS is up."""

    def secured(self) -> None:
        """TLS is up: begin with the options again, as if nothing had been negotiated."""
        assert self.phase is Phase.UPGRADING
        self.is_secure = True
        self.is_structured = False
        self.contexts = {}
        self._context_export = self._only = None
        self.phase = Phase.OPTIONS

    def receive(self, data: memoryview) -> int:
        """Consume whole steps from the beginning of `data`; returns how many bytes.

        :raises RemoteProtocolError: the client breaks the protocol; close the connection.
        :raises RefusedError: EXPORT_NAME cannot be granted; close the connection.
        """
        used = 0
        while self.phase in (Phase.FLAGS, Phase.OPTIONS):
            step = (
                self._receive_flags(data[used:])
                if self.phase is Phase.FLAGS
                else self._receive_option(data[used:])
            )
            if step == 0:
                break
            used += step
        if self.phase is Phase.UPGRADING and used < len(data):
            raise RemoteProtocolError("an NBD client sent bytes in the clear behind STARTTLS")
        return used

    def _receive_flags(self, data: memoryview) -> int:
        if len(data) < 4:
            return 0
        flags = int.from_bytes(data[:4], "big")
        if flags & ~(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES):
            raise RemoteProtocolError(f"unknown NBD client flags {flags:#x}")
        self._is_fixed = bool(flags & c.FLAG_FIXED_NEWSTYLE)
        self._wants_zeroes = not flags & c.FLAG_NO_ZEROES
        self.phase = Phase.OPTIONS
        return 4

    def _receive_option(self, data: memoryview) -> int:
        if len(data) < _OPTION.size:
            return 0
        magic, option, length = _OPTION.unpack_from(data)
        if magic != c.OPTION_MAGIC:
            raise RemoteProtocolError(f"NBD option magic is {magic:#x}")
        if length > c.OPTION_BYTES_MAX:
            raise LimitExceededError(
                f"NBD option {option} announces {length} bytes, over {c.OPTION_BYTES_MAX}"
            )
        if not self._is_fixed and option != c.OPT_EXPORT_NAME:
            raise RemoteProtocolError(f"NBD option {option} without fixed newstyle")
        end: int = _OPTION.size + length
        if len(data) < end:
            return 0
        self._option_count += 1
        if self._option_count > c.OPTIONS_MAX:
            raise LimitExceededError(f"more than {c.OPTIONS_MAX} NBD options")
        body = bytes(data[_OPTION.size : end])
        is_locked = self._tls is TlsMode.REQUIRE and not self.is_secure
        if is_locked and option == c.OPT_EXPORT_NAME:
            raise RemoteProtocolError("an NBD client wants an export before TLS")
        if option == c.OPT_EXPORT_NAME:
            self._export_name(body)
            return end
        try:
            if is_locked and option not in (c.OPT_STARTTLS, c.OPT_ABORT):
                raise _RefusedOption(c.REP_ERR_TLS_REQD, "this server wants TLS first")
            self._answer(option, body)
        except _RefusedOption as refused:
            self._reply(option, refused.reply, refused.message.encode()[: c.NAME_BYTES_MAX])
        return end

    def _answer(self, option: int, body: bytes) -> None:
        if option == c.OPT_ABORT:
            self._reply(option, c.REP_ACK)
            self.phase = Phase.CLOSED
        elif option == c.OPT_LIST:
            self._list(body)
        elif option in (c.OPT_INFO, c.OPT_GO):
            self._info(option, body)
        elif option == c.OPT_STRUCTURED_REPLY:
            if body:
                raise _RefusedOption(c.REP_ERR_INVALID, "STRUCTURED_REPLY takes no data")
            self.is_structured = True
            self._reply(option, c.REP_ACK)
        elif option in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
            self._meta_context(option, body)
        elif option == c.OPT_CONFINE:
            self._confine(body)
        elif option == c.OPT_STARTTLS and self._tls is not TlsMode.OFF:
            if body or self.is_secure:
                reason = "TLS is on already" if self.is_secure else "STARTTLS takes no data"
                raise _RefusedOption(c.REP_ERR_INVALID, reason)
            self._reply(option, c.REP_ACK)
            self.phase = Phase.UPGRADING
        else:
            raise _RefusedOption(c.REP_ERR_UNSUP, f"option {option} is not supported")

    def _list(self, body: bytes) -> None:
        if body:
            raise _RefusedOption(c.REP_ERR_INVALID, "LIST takes no data")
        only = self._lookup("") if self._only is not None else None
        for name, description in self._names():
            if self._only is not None and (only is None or name != only.name):
                continue
            encoded = name.encode()
            details = description.encode()[: c.NAME_BYTES_MAX]
            self._reply(
                c.OPT_LIST, c.REP_SERVER, struct.pack(">I", len(encoded)) + encoded + details
            )
        self._reply(c.OPT_LIST, c.REP_ACK)

    def _info(self, option: int, body: bytes) -> None:
        name, at = _take_string(body, 0)
        count = int.from_bytes(body[at : at + 2], "big")
        if len(body) != at + 2 + 2 * count:
            raise _RefusedOption(c.REP_ERR_INVALID, "count of info requests does not fit")
        wanted = set(struct.unpack_from(f">{count}H", body, at + 2))
        export = self._find(name)
        if option == c.OPT_GO:
            self._open(export)
            self._keep_contexts(name)
        self.size_bytes = export.size_bytes
        head = struct.pack(">HQH", c.INFO_EXPORT, export.size_bytes, self._export_flags(export))
        self._reply(option, c.REP_INFO, head)
        for kind, value in _descriptions(export, self._payload_bytes_max):
            if kind in wanted:
                self._reply(option, c.REP_INFO, struct.pack(">H", kind) + value)
        self._reply(option, c.REP_ACK)
        if option == c.OPT_GO:
            self.phase = Phase.TRANSMISSION

    def _export_name(self, body: bytes) -> None:
        name = _decode(body)
        export = self._lookup(name) if name is not None else None
        if export is None:
            raise RemoteProtocolError(f'NBD client wants the unknown export "{body[:100]!r}"')
        self._attach(export)
        self.export = export
        self._keep_contexts(name)
        self.size_bytes = export.size_bytes
        self.output += struct.pack(">QH", export.size_bytes, self._export_flags(export))
        if self._wants_zeroes:
            self.output += bytes(124)
        self.phase = Phase.TRANSMISSION

    def _meta_context(self, option: int, body: bytes) -> None:
        is_set = option == c.OPT_SET_META_CONTEXT
        if is_set:
            # A SET that fails also undoes the one before it.
            self.contexts = {}
            if not self.is_structured:
                raise _RefusedOption(c.REP_ERR_INVALID, "structured replies come first")
        name, at = _take_string(body, 0)
        count = int.from_bytes(body[at : at + 4], "big")
        at += 4
        queries: list[str] = []
        while at < len(body):
            query, at = _take_string(body, at)
            queries.append(query)
        if at != len(body) or len(queries) != count:
            raise _RefusedOption(c.REP_ERR_INVALID, "query count does not fit")
        export = self._find(name)
        chosen = with_ids(select(available(export), queries, is_list=not is_set))
        for context, number in chosen.items():
            # In LIST the id is reserved and must be 0.
            shown = struct.pack(">I", number if is_set else 0)
            self._reply(option, c.REP_META_CONTEXT, shown + context.encode())
        self._reply(option, c.REP_ACK)
        if is_set:
            self.contexts, self._context_export = chosen, name

    def _keep_contexts(self, name: str | None) -> None:
        """Attached: contexts that were set for another name are void."""
        if name != self._context_export:
            self.contexts = {}

    def _confine(self, body: bytes) -> None:
        if self._only is not None:
            raise _RefusedOption(c.REP_ERR_POLICY, "this connection is confined already")
        name = _decode(body)
        if not name:
            raise _RefusedOption(c.REP_ERR_INVALID, "no name to be confined to")
        self._find(name)
        self._only = name
        self._reply(c.OPT_CONFINE, c.REP_ACK)

    def _lookup(self, name: str) -> Export | None:
        """The export of a name as this client sees it."""
        if self._only is None:
            return self._resolve(name)
        only = self._resolve(self._only)
        if not name or only is None:
            return only
        # Aliases are other names of the same export.
        found = self._resolve(name)
        return only if found is not None and found.name == only.name else None

    def _find(self, name: str) -> Export:
        export = self._lookup(name)
        if export is None:
            raise _RefusedOption(c.REP_ERR_UNKNOWN, f'no export is named "{name[:200]}"')
        return export

    def _open(self, export: Export) -> None:
        try:
            self._attach(export)
        except RefusedError as error:
            raise _RefusedOption(c.REP_ERR_POLICY, str(error)) from error
        except GeomirrorError as error:
            raise _RefusedOption(c.REP_ERR_SHUTDOWN, str(error)) from error
        self.export = export

    def _export_flags(self, export: Export) -> int:
        flags = c.EXPORT_HAS_FLAGS | c.EXPORT_SEND_FLUSH | c.EXPORT_SEND_FUA | c.EXPORT_SEND_CACHE
        if export.is_read_only:
            flags |= c.EXPORT_READ_ONLY
        else:
            flags |= c.EXPORT_SEND_TRIM | c.EXPORT_SEND_WRITE_ZEROES | c.EXPORT_SEND_FAST_ZERO
        if export.is_multi_conn:
            flags |= c.EXPORT_CAN_MULTI_CONN
        if self.is_structured:
            flags |= c.EXPORT_SEND_DF
        return flags

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.output += _REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _descriptions(export: Export, payload_bytes_max: int) -> list[tuple[int, bytes]]:
    """The (info type, value) pairs that a client may ask for."""
    payload = min(export.maximum_payload, payload_bytes_max)
    sizes = (export.minimum_block, export.preferred_block, payload)
    return [
        (c.INFO_NAME, export.name.encode()[: c.NAME_BYTES_MAX]),
        (c.INFO_DESCRIPTION, export.description.encode()[: c.NAME_BYTES_MAX]),
        (c.INFO_BLOCK_SIZE, struct.pack(">III", *sizes)),
    ]


def _decode(data: bytes) -> str | None:
    """A name or query, or None when it is too long or not UTF-8."""
    if len(data) > c.NAME_BYTES_MAX:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _take_string(data: bytes, at: int) -> tuple[str, int]:
    """The string at `at`, a u32 length and that many bytes of UTF-8, and where it ends."""
    start = at + 4
    end = start + int.from_bytes(data[at:start], "big")
    text = _decode(data[start:end])
    if end > len(data) or text is None:
        raise _RefusedOption(c.REP_ERR_INVALID, "a name is cut off, too long or not UTF-8")
    return text, end
