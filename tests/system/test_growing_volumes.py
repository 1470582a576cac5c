"""Volumes grow and are added under real daemons, with real clients, and through kills."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.loop_disks import loop_over, mounted, need_loops
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

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """Two linked nodes with a resource that ends within a block."""
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg", size=str(8 * MIB + 512))
        until(lambda: a.peer()["state"] == "Stream", what="streaming")
        yield a, b
        assert a.crashes() == b.crashes() == []


def size_at(uri: str) -> int:
    """What other people's client says."""
    command = ["nbdinfo", "--json", uri]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["exports"][0]["export-size"])


def content(uri: str, path: Path) -> str:
    """Hash of a whole volume, read by nbdcopy."""
    subprocess.run(["nbdcopy", uri, path], check=True, capture_output=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    return digest


def sizes(site: Site) -> dict[str, int]:
    return {each["name"]: each["size_bytes"] for each in site.status()["volumes"]}


def test_a_volume_grows_everywhere_and_the_next_connection_sees_it(pair, tmp_path: Path):
    a, b = pair
    data = random.Random(1).randbytes(MIB)

    async def story() -> None:
        async with await NbdClient.connect(a.uri()) as old:
            await old.write(8 * MIB, data[:512])
            grown = await asyncio.to_thread(b.json, "volume", "resize", "pg/0", "--size", "24M")
            assert grown["volume"]["size_bytes"] == 24 * MIB
            assert grown["changed"] and grown["epoch"] > 0
            assert old.size_bytes == 8 * MIB + 512  # Until it connects again.
            await old.write(0, data)
            await old.flush()
        async with await NbdClient.connect(a.uri()) as new:
            assert new.size_bytes == 24 * MIB
            assert await new.read(8 * MIB, 8192) == data[:512] + bytes(8192 - 512)
            await new.write(23 * MIB, data)
            await new.flush()

    asyncio.run(story())
    wait_applied(a)
    assert size_at(a.uri()) == size_at(b.uri()) == 24 * MIB
    assert content(a.uri(), tmp_path / "x") == content(b.uri(), tmp_path / "x")
    image = b.data_dir / "resources/pg/volumes/0.img"
    assert image.stat().st_size == 24 * MIB
    assert image.stat().st_blocks * 512 < 8 * MIB  # The new bytes are a hole.
    again = a.json("volume", "resize", "pg", "--size", "24M")
    assert (again["changed"], again["epoch"]) == (False, None)
    assert "cannot be shrunk" in a.error(
        *("volume", "resize", "pg/0", "--size", "8M"), expected=5, code="refused"
    )
    a.error("volume", "resize", "pg/9", "--size", "32M", expected=4, code="not_found")
    a.error("volume", "resize", "pg/0", "--size", "33554433", expected=2, code="usage")
    until(lambda: b.call("resource.list")["resources"][0]["size_bytes"] == 24 * MIB)
    assert [
        e["fields"]["size_bytes"] if "fields" in e else e["size_bytes"]
        for e in a.events("volume_resized")
    ] == [24 * MIB]


def test_a_volume_is_added_and_comes_back_with_its_name_and_backing(pair, tmp_path: Path):
    a, b = pair
    disk = tmp_path / "wal.img"
    data = random.Random(2).randbytes(MIB)
    used = tmp_path / "used.img"
    used.write_bytes(b"x" * 4 * MIB)
    said = a.error(
        *("volume", "add", "pg", "--size", "4M", "--backing", f"west-1={used}"),
        expected=5,
        code="refused",
    )
    assert str(used) in said and sizes(a) == {"0": 8 * MIB + 512}
    made = a.json(
        *("volume", "add", "pg", "--size", "4M", "--name", "wal", "--backing", f"west-1={disk}")
    )
    assert made["volume"]["nbd_uri"] == a.uri("pg", 1)
    asyncio.run(a.write(3 * MIB, data, volume=1))
    a.run("volume", "add", "pg", "--size", "1M")
    wait_applied(a)
    expected = {"0": 8 * MIB + 512, "wal": 4 * MIB, "2": MIB}
    for site in (a, b):
        assert sizes(site) == expected
        assert size_at(site.uri("pg", 1)) == 4 * MIB
        assert asyncio.run(site.read(3 * MIB, MIB, volume=1)) == data
    assert disk.stat().st_size == 4 * MIB
    for site in (a, b):
        site.kill()
        site.restart()
    until(lambda: a.peer()["state"] == "Stream", what="streaming again")
    for site in (a, b):
        assert sizes(site) == expected
        assert asyncio.run(site.read(3 * MIB, MIB, volume=1)) == data
    assert used.read_bytes() == b"x" * 4 * MIB


def test_kills_around_the_command_leave_the_old_size_or_the_new_one(pair, tmp_path: Path):
    a, b = pair
    chance = random.Random(3 + SEED)
    wanted = known = 8 * MIB + 512
    for number in range(6):
        victim = (a, b)[number % 2]
        wanted += MIB + 512
        killer = threading.Timer(chance.uniform(0.0, 0.6), victim.kill)
        killer.start()
        done = subprocess.run(
            a.command("volume", "resize", "pg", "--size", str(wanted)), capture_output=True
        )
        killer.join()
        victim.restart()
        a.uri()  # It is served again: only now the journal has been read.
        found = a.status()["volumes"][0]["size_bytes"]
        assert found in ((wanted,) if done.returncode == 0 else (known, wanted))
        if found == known:
            assert a.json("volume", "resize", "pg", "--size", str(wanted))["changed"]
        known = wanted
        asyncio.run(a.write(known - 512, bytes([number + 1]) * 512))
    until(lambda: a.peer()["state"] == "Stream", what="streaming")
    wait_applied(a)
    assert size_at(a.uri()) == size_at(b.uri()) == known
    assert content(a.uri(), tmp_path / "x") == content(b.uri(), tmp_path / "x")
    until(lambda: b.call("resource.list")["resources"][0]["size_bytes"] == known, what="told")


def test_who_was_away_and_who_comes_later_have_the_same_volumes(tmp_path: Path):
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        create(a, "pg", size="8M")
        until(lambda: a.peer()["state"] == "Stream", what="streaming")
        b.kill()
        disk = tmp_path / "b.img"
        a.run("volume", "resize", "pg", "--size", "12M")
        a.run("volume", "add", "pg", "--size", "2M", "--backing", f"west-1={disk}")
        data = random.Random(4).randbytes(MIB)
        asyncio.run(a.write(11 * MIB, data))
        asyncio.run(a.write(MIB, data, volume=1))
        late = tmp_path / "c.img"
        a.run("resource", "add-secondary", "pg", "north-1", "--backing", f"1={late}")
        b.restart()
        until(lambda: len(a.status()["peers"]) == 2, what="two peers")
        wait_applied(a)
        for site in (a, b, c):
            assert sizes(site) == {"0": 12 * MIB, "1": 2 * MIB}
            assert asyncio.run(site.read(11 * MIB, MIB)) == data
            assert asyncio.run(site.read(MIB, MIB, volume=1)) == data
        assert disk.stat().st_size == late.stat().st_size == 2 * MIB
        assert a.crashes() == b.crashes() == c.crashes() == []


def enlarge(path: Path, device: str, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
    subprocess.run(["losetup", "--set-capacity", device], check=True)


def test_a_device_that_is_too_small_is_refused_here_and_waited_for_there(tmp_path: Path):
    files = [tmp_path / "here.img", tmp_path / "there.img"]
    for file in files:
        with file.open("wb") as made:
            made.truncate(8 * MIB)
    with (
        loop_over(files[0]) as here,
        loop_over(files[1]) as there,
        some_sites(tmp_path, "a", "b") as (a, b),
    ):
        make_network(a, b)
        create(a, "pg", f"--backing=east-1={here}", f"--backing=west-1={there}", size="8M")
        until(lambda: a.peer()["state"] == "Stream", what="streaming")
        said = a.error("volume", "resize", "pg", "--size", "16M", expected=5, code="refused")
        assert here in said and "enlarge the device" in said
        assert sizes(a) == {"0": 8 * MIB} and a.events("volume_resized") == []

        enlarge(files[0], here, 16 * MIB)
        a.run("volume", "resize", "pg", "--size", "16M")
        data = random.Random(5).randbytes(MIB)
        asyncio.run(a.write(15 * MIB, data))
        until(lambda: b.events("volume_waits"), what="the secondary says so")
        status = until(lambda: b.status()["reason"] and b.status(), what="a reason")
        assert there in status["reason"] and "enlarge the device" in status["reason"]
        assert status["state"] == "storage_full"
        a.call("resource.wait", name="pg", kind="durable", timeout_s=30)
        assert size_at(b.uri()) == 8 * MIB  # Its epoch is the one before.
        b.kill()
        b.restart()
        until(lambda: b.status().get("reason"), what="it still says so")

        enlarge(files[1], there, 16 * MIB)
        wait_applied(a)
        assert size_at(b.uri()) == 16 * MIB
        assert asyncio.run(b.read(15 * MIB, MIB)) == data
        assert b.status()["state"] == "ok"
        assert a.crashes() == b.crashes() == []


def test_an_ext4_is_grown_on_its_volume(pair, tmp_path: Path):
    need_loops()
    a, b = pair
    image = tmp_path / "fs.img"
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "orders").write_bytes(random.Random(6).randbytes(MIB))
    run = ("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "8m")
    subprocess.run(run, check=True)
    subprocess.run(["nbdcopy", "--flush", image, a.uri()], check=True)
    a.run("volume", "resize", "pg", "--size", "64M")
    subprocess.run(["nbdcopy", a.uri(), image], check=True)
    subprocess.run(["e2fsck", "-fp", image], check=True, capture_output=True)
    subprocess.run(["resize2fs", image], check=True, capture_output=True)
    subprocess.run(["nbdcopy", "--flush", image, a.uri()], check=True)
    wait_applied(a)
    time.sleep(0.1)
    copy, mount = tmp_path / "copy.img", tmp_path / "mount"
    subprocess.run(["nbdcopy", b.uri(), copy], check=True)
    subprocess.run(["e2fsck", "-fn", copy], check=True, capture_output=True)
    with mounted(copy, mount, "ro"):
        assert (mount / "orders").read_bytes() == (tree / "orders").read_bytes()
        assert shutil.disk_usage(mount).total > 48 * MIB
