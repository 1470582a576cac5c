"""Loop devices and file systems on them, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import is_root

TOOLS = ("losetup", "mke2fs", "e2fsck", "mount", "umount")


def need_loops() -> None:
    """Skip with the reason where there can be no loop devices; in CI that fails."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not is_root():
        pytest.skip("loop devices and mounts need root")


def loop_device(path: Path) -> str:
    """A loop device over a file, which the caller detaches."""
    need_loops()
    return _done("losetup", "--find", "--show", path)


@contextlib.contextmanager
def loop_over(path: Path) -> Iterator[str]:
    """A loop device over a file."""
    device = loop_device(path)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def make_ext4(image: Path, size: str) -> None:
    """An empty ext4 in a new file."""
    need_loops()
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", image, size], check=True)


def mount(image: Path, directory: Path, options: str = "") -> None:
    """Mount an image over a loop device, which goes with the mount."""
    need_loops()
    _done("mount", "-o", f"loop,{options}" if options else "loop", image, directory)


@contextlib.contextmanager
def mounted(image: Path, directory: Path, options: str = "") -> Iterator[Path]:
    """An image that is mounted; the directory is made."""
    directory.mkdir()
    mount(image, directory, options)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def _done(*command: str | Path) -> str:
    """Run a tool; a kernel that refuses (a container without loop devices) is a skip."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]} is refused here: {done.stderr.strip()}")
    return done.stdout.strip()
