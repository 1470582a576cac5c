"""The handshake of the NBD server: however it is cut, the same answers and the same end."""

from __future__ import annotations

import struct

from geomirror.errors import RefusedError, RemoteProtocolError
from geomirror.nbd import constants as c
from geomirror.nbd.negotiation import BUFFER_BYTES, Negotiation, Phase, TlsMode
from geomirror.nbd.protocol import canonical_names
from tests.fuzz.source import Source, chunks, require_equal
from tests.nbd.ram_export import RamExport

_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
WORDS = [
    *(_OPTION.pack(c.OPTION_MAGIC, option, 0) for option in (*range(12), c.OPT_CONFINE)),
    *(b"\0\0\0\x0fbase:allocation", b"\0\0\0\3ram", b"\0\0\0\0", b"base:", b"alias"),
]


def option(number: int, body: bytes = b"") -> bytes:
    """One option of a client."""
    return _OPTION.pack(c.OPTION_MAGIC, number, len(body)) + body


def name(text: str) -> bytes:
    """A counted string."""
    return struct.pack(">I", len(text)) + text.encode()


def seeds() -> list[bytes]:
    """What usual clients send, and each option alone; with TLS off, allowed and required."""
    fixed = struct.pack(">I", c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
    context = name("ram") + struct.pack(">I", 1) + name(c.ALLOCATION_CONTEXT)
    go = option(c.OPT_GO, name("ram") + struct.pack(">HHHH", 3, 1, 2, 3))
    structured = option(c.OPT_STRUCTURED_REPLY)
    stories = [
        fixed + structured + option(c.OPT_SET_META_CONTEXT, context) + go + b"behind GO",
        fixed + option(c.OPT_LIST) + option(c.OPT_LIST_META_CONTEXT, context) + option(c.OPT_ABORT),
        fixed + option(c.OPT_CONFINE, b"ram") + option(c.OPT_LIST) + go,
        fixed + option(c.OPT_STARTTLS) + structured + go,
        fixed + option(c.OPT_INFO, name("") + b"\0\0") + option(c.OPT_EXPORT_NAME, b"alias"),
        b"\0\0\0\0" + option(c.OPT_EXPORT_NAME, b"full"),
        fixed + option(99, b"x" * 20) + option(c.OPT_GO, name("nobody") + b"\0\0"),
    ]
    return [bytes([mode, 3, 1]) + story for mode in range(3) for story in stories]


class Client:
    """The server's end of one connection, without the connection."""

    def __init__(self, tls: TlsMode) -> None:
        self.opened: list[str] = []
        exports = {
            "ram": RamExport(size_bytes=4096),
            "full": RamExport("full", 4096, is_single_writer=True),
        }
        exports["full"].open_count = 1
        exports["alias"] = exports["ram"]
        self._exports = exports
        self.negotiation = Negotiation(
            lambda name: exports.get(name or "ram"),
            lambda: canonical_names(exports.items()),
            self._attach,
            tls=tls,
        )
        self.output = b""
        self.error = ""
        self.rest = b""

    def _attach(self, export) -> None:
        if export.name == "full":
            raise RefusedError("somebody writes")
        self.opened.append(export.name)

    def feed(self, data: bytes) -> None:
        """As the connection does it, with a buffer of its size."""
        while not self.error:
            room = BUFFER_BYTES - len(self.rest)
            taken = self.rest + data[:room]
            data = data[room:]
            try:
                used = self.negotiation.receive(memoryview(taken))
            except (RemoteProtocolError, RefusedError) as error:
                self.error = type(error).__name__
                used = len(taken)
            self.rest = taken[used:]
            self.output += bytes(self.negotiation.output)
            self.negotiation.output.clear()
            if self.negotiation.phase is Phase.UPGRADING and not self.error:
                # TLS comes up; nothing in the clear may follow in the same read.
                self.negotiation.secured()
            if self.negotiation.phase in (Phase.TRANSMISSION, Phase.CLOSED):
                self.rest += data
                return
            assert len(self.rest) < BUFFER_BYTES, "the buffer is full and nothing is taken"
            if not data:
                return

    def state(self) -> tuple[object, ...]:
        """All that must not depend on how the stream was cut."""
        n = self.negotiation
        flags = (n.is_structured, tuple(n.contexts.items()), n.is_secure, n.size_bytes)
        return n.phase, self.output, self.error, self.opened, flags, self.error or self.rest


def run(data: bytes) -> None:
    """Whole, in pieces, byte by byte; the answers are well-formed."""
    source = Source(data)
    mode = source.pick(list(TlsMode))
    sizes = [source.number() + 1 for _ in range(source.below(5))]
    stream = source.rest()
    found = []
    for pieces in ([1], sizes or [7]):
        client = Client(mode)
        client.feed(b"")
        for piece in chunks(stream, pieces):
            if client.error or client.negotiation.phase in (Phase.TRANSMISSION, Phase.CLOSED):
                client.rest += piece
            else:
                client.feed(piece)
        found.append(client)
    if mode is TlsMode.OFF:
        # With TLS, bytes that come in one read with STARTTLS are an error: it depends on the cut.
        require_equal("outcome by cut", found[0].state(), found[1].state())
    for client in found:
        _check(client, mode)


def _check(client: Client, mode: TlsMode) -> None:
    negotiation = client.negotiation
    is_attached = negotiation.phase is Phase.TRANSMISSION
    assert is_attached == (negotiation.export is not None)
    assert len(client.opened) == int(is_attached)
    if mode is TlsMode.REQUIRE and not negotiation.is_secure:
        assert not is_attached, "attached before TLS"
        assert b"ram" not in client.output[18:], "told a name before TLS"
    if negotiation.contexts:
        assert negotiation.is_structured
    output = client.output
    assert output[:16] == struct.pack(">QQ", c.HELLO_MAGIC, c.OPTION_MAGIC)
    at = 18
    while at + _REPLY.size <= len(output):
        magic, _, kind, length = _REPLY.unpack_from(output, at)
        if magic != c.OPTION_REPLY_MAGIC:
            break
        assert length <= c.OPTION_BYTES_MAX
        assert kind in (1, 2, 3, 4) or kind & c.REP_ERROR_BIT
        at += _REPLY.size + length
    # Only the answer to EXPORT_NAME is no option reply.
    assert len(output) - at in (0, 10, 134)
