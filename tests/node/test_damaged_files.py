"""Definitions that are not what this version writes: typed errors, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from geomirror.errors import IntegrityError
from geomirror.node.definition_store import DefinitionStore

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
