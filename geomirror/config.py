"""The node's configuration: one TOML file, `DATA_DIR/geomirror.toml`, and its defaults.

`docs/config.example.toml` is the reference: every key with unit, default and whether a running
node takes a change at SIGHUP; a test compares it with the structs below. An unknown key is an
error, never ignored. A resource's settings are not here: they are replicated with the resource.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from geomirror.environment import MS, SECOND
from geomirror.errors import ConfigError
from geomirror.limits import MIB, PRODUCTION, Limits

CONFIG_BYTES_MAX = 1 * MIB
"""Largest configuration file that is read."""

Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
"""Up to 1 PiB: far above any use, and far below what 64 bits count."""
_PORT = "6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|0?[0-9]{1,4}"
Endpoint = Annotated[str, Meta(pattern=rf"^(\[[0-9A-Fa-f:.%]+\]|[^:\s\[\]]+):({_PORT})\Z")]
"""HOST:PORT; an IPv6 host stands in brackets."""
_URL = rf"wss?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:({_PORT}))?(/[A-Za-z0-9._~/-]*)?"
PeerEndpoint = Annotated[
    str, Meta(pattern=rf"^((\[[0-9A-Fa-f:.%]+\]|[^:\s\[\]]+):({_PORT})|{_URL})\Z", max_length=256)
]
"""HOST:PORT, or the URL of a WebSocket."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class NodeConfig(_Section, frozen=True):
    """`[node]`"""

    listen: Endpoint | None = None
    """Overrides the endpoint given to `network create` or `join` with `--listen`."""
    worker_threads: Annotated[int, Meta(ge=2, le=64)] = 4
    listen_websocket: Endpoint | None = None
    websocket_path: Annotated[str, Meta(pattern=r"^/[A-Za-z0-9._~/-]{0,127}\Z")] = "/geomirror"
    websocket_certificate: str | None = None
    websocket_key: str | None = None

    def __post_init__(self) -> None:
        if (self.websocket_certificate is None) != (self.websocket_key is None):
            raise ValueError("websocket_certificate and websocket_key belong together")
        if self.websocket_certificate is not None and self.listen_websocket is None:
            raise ValueError("websocket_certificate needs listen_websocket")


class NbdConfig(_Section, frozen=True):
    """`[nbd]`"""

    tcp_listen: Endpoint | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls: Literal["require", "allow"] = "require"
    single_writer: bool = False
    read_only: bool = False

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.tls_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_ca needs tls_certificate and tls_key")


class LinksConfig(_Section, frozen=True):
    """`[links]`"""

    rate_bits_per_second: Annotated[int, Meta(ge=0, le=10**13)] = 0
    data_connections: Annotated[int, Meta(ge=1, le=PRODUCTION.data_connections_max)] = (
        PRODUCTION.data_connections
    )
    hello_interval_ms: Annotated[int, Meta(ge=20, le=60_000)] = PRODUCTION.hello_interval_ns // MS
    hello_misses_max: Annotated[int, Meta(ge=3, le=100)] = PRODUCTION.hello_misses_max
    tcp_segment_bytes: Annotated[int, Meta(ge=0, le=32_767)] = PRODUCTION.tcp_segment_bytes
    proxy: Endpoint | None = None
    """An HTTP proxy that takes CONNECT, for peers that are not reached directly."""
    proxy_credentials: str | None = None

    def __post_init__(self) -> None:
        if self.proxy_credentials is not None and self.proxy is None:
            raise ValueError("proxy_credentials needs proxy")
        if self.tcp_segment_bytes and not 88 <= self.tcp_segment_bytes <= 32_767:
            raise ValueError("tcp_segment_bytes is 0 or from 88 to 32767, as the kernel takes it")


class TunnelConfig(_Section, frozen=True):
    """`[tunnel]`"""

    driver: Literal["none", "wireguard"] = "none"
    port: Annotated[int, Meta(ge=1, le=65_535)] = 7710
    mtu: Annotated[int, Meta(ge=1280, le=65_455)] = 1280
    """IPv6 has no smaller one, and every path takes 80 bytes more than this."""
    hosts_file: Annotated[str, Meta(pattern=r"^/.*[^/]\Z")] | None = None


class PeerConfig(_Section, frozen=True):
    """`[peers.NAME]`"""

    endpoints: list[PeerEndpoint] = []
    """Replaces the endpoints that the network knows for this node; empty replaces nothing."""


class ReplicationConfig(_Section, frozen=True):
    """`[replication]`"""

    epoch_age_ms: Annotated[int, Meta(ge=10, le=60_000)] = PRODUCTION.epoch_age_ns // MS


