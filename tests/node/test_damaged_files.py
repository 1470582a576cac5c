"""Definitions that are not what this version writes: typed errors, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from geomirror.errors import IntegrityError
from geomirror.limits import PRODUCTION
from geomirror.node.definition_store import DefinitionStore
from geomirror.node.service_store import ServiceStore
from geomirror.tunnel.service_rules import Exposure, Forward

DEEP = b'{"format":1,"resources":' + b"[" * 100_000
CASES = {
    "empty": b"",
    "cut": b'{"format":1,"resources":[',
    "not UTF-8": b'{"format":1,"resources":[],"\xff":1}',
    "deep": DEEP + b"]" * 100_000 + b"}",
    "other key": b'{"format":1,"resources":[],"more":1}',
    "other type": b'{"format":"1","resources":[]}',
    "future": b'{"format":2,"resources":[]}',
}


@pytest.mark.parametrize("data", CASES.values(), ids=CASES.keys())
def test_damaged_definitions_are_told_and_left_as_they_are(tmp_path: Path, data: bytes):
    path = tmp_path / "resources.json"
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        DefinitionStore(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert path.read_bytes() == data


SERVICES = {
    "empty": b"",
    "cut": b'{"format":1,"exposures":[',
    "not UTF-8": b'{"format":1,"\xff":1}',
    "other key": b'{"format":1,"exposures":[{"name":"a","host":"h","port":1,"deny":["x"]}]}',
    "no name": b'{"format":1,"exposures":[{"name":"a b","host":"h","port":1}]}',
    "no port": b'{"format":1,"exposures":[{"name":"a","host":"h","port":70000}]}',
    "a port twice": b'{"format":1,"forwards":[{"name":"a","host":"h","port":1},'
    b'{"name":"b","host":"h","port":1}]}',
    "future": b'{"format":2}',
}


@pytest.mark.parametrize("data", SERVICES.values(), ids=SERVICES.keys())
def test_damaged_services_are_told_and_left_as_they_are(tmp_path: Path, data: bytes):
    path = tmp_path / "services.json"
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        ServiceStore(path, PRODUCTION)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert path.read_bytes() == data


def test_services_are_read_as_they_were_written(tmp_path: Path):
    store = ServiceStore(tmp_path / "services.json", PRODUCTION)
    rules = store.rules.with_exposure(Exposure("ldap", "::1", 389, ("key-1",)))
    store.save(rules.with_forward(Forward("pg", "127.0.0.1", 5432, "key-2")))
    again = ServiceStore(tmp_path / "services.json", PRODUCTION).rules
    assert again.exposures == store.rules.exposures
    assert again.forwards == store.rules.forwards
    assert (tmp_path / "services.json").stat().st_mode & 0o777 == 0o600
