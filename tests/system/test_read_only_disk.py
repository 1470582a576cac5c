"""The file system under the journal becomes read-only under a writer, as ext4 does on errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.errors import FencedError, GeomirrorError, StorageError
from geomirror.nbd.client_io import NbdClient
from tests.system.loop_disks import make_ext4, mount, need_loops
from tests.system.private_mounts import own_mounts
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
CHUNK = 64 * 1024
CHUNKS = 64


class FragileDisk:
    """An ext4 on a loop device that can be made to find an error in itself."""

    def __init__(self, root: Path) -> None:
        self._image, self.mount = root / "fs.img", root / "mnt"
        self.mount.mkdir()
        make_ext4(self._image, "600m")
        self.mount_again()

    def mount_again(self) -> None:
        mount(self._image, self.mount, "errors=remount-ro")

    def become_read_only(self) -> None:
        """From here on nothing can be written."""
        device = next(
            line.split()[0]
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[1] == str(self.mount)
        )
        assert device.startswith("/dev/loop"), device
        trigger = Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel's ext4 cannot be told to fail")
        trigger.write_text("a test\n")
        with pytest.raises(OSError) as caught:
            (self.mount / "probe").write_text("x")
        assert caught.value.errno == errno.EROFS

    def repair(self) -> None:
        """What an administrator does: unmount, check, mount."""
        subprocess.run(["umount", self.mount], check=True)
        done = subprocess.run(
            ["e2fsck", "-fy", self._image], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        self.mount_again()

    def close(self) -> None:
        subprocess.run(["umount", self.mount], check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FragileDisk]:
    need_loops()
    # Another test's namespace that had a copy of the mount would keep the broken file system alive.
    with own_mounts():
        found = FragileDisk(tmp_path)
        yield found
        found.close()


@pytest.fixture
def pair(disk: FragileDisk, tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """A primary on that disk, and its copy on another."""
    with some_sites(tmp_path, "a", "b") as (a, b):
        a.data_dir = disk.mount / "a"
        make_network(a, b)
        create(a, "pg", size="16M")
        wait_applied(a)
        yield a, b
    assert a.crashes() == b.crashes() == []


class Writer:
    """Overwrites chunks with numbers, each flushed; knows what was confirmed."""

    def __init__(self) -> None:
        self.sent = [0] * CHUNKS
        self.confirmed = [0] * CHUNKS
        self.error: GeomirrorError | None = None

    async def run(self, uri: str) -> None:
        """Until a request fails."""
        async with await NbdClient.connect(uri) as client:
            number = 0
            try:
                while True:
                    number += 1
                    chunk = number % CHUNKS
                    self.sent[chunk] = number
                    await client.write(chunk * CHUNK, number.to_bytes(8, "big") * (CHUNK // 8))
                    await client.flush()
                    self.confirmed[chunk] = number
            except GeomirrorError as error:
                self.error = error

    def lost(self, image: bytes) -> list[str]:
        found = []
        for chunk in range(CHUNKS):
            data = image[chunk * CHUNK : (chunk + 1) * CHUNK]
            numbers = {data[at : at + 8] for at in range(0, CHUNK, 8)}
            held = sorted(int.from_bytes(each, "big") for each in numbers)
            if not self.confirmed[chunk] <= held[0] <= held[-1] <= self.sent[chunk]:
                found.append(f"chunk {chunk}: {held}, confirmed {self.confirmed[chunk]}")
        return found


async def write_until_it_fails(writer: Writer, uri: str, disk: FragileDisk) -> None:
    writing = asyncio.create_task(writer.run(uri))
    while sum(map(bool, writer.confirmed)) < CHUNKS:
        await asyncio.sleep(0.02)
        assert not writing.done(), writer.error
    await asyncio.to_thread(disk.become_read_only)
    async with asyncio.timeout(60):
        await writing


def test_a_writer_gets_an_error_and_nothing_confirmed_is_lost(
    pair: tuple[Site, Site], disk: FragileDisk
) -> None:
    a, b = pair
    writer, uri = Writer(), a.uri()
    asyncio.run(write_until_it_fails(writer, uri, disk))
    # EIO for what cannot be written, ESHUTDOWN for a flush that waits then: both are EIO for a
    # file system on the kernel's client.
    assert isinstance(writer.error, StorageError | FencedError), writer.error
    assert isinstance(writer.error.__cause__, OSError)
    assert writer.error.__cause__.errno in (errno.EIO, errno.ESHUTDOWN)
    late = Writer()
    with contextlib.suppress(GeomirrorError):  # Not even a connection, perhaps.
        asyncio.run(late.run(uri))
    assert not any(late.confirmed)
    # The daemon goes on, and says what is wrong and with which file system.
    status = until(lambda: (s := a.status())["state"] == "fenced" and s, what="it is said")
    assert str(a.data_dir / "resources/pg/journal") in status["reason"]
    assert "Read-only file system" in status["reason"]
    assert "Read-only file system" in a.run("status", "pg")
    a.run("check", "pg", expected=2)
    # The copy is a moment of the history, whatever the primary could not write any more.
    copied = b.status()["position"]["applied_epoch"]
    a.kill()
    disk.repair()
    a.restart()
    assert writer.lost(asyncio.run(a.read(0, CHUNKS * CHUNK))) == []
    wait_applied(a)
    assert b.status()["position"]["applied_epoch"] >= copied
    assert asyncio.run(b.read(0, 16 * MIB)) == asyncio.run(a.read(0, 16 * MIB))
    assert a.peer()["resyncs"] == 0
    asyncio.run(a.write(0, b"as before"))
    wait_applied(a)
    assert asyncio.run(b.read(0, 9)) == b"as before"


def test_a_copy_whose_disk_becomes_read_only_says_so_and_holds_nobody_up(
    disk: FragileDisk, tmp_path: Path
) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        b.data_dir = disk.mount / "b"
        make_network(a, b)
        create(a, "pg", size="16M")
        wait_applied(a)
        disk.become_read_only()
        asyncio.run(a.write(0, b"1" * MIB))
        status = until(lambda: (s := b.status())["state"] == "fenced" and s, what="it says so")
        assert "stopped serving" in status["reason"]
        asyncio.run(a.write(MIB, b"2" * MIB))
        assert a.status()["state"] == "degraded"
        until(lambda: a.peer()["lag"]["epochs"] > 0, what="the copy stays behind")
        b.kill()
        disk.repair()
        b.restart()
        wait_applied(a)
        assert asyncio.run(b.read(0, 2 * MIB)) == b"1" * MIB + b"2" * MIB
        assert a.peer()["resyncs"] == 0
        assert a.crashes() == b.crashes() == []
