"""Compiles a C program of the package when it is first needed, and keeps it.

The cache is `$XDG_CACHE_HOME/geomirror` (or `~/.cache/geomirror`); a program's file name carries
the hash of its source, flags and machine, so that a new version never meets an old program.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, StorageError
from geomirror.lab.process_io import run

FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
COMPILE_TIMEOUT_S = 60.0
HASH_CHARACTERS = 16
OUTPUT_CHARACTERS_MAX = 2000
"""Part of the compiler's output that goes into a message."""


def default_cache() -> Path:
    """Where programs are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path in the variable is to be ignored, says its specification.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "geomirror"


def find_compiler() -> list[str]:
    """Command of the C compiler: `$CC`, or `cc`.

    :raises NotFoundError: there is none.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise NotFoundError(
            f"there is no C compiler: {command[0]!r} is not installed",
            hint='install one with "apt-get install gcc libc6-dev", or set CC',
        )
    return command


def _open_cache(cache: Path) -> None:
    # Programs from here are run as root: nobody else may put one in.
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = cache.stat()
    except OSError as error:
        raise StorageError.from_os(error, operation="create", path=str(cache)) from error
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise RefusedError(
            f"{cache} is not ours alone, and programs from it would be run",
            hint=f'make it so with "chown {os.geteuid()} {cache}; chmod 700 {cache}"',
        )


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise StorageError.from_os(error, operation="read", path=str(source)) from error


async def compile_program(
    source: Path, *, flags: Sequence[str] = FLAGS, cache: Path | None = None
) -> Path:
    """The program made of one C file, compiled now unless it was before. Atomic.

    :raises NotFoundError: there is no compiler.
    :raises GeomirrorError: it did not compile; the message has the compiler's.
    :raises RefusedError: others may write to the cache.
    :raises StorageError: the cache cannot be written.
    """
    text = _read(source)
    key = "\0".join([*flags, platform.machine()]).encode() + b"\0" + text
    digest = hashlib.sha256(key).hexdigest()[:HASH_CHARACTERS]
    cache = cache or default_cache()
    program = cache / f"{source.stem}-{digest}"
    _open_cache(cache)
    if program.exists():
        return program
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(dir=cache, prefix="compile-") as directory:
        output = Path(directory) / source.stem
        # From stdin: the file may have been replaced since its hash was taken.
        command = [*compiler, *flags, "-x", "c", "-o", str(output), "-"]
        done = await run(command, timeout_s=COMPILE_TIMEOUT_S, stdin=text)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace")[:OUTPUT_CHARACTERS_MAX].strip()
            raise GeomirrorError(
                f"{source.name} does not compile: {said}",
                hint='the C library\'s headers are in "apt-get install libc6-dev"',
            )
        output.replace(program)
    return program
