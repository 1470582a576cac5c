"""Documents that are made from the code are what the code would make now."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from geomirror.node.nbd_listeners import SOCKET_NAMES
from tests.cli.documents import DOCS, cli_document, commands, exit_codes

ROOT = Path(__file__).parent.parent.parent


def unit_of(name: str) -> configparser.ConfigParser:
    """A unit file as systemd reads it: keys have case, and may come more than once."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    assert unit.read(ROOT / "deploy/systemd" / name)
    return unit


def test_the_exit_codes_are_those_of_the_table():
    assert (DOCS / "exit_codes.md").read_text() == exit_codes()


def test_the_reference_of_commands_is_that_of_the_help():
    assert (DOCS / "cli.md").read_text() == cli_document()


@pytest.mark.parametrize(("words", "command"), commands(), ids=lambda value: str(value)[:40])
def test_every_command_is_explained_and_takes_json(words, command):
    options = {name for parameter in command.params for name in parameter.opts}
    assert "--json" in options, words
    assert command.help
    assert command.get_short_help_str(200).endswith("."), words


def test_the_unit_starts_the_daemon_as_the_node_expects():
    unit = unit_of("geomirror.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["ExecStart"].endswith("node run")
    assert service["UMask"] == "0077"
    assert int(service["TimeoutStopSec"]) > 10


def test_the_socket_unit_names_its_socket_as_the_daemon_knows_it():
    unit = unit_of("geomirror-nbd.socket")
    found = unit["Socket"]
    assert found["FileDescriptorName"] in SOCKET_NAMES
    assert found["Service"] == "geomirror.service"
    assert found.get("Accept", "no") == "no"


def test_a_drills_unit_fails_with_its_drill_and_may_mount():
    unit = unit_of("geomirror-drill@.service")
    service = unit["Service"]
    assert service["Type"] == "oneshot"
    assert "drill %I --check ${CHECK} $OPTIONS" in service["ExecStart"]
    assert not service["ExecStart"].startswith("-")
    assert service["KillMode"] == "mixed"
    assert not any(name in service for name in ("PrivateMounts", "PrivateDevices", "User"))


def test_a_verifys_unit_fails_with_what_it_finds_and_is_never_cut_short():
    unit = unit_of("geomirror-verify@.service")
    service = unit["Service"]
    assert service["Type"] == "oneshot"
    assert "verify %I --wait $OPTIONS" in service["ExecStart"]
    assert not service["ExecStart"].startswith("-")
    assert service["TimeoutStartSec"] == "infinity"
    assert unit_of("geomirror-verify@.timer")["Timer"]["Persistent"] == "true"


def test_the_tunnels_drop_in_opens_what_the_unit_closes():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "deploy/systemd/geomirror.service")
    assert "AF_NETLINK" not in unit["Service"]["RestrictAddressFamilies"]
    assert unit["Service"]["ProtectSystem"] == "strict"
    unit.read(ROOT / "deploy/systemd/geomirror-tunnel.conf")
    assert unit["Service"]["RestrictAddressFamilies"] == "AF_NETLINK"
    assert {"/run", "-/etc"} <= set(unit["Service"]["ReadWritePaths"].split())


def test_the_attachments_unit_is_seen_by_everybody_and_outlives_the_daemon():
    unit = unit_of("geomirror-attach@.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert "attach %I ${TARGET} --foreground" in service["ExecStart"]
    assert service["ExecStop"].endswith("detach %I")
    assert service["KillMode"] == "mixed"
    # A mount namespace of its own would keep the mount to itself.
    hiding = ("PrivateTmp", "ProtectSystem", "ProtectHome", "PrivateMounts", "ReadOnlyPaths")
    assert not any(name in service for name in hiding)
    assert "Requires" not in unit["Unit"]
    assert "BindsTo" not in unit["Unit"]
