"""The demo's disk: a real ext4 file system with part of this machine's Python and the ledger."""

from __future__ import annotations

import mmap
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geomirror.errors import GeomirrorError, NotFoundError
from geomirror.lab.demo_ledger import MAGIC, BlockMaker, read_block
from geomirror.lab.process_io import run
from geomirror.limits import BLOCK_BYTES, MIB

LEDGER_FILES = 48
LEDGER_FILE_BYTES = 512 * 1024
SKIPPED = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib")
"""Parts of the standard library that only make it bigger."""
FIRST = "json"
"""A package that is always in the image, however large the rest is."""
TOOL_TIMEOUT_S = 60.0


def find_tool(name: str, package: str) -> str:
    """Path of a program; Debian keeps file system tools out of a user's PATH.

    :raises NotFoundError: it is not installed; the hint says how to get it.
    """
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    found = shutil.which(name, path=search)
    if found is None:
        raise NotFoundError(f"{name} is not installed", hint=f"sudo apt-get install {package}")
    return found


@dataclass(frozen=True)
class DemoImage:
    """A built image."""

    path: Path
    size_bytes: int
    file_count: int
    content_bytes: int
    """Bytes of the files in it."""
    slot_offsets: list[int]


def _library_files(budget_bytes: int) -> Iterator[tuple[Path, Path]]:
    """(file, path inside the image) of the standard library, sorted, until the budget is used."""
    root = Path(sysconfig.get_paths()["stdlib"])
    used = 0
    for directory, names, files in os.walk(root):
        names[:] = sorted(set(names) - set(SKIPPED), key=lambda name: (name != FIRST, name))
        for name in sorted(files):
            path = Path(directory) / name
            size = path.lstat().st_size
            if path.is_symlink() or not path.is_file() or used + size > budget_bytes:
                continue
            used += size
            yield path, path.relative_to(root)


def _stage(stage: Path, library_bytes: int, maker: BlockMaker) -> tuple[int, int]:
    """Fill the directory that becomes the file system; (files, bytes)."""
    count, size = 0, 0
    for source, inside in _library_files(library_bytes):
        target = stage / "python" / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        count, size = count + 1, size + target.stat().st_size
    ledger = stage / "ledger"
    ledger.mkdir()
    blocks = LEDGER_FILE_BYTES // BLOCK_BYTES
    for number in range(LEDGER_FILES):
        first = number * blocks
        content = b"".join(maker.block(first + index, 0) for index in range(blocks))
        (ledger / f"file-{number:03d}").write_bytes(content)
        count, size = count + 1, size + LEDGER_FILE_BYTES
    return count, size


def _find_slots(path: Path) -> list[int]:
    """Offsets of the ledger's blocks in the image, by slot.

    mke2fs puts file data at multiples of the 4 KiB block, so that a slot is one block of the
    volume, and writing it anew leaves the file system valid.
    """
    offsets: dict[int, int] = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        for offset in range(0, len(image), BLOCK_BYTES):
            if image[offset : offset + len(MAGIC)] == MAGIC:
                parsed = read_block(image[offset : offset + BLOCK_BYTES])
                if parsed is not None:
                    offsets[parsed[0]] = offset
    expected = LEDGER_FILES * LEDGER_FILE_BYTES // BLOCK_BYTES
    if sorted(offsets) != list(range(expected)):
        raise GeomirrorError(f"{path}: {len(offsets)} of {expected} ledger blocks found")
    return [offsets[slot] for slot in range(expected)]


def prepare(directory: Path, size_bytes: int, maker: BlockMaker) -> tuple[Path, int, int]:
    """Stage the files; (directory, files, bytes). Blocking."""
    stage = directory / "stage"
    stage.mkdir(parents=True)
    library_bytes = size_bytes - LEDGER_FILES * LEDGER_FILE_BYTES - 24 * MIB
    count, size = _stage(stage, library_bytes, maker)
    return stage, count, size


async def make_file_system(
    path: Path, stage: Path, size_bytes: int, files: int, content_bytes: int
) -> DemoImage:
    """Build the ext4 image from the staged files and find the ledger's blocks in it.

    :raises NotFoundError: mke2fs is missing.
    :raises GeomirrorError: mke2fs failed.
    """
    command = [find_tool("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES)]
    command += ["-L", "geomirror-demo", "-d", str(stage), str(path), f"{size_bytes // 1024}k"]
    output = await run(command, timeout_s=TOOL_TIMEOUT_S)
    if output.returncode != 0:
        raise GeomirrorError(f"mke2fs failed: {output.stderr.decode(errors='replace').strip()}")
    return DemoImage(path, size_bytes, files, content_bytes, _find_slots(path))


async def is_file_system_clean(path: Path) -> tuple[bool, str]:
    """`e2fsck -fn`: whether it finds nothing to repair, and what it printed. Changes nothing."""
    tool = find_tool("e2fsck", "e2fsprogs")
    output = await run([tool, "-f", "-n", str(path)], timeout_s=TOOL_TIMEOUT_S)
    return output.returncode == 0, (output.stdout + output.stderr).decode(errors="replace")
