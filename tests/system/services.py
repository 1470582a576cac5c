"""Applications for circuits: an echo server with a mind of its own, and a client in steps."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.system.support import Site, until

PIECE = 1 << 18


class Server:
    """A TCP server on loopback; each connection has a thread that runs `behave`."""

    def __init__(self, behave: Callable[[socket.socket], None]) -> None:
        self._behave = behave
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._listening.getsockname()[1])
        self.connections: list[socket.socket] = []
        self.resets = 0
        """Connections that were reset."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.connections.append(sock)
                threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock: socket.socket) -> None:
        try:
            self._behave(sock)
        except ConnectionResetError:
            self.resets += 1
        except OSError:
            pass  # closed by `stop`

    def stop(self) -> None:
        # Wakes the thread that accepts; a plain close would leave it there.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for sock in self.connections:
            sock.close()


def echo(sock: socket.socket) -> None:
    """Send back what comes; the end, too."""
    while data := sock.recv(PIECE):
        sock.sendall(data)
    sock.close()


def answer_at_the_end(sock: socket.socket) -> None:
    """Say how much came, but only after its end: wants a half-closed connection."""
    count = 0
    while data := sock.recv(PIECE):
        if data.endswith(b"reset!"):
            reset(sock)
            return
        count += len(data)
    sock.sendall(f"{count} bytes".encode())
    sock.close()


def never_read(sock: socket.socket) -> None:
    """Take nothing for as long as the test lasts."""
    threading.Event().wait(60)


@contextmanager
def serving(behave: Callable[[socket.socket], None]) -> Iterator[Server]:
    server = Server(behave)
    try:
        yield server
    finally:
        server.stop()


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 20)
    sock.settimeout(60)
    return sock


def receive_all(sock: socket.socket) -> bytes:
    """Until the other side ends."""
    found = bytearray()
    while data := sock.recv(PIECE):
        found += data
    return bytes(found)


def ask(port: int, data: bytes) -> bytes:
    """Send, end, and read to the end, as a client in a hurry does."""
    with connect(port) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return receive_all(sock)


def is_reset(sock: socket.socket) -> bool:
    """Whether the connection ends with a reset, not with an end."""
    try:
        while sock.recv(PIECE):
            pass
    except ConnectionResetError:
        return True
    return False


def is_turned_away(port: int) -> bool:
    """Whether a connection to the port is reset, at once or soon."""
    try:
        with connect(port) as sock:
            return is_reset(sock)
    except ConnectionResetError:
        return True


def reset(sock: socket.socket) -> None:
    """Close it with a reset."""
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    sock.close()


def publish(holder: Site, user: Site, name: str, port: int, *more: str) -> int:
    """Expose at one node, forward at the other; the local port."""
    holder.run("expose", name, "--port", str(port), *more)
    until(lambda: knows(user, name), what=f"{user.name} knows {name}")
    return forward(user, name)


def forward(user: Site, name: str) -> int:
    listen = str(user.call("service.forward", name=name, port=0)["listen"])
    return int(listen.rpartition(":")[2])


def knows(user: Site, name: str) -> bool:
    return any(s["name"] == name for s in user.call("service.list")["services"])


def exposure(site: Site, name: str) -> dict[str, object]:
    found = site.call("service.list")["exposures"]
    return next(each for each in found if each["name"] == name)


def forwarding(site: Site, name: str) -> dict[str, object]:
    found = site.call("service.list")["forwards"]
    return next(each for each in found if each["name"] == name)
