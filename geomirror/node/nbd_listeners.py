"""The sockets on which a node's exports are served: its own, a configured one, handed-over ones."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from geomirror.config import NbdConfig
from geomirror.errors import UsageError
from geomirror.nbd.server_io import NbdServer
from geomirror.node.activation_io import ActivatedSocket, describe_address
from geomirror.tunnel.names import split_endpoint

_log = structlog.get_logger(component="nbd")

SOCKET_NAMES = ("nbd", "unknown", "geomirror-nbd.socket")
"""Names of handed-over sockets that are taken for NBD: ours, none given, and the unit's own."""


@dataclass(frozen=True)
class NbdAddresses:
    """Where clients find the exports."""

    socket_path: str
    tcp_endpoint: str | None
    exposed: list[str]
    """TCP endpoints beyond this machine on which anybody may read and write."""


def check_names(activated: Sequence[ActivatedSocket]) -> None:
    """:raises UsageError: a handed-over socket has a name that is not one of NBD's."""
    for entry in activated:
        if entry.name not in SOCKET_NAMES:
            raise UsageError(
                f'a socket named "{entry.name}" was handed over, and only "nbd" is known',
                hint="set FileDescriptorName=nbd in the .socket unit",
            )


async def start_nbd(
    server: NbdServer, config: NbdConfig, path: str, activated: Sequence[ActivatedSocket]
) -> NbdAddresses:
    """Listen everywhere.

    :param path: of the node's own Unix socket; not made when a handed-over one has that path.
    :raises GeomirrorError: a socket cannot be had; `server.stop` closes those that could.
    """
    tcp: list[tuple[str, str]] = []
    is_own_there = False
    for entry in activated:
        listener = entry.listener
        shown = describe_address(listener)
        if listener.family == socket.AF_UNIX:
            is_own_there |= shown == path
        else:
            tcp.append((str(listener.getsockname()[0]), shown))
        await server.start_socket(listener)
        _log.info("nbd_socket_taken_over", name=entry.name, address=shown)
    if not is_own_there:
        await server.start_unix(path)
    if config.tcp_listen:
        host, port = await server.start_tcp(*split_endpoint(config.tcp_listen))
        tcp.insert(0, (host, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))
    exposed = [shown for host, shown in tcp if not is_loopback(host)]
    return NbdAddresses(path, tcp[0][1] if tcp else None, exposed)


def warn_if_exposed(addresses: NbdAddresses) -> None:
    """Say it, at every start: neither encryption nor authentication stands before the volumes."""
    for endpoint in addresses.exposed:
        _log.warning(
            "nbd_tcp_is_exposed",
            endpoint=endpoint,
            reason="whoever reaches this address can read and write all volumes",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a numeric address."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
