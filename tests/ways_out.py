"""What stands between two nodes in tests: an HTTP proxy, a firewall, a web front end, an inspector.

Threads and plain sockets, so that tests with and without an event loop use the same ones.
"""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

from geomirror.lab.ports_io import free_port


class Server:
    """Accepts on a loopback port; `serve` runs in a thread for each connection."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self._listening: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.open()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def open(self) -> None:
        """Listen."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        listening.listen(64)
        self._listening = listening
        self._start(self._accept, listening)

    def close(self) -> None:
        """Do not listen; connections are refused and those that exist are cut."""
        listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Close, and wait for the threads."""
        self.close()
        for thread in self._threads:
            thread.join(10)

    def serve(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def hold(self, sock: socket.socket) -> None:
        """Cut it when the server closes."""
        with self._lock:
            self._open.add(sock)

    def release(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
        sock.close()

    def connect(self, port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), 5)
        sock.settimeout(None)
        self.hold(sock)
        return sock

    def splice(self, left: socket.socket, right: socket.socket) -> None:
        """Bytes both ways until one side ends."""
        with contextlib.suppress(OSError):
            while True:
                for sock in select.select([left, right], [], [])[0]:
                    data = sock.recv(1 << 16)
                    if not data:
                        return
                    (right if sock is left else left).sendall(data)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.hold(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(sock)
        self.release(sock)


class Proxy(Server):
    """An HTTP CONNECT proxy.

    :param routes: `HOST:PORT` asked for → loopback port; others are refused.
    """

    def __init__(self, routes: dict[str, int], *, credentials: str = "", port: int = 0) -> None:
        self.routes = routes
        self.credentials = credentials
        self.requests: list[bytes] = []
        self.answer: bytes | None = None
        """Said instead of anything, then nothing more."""
        self.drip_s: float | None = None
        """A byte each so many seconds, for ever."""
        super().__init__(port)

    def serve(self, sock: socket.socket) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            data = sock.recv(1)
            if not data:
                return
            request += data
        self.requests.append(request)
        if self.drip_s is not None:
            while True:
                sock.sendall(b"H")
                time.sleep(self.drip_s)  # Its pace is what the other side has to bear.
        if self.answer is not None:
            sock.sendall(self.answer)
            sock.recv(1)
            return
        lines = request.decode().split("\r\n")
        proof = base64.b64encode(self.credentials.encode()).decode()
        if self.credentials and f"Proxy-Authorization: Basic {proof}" not in lines:
            reply = (
                'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"'
            )
            sock.sendall(f"{reply}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        target = lines[0].split(" ")[1]
        if target not in self.routes:
            sock.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nno way")
            return
        try:
            onward = self.connect(self.routes[target])
        except OSError:
            sock.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        try:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
            self.splice(sock, onward)
        finally:
            self.release(onward)


class Gate(Server):
    """A firewall on the direct way: lets through to a port, refuses, or swallows everything."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._filling: list[socket.socket] = []
        self._is_passable = threading.Event()
        self._is_passable.set()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        onward = self.connect(self.target)
        try:
            with contextlib.suppress(OSError):
                while True:
                    for ready in select.select([sock, onward], [], [], 0.1)[0]:
                        if not self._is_passable.wait(0.1):
                            continue
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        self.passed(data)
                        (onward if ready is sock else sock).sendall(data)
        finally:
            self.release(onward)

    def passed(self, data: bytes) -> None:
        """Called with everything that goes through."""

    def swallow(self) -> None:
        """Become a black hole: connections freeze, new ones get no answer to their first packet."""
        self._is_passable.clear()
        listening, self._listening = self._listening, None
        assert listening is not None
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        full = socket.socket()
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", self.port))
        full.listen(0)
        self._filling = [full]
        while True:  # until its queue is full, the kernel answers
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.port))
            self._filling.append(sock)
            if not select.select([], [sock], [], 0.05)[1]:
                break

    def let_through(self) -> None:
        """Back to normal; what was frozen is cut."""
        self.close()
        for sock in self._filling:
            sock.close()
        self._filling = []
        self._is_passable.set()
        self.open()

    def stop(self) -> None:
        for sock in self._filling:
            sock.close()
        self.close()
        self._is_passable.set()  # Frozen threads see that they are cut.
        super().stop()


class Inspector(Server):
    """A firewall that opens TLS: it answers each handshake with a certificate of its own.

    :param inside: port to which it speaks, in TLS of its own, what it decrypted; None: nowhere.
    """

    def __init__(self, certificate: Path, key: Path, inside: int | None = None) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self.inside = inside
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(sock, server_side=True) as tls:
            self.hold(tls)
            if self.inside is None:
                tls.recv(1)
            else:
                self._pass_on(tls, self.inside)
            self.release(tls)

    def _pass_on(self, tls: ssl.SSLSocket, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with context.wrap_socket(self.connect(port)) as onward:
            self.hold(onward)
            both = (tls, onward)
            for sock in both:
                sock.setblocking(False)
            while True:
                if not any(sock.pending() for sock in both):
                    select.select(both, [], [])
                for sock in both:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        data = sock.recv(1 << 16)
                        if not data:
                            return
                        other = onward if sock is tls else tls
                        other.setblocking(True)
                        other.sendall(data)
                        other.setblocking(False)


def self_signed(directory: Path, name: str = "front.example") -> tuple[Path, Path]:
    """PEM files of a certificate that nobody trusts, and its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True)
    found = directory / f"{name}-cert.pem", directory / f"{name}-key.pem"
    found[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    found[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    found[1].chmod(0o600)
    return found
