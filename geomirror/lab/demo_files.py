"""Files inside an ext4 image, by debugfs: nothing is mounted, nobody is root."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from geomirror.errors import GeomirrorError
from geomirror.lab.demo_image import TOOL_TIMEOUT_S, find_tool
from geomirror.lab.process_io import run
from geomirror.limits import BLOCK_BYTES, MIB


async def _debugfs(image: Path, *commands: str, is_writing: bool = False) -> str:
    """Run commands on an image; what they printed. debugfs has no exit code for what fails."""
    script = image.with_suffix(".debugfs")
    script.write_text("\n".join(commands) + "\n", encoding="utf-8")
    command = [find_tool("debugfs", "e2fsprogs"), *(["-w"] if is_writing else [])]
    output = await run([*command, "-f", str(script), str(image)], timeout_s=TOOL_TIMEOUT_S)
    script.unlink()
    text = (output.stdout + output.stderr).decode(errors="replace")
    if output.returncode != 0:
        raise GeomirrorError(f"debugfs {image.name}: {text.strip()}")
    return text


async def list_files(image: Path, directory: str) -> list[str]:
    """Names in a directory of the image, sorted; empty when it is not there."""
    text = await _debugfs(image, f"ls -p {directory}")
    rows = [line.split("/") for line in text.splitlines() if line.startswith("/")]
    # /inode/mode/uid/gid/name/size/
    names = [row[5] for row in rows if len(row) > 5 and row[1] != "0"]
    return sorted(name for name in names if name not in (".", ".."))


async def remove_directory(image: Path, directory: str) -> None:
    """`rm -r` of a directory of plain files.

    :raises GeomirrorError: it is still there.
    """
    names = await list_files(image, directory)
    removals = [f"rm {directory}/{name}" for name in names]
    said = await _debugfs(image, *removals, f"rmdir {directory}", is_writing=True)
    if await list_files(image, directory):
        raise GeomirrorError(f"{image.name}: {directory} is still there: {said.strip()[-500:]}")


async def copy_files_out(image: Path, directory: str, target: Path) -> list[Path]:
    """Copy a directory's plain files into `target`, a new directory; the files, sorted."""
    await asyncio.to_thread(target.mkdir)
    names = await list_files(image, directory)
    await _debugfs(image, *(f'dump {directory}/{name} "{target / name}"' for name in names))
    return [target / name for name in names]


async def put_directory(image: Path, directory: str, files: Sequence[Path]) -> None:
    """Make a directory in the image with copies of these files."""
    writes = [f'write "{path}" {path.name}' for path in files]
    await _debugfs(image, f"mkdir {directory}", f"cd {directory}", *writes, is_writing=True)


def changed_blocks(before: Path, after: Path) -> list[tuple[int, bytes]]:
    """(offset, content) of every 4 KiB block in which two images of one size differ. Blocking."""
    found: list[tuple[int, bytes]] = []
    with before.open("rb") as old, after.open("rb") as new:
        at = 0
        while content := new.read(MIB):
            known = old.read(MIB)
            if known != content:
                found += [
                    (at + inside, content[inside : inside + BLOCK_BYTES])
                    for inside in range(0, len(content), BLOCK_BYTES)
                    if known[inside : inside + BLOCK_BYTES]
                    != content[inside : inside + BLOCK_BYTES]
                ]
            at += len(content)
    return found
