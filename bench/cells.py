"""A cell: the smallest part of a benchmark that has a result of its own.

An interrupted run goes on with the next cell. What is compared with each other is measured in one
cell, taking turns; two cells may be hours apart and share no ratio.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.options import Options
from bench.report import SCHEMA_VERSION, Result

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
"""Published results: full runs, committed with the page that is made from them."""


@dataclass(frozen=True)
class Cell:
    """One result file."""

    benchmark: str
    run: Callable[[Options], Coroutine[Any, Any, Result]]
    name: str = ""
    """Empty when the benchmark has just this one."""

    @property
    def label(self) -> str:
        """`benchmark` or `benchmark.name`."""
        return f"{self.benchmark}.{self.name}" if self.name else self.benchmark

    def path(self, directory: Path) -> Path:
        """Where its result is kept."""
        return directory / f"{self.label}.json"


def code_digest() -> str:
    """Of everything that decides a figure: the program and the benchmarks, as they are on disk.

    A commit alone would not do: it changes when results or documents are committed, and does not
    when a file is edited.
    """
    digest = hashlib.sha256()
    files = sorted(
        path
        for top in ("geomirror", "bench")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".c", ".html", ".js")
    )
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def commit() -> str:
    """Of the working tree, with `+` when files differ from it; empty without git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def load(path: Path) -> dict[str, Any] | None:
    """A result, or None when there is none that this program understands."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        return None
    return found


def is_done(path: Path, options: Options, code: str) -> bool:
    """Whether a result is there that this code made with these options and that counts.

    One of a run that was disturbed, failed or was skipped is made again.
    """
    found = load(path)
    return (
        found is not None
        and found["verdict"] == "ok"
        and found["code"] == code
        and found["options"] == parameters(options)
    )


def parameters(options: Options) -> dict[str, Any]:
    """The options that decide what is measured."""
    found = dataclasses.asdict(options)
    del found["directory"]
    return found


def verdict(document: dict[str, Any]) -> str:
    """`ok`, `not quiet`, `does not count` or `skipped`."""
    if document["skipped_because"]:
        return "skipped"
    if document["invalid_because"]:
        return "does not count"
    return "ok" if document["machine"]["is_quiet"] else "not quiet"
