"""Calls of the control socket and of peers, on the real handlers of two nodes without sockets.

Whatever is asked: an answer that is JSON, or a typed error that is JSON, never an internal one;
and what the node keeps of it can be read back at its next start.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import structlog

from geomirror.errors import GeomirrorError, LocalProtocolError
from geomirror.limits import MIB
from geomirror.node import resource_calls
from geomirror.node.calls import Caller
from geomirror.node.control_io import _parameters
from geomirror.node.definition_store import DefinitionStore
from geomirror.node.error_json import error_from_object, error_object
from tests.fuzz.loop import LOOP
from tests.fuzz.source import Source
from tests.node.fakes import FakeNetwork

CALLS_MAX = 6

_ROOT = Path(tempfile.gettempdir())
_DEFINITION = {
    "name": "pg",
    "resource_id": "00" * 15 + "01",
    "version": 2,
    "primary": "b",
    "secondaries": ["a"],
    "volumes": [{"index": 0, "name": "0", "size_bytes": MIB}],
}
_CREATE = {"name": "pg", "primary": "a", "secondaries": ["b"], "sizes": [MIB]}
_BACKINGS = {"a": {"0": "/x"}}
_GOOD: list[tuple[str, dict[str, Any]]] = [
    ("resource.create", _CREATE),
    ("resource.create", _CREATE | {"journal_bytes": 256 * MIB, "settings": {"ack": "durable"}}),
    (
        "resource.create",
        {"name": "x", "primary": "a", "adopt": "a", "backings": {"a": {"0": "/x"}}},
    ),
    ("resource.check_backing", {"paths": {"0": "/x"}, "sizes": {"0": 4096}, "is_forced": False}),
    ("resource.define", {"definition": _DEFINITION}),
    ("resource.set", {"name": "pg", "settings": {"copies": "1", "degrade_after": "5s"}}),
    ("resource.add_secondary", {"name": "pg", "node": "c"}),
    ("resource.remove_secondary", {"name": "pg", "node": "b", "keep_data": True}),
    ("resource.forget", {"name": "pg", "resource_id": "00" * 15 + "01"}),
    ("resource.pause", {"name": "pg", "peer": "b"}),
    ("resource.resume", {"name": "pg"}),
    ("resource.wait", {"name": "pg", "kind": "applied", "timeout_s": 0.5}),
    ("resource.list", {}),
    ("resource.show", {"name": "pg"}),
    ("resource.delete", {"name": "pg", "keep_data": True}),
]
WORDS = [
    *(f'\n{method} {{"name":"pg"}}'.encode() for method, _ in _GOOD),
    *(
        b'"name":',
        b'"size_bytes":',
        b"9223372036854775808",
        b"1e400",
        b"NaN",
        b"null",
        b"[]",
        b"{}",
    ),
    *(b"-1", b'"\\ud800"', b'"../x"', b'"\\u0000"', b"0.5", b"true", b'"a"', b'"b"', b'"c"'),
]


def seeds() -> list[bytes]:
    """Every method, alone and behind a create, from the operator and from a peer."""
    lines = [f"{method} {json.dumps(parameters)}" for method, parameters in _GOOD]
    found = [bytes([who]) + line.encode() for line in lines for who in (0, 1)]
    return found + [b"\0" + f"{lines[0]}\n{line}".encode() for line in lines[1:]]


class _Request:
    """As much of an HTTP request as the server's reader of parameters looks at."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self) -> bytes:
        return self._body


def run(data: bytes) -> None:
    """Some calls, one after the other: `METHOD BODY` per line."""
    source = Source(data)
    caller = Caller("b") if source.flag() else Caller()
    lines = source.rest().split(b"\n")[:CALLS_MAX]
    logging.disable(logging.CRITICAL)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else _ROOT))
    (root / "backing").write_bytes(bytes(8192))
    try:
        with patch.multiple(resource_calls, **_confined(root)):
            LOOP.run_until_complete(_calls(root, caller, lines))
    finally:
        shutil.rmtree(root)
        structlog.reset_defaults()
        logging.disable(logging.NOTSET)


def _confined(root: Path) -> dict[str, Callable[..., Any]]:
    """What the node does to backings, done to one file of ours, whatever path an input names: a
    forced create would overwrite any device of this machine."""

    def inside(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: str, *arguments: Any, **options: Any) -> Any:
            name = "backing" if path == "/x" else "absent"
            return real(str(root / name), *arguments, **options)

        return call

    names = ("check_backing", "backing_size", "zero_backing")
    return {name: inside(getattr(resource_calls, name)) for name in names}


async def _calls(root: Path, caller: Caller, lines: list[bytes]) -> None:
    network = FakeNetwork(root, "a", "b", "c")
    network.connect("a", "b")
    node = network.nodes["a"]
    try:
        for line in lines:
            method, _, body = line.partition(b" ")
            try:
                parameters = await _parameters(_Request(body))  # type: ignore[arg-type]
                result = await node.methods.dispatch(
                    caller, method.decode("utf-8", "replace"), parameters
                )
                json.dumps(result)
            except LocalProtocolError as error:
                raise AssertionError(f"an internal error: {error}") from error
            except GeomirrorError as error:
                said = json.loads(json.dumps({"error": error_object(error)}))
                assert type(error_from_object(said["error"])) is type(error)
            kept = {entry.definition.name for entry in node.store.entries()}
            again = DefinitionStore(root / "a" / "resources.json")
            assert {entry.definition.name for entry in again.entries()} == kept
    finally:
        for each in network.nodes.values():
            await each.stop()