class StorageConfig(_Section, frozen=True):
    """`[storage]`"""

    dirty_bytes_max: Annotated[int, Meta(ge=16 * MIB, le=1 << 50)] = PRODUCTION.dirty_bytes_max
    destage_age_s: Annotated[int, Meta(ge=1, le=3600)] = PRODUCTION.destage_age_ns_max // SECOND
    undo_bytes_max: Bytes = PRODUCTION.undo_bytes_max
    branches_bytes_max: Bytes = PRODUCTION.branches_bytes_max
    resync_undo_bytes_max: Bytes = PRODUCTION.resync_undo_bytes_max
    full_disk_wait_s: Annotated[int, Meta(ge=0, le=3600)] = (
        PRODUCTION.full_disk_wait_ns_max // SECOND
    )


class LogConfig(_Section, frozen=True):
    """`[log]`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Config(_Section, frozen=True):
    """The whole file."""

    node: NodeConfig = NodeConfig()
    nbd: NbdConfig = NbdConfig()
    links: LinksConfig = LinksConfig()
    tunnel: TunnelConfig = TunnelConfig()
    peers: dict[str, PeerConfig] = {}
    replication: ReplicationConfig = ReplicationConfig()
    storage: StorageConfig = StorageConfig()
    log: LogConfig = LogConfig()

    def limits(self, base: Limits = PRODUCTION) -> Limits:
        """`base` with the bounds that the operator set."""
        return replace(
            base,
            data_connections=self.links.data_connections,
            hello_interval_ns=self.links.hello_interval_ms * MS,
            hello_misses_max=self.links.hello_misses_max,
            tcp_segment_bytes=self.links.tcp_segment_bytes,
            epoch_age_ns=self.replication.epoch_age_ms * MS,
            dirty_bytes_max=self.storage.dirty_bytes_max,
            destage_age_ns_max=self.storage.destage_age_s * SECOND,
            undo_bytes_max=self.storage.undo_bytes_max,
            branches_bytes_max=self.storage.branches_bytes_max,
            resync_undo_bytes_max=self.storage.resync_undo_bytes_max,
            full_disk_wait_ns_max=self.storage.full_disk_wait_s * SECOND,
        )


RELOADABLE = frozenset(
    {
        "links.proxy",
        "links.proxy_credentials",
        "links.rate_bits_per_second",
        "log.level",
        "nbd.tls",
        "nbd.tls_ca",
        "nbd.tls_certificate",
        "nbd.tls_key",
        "peers",
    }
)
"""Keys (or whole sections) that a running node takes over at SIGHUP; the rest needs a restart."""


def parse_config(text: str, source: str) -> Config:
    """Check and decode a configuration file.

    :param source: name of the file for messages.
    :raises ConfigError: not TOML, an unknown key (with a proposal), or a value that cannot be.
    """
    if len(text) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{source}: over {CONFIG_BYTES_MAX} bytes")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits is a plain ValueError.
        raise ConfigError(f"{source}: not TOML: {error}") from error
    _refuse_unknown_keys(table, Config, source, "")
    try:
        return msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        key = str(error).rpartition("`$.")[2].rstrip("`") or "?"
        reason = str(error).partition(" - at `")[0]
        raise ConfigError(f"{source}: key {key}: {reason}", hint=_HINT) from error


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted names of the keys (for `peers`: the section) whose values differ."""
    changed: list[str] = []
    for section in Config.__struct_fields__:
        before, after = getattr(old, section), getattr(new, section)
        if section == "peers":
            changed += ["peers"] if before != after else []
            continue
        for key in before.__struct_fields__:
            if getattr(before, key) != getattr(after, key):
                changed.append(f"{section}.{key}")
    return changed


_HINT = 'docs/config.example.toml has every key; "geomirror node check-config" checks a file'


def _refuse_unknown_keys(table: dict[str, Any], kind: type, source: str, prefix: str) -> None:
    for field in msgspec.structs.fields(kind):
        if field.name not in table:
            continue
        value, inner = table[field.name], field.type
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, _Section):
            _refuse_unknown_keys(value, inner, source, f"{prefix}{field.name}.")
        elif isinstance(value, dict) and field.name == "peers":
            section = get_args(inner)[1]
            for name, entry in value.items():
                if isinstance(entry, dict):
                    _refuse_unknown_keys(entry, section, source, f"{prefix}peers.{name}.")
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key in table:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        proposal = f'did you mean "{prefix}{near[0]}"?' if near else _HINT
        raise ConfigError(f"{source}: unknown key {prefix}{key}", hint=proposal)
