"""Backing devices: in use, too small, holding data, adopted; what they hold is never harmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.loop_disks import loop_device
from tests.system.support import (
    MIB,
    Site,
    create,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
DATA = random.Random(1).randbytes(4 * MIB)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    """Two linked nodes without resources."""
    with some_sites(tmp_path_factory.mktemp("pair"), "a", "b") as (a, b):
        make_network(a, b)
        yield a, b
        assert a.crashes() == b.crashes() == []


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(DATA)
    return path


def refused(site: Site, *arguments: str, code: str = "refused", expected: int = 5) -> str:
    """Creating "x" must fail, and leave nothing of it on either node."""
    command = ("resource", "create", "x", "--primary", "east-1", "--journal-size", "256M")
    said = site.error(*command, *arguments, expected=expected, code=code)
    assert [r["name"] for r in site.call("resource.list")["resources"] if r["name"] == "x"] == []
    assert not (site.data_dir / "resources/x").exists()
    return said


def test_a_backing_that_holds_data_is_only_taken_with_a_word(pair, disk: Path):
    a, _ = pair
    backing = ("--backing", f"east-1={disk}")
    said = refused(a, "--size", "4M", *backing)
    assert str(disk) in said
    assert "--adopt" in said and "--force" in said
    said = refused(a, "--size", "8M", *backing, "--force")
    assert "4194304 bytes" in said and str(8 * MIB) in said
    refused(a, "--size", "8M", *backing, "--adopt", "east-1")
    refused(a, "--size", "4M", *backing, "--adopt", "west-1", code="usage", expected=2)
    refused(a, "--size", "4M", "--backing", "east-1=disk.img", code="usage", expected=2)
    refused(a, "--size", "4M", "--backing", f"east-1={disk.parent}", code="usage", expected=2)
    gone = disk.parent / "none/disk.img"
    refused(a, "--size", "4M", "--backing", f"east-1={gone}", code="not_found", expected=4)
    said = refused(a, "--size", "4M", "--secondary", "west-1", "--backing", f"west-1={disk}")
    assert "west-1" in said and str(disk) in said
    assert disk.read_bytes() == DATA


def test_a_backing_in_use_is_refused_also_with_force(pair, disk: Path):
    a, _ = pair
    backing = ("--backing", f"east-1={disk}")
    create(a, "one", *backing, "--adopt", "east-1", size=None, secondary=None)
    for word in ((), ("--force",), ("--adopt", "east-1")):
        said = refused(a, "--size", "4M", *backing, *word, code="in_use")
        assert str(disk) in said and "running resource" in said
    # By another daemon, through the node that has been asked.
    there = ("resource", "create", "x", "--primary", "west-1", "--journal-size", "256M")
    backing = ("--size", "4M", "--backing", f"west-1={disk}", "--force")
    said = a.error(*there, *backing, expected=5, code="in_use")
    assert str(disk) in said
    # And as a secondary's.
    force = ("--size", "4M", "--secondary", "west-1", "--backing", f"west-1={disk}", "--force")
    assert "west-1" in refused(a, *force, code="in_use")
    assert asyncio.run(a.read(0, len(DATA), "one")) == DATA
    asyncio.run(a.write(0, b"new" * 1000, "one"))
    a.run("resource", "delete", "one", "--keep-data", "--yes")
    assert disk.read_bytes() == b"new" * 1000 + DATA[3000:]


def test_a_secondary_that_was_away_refuses_a_backing_that_is_too_small(pair, disk: Path):
    a, b = pair
    b.stop()
    create(a, "late", "--backing", f"west-1={disk}", "--force", size="8M")
    until(lambda: a.peer("late")["state"] == "Pending")
    b.restart()
    until(lambda: a.peer("late")["pending"])
    pending = a.peer("late")["pending"]
    assert str(disk) in pending and "4194304 bytes" in pending
    text = a.run("status", "late")
    assert pending.split(";")[0] in text
    assert b.call("resource.list")["resources"] == []
    assert disk.read_bytes() == DATA
    a.run("resource", "delete", "late", "--yes")
    until(lambda: a.call("resource.list")["resources"] == [])
    assert disk.read_bytes() == DATA


def test_a_mounted_device_is_refused_and_a_free_one_is_mirrored(pair, tmp_path: Path):
    a, b = pair
    image, mounted = tmp_path / "fs.img", tmp_path / "mnt"
    make_ext4(image, tmp_path)
    device = loop_device(image)
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["losetup", "-d", device], check=False)
        mounted.mkdir()
        subprocess.run(["mount", "-o", "ro", device, mounted], check=True)
        backing = ("--backing", f"east-1={device}")
        before = image.read_bytes()
        try:
            for word in ("--force", "--adopt=east-1"):
                said = refused(a, "--size", "8M", *backing, word, code="in_use")
                assert device in said and "mounted" in said
        finally:
            subprocess.run(["umount", mounted], check=True)
        assert image.read_bytes() == before
        refused(a, "--size", "64M", *backing, "--adopt", "east-1")
        create(a, "fs", *backing, "--adopt", "east-1", size=None)
        check_mirror(a, b, tmp_path, before)
        a.run("resource", "delete", "fs", "--keep-data", "--yes")
        assert image.read_bytes() == before


def check_mirror(a: Site, b: Site, tmp_path: Path, expected: bytes) -> None:
    """The secondary's export is a clean file system, equal byte for byte."""
    wait_applied(a, "fs")
    copy = tmp_path / "copy.img"
    copy.write_bytes(asyncio.run(b.read(0, len(expected), "fs")))
    assert copy.read_bytes() == expected
    check_file_system(copy)
    peer = a.peer("fs")
    assert (peer["disk_state"], peer["resyncs"]) == ("UpToDate", 0)


def make_ext4(image: Path, tmp_path: Path) -> None:
    if shutil.which("mke2fs") is None:
        pytest.skip("mke2fs is not installed")
    source = tmp_path / "tree"
    source.mkdir()
    for number in range(50):
        (source / f"file-{number}").write_bytes(random.Random(number).randbytes(20_000))
    command = ["mke2fs", "-q", "-t", "ext4", "-d", source, image, "16m"]
    subprocess.run(command, check=True, capture_output=True)


def check_file_system(image: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_adopted_file_system_is_mirrored(pair, tmp_path: Path):
    a, b = pair
    image = tmp_path / "fs.img"
    make_ext4(image, tmp_path)
    before = image.read_bytes()
    backing = ("--backing", f"east-1={image}", "--backing", f"west-1={tmp_path}/copy-b.img")
    create(a, "fs", *backing, "--adopt", "east-1", size=None)
    check_mirror(a, b, tmp_path, before)
    events = [json.dumps(event) for event in b.events("resource_defined")]
    assert any('"fs"' in event for event in events)
    a.run("resource", "delete", "fs", "--keep-data", "--yes")
    until(lambda: b.call("resource.list")["resources"] == [])
    assert image.read_bytes() == before
    assert (tmp_path / "copy-b.img").read_bytes() == before
