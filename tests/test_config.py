"""The configuration file: its reference, its defaults, and what is refused."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from geomirror.config import RELOADABLE, Config, changed_keys, parse_config
from geomirror.errors import ConfigError
from geomirror.limits import PRODUCTION
from geomirror.node.config_io import load_config

REFERENCE = Path(__file__).parent.parent / "docs/config.example.toml"


def test_the_reference_has_every_key_with_its_default():
    assert parse_config(REFERENCE.read_text(), "reference") == Config()
    with_optional = re.sub(r"^# (\w+ = |\[peers)", r"\1", REFERENCE.read_text(), flags=re.M)
    table = tomllib.loads(with_optional)
    parse_config(with_optional, "reference")
    for section in msgspec.structs.fields(Config):
        assert section.name in table
        if section.name != "peers":
            kind = type(section.default)
            assert set(table[section.name]) == set(kind.__struct_fields__)
    assert set(table["peers"]["west-1"]) == {"endpoints"}


def test_the_reference_says_of_every_key_whether_it_can_be_reloaded():
    section = ""
    comment = ""
    said: dict[str, bool] = {}
    for line in REFERENCE.read_text().splitlines():
        header = re.match(r"(?:# )?\[(\w+)", line)
        key = re.match(r"(?:# )?(\w+) = ", line)
        if header:
            section, comment = header.group(1), comment if header.group(1) == "peers" else ""
        elif key:
            assert "eloadable" in comment, key.group(1)
            name = section if section == "peers" else f"{section}.{key.group(1)}"
            said[name] = "Not reloadable" not in comment
            comment = ""
        else:
            comment = f"{comment} {line.lstrip('# ')}" if line else ""
    assert {name for name, reloadable in said.items() if reloadable} == RELOADABLE


def test_defaults_leave_the_limits_as_they_are():
    assert Config().limits() == PRODUCTION


LIMITED_BY = {
    "links.data_connections": (3, {"data_connections": 3}),
    "links.hello_interval_ms": (70, {"hello_interval_ns": 70_000_000}),
    "links.hello_misses_max": (7, {"hello_misses_max": 7}),
    "links.tcp_segment_bytes": (1000, {"tcp_segment_bytes": 1000}),
    "replication.epoch_age_ms": (500, {"epoch_age_ns": 500_000_000}),
    "storage.dirty_bytes_max": (17 << 20, {"dirty_bytes_max": 17 << 20}),
    "storage.destage_age_s": (9, {"destage_age_ns_max": 9_000_000_000}),
    "storage.undo_bytes_max": (12345, {"undo_bytes_max": 12345}),
    "storage.branches_bytes_max": (12346, {"branches_bytes_max": 12346}),
    "storage.resync_undo_bytes_max": (12347, {"resync_undo_bytes_max": 12347}),
    "storage.full_disk_wait_s": (5, {"full_disk_wait_ns_max": 5_000_000_000}),
}
"""Key → a value, and all limits that it changes."""


def with_one(key: str, value: int) -> Config:
    section, name = key.split(".")
    return parse_config(f"[{section}]\n{name} = {value}\n", "x")


@pytest.mark.parametrize("key", LIMITED_BY)
def test_a_key_changes_its_own_limit_and_no_other(key):
    value, changed = LIMITED_BY[key]
    assert with_one(key, value).limits() == replace(PRODUCTION, **changed)


def test_no_number_is_left_out():
    """Numbers that change no limit are used by name elsewhere."""
    found = set()
    for section in msgspec.structs.fields(Config):
        if section.name == "peers":
            continue
        for field in msgspec.structs.fields(type(section.default)):
            if isinstance(field.default, int) and not isinstance(field.default, bool):
                found.add(f"{section.name}.{field.name}")
    assert found - LIMITED_BY.keys() == {
        *("node.worker_threads", "links.rate_bits_per_second", "tunnel.port", "tunnel.mtu")
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[links]\nrate_bits_per_secnd = 1", 'did you mean "links.rate_bits_per_second"'),
        ("[node]\nlistn = 'x:1'", 'did you mean "node.listen"'),
        ("[lnks]\n", 'did you mean "links"'),
        ("[peers.west-1]\nendpoint = []", 'did you mean "peers.west-1.endpoints"'),
        ("[zzz]\n", "unknown key zzz"),
        ("[links]\ndata_connections = 99", "links.data_connections"),
        ("[links]\ndata_connections = '4'", "links.data_connections"),
        ("[node]\nlisten = 'nowhere'", "node.listen"),
        ("[log]\nlevel = 'loud'", "log.level"),
        ("[nbd]\ntls_key = 'k'", "tls_certificate and tls_key belong together"),
        ("[nbd]\ntls_ca = 'k'", "tls_ca needs tls_certificate"),
        ("[nbd]\ntls = 'off'", "nbd.tls"),
        ("[log", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
        ("a = " + "9" * 5000, "not TOML"),
        ("[links]\nrate_bits_per_second = " + "9" * 30, "links.rate_bits_per_second"),
        ("[storage]\ndirty_bytes_max = " + "9" * 30, "storage.dirty_bytes_max"),
        ("[storage]\nundo_bytes_max = 18446744073709551615", "storage.undo_bytes_max"),
        ("[node]\nlisten = 'host:65536'", "node.listen"),
        ("[node]\nlisten = 'host:١'", "node.listen"),
        ("#" + "x" * (1 << 20), "over 1048576"),
    ],
)
def test_what_is_refused_and_how_it_is_said(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "/etc/x.toml")
    assert "/etc/x.toml" in caught.value.message
    assert message in str(caught.value)


KEYS = st.sampled_from(
    ["node", "links", "listen", "peers", "data_connections", "log", "level", "a"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def is_config_or_typed_error(text: str) -> bool:
    try:
        return isinstance(parse_config(text, "x"), Config)
    except ConfigError as error:
        return error.message.startswith("x: ")


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_table_is_a_configuration_or_a_typed_error(table):
    try:
        text = tomli_w.dumps(table)
    except (TypeError, ValueError):
        return
    assert is_config_or_typed_error(text)


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_a_typed_error(text):
    assert is_config_or_typed_error(text)


def test_changed_keys_are_named():
    new = parse_config("[log]\nlevel = 'debug'\n[peers.b]\nendpoints = ['h:1']\n", "x")
    assert changed_keys(Config(), new) == ["peers", "log.level"]


def test_an_absent_file_is_the_defaults(tmp_path):
    assert load_config(tmp_path / "geomirror.toml") == Config()


def test_a_file_that_others_may_write_is_refused(tmp_path):
    path = tmp_path / "geomirror.toml"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others may write"):
        load_config(path)
    path.chmod(0o600)
    assert load_config(path) == Config()


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "geomirror.toml"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)
