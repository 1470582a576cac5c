"""TLS for NBD over TCP: what a listener offers, and the step from plain to encrypted.

Only the server's side. Nothing crosses the step but the bytes of the TLS handshake: what a client
sent in the clear behind STARTTLS ends the connection (CVE-2021-20286 was such a buffer).
"""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from geomirror.errors import AuthError, ConfigError
from geomirror.nbd.negotiation import TlsMode

SHUTDOWN_S_MAX = 5.0
"""How long a close waits for the client's goodbye."""


@dataclass(frozen=True)
class ServerTls:
    """What a TCP listener offers to clients that connect from now on."""

    context: ssl.SSLContext
    mode: TlsMode

    @property
    def is_proof(self) -> bool:
        """True when nobody without a certificate of ours attaches."""
        return self.mode is TlsMode.REQUIRE and self.context.verify_mode is ssl.CERT_REQUIRED


def load_server_tls(certificate: Path, key: Path, ca: Path | None, mode: TlsMode) -> ServerTls:
    """Read a listener's certificate chain, its key, and the authority of its clients, all PEM.

    :param ca: clients must have a certificate of it; None: any client is taken.
    :raises ConfigError: a file cannot be read or used, or others may read or write the key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Every connection proves itself anew: a revoked client must not come back by a ticket.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    _check_key(key)
    try:
        # A key with a passphrase fails, instead of asking a terminal for it.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate}, {key}: not a certificate with its key: {_reason(error)}",
            hint="nbd.tls_certificate and nbd.tls_key are PEM files, the key without passphrase",
        ) from error
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{ca}: no certificates: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return ServerTls(context, mode)


async def upgrade(
    transport: asyncio.Transport,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext,
    timeout_s: float,
) -> asyncio.Transport:
    """Do the handshake over a connection whose reading is paused; the transport to use from then.

    The protocol may get decrypted bytes before this returns.

    :raises AuthError: the client is not let in, or does not speak TLS; abort the connection.
    """
    loop = asyncio.get_running_loop()
    try:
        if transport.is_closing():
            raise ConnectionAbortedError("the connection is closing")
        secured = await loop.start_tls(
            transport,
            protocol,
            context,
            server_side=True,
            ssl_handshake_timeout=timeout_s,
            ssl_shutdown_timeout=SHUTDOWN_S_MAX,
        )
        # A connection that is lost in between looks like a success to both event loops.
        if secured is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
    except OSError as error:
        raise AuthError(f"no TLS with an NBD client: {_reason(error)}") from error
    return secured


def _check_key(key: Path) -> None:
    try:
        mode = os.stat(key).st_mode
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise ConfigError(f"{key}: others may use it", hint=f'run "chmod 600 {key}"')


def _reason(error: Exception) -> str:
    return getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error)
