"""Real daemons with tunnels in namespaces joined by a veth: traffic, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from geomirror.lab.namespace_io import Namespace, make_owner
from geomirror.node.tunnel_store import tag_of
from geomirror.tunnel.network_io import load_network
from tests.lab.packet_support import need, need_namespaces
from tests.system.support import Site, count_links, until

SOCKETS = Path("/var/run/wireguard")
TCP_PORT = 9100


def need_tunnels() -> None:
    """All that tunnels take, or the end of the test."""
    need_namespaces()
    for tool in ("wg", "wireguard-go"):
        if shutil.which(tool) is None:
            need(f"{tool} is not installed")


def ip(*arguments: str) -> str:
    """Run `ip`; what it printed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


class Host(Site):
    """A node alone in a network namespace, as root."""

    def __init__(self, root: Path, name: str, namespace: Namespace) -> None:
        super().__init__(root, name)
        self.namespace = namespace
        self.endpoint = f"{namespace.ipv4}:{self.port}"
        self.before: dict[str, Any] = {}
        """Its `picture` before there were tunnels."""

    def command(self, *arguments: str) -> list[str]:
        return self.namespace.command(*super().command(*arguments))

    def entered(self, *arguments: str) -> list[Path]:
        return [self.namespace.path]

    def configure(self, text: str) -> None:
        """Write the configuration file."""
        path = self.data_dir / "geomirror.toml"
        path.write_text(text)
        path.chmod(0o600)

    def tunnel(self) -> dict[str, Any]:
        """`tunnel status` of it."""
        return self.call("tunnel.status")

    def neighbour(self) -> dict[str, Any]:
        """Its tunnel to the one other node."""
        found: dict[str, Any] = self.tunnel()["neighbours"][0]
        return found

    @property
    def tag(self) -> str:
        """First part of the names of its interfaces."""
        return tag_of(load_network(self.data_dir))

    def is_through(self) -> bool:
        """Whether the tunnel is up in its own words."""
        return bool(self.neighbour()["state"] == "up")

    def picture(self) -> dict[str, Any]:
        """Everything of the network in the namespace that tunnels could have changed."""
        n = self.namespace.name
        links = json.loads(ip("-n", n, "-j", "address", "show"))
        addresses = {
            link["ifname"]: sorted(info["local"] for info in link["addr_info"]) for link in links
        }
        routes = [ip("-n", n, family, "route", "show", "table", "all") for family in ("-4", "-6")]
        rules = [ip("-n", n, family, "rule", "show") for family in ("-4", "-6")]
        return {"addresses": addresses, "routes": routes, "rules": rules}

    def ping(self, address: str, size: int = 84, wait_s: float = 2) -> bool:
        """Whether the address answers a packet of `size` bytes that is never fragmented."""
        is_ipv6 = ":" in address
        family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if is_ipv6 else socket.IPPROTO_ICMP
        request, reply = (128, 129) if is_ipv6 else (8, 0)
        sent = os.urandom(size - (40 if is_ipv6 else 20) - 8)
        head = struct.pack("!BBHHH", request, 0, 0, os.getpid() & 0xFFFF, 1)
        if not is_ipv6:
            total = _checksum(head + sent)
            head = struct.pack("!BBHHH", request, 0, total, os.getpid() & 0xFFFF, 1)
        with socket_in(self, family, socket.SOCK_RAW, protocol) as echo:
            # IP_MTU_DISCOVER and IPV6_MTU_DISCOVER, "do": by what the route says.
            echo.setsockopt(*((socket.IPPROTO_IPV6, 23) if is_ipv6 else (socket.IPPROTO_IP, 10)), 2)
            try:
                echo.sendto(head + sent, (address, 0))
            except OSError:
                return False
            give_up = time.monotonic() + wait_s
            while (left := give_up - time.monotonic()) > 0:
                echo.settimeout(left)
                try:
                    packet = echo.recv(1 << 16)
                except TimeoutError:
                    return False
                answer = packet if is_ipv6 else packet[20:]
                if answer[0] == reply and answer[8:] == sent:
                    return True
        return False

    def pid(self) -> int | None:
        """Of the process that serves the tunnel."""
        found: int | None = self.neighbour()["process_id"]
        return found


def connection(source: Host, target: Host, address: str) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection to a virtual address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket_in(target, family) as listener:
        # An earlier story's connection may be in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, TCP_PORT + 1))
        listener.listen()
        listener.settimeout(20)
        sender = socket_in(source, family)
        sender.settimeout(30)
        sender.connect((address, TCP_PORT + 1))
        taken, _ = listener.accept()
    taken.settimeout(30)
    return sender, taken


def transfer(source: Host, target: Host, address: str, data: bytes) -> tuple[bytes, str]:
    """Bytes over TCP to a virtual address; what arrived, and where it came from."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket_in(target, family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.settimeout(20)
        listener.bind((address, TCP_PORT))
        listener.listen()
        with socket_in(source, family) as sender:
            sender.settimeout(20)
            sender.connect((address, TCP_PORT))

            def send() -> None:
                sender.sendall(data)
                sender.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=send)
            thread.start()
            taken, origin = listener.accept()
            taken.settimeout(20)
            with taken:
                found = b"".join(iter(lambda: taken.recv(1 << 18), b""))
            thread.join()
    return found, str(origin[0])


def _checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def socket_in(
    host: Host, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0
) -> socket.socket:
    """A socket that lives in the host's namespace."""
    made: list[socket.socket] = []

    def make() -> None:
        # A thread of its own: setns changes the calling thread, which ends here.
        with contextlib.ExitStack() as stack:
            descriptor = os.open(host.namespace.path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            setns(descriptor)
            made.append(socket.socket(family, kind, protocol))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def setns(descriptor: int) -> None:
    """Move this thread into a network namespace."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(descriptor, 0x40000000) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def two_hosts(root: Path) -> Iterator[tuple[Host, Host]]:
    """Two namespaces with a veth between them, without daemons yet."""
    owner = make_owner()
    names = [f"{owner}-{name}" for name in "ab"]
    hosts: list[Host] = []
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        veth = ("link", "add", "eth0", "type", "veth", "peer", "name", "eth0")
        ip("-n", names[0], *veth, "netns", names[1])
        for number, name in enumerate(names, 1):
            v4, v6 = IPv4Address(f"192.0.2.{number}"), IPv6Address(f"2001:db8::{number}")
            ip("-n", name, "address", "add", f"{v4}/24", "dev", "eth0")
            ip("-n", name, "address", "add", f"{v6}/64", "dev", "eth0", "nodad")
            # An address of its own making would come a second later, into the picture.
            ip("-n", name, "link", "set", "eth0", "addrgenmode", "none", "up")
            hosts.append(Host(root, "ab"[number - 1], Namespace(name, v4, v6)))
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.end()
            # Of a daemon that had to be killed.
            if (host.data_dir / "network/network.json").exists():
                for path in SOCKETS.glob(f"{host.tag}*.sock"):
                    path.unlink(missing_ok=True)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def make_virtual_network(a: Host, b: Host, config: str) -> None:
    """Two running, linked nodes `east-1` and `west-1` in 10.77.0.0/16."""
    a.run(
        *("network", "create", "acme", "--site", "east", "--node", "east-1"),
        *("--listen", a.endpoint, "--range", "10.77.0.0/16"),
    )
    a.configure(config)
    a.start()
    token = a.run("token", "create", "--site", "west", "--node", "west-1").strip()
    b.run("join", token, "--listen", b.endpoint)
    b.configure(config)
    b.start()
    for host in (a, b):
        until(lambda host=host: count_links(host) == 1, what=f"link of {host.name}")
