"""A member of the network whose daemon was replaced by something that sends what it likes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from geomirror.environment import SystemClock, SystemEntropy
from geomirror.limits import PRODUCTION
from geomirror.tunnel.network_state_io import load_network
from geomirror.tunnel.tls_io import TlsDriver
from geomirror.volume.superblock import NAME, SLOT_BYTES, Superblock, parse_slot
from geomirror.wan_protocol.epoch_encode import FRAME_ENTRY, FRAME_HEADER, frame_hash
from geomirror.wan_protocol.frame import (
    KIND_FRAME,
    KIND_MESSAGE,
    Packet,
    PacketReader,
    pack_header,
)
from geomirror.wan_protocol.messages import (
    Hello,
    Message,
    Ping,
    Pong,
    SessionAccept,
    SessionOpen,
    Use,
    decode_message,
    encode_message,
)
from geomirror.wan_protocol.negotiation import make_hello
from geomirror.wan_protocol.session import chain_entries, session_number, volume_infos

M = TypeVar("M", bound=Message)
TIMEOUT_S = 10.0


class Wire(asyncio.Protocol):
    """One connection: keeps the messages that arrive, and answers pings like an honest node."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.closed = asyncio.Event()
        self._arrived = asyncio.Event()
        self._reader = PacketReader(PRODUCTION)
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        for packet in self._reader.feed(data):
            if packet.kind == KIND_MESSAGE:
                self._take(packet)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._arrived.set()

    def _take(self, packet: Packet) -> None:
        message = decode_message(packet.body)
        if isinstance(message, Ping):
            self.send(Pong(message.now_ns))
        else:
            self.messages.append(message)
            self._arrived.set()

    def send(self, message: Message, session: int = 0) -> None:
        self.packet(KIND_MESSAGE, encode_message(message), session=session)

    def packet(self, kind: int, body: bytes, **fields: int) -> None:
        self.raw(pack_header(kind, len(body), **fields) + body)

    def raw(self, data: bytes) -> None:
        self.transport.write(data)

    async def expect(self, kind: type[M]) -> M:
        """The next message of a kind; others are dropped."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                while self.messages:
                    message = self.messages.pop(0)
                    if isinstance(message, kind):
                        return message
                assert not self.closed.is_set(), f"closed instead of {kind.__name__}"
                self._arrived.clear()
                await self._arrived.wait()

    async def expect_close(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.closed.wait()


class HostilePeer:
    """Links with `peer` under the identity in `data_dir`, as correctly as a real node does."""

    def __init__(self, data_dir: Path, peer: str, port: int) -> None:
        self.state = load_network(data_dir)
        self.data_dir = data_dir
        self.control: Wire
        self.data: Wire
        self._peer = peer
        self._endpoint = f"127.0.0.1:{port}"
        self._driver = TlsDriver(self.state, SystemClock(), SystemEntropy())
        self._incarnation = SystemEntropy().token_bytes(16)
        self._number = 1 << 40

    async def __aenter__(self) -> HostilePeer:
        link = SystemEntropy().token_bytes(16)
        self.control = await self._connect(link, -1)
        self.data = await self._connect(link, 0)
        self._number += 1
        self.control.send(Use(self._number))
        return self

    async def __aexit__(self, *_: object) -> None:
        for wire in (self.data, self.control):
            wire.transport.abort()
            await wire.expect_close()

    async def _connect(self, link: bytes, index: int) -> Wire:
        _, protocol = await self._driver.dial(self._peer, self._endpoint, Wire)
        assert isinstance(protocol, Wire)
        wall_ns = SystemClock().wall_ns()
        protocol.send(make_hello(self.state.node, self._incarnation, link, index, wall_ns, b""))
        await protocol.expect(Hello)
        return protocol

    def superblock(self, resource: str) -> Superblock:
        """What the node whose identity this is knows of a resource."""
        data = (self.data_dir / "resources" / resource / NAME).read_bytes()
        slots = [parse_slot(data[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
        return max((slot for slot in slots if slot), key=lambda slot: slot.sequence)

    def session_open(self, resource: str) -> SessionOpen:
        """An honest offer of a session."""
        found = self.superblock(resource)
        return SessionOpen(
            session_number(found.resource_id),
            bytes.fromhex(found.resource_id),
            found.name,
            chain_entries(found),
            volume_infos(found),
            found.applied_epoch,
            bytes.fromhex(found.applied_hash),
            self._incarnation,
        )

    async def open_session(self, resource: str) -> SessionAccept:
        """Open it; the answer says where the victim stands."""
        message = self.session_open(resource)
        self.control.send(message, message.session)
        return await self.control.expect(SessionAccept)

    def frame(self, session: int, epoch: int, sequence: int, body: bytes) -> None:
        self.data.packet(KIND_FRAME, body, session=session, epoch=epoch, sequence=sequence)


Entry = tuple[int, int, int, int, int]
"""Volume, kind, flags, count, block."""


def frame_body(
    entries: Sequence[Entry],
    data: bytes,
    *,
    codec: int = 0,
    encode: Callable[[bytes], bytes] = bytes,
    **changed: Any,
) -> bytes:
    """A frame with a right hash; `changed` overrides header fields by name."""
    table = b"".join(FRAME_ENTRY.pack(*entry) for entry in entries)
    fields = {"codec": codec, "flags": 0, "count": len(entries), "raw_bytes": len(data), "base": 0}
    fields |= changed
    values = [fields[name] for name in ("codec", "flags", "count", "raw_bytes")]
    header = FRAME_HEADER.pack(*values, 0, fields["base"])
    expected = frame_hash(header, table, data)
    return FRAME_HEADER.pack(*values, expected, fields["base"]) + table + encode(data)
