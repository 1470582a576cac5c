"""The sockets on which a node's exports are served: its own, a configured one, handed-over ones."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from geomirror.config import NbdConfig
from geomirror.errors import UsageError
from geomirror.nbd.negotiation import TlsMode
from geomirror.nbd.server_io import NbdServer
from geomirror.nbd.tls_io import ServerTls, load_server_tls
from geomirror.node.activation_io import ActivatedSocket, describe_address
from geomirror.tunnel.names import split_endpoint

_log = structlog.get_logger(component="nbd")

SOCKET_NAMES = ("nbd", "unknown", "geomirror-nbd.socket")
"""Names of handed-over sockets that are taken for NBD: ours, none given, and the unit's own."""


@dataclass(frozen=True)
class NbdAddresses:
    """Where clients find the exports."""

    socket_path: str
    tcp: list[tuple[str, str]]
    """(address, HOST:PORT) of each TCP socket, the configured one first."""

    def exposed(self, tls: ServerTls | None) -> list[str]:
        """Endpoints beyond this machine on which strangers may read and write."""
        if tls is not None and tls.is_proof:
            return []
        return [shown for host, shown in self.tcp if not is_loopback(host)]

    def tcp_base_uri(self, tls: ServerTls | None) -> str | None:
        """What stands before the export's name in the URI of the first TCP socket."""
        scheme = "nbd" if tls is None else "nbds"
        return f"{scheme}://{self.tcp[0][1]}" if self.tcp else None


def load_nbd_tls(config: NbdConfig, root: Path) -> ServerTls | None:
    """TLS as configured; None when it is not.

    :param root: where relative paths begin.
    :raises ConfigError: a file cannot be used.
    """
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return load_server_tls(
        root / config.tls_certificate,
        root / config.tls_key,
        root / config.tls_ca if config.tls_ca is not None else None,
        TlsMode.ALLOW if config.tls == "allow" else TlsMode.REQUIRE,
    )


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
    return NbdAddresses(path, tcp)


def warn_if_exposed(addresses: NbdAddresses, tls: ServerTls | None) -> None:
    """Say it, at every start and reload."""
    for endpoint in addresses.exposed(tls):
        _log.warning(
            "nbd_tcp_is_exposed",
            endpoint=endpoint,
            reason="whoever reaches this address can read and write all volumes",
            hint='set nbd.tls_certificate, tls_key and tls_ca, and tls = "require"',
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a numeric address."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
