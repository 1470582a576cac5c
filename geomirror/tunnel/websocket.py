"""WebSocket (RFC 6455) as a carrier of bytes: the upgrade, and binary frames both ways.

```
 GET PATH, Upgrade: websocket ──▶ 101 ──▶ frames:  FIN RSV OPCODE │ MASK LENGTH │ KEY │ payload
```
Only a byte stream is carried, so borders of messages mean nothing: payload goes on as it comes,
and a message of any size costs no memory. Who sends text, unknown opcodes, wrong masks or a frame
over `FRAME_BYTES_MAX` is not one of us. Pings are answered, since front ends send them.
Deliberately not here: extensions (what is carried is ciphertext) and subprotocols.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from geomirror.environment import Entropy
from geomirror.errors import LimitExceededError, LinkError, RefusedError, RemoteProtocolError
from geomirror.limits import KIB, MIB
from geomirror.tunnel.http_head import Head

FRAME_BYTES_MAX = 16 * MIB
"""Announced by the other side; front ends may join frames, of which ours have 64 KiB."""
SENT_BYTES_MAX = 64 * KIB
CONTROL_BYTES_MAX = 125
CLOSE_NORMAL = b"\x03\xe8"
"""1000"""

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==\Z")
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
"""What strangers get, whatever they asked for."""


def new_key(entropy: Entropy) -> str:
    """The `Sec-WebSocket-Key` of one request."""
    return base64.b64encode(entropy.token_bytes(16)).decode("ascii")


def upgrade_request(host: str, resource: str, key: str) -> bytes:
    """Ask for the upgrade.

    :param host: as in the URL, with a port that is not the scheme's.
    """
    lines = [
        f"GET {resource} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def check_upgrade(head: Head, key: str) -> None:
    """Judge the answer.

    :raises LinkError: the server is there, but does not carry our bytes.
    :raises RemoteProtocolError: it says that it does, and did not understand.
    """
    status = head.status()
    if status != 101:
        raise LinkError(
            f"the web server answers {status} instead of opening a WebSocket",
            hint="check path and host of the URL, and that the front end passes WebSockets on",
        )
    is_right = (
        head.words("upgrade") == {"websocket"}
        and "upgrade" in head.words("connection")
        and head.values("sec-websocket-accept") == [_accept(key)]
        and not head.values("sec-websocket-extensions")
        and not head.values("sec-websocket-protocol")
    )
    if not is_right:
        raise RemoteProtocolError("the web server's answer is not that of a WebSocket")


def answer_upgrade(head: Head, resource: str) -> bytes:
    """The answer to a request for the upgrade at this path.

    :raises RefusedError: it asks for something else; the answer is `NOT_FOUND`.
    """
    method, target = head.request()
    keys = head.values("sec-websocket-key")
    is_right = (
        (method, target) == ("GET", resource)
        and len(head.values("host")) == 1
        and head.words("upgrade") == {"websocket"}
        and "upgrade" in head.words("connection")
        and head.values("sec-websocket-version") == ["13"]
        and len(keys) == 1
        and _KEY.match(keys[0])
        and not head.values("content-length")
        and not head.values("transfer-encoding")
    )
    if not is_right:
        raise RefusedError("a stranger asked the WebSocket listener for something else")
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {_accept(keys[0])}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _accept(key: str) -> str:
    digest = hashlib.sha1((key + _MAGIC).encode("ascii"), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii")


@dataclass
class _Frame:
    opcode: int
    length: int
    mask: bytes
    done: int = 0
    control: bytearray = field(default_factory=bytearray)
    """Payload of a ping or close so far."""


class WebSocketFrames:
    """Both directions of one connection after the upgrade."""

    def __init__(self, *, is_client: bool, entropy: Entropy) -> None:
        self._is_client = is_client
        self._entropy = entropy
        self._head = bytearray()
        self._frame: _Frame | None = None
        self._is_within = False
        """A message has begun, and more frames of it follow."""
        self.is_ended = False
        """The other side has closed; nothing after it counts."""

    def encode(self, data: bytes) -> bytes:
        """Bytes as binary frames."""
        if len(data) <= SENT_BYTES_MAX:
            return self._pack(BINARY, data)
        starts = range(0, len(data), SENT_BYTES_MAX)
        return b"".join(self._pack(BINARY, data[at : at + SENT_BYTES_MAX]) for at in starts)

    def ping(self) -> bytes:
        """A frame that keeps front ends from taking a silent connection for a dead one."""
        return self._pack(PING, b"")

    def close(self) -> bytes:
        """The last frame."""
        return self._pack(CLOSE, CLOSE_NORMAL)

    def receive(self, data: bytes, reply: Callable[[bytes], None]) -> list[bytes]:
        """Take bytes; the payload among them, in order.

        :param reply: called with each frame that has to be sent back.
        :raises RemoteProtocolError: close the connection.
        """
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_ended:
            if self._frame is None:
                at = self._read_head(data, at)
            frame = self._frame
            if frame is None:
                break
            piece = data[at : at + frame.length - frame.done]
            at += len(piece)
            if piece:
                if frame.mask:
                    piece = mask(piece, frame.mask, frame.done)
                frame.done += len(piece)
                if frame.opcode >= CLOSE:
                    frame.control += piece
                else:
                    pieces.append(piece)
            if frame.done == frame.length:
                self._frame = None
                self._finish(frame, reply)
        return pieces

    def _finish(self, frame: _Frame, reply: Callable[[bytes], None]) -> None:
        if frame.opcode == PING:
            reply(self._pack(PONG, bytes(frame.control)))
        elif frame.opcode == CLOSE:
            self.is_ended = True
            reply(self._pack(CLOSE, bytes(frame.control[:2])))

    def _read_head(self, data: bytes, at: int) -> int:
        """Take what is missing of a frame's head; how far it got."""
        while missing := self._head_bytes() - len(self._head):
            taken = data[at : at + missing]
            self._head += taken
            at += len(taken)
            if len(taken) < missing:
                return at
        self._frame = self._judge(bytes(self._head))
        self._head.clear()
        return at

    def _head_bytes(self) -> int:
        if len(self._head) < 2:
            return 2
        length, is_masked = self._head[1] & 0x7F, self._head[1] & 0x80
        return 2 + {126: 2, 127: 8}.get(length, 0) + (4 if is_masked else 0)

    def _judge(self, head: bytes) -> _Frame:
        is_final, opcode, short = head[0] & 0x80, head[0] & 0x0F, head[1] & 0x7F
        mask_bytes = head[-4:] if head[1] & 0x80 else b""
        length = short
        if short >= 126:
            length = int.from_bytes(head[2 : 4 if short == 126 else 10], "big")
            if length < (126 if short == 126 else 1 << 16):
                raise RemoteProtocolError("a WebSocket frame with a length in too many bytes")
        if head[0] & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise RemoteProtocolError("a WebSocket frame of an unknown kind")
        if opcode == TEXT:
            raise RemoteProtocolError("a WebSocket message of text")
        if bool(mask_bytes) == self._is_client:
            raise RemoteProtocolError("a WebSocket frame with the mask of the wrong side")
        if opcode >= CLOSE:
            if not is_final or length > CONTROL_BYTES_MAX:
                raise RemoteProtocolError("a WebSocket control frame that is too long or in parts")
        elif (opcode == CONTINUATION) != self._is_within:
            raise RemoteProtocolError("a WebSocket message within another")
        else:
            self._is_within = not is_final
        if length > FRAME_BYTES_MAX:
            raise LimitExceededError(f"a WebSocket frame over {FRAME_BYTES_MAX} bytes")
        return _Frame(opcode, length, mask_bytes)

    def _pack(self, opcode: int, payload: bytes) -> bytes:
        length, bit = len(payload), 0x80 if self._is_client else 0
        if length < 126:
            head = bytes((0x80 | opcode, bit | length))
        elif length < 1 << 16:
            head = bytes((0x80 | opcode, bit | 126)) + length.to_bytes(2, "big")
        else:
            head = bytes((0x80 | opcode, bit | 127)) + length.to_bytes(8, "big")
        if not self._is_client:
            return head + payload
        key = self._entropy.token_bytes(4)
        return head + key + mask(payload, key, 0)


def mask(data: bytes, key: bytes, position: int) -> bytes:
    """Put on or take off a mask, from this position of the payload on."""
    shift = position % 4
    pattern = (key[shift:] + key[:shift]) * (len(data) // 4 + 1)
    left = np.frombuffer(data, np.uint8)
    return np.bitwise_xor(left, np.frombuffer(pattern, np.uint8)[: len(data)]).tobytes()
