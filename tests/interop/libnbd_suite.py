"""libnbd's own tests as Debian's source package has them, run against our server unchanged.

`deploy/fetch_libnbd_tests.sh` brings the source; nothing of it is in this repository. Its tests
name their server in one of two ways, and both are met without touching them:

- programs of `interop/` are compiled with SERVER and SERVER_PARAMS, as libnbd's Makefile does for
  nbdkit, qemu-nbd and nbd-server: ours is one more server;
- the others start `nbdkit -s … memory|null|pattern size=N`: a program of that name, first in PATH,
  serves the volume of that content and size by `geomirror nbd --stdio`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.support import GEOMIRROR

ROOT = Path(__file__).parents[2]
SKIPPED = 77
"""Exit code of a test of libnbd that finds something missing."""
PREREQUISITES = ("/usr/include/libnbd.h", "/usr/include/stdlib.h", "/usr/bin/nbdsh")


def find_source() -> Path:
    """The unpacked source package, or the end of the test."""
    found = sorted(ROOT.glob("build/libnbd/*/interop/interop.c"))
    missing = [path for path in PREREQUISITES if not os.path.exists(path)]
    if shutil.which("cc") is None:
        missing.append("cc")
    if not found or missing:
        what = ", ".join(missing) or "libnbd's source package"
        pytest.skip(f'{what} is not here; "sh deploy/setup_test_tools.sh" brings it')
    return found[-1].parents[1]


@dataclass(frozen=True)
class Program:
    """One test of libnbd's, built for our server."""

    name: str
    source: str
    """Of the C file in the source package."""
    server: Sequence[str] = ()
    """Command of the server, for programs that are compiled with one."""
    defines: dict[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()


@dataclass
class Suite:
    """The source package, and a directory that is laid out as its tests want it."""

    source: Path
    work: Path

    def __post_init__(self) -> None:
        for part in ("interop", "tests", "bin", "include"):
            (self.work / part).mkdir(parents=True)
        # What ./configure finds; nothing of it changes a test here.
        (self.work / "include" / "config.h").write_text("")

    def replace_nbdkit(self, data_dir: Path) -> None:
        """Serve `memory`, `null` and `pattern` from the volumes `PLUGIN-SIZE` of a node."""
        (self.work / "bin" / "nbdkit").write_text(
            "#!/bin/sh\n"
            "for word; do case $word in\n"
            "    memory|null|pattern) plugin=$word ;;\n"
            "    size=2m) size=2097152 ;;\n"
            "    size=*) size=${word#size=} ;;\n"
            "    [0-9]*) size=$word ;;\n"
            "    -s|-v|-n|--exit-with-parent) ;;\n"
            '    *) echo "not imitated: $*" >&2; exit 1 ;;\n'
            "esac; done\n"
            f"exec {shlex.join(GEOMIRROR)} --data-dir {shlex.quote(str(data_dir))} "
            'nbd "$plugin-${size:-1048576}" --stdio\n'
        )
        (self.work / "bin" / "nbdkit").chmod(0o755)

    def build(self, program: Program) -> Path:
        """Compile; the source as it is, with the server as its Makefile would name it."""
        defines = dict(program.defines)
        if program.server:
            defines["SERVER"] = json.dumps(program.server[0])
            defines["SERVER_PARAMS"] = ", ".join(json.dumps(each) for each in program.server[1:])
        target = self.work / "bin" / program.name
        include = [self.work / "include", self.source / "common/include", self.source / "tests"]
        command = ["cc", "-O1", "-g", *(f"-I{path}" for path in include)]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        sources = [self.source / program.source, self.source / "tests/requires.c"]
        command += [*map(str, sources), "-o", str(target), "-lnbd", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return target

    def run(self, program: Program) -> str:
        """Build and run a program; its output."""
        return self.play(program.name, [str(self.build(program)), *program.arguments])

    def run_python(self, name: str) -> str:
        """Run a script of `python/t` with Debian's Python, for which the bindings are."""
        return self.play(name, ["/usr/bin/python3", str(self.source / "python/t" / name)])

    def play(self, name: str, command: Sequence[str]) -> str:
        """A test passes with 0; one that skips itself has not been run, and fails here."""
        path = f"{self.work / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            cwd=self.work / "interop",
            env={**os.environ, "PATH": path, "LIBNBD_DEBUG": "1"},
            errors="replace",
        )
        said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        assert done.returncode != SKIPPED, f"{name} skipped itself: {said}"
        assert done.returncode == 0, f"{name} ended with {done.returncode}: {said}"
        return done.stdout + done.stderr

    def names_in(self, folder: str) -> set[str]:
        """All tests of a folder of the source package, by file name."""
        found = {path.name for path in (self.source / folder).iterdir()}
        return {name for name in found if re.search(r"\.(c|sh|py)$", name)}
