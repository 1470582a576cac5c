"""Carries one client's NBD connection to the daemon's Unix socket, confined to one export.

    client ──flags──> relay ──flags, CONFINE──> daemon
    client <────────── bytes, unlooked at ────> daemon

Only the hello and the client's flags are read here; the daemon does the rest of the negotiation,
so that everything it can do is had through a relay too. Blocking, with two threads a connection:
standard streams may be pipes, sockets or files, and event loops want only some of them. Memory is
bounded by `BUFFER_BYTES` for each direction; a slow side holds the other one back.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Protocol

from geomirror.errors import (
    GeomirrorError,
    NotFoundError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
)
from geomirror.nbd import constants as c

BUFFER_BYTES = 256 << 10
"""Of one direction."""
_HELLO_BYTES = 18
_FLAGS_BYTES = 4
_REPLY = struct.Struct(">QIII")


class Channel(Protocol):
    """The client's side of a relay."""

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end."""

    def send(self, data: memoryview) -> None:
        """Hand on all bytes."""

    def end(self) -> None:
        """Nothing more comes or is taken; ends a waiting `receive_into` where that can be."""


class SocketChannel:
    """An accepted connection; closed by `close`, after the threads are through."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end."""
        return self._socket.recv_into(buffer)

    def send(self, data: memoryview) -> None:
        """Hand on all bytes."""
        self._socket.sendall(data)

    def end(self) -> None:
        """Shut both directions down."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class DescriptorChannel:
    """A pair of descriptors: pipes, or the same socket twice, as inetd gives it."""

    def __init__(self, source: int, target: int) -> None:
        for descriptor in (source, target):
            os.set_blocking(descriptor, True)
        self._source, self._target = source, target

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end."""
        return os.readv(self._source, [buffer])

    def send(self, data: memoryview) -> None:
        """Hand on all bytes."""
        while data:
            data = data[os.write(self._target, data) :]

    def end(self) -> None:
        """Nothing: the end of the process ends them."""


def relay(channel: Channel, path: str, export: str) -> None:
    """Serve one client until either side ends the connection.

    :param path: the daemon's NBD socket.
    :param export: the only export that the client sees; the empty name stands for it.
    :raises UnreachableError: the daemon does not answer, or went away before the client.
    :raises NotFoundError, RefusedError: the daemon does not serve the export.
    """
    with _connect(path) as server:
        try:
            is_confined = _introduce(channel, server, export)
            if is_confined:
                _carry(channel, server)
        except OSError as error:
            text = f"the connection to the daemon was lost: {error.strerror or error}"
            raise UnreachableError(text) from error
        finally:
            channel.end()


def _carry(channel: Channel, server: socket.socket) -> None:
    """Both directions until the daemon, whose word is the last one, is done."""

    is_client_done = threading.Event()

    def upwards() -> None:
        # A client that is lost is a client that is done.
        with contextlib.suppress(OSError):
            _pump(channel.receive_into, server.sendall)
        is_client_done.set()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=upwards, name="relay-upwards", daemon=True)
    thread.start()

    def downwards(data: memoryview) -> None:
        try:
            channel.send(data)
        except OSError as error:
            raise _ClientGone from error

    try:
        _pump(server.recv_into, downwards)
    except _ClientGone:
        pass
    except OSError:
        # The daemon resets a connection whose client left it with replies to come.
        if not is_client_done.is_set():
            raise
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        channel.end()
        if isinstance(channel, SocketChannel):
            thread.join()  # Of descriptors, a read may wait for ever; it ends with the process.


class _ClientGone(Exception):
    """The client takes no more; never leaves this module."""


def _pump(receive_into: Callable[[memoryview], int], send: Callable[[memoryview], None]) -> None:
    """Copy from one side to the other until the end."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while count := receive_into(buffer):
        send(buffer[:count])


def _connect(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.connect(path)
    except OSError as error:
        server.close()
        raise UnreachableError(
            f'no daemon answers on "{path}": {error.strerror or error}',
            hint='is "geomirror node run" running?',
        ) from error
    return server


def _introduce(channel: Channel, server: socket.socket, export: str) -> bool:
    """The first words of both sides, with ours in between; False when the client said nothing."""
    hello = _exactly(server.recv_into, _HELLO_BYTES)
    if hello is None:
        raise UnreachableError("the daemon takes no more connections")
    try:
        channel.send(memoryview(hello))
        flags = _exactly(channel.receive_into, _FLAGS_BYTES)
    except OSError:
        return False
    if flags is None:
        return False
    name = export.encode()
    # A client without fixed newstyle gets it from us: we need it, and it hears nothing of it.
    given = int.from_bytes(flags, "big") | c.FLAG_FIXED_NEWSTYLE
    option = struct.pack(">QII", c.OPTION_MAGIC, c.OPT_CONFINE, len(name))
    server.sendall(struct.pack(">I", given) + option + name)
    head = _exactly(server.recv_into, _REPLY.size)
    if head is None:
        raise UnreachableError("the daemon ended the connection")
    magic, answered, kind, length = _REPLY.unpack(head)
    if (magic, answered) != (c.OPTION_REPLY_MAGIC, c.OPT_CONFINE) or length > c.OPTION_BYTES_MAX:
        raise RemoteProtocolError("the daemon's answer is not one")
    text = _exactly(server.recv_into, length)
    if kind != c.REP_ACK:
        raise _refusal(kind, export, (text or b"").decode(errors="replace"))
    return True


def _refusal(kind: int, export: str, text: str) -> GeomirrorError:
    if kind == c.REP_ERR_UNKNOWN:
        return NotFoundError(f'"{export}" is not served', hint='see "geomirror status"')
    if kind == c.REP_ERR_UNSUP:
        return RefusedError("the daemon is an older version", hint="restart it")
    return RefusedError(f'"{export}" is refused by the daemon: {text}')


def _exactly(receive_into: Callable[[memoryview], int], count: int) -> bytes | None:
    """That many bytes, or None when the end comes first."""
    buffer = bytearray(count)
    at = 0
    while at < count:
        received = receive_into(memoryview(buffer)[at:])
        if not received:
            return None
        at += received
    return bytes(buffer)
