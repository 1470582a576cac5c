"""A small real file system under the data directory, filled up and made read-only."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.errors import NoSpaceError
from geomirror.nbd.client_io import NbdClient
from tests.system.loop_disks import make_ext4, mounted
from tests.system.support import (
    MIB,
    SEED,
    Site,
    create,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
CHUNKS = 48
WAIT_S = 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 400 MiB over a loop device."""
    image = tmp_path / "fs.img"
    make_ext4(image, "400m")
    with mounted(image, tmp_path / "mnt") as directory:
        yield directory


@pytest.fixture
def site(small_disk: Path, tmp_path: Path) -> Iterator[Site]:
    """A node whose data directory lies on the small file system."""
    with some_sites(tmp_path, "a") as (a,):
        a.data_dir = small_disk / "a"
        listen = ("--listen", f"127.0.0.1:{a.port}")
        a.run("network", "create", "acme", "--site", "east", "--node", "east-1", *listen)
        config = a.data_dir / "geomirror.toml"
        config.write_text(f"[storage]\nfull_disk_wait_s = {WAIT_S}\n")
        config.chmod(0o600)
        a.restart()
        create(a, "pg", secondary=None)
        yield a


def fill(small_disk: Path) -> Path:
    """Take all the space that is left."""
    path = small_disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096):
            block = bytes(size)
            while True:
                try:
                    if file.write(block) < size:
                        break
                except OSError:
                    break
    os.sync()
    return path


class Writer:
    """Overwrites megabytes in turn, each flushed, and knows what must be there."""

    def __init__(self, client: NbdClient) -> None:
        self.client = client
        self.completed: dict[int, bytes] = {}
        self.under_way: dict[int, bytes] = {}
        self._chance = random.Random(1 + SEED)

    async def write(self, number: int) -> None:
        chunk = self._chance.randbytes(MIB)
        self.under_way[number] = chunk
        await self.client.write(number * MIB, chunk)
        self.completed[number] = chunk
        del self.under_way[number]
        await self.client.flush()

    async def write_until_the_disk_is_full(self) -> float:
        """Until a write fails; how long it waited, in seconds."""
        loop = asyncio.get_running_loop()
        for count in range(1000):
            began = loop.time()
            try:
                await self.write(count % CHUNKS)
            except NoSpaceError:
                return loop.time() - began
        raise AssertionError("it is never full")

    async def check(self, client: NbdClient) -> None:
        for number, chunk in self.completed.items():
            found = bytes(await client.read(number * MIB, MIB))
            # A write that was not answered may have happened, in whole.
            assert found in (chunk, self.under_way.get(number)), f"chunk {number}"


def is_full(site: Site) -> bool:
    state: str = site.status()["state"]
    return state == "storage_full"


def is_durable(site: Site) -> bool:
    return bool(site.peer()["lag"]["seconds"] < 1)


def full_text(site: Site) -> str:
    """What `status` says while the disk is full."""
    text = site.run("status", "pg")
    return text if "disk is full" in text else ""


async def test_a_full_disk_holds_writers_back_and_loses_nothing(site: Site, small_disk: Path):
    filler = await asyncio.to_thread(fill, small_disk)
    async with await NbdClient.connect(site.uri()) as client:
        writer = Writer(client)
        waited_s = await writer.write_until_the_disk_is_full()
        assert WAIT_S / 2 <= waited_s < 30
        assert len(writer.completed) > 10
        # The next one is told, too, and nothing is torn down: reads go on.
        with pytest.raises(NoSpaceError):
            await writer.write(0)
        await writer.check(client)
        await asyncio.to_thread(until, lambda: "No space left" in site.status()["reason"])
        # By the time that a command has started, destaging may have found some room.
        text = await asyncio.to_thread(until, lambda: full_text(site))
        assert "Free space" in text
        assert len(site.events("storage_full")) <= 2
        # It goes on by itself, on the same connection, when there is space again.
        filler.unlink()
        await asyncio.to_thread(until, lambda: site.status()["state"] == "ok")
        await writer.check(client)
        after = Writer(client)
        for number in range(CHUNKS):
            await after.write(number)
    # And what was flushed outlives the process.
    await asyncio.to_thread(site.kill)
    await asyncio.to_thread(site.restart)
    async with await NbdClient.connect(site.uri()) as last:
        await after.check(last)
    assert site.crashes() == []


async def test_a_daemon_killed_on_a_full_disk_starts_again_when_there_is_space(
    site: Site, small_disk: Path
):
    async with await NbdClient.connect(site.uri()) as client:
        writer = Writer(client)
        for number in range(8):
            await writer.write(number)
        await asyncio.to_thread(site.kill)
    filler = await asyncio.to_thread(fill, small_disk)
    await asyncio.to_thread(site.restart)
    found = site.status()
    if found["error"] is not None:
        assert found["error"]["code"] == "no_space"
        await asyncio.to_thread(site.kill)
        filler.unlink()
        await asyncio.to_thread(site.restart)
    async with await NbdClient.connect(site.uri()) as again:
        await writer.check(again)


def test_a_read_only_data_directory_keeps_the_daemon_from_starting(site: Site, small_disk: Path):
    asyncio.run(site.write(0, b"x" * MIB))
    site.stop()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = site.error("node", "run", expected=8, code="storage")
    assert str(site.data_dir) in said
    assert "Read-only file system" in said
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    site.restart()
    assert asyncio.run(site.read(0, MIB)) == b"x" * MIB


def test_a_data_directory_without_room_for_a_journal(site: Site, small_disk: Path):
    filler = fill(small_disk)
    new = ("resource", "create", "more", "--size", "64M", "--primary", "east-1")
    said = site.error(*new, "--journal-size", "256M", expected=8, code="no_space")
    assert str(site.data_dir) in said
    assert not (site.data_dir / "resources/more").exists()
    assert [r["name"] for r in site.call("resource.list")["resources"]] == ["pg"]
    filler.unlink()
    asyncio.run(site.write(0, b"x" * MIB))
    assert asyncio.run(site.read(0, MIB)) == b"x" * MIB


async def test_a_secondary_on_a_full_disk_says_so_and_catches_up(small_disk: Path, tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        b.data_dir = small_disk / "b"
        await asyncio.to_thread(make_network, a, b)
        # More segments than can lie ready there: the disk is full before the journal is.
        await asyncio.to_thread(create, a, "pg", "--journal-size", "384M")
        await asyncio.to_thread(wait_applied, a)
        filler = await asyncio.to_thread(fill, small_disk)
        async with await NbdClient.connect(a.uri()) as client:
            writer = Writer(client)
            async with await NbdClient.connect(b.uri()) as reader:
                # It holds applying back, or old history would make room for ever; and one chunk
                # after another is not folded away. So in the end what lies ready there is used.
                await reader.read(0, 4096)
                for number in range(20 * CHUNKS):
                    await writer.write(number % CHUNKS)
                    await asyncio.to_thread(until, lambda: is_full(b) or is_durable(a))
                    if is_full(b):
                        break
                else:
                    raise AssertionError("it is never full")
                assert a.status()["state"] in ("ok", "degraded")
            # Of the journal that takes no more, or of a job that has to wait.
            assert b.events("spool_full") or b.events("storage_full")
            filler.unlink()
            await asyncio.to_thread(wait_applied, a)
            image = await b.read(0, CHUNKS * MIB)
            assert image == bytes(await client.read(0, CHUNKS * MIB))
        assert a.peer()["resyncs"] == 0
        assert a.crashes() == b.crashes() == []
