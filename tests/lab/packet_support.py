"""For tests of the packet-level emulator: may they run here, and traffic in the same process.

Sockets of both namespaces live in this process, so that no other program is needed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field

import pytest

from geomirror.errors import NotFoundError
from geomirror.lab.compile_io import find_compiler
from geomirror.lab.namespace_io import Namespace, make_owner
from geomirror.lab.packet_emulator_io import may_run

ECHO_REQUEST, ECHO_REPLY = 8, 0
UDP_PORT = 9000
TCP_PORT = 9001


def need(what: str) -> None:
    """Something that can be installed is missing."""
    pytest.skip(what)


def need_compiler() -> None:
    """A C compiler, or the end of the test."""
    try:
        find_compiler()
    except NotFoundError as error:
        need(str(error))


@functools.cache
def namespace_refusal() -> str:
    """Why this kernel or container makes no network namespaces; empty when it does."""
    name = f"{make_owner()}-probe"
    made = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, timeout=10, check=False
    )
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], timeout=10, check=True)
    return made.stderr.strip()


def need_packet_emulator() -> None:
    """All that the packet-level emulator takes, or the end of the test."""
    need_namespaces()
    need_compiler()


def need_namespaces() -> None:
    """Network namespaces with TUN devices, or the end of the test."""
    if not may_run():
        pytest.skip("network namespaces with TUN devices need root and /dev/net/tun")
    if shutil.which("ip") is None:
        need("ip of iproute2 is not installed")
    if refusal := namespace_refusal():
        pytest.skip(f"no network namespaces here: {refusal}")


@dataclass
class Pings:
    """Answers to echo requests."""

    sent: int = 0
    rtt_s: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """Sequence numbers as their answers came, duplicates included."""

    @property
    def received(self) -> int:
        """Requests with an answer."""
        return len(set(self.order))


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ping(
    source: Namespace,
    target: Namespace,
    count: int = 10,
    *,
    interval_s: float = 0.002,
    wait_s: float = 1.0,
    payload_bytes: int = 56,
    is_unfragmented: bool = False,
) -> Pings:
    """Echo requests answered by the target's kernel; ends when all came or after `wait_s`."""
    pings = Pings()
    begins: dict[int, float] = {}
    with source.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP) as echo:
        echo.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        if is_unfragmented:
            # IP_MTU_DISCOVER, IP_PMTUDISC_PROBE: never in fragments, whatever the path was.
            echo.setsockopt(socket.IPPROTO_IP, 10, 3)
        identifier = os.getpid() & 0xFFFF

        def receive(until: float) -> None:
            while (left := until - time.monotonic()) > 0:
                echo.settimeout(left)
                try:
                    packet = echo.recv(1 << 16)
                except TimeoutError:
                    return
                kind, _, _, found, sequence = struct.unpack_from("!BBHHH", packet, 20)
                if (kind, found) == (ECHO_REPLY, identifier):
                    pings.rtt_s.append(time.monotonic() - begins[sequence])
                    pings.order.append(sequence)

        for sequence in range(count):
            body = bytes(payload_bytes)
            header = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, identifier, sequence)
            total = _checksum(header + body)
            header = struct.pack("!BBHHH", ECHO_REQUEST, 0, total, identifier, sequence)
            begins[sequence] = time.monotonic()
            echo.sendto(header + body, (str(target.ipv4), 0))
            pings.sent += 1
            receive(time.monotonic() + interval_s)
        give_up = time.monotonic() + wait_s
        while pings.received < count and time.monotonic() < give_up:
            receive(min(give_up, time.monotonic() + 0.02))
    return pings


def send_numbers(
    source: Namespace, target: Namespace, count: int, *, batch: int = 50, wait_s: float = 0.5
) -> list[int]:
    """UDP datagrams with numbers, one way; the numbers as they arrived."""
    with (
        target.socket(socket.SOCK_DGRAM) as receiver,
        source.socket(socket.SOCK_DGRAM) as sender,
    ):
        # SO_RCVBUFFORCE, over the system's bound: what is not received was lost on the way.
        receiver.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)
        receiver.bind((str(target.ipv4), UDP_PORT))
        receiver.settimeout(wait_s)
        found: list[int] = []
        for number in range(count):
            sender.sendto(struct.pack("!I", number), (str(target.ipv4), UDP_PORT))
            if number % batch == batch - 1:
                time.sleep(0.002)
        with contextlib.suppress(TimeoutError):
            while True:
                found.append(struct.unpack("!I", receiver.recv(64))[0])
        return found


class Transfer:
    """One TCP connection whose bytes go one way, with a thread that takes them."""

    def __init__(self, source: Namespace, target: Namespace, congestion: bytes = b"reno") -> None:
        self.received = bytearray()
        self._is_stopped = False
        with target.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((str(target.ipv4), TCP_PORT))
            listener.listen()
            listener.settimeout(20)
            self.sender = source.socket()
            self.sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion)
            self.sender.settimeout(20)
            self.sender.connect((str(target.ipv4), TCP_PORT))
            self._taker, _ = listener.accept()
        self._taker.settimeout(20)
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._taker.recv(1 << 18):
                self.received += data

    def send_for(self, seconds: float) -> None:
        """Send zeros for a time, or until `stop`."""
        give_up = time.monotonic() + seconds
        data = bytes(1 << 14)
        while not self._is_stopped and time.monotonic() < give_up:
            self.sender.sendall(data)

    def stop(self) -> None:
        """End `send_for`."""
        self._is_stopped = True

    def finish(self) -> bytes:
        """Send the end and wait until the other side has it; all that arrived."""
        self.sender.shutdown(socket.SHUT_WR)
        self._thread.join(20)
        assert not self._thread.is_alive()
        return bytes(self.received)

    def close(self) -> None:
        """Forget the connection."""
        self.sender.close()
        with contextlib.suppress(OSError):
            self._taker.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._taker.close()
