"""`geomirror.toml`: refused with a ConfigError, or a configuration that a node can run with."""

from __future__ import annotations

from typing import Any

import msgspec
import tomli_w

from geomirror.config import Config, changed_keys, parse_config
from geomirror.errors import ConfigError
from tests.fuzz.corpus import ROOT


def _keys(section: msgspec.structs.FieldInfo) -> list[str]:
    fields = msgspec.structs.fields(section.type) if section.name != "peers" else ()
    return [field.name for field in fields]


INPUT_BYTES_MAX = 8192
WORDS = [
    *(
        f"{field}=".encode()
        for section in msgspec.structs.fields(Config)
        for field in _keys(section)
    ),
    *(f"\n[{section.name}]\n".encode() for section in msgspec.structs.fields(Config)),
    *(b"9" * 4400, b"9223372036854775808", b"1979-05-27", b"nan", b"{}", b"[]", b'"h:1"', b"true"),
]


def seeds() -> list[bytes]:
    """The reference file, its sections one by one, and what TOML can do besides."""
    example = (ROOT.parent.parent / "docs" / "config.example.toml").read_text()
    lines = [line.removeprefix("# ") for line in example.splitlines()]
    texts = [
        *("\n".join(lines[at : at + 12]) for at in range(0, len(lines), 12)),
        '[node]\nlisten = "0.0.0.0:7701"\nworker_threads = 4\n',
        '[nbd]\ntcp_listen = "[::1]:10809"\ntls_certificate = "a"\ntls_key = "b"\ntls = "allow"\n',
        "[links]\nrate_bits_per_second = 20_000_000\ndata_connections = 8\nhello_misses_max = 5\n",
        '[peers.west-1]\nendpoints = ["203.0.113.7:7701", "h:1"]\n[peers."a b"]\n',
        "[storage]\ndirty_bytes_max = 16777216\ndestage_age_s = 1\nundo_bytes_max = 0\n",
        '[log]\nlevel = "debug"\nformat = "json"\n[replication]\nepoch_age_ms = 10\n',
        "links = {hello_interval_ms = 0x20}\nnode = 1979-05-27T07:32:00Z\nnbd = [nan, -inf]\n",
    ]
    return [text.encode() for text in texts]


def run(data: bytes) -> None:
    """Text → configuration → text → the same configuration."""
    text = data.decode("utf-8", "replace")
    try:
        config = parse_config(text, "fuzz.toml")
    except ConfigError:
        return
    assert changed_keys(config, config) == []
    limits = config.limits()
    for number in (limits.dirty_bytes_max, limits.undo_bytes_max, limits.destage_age_ns_max):
        assert number < 1 << 63
    assert config.links.rate_bits_per_second < 1 << 63
    endpoints = [config.node.listen, config.nbd.tcp_listen]
    for endpoint in [*endpoints, *(e for p in config.peers.values() for e in p.endpoints)]:
        assert endpoint is None or 0 <= int(endpoint.rpartition(":")[2]) <= 65535
    again = tomli_w.dumps(_without_none(msgspec.to_builtins(config)))
    assert parse_config(again, "again.toml") == config


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return value
