"""The audit log: who did what, when, and what came of it; appended to and never rewritten."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import LocalProtocolError, RefusedError, UsageError
from geomirror.node import audit
from geomirror.node.audit import ACTS, AuditLog, append_act, audit_path, read_acts
from geomirror.node.calls import Caller, MethodRegistry, Parameters
from geomirror.node.control_client_io import ControlClient
from geomirror.node.control_io import ControlServer
from geomirror.node.events import EventRing
from geomirror.node.paths import DataDir
from tests.tidy_test import ROOT


class Name(Parameters, frozen=True):
    name: str


def registry(root: Path, events: list[tuple[str, dict[str, Any]]]) -> MethodRegistry:
    async def revoke(_caller: Caller, request: Name) -> dict[str, Any]:
        if request.name == "nobody":
            raise RefusedError("no", hint="never")
        if request.name == "bug":
            raise ZeroDivisionError
        return {"node": request.name}

    methods = MethodRegistry()
    methods.note = AuditLog(root, lambda kind, fields: events.append((kind, fields))).note
    methods.add("node.revoke", Name, revoke, from_peers=True)
    methods.add("node.show", Name, revoke)
    return methods


async def test_acts_are_noted_with_who_and_what_came_of_it_and_questions_are_not(
    tmp_path: Path,
) -> None:
    methods = registry(tmp_path, [])
    await methods.dispatch(Caller(user="root (uid 0)"), "node.revoke", {"name": "west-1"})
    await methods.dispatch(Caller(), "node.show", {"name": "west-1"})
    with pytest.raises(RefusedError):
        await methods.dispatch(Caller("colo-1"), "node.revoke", {"name": "nobody"})
    with pytest.raises(LocalProtocolError):
        await methods.dispatch(Caller("colo-1"), "node.revoke", {"name": "bug"})
    with pytest.raises(UsageError):
        await methods.dispatch(Caller("colo-1"), "node.revoke", {"nome": "never begun"})
    first, refused, bug = read_acts(tmp_path, 100)
    assert (first["who"], first["act"], first["result"]) == ("root (uid 0)", "node.revoke", "done")
    assert first["parameters"] == {"name": "west-1"}
    assert (refused["who"], refused["result"]) == ("node colo-1", "failed")
    assert refused["error"]["message"] == "no"
    assert "ZeroDivisionError" in bug["error"]["message"]
    assert stat.S_IMODE(audit_path(tmp_path).stat().st_mode) == 0o600


async def test_the_kernel_says_who_is_at_the_control_socket(tmp_path: Path) -> None:
    server = ControlServer(registry(tmp_path, []), EventRing())
    await server.start(str(tmp_path / "control.sock"))
    client = ControlClient(DataDir(tmp_path))
    await asyncio.to_thread(client.call, "node.revoke", {"name": "west-1"})
    await server.stop()
    (act,) = read_acts(tmp_path, 1)
    assert act["who"] == f"{getpass.getuser()} (uid {os.getuid()})"


def test_lines_are_only_ever_added(tmp_path: Path) -> None:
    kept = b""
    for number in range(5):
        append_act(tmp_path, "mark.create", {"name": number})
        data = audit_path(tmp_path).read_bytes()
        assert data.startswith(kept)
        kept = data
    assert [act["parameters"]["name"] for act in read_acts(tmp_path, 3)] == [2, 3, 4]


def test_a_hostile_name_forges_no_line(tmp_path: Path) -> None:
    name = 'x"}\n{"time": "t", "who": "root", "act": "node.revoke\u2028\x1b[2J'
    append_act(tmp_path, "mark.create", {"name": name}, who="node \n evil")
    data = audit_path(tmp_path).read_bytes()
    assert (data.count(b"\n"), data.isascii(), b"\x1b" in data) == (1, True, False)
    (act,) = read_acts(tmp_path, 10)
    assert act["parameters"]["name"] == name


def test_long_parameters_are_cut_off_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    append_act(tmp_path, "resource.set", {"settings": {"x" * 10_000: "y"}})
    with audit_path(tmp_path).open("ab") as file:
        file.write(b'{"time": "2026')
    (act,) = read_acts(tmp_path, 10)
    assert len(act["parameters"]) == audit.PARAMETERS_BYTES_MAX
    assert read_acts(tmp_path, 0) == []


def test_a_full_file_makes_room_and_its_acts_are_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "AUDIT_BYTES_MAX", 1000)
    for number in range(12):
        append_act(tmp_path, "mark.create", {"name": number})
    assert (tmp_path / "audit.1.ndjson").stat().st_size >= 1000
    shown = [act["parameters"]["name"] for act in read_acts(tmp_path, 5)]
    assert shown == [7, 8, 9, 10, 11]


async def test_an_act_counts_where_it_cannot_be_noted_and_an_event_says_so(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    audit_path(tmp_path).mkdir()  # no file can be there
    done = await registry(tmp_path, events).dispatch(Caller(), "node.revoke", {"name": "west-1"})
    assert done == {"node": "west-1"}
    assert [(kind, fields["act"]) for kind, fields in events] == [("audit_failed", "node.revoke")]


def test_every_act_is_a_method_that_exists() -> None:
    added: set[str] = set()
    for path in ROOT.rglob("*.py"):
        added.update(re.findall(r'methods\.add\(\s*"([a-z_.]+)"', path.read_text()))
    assert not ACTS - added
    assert {"node.revoke", "resource.delete", "promotion.failover"} <= ACTS
    # Calls between nodes carry keys, shares and whole records: none of them is written down.
    assert not ACTS & {"tunnel.exchange", "certificate.renew", "membership.exchange"}


def test_what_is_noted_is_one_json_object_a_line(tmp_path: Path) -> None:
    append_act(tmp_path, "view.create", {"name": "pg", "at": None})
    found = json.loads(audit_path(tmp_path).read_text())
    assert sorted(found) == ["act", "error", "parameters", "result", "time", "who"]
