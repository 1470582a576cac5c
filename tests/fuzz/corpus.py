"""The targets and their inputs: seeds made by code, files kept in the repository, files of runs."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol, cast

ROOT = Path(__file__).resolve().parent
CORPUS = ROOT / "corpus"
BUILD = ROOT.parent.parent / "build" / "fuzz"
INPUT_BYTES_MAX = 4096
"""Longest input of a target that does not say `INPUT_BYTES_MAX` itself."""
PRODUCT = str(ROOT.parent.parent / "geomirror")


class Target(Protocol):
    """A module of `tests.fuzz.targets`."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def names() -> list[str]:
    """All targets, sorted."""
    found = (path.stem for path in (ROOT / "targets").glob("*.py"))
    return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> Target:
    """Import a target, and with it the part of geomirror that it is about."""
    return cast(Target, importlib.import_module(f"tests.fuzz.targets.{name}"))


def bytes_max(target: Target) -> int:
    """Longest input."""
    return int(getattr(target, "INPUT_BYTES_MAX", INPUT_BYTES_MAX))


def words(target: Target) -> list[bytes]:
    """Words that inputs are made of, for both engines to insert."""
    return list(getattr(target, "WORDS", []))


def kept(name: str) -> list[Path]:
    """Files of the repository, sorted: the corpus, and every input that once failed."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def inputs(name: str) -> list[bytes]:
    """Seeds and kept files."""
    return [*load(name).seeds(), *(path.read_bytes() for path in kept(name))]


def store(directory: Path, data: bytes, prefix: str = "") -> Path:
    """Write an input under the name of its hash."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{prefix}{hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


class Arcs:
    """Steps from line to line within geomirror that were taken; slow, for choosing a corpus."""

    def __init__(self) -> None:
        self.seen: set[tuple[CodeType, int, int]] = set()

    def of(self, run: Callable[[bytes], None], data: bytes) -> int:
        """Run one input; how many steps were new."""
        before = len(self.seen)
        previous = sys.gettrace()
        sys.settrace(self._called)
        try:
            run(data)
        finally:
            sys.settrace(previous)
        return len(self.seen) - before

    def _called(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PRODUCT):
            return None
        last = -1

        def line(frame: FrameType, event: str, _arg: Any) -> Any:
            nonlocal last
            if event == "line":
                self.seen.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line


def minimise(name: str, candidates: Iterable[bytes]) -> list[bytes]:
    """The candidates that take steps which neither the seeds nor shorter candidates took."""
    target, arcs = load(name), Arcs()
    for seed in target.seeds():
        arcs.of(target.run, seed)
    return [
        data
        for data in sorted(set(candidates), key=lambda d: (len(d), d))
        if arcs.of(target.run, data)
    ]
