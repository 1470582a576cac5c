"""How this node gets out and lets others in, as configured: proxy, credentials, WebSockets."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

from geomirror.config import LinksConfig, NodeConfig
from geomirror.errors import ConfigError
from geomirror.tunnel.connect_proxy import CREDENTIALS_BYTES_MAX, Credentials, parse_credentials
from geomirror.tunnel.path_io import WayOut


def websocket_url(config: NodeConfig) -> str | None:
    """Where WebSockets are accepted, for the link driver; None: nowhere."""
    if config.listen_websocket is None:
        return None
    scheme = "ws" if config.websocket_certificate is None else "wss"
    return f"{scheme}://{config.listen_websocket}{config.websocket_path}"


def websocket_tls(config: NodeConfig, root: Path) -> ssl.SSLContext | None:
    """What the WebSocket listener shows; None: it has no TLS of its own.

    :param root: where relative paths begin.
    :raises ConfigError: a file cannot be used, or others may read the key.
    """
    if config.websocket_certificate is None or config.websocket_key is None:
        return None
    certificate, key = root / config.websocket_certificate, root / config.websocket_key
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        _check_private(key)
        # A key with a passphrase fails, instead of asking a terminal for it.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{certificate}, {key}: not a certificate with its key: {reason}",
            hint="node.websocket_certificate and node.websocket_key are PEM files",
        ) from error
    return context


def load_way_out(config: LinksConfig, root: Path) -> WayOut:
    """What dialling needs besides the paths.

    :param root: where relative paths begin.
    :raises ConfigError: the file of the credentials cannot be used, or others may read it.
    """
    return WayOut(_load_credentials(config, root))


def _load_credentials(config: LinksConfig, root: Path) -> Credentials | None:
    if config.proxy_credentials is None:
        return None
    path = root / config.proxy_credentials
    try:
        _check_private(path)
        with path.open("rb") as file:
            data = file.read(CREDENTIALS_BYTES_MAX + 2)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", hint="write USER:PASSWORD into it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return parse_credentials(data, str(path))


def _check_private(path: Path) -> None:
    bits = stat.S_IMODE(path.stat().st_mode)
    if bits & 0o077:
        raise ConfigError(
            f"{path} may be used by other users (mode {bits:04o})", hint=f"run: chmod 600 {path}"
        )
