"""The power of a host goes away under load: what was confirmed is there afterwards.

`GEOMIRROR_POWER_CUTS=50` makes it as many rounds as that.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import GeomirrorError
from geomirror.nbd.client_io import NbdClient
from tests.system.power import BLOCK, SLOT_BLOCKS, SLOTS, Load, PowerDisk, PowerSite, require_power
from tests.system.support import SEED, Site, count_links, create, make_network, some_sites, until

ROUNDS = int(os.environ.get("GEOMIRROR_POWER_CUTS", "2"))
FLUSHES_MIN = 6
"""Of a round, before its cut: less would show little."""
pytestmark = [pytest.mark.system, pytest.mark.timeout(120 + 60 * ROUNDS)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerDisk]:
    require_power()
    found = PowerDisk(tmp_path)
    try:
        yield found
    finally:
        found.close()


async def load_until_the_cut(load: Load, uri: str, cut: object, after_s: float) -> None:
    """Write for a while, on a slow machine longer, then cut the power in the middle of it."""
    task = asyncio.create_task(load.run(uri))
    enough = load.flushes + FLUSHES_MIN
    await asyncio.sleep(after_s)
    give_up = time.monotonic() + 30
    while load.flushes < enough and time.monotonic() < give_up and not task.done():
        await asyncio.sleep(0.01)
    assert not task.done(), task
    assert callable(cut)
    await asyncio.to_thread(cut)
    await task


def cut(site: Site, disk: PowerDisk) -> None:
    """The power first, then the daemon, which cannot write anything any more."""
    disk.cut()
    site.kill()
    disk.unplug()


def restart(site: Site, disk: PowerDisk) -> None:
    disk.power_on()
    site.restart()


@pytest.fixture
def alone(disk: PowerDisk, tmp_path: Path) -> Iterator[PowerSite]:
    """A node on the disk with a resource that nobody else has."""
    site = PowerSite(tmp_path, "a", disk.mount / "a")
    try:
        listen = ("--listen", f"127.0.0.1:{site.port}")
        site.run("network", "create", "acme", "--site", "east", "--node", "east-1", *listen)
        site.restart()
        create(site, "pg", secondary=None)
        yield site
    finally:
        site.end()


def test_what_a_flush_confirmed_outlives_the_power(alone: PowerSite, disk: PowerDisk):
    load, chance = Load(1 + SEED), random.Random(1 + SEED)
    for _ in range(ROUNDS):
        after_s = chance.uniform(0.5, 2.5)
        asyncio.run(load_until_the_cut(load, alone.uri(), lambda: cut(alone, disk), after_s))
        restart(alone, disk)
        assert asyncio.run(load.lost(alone.uri())) == []
    assert load.flushes > 5 * ROUNDS
    assert alone.crashes() == []


def test_a_node_that_does_not_sync_is_caught(alone: PowerSite, disk: PowerDisk):
    alone.stop()
    alone.has_no_sync = True
    alone.restart()
    load, chance = Load(2 + SEED), random.Random(2 + SEED)
    for _ in range(10):
        after_s = chance.uniform(0.5, 1.5)
        asyncio.run(load_until_the_cut(load, alone.uri(), lambda: cut(alone, disk), after_s))
        restart(alone, disk)
        resource = alone.status()
        if resource["error"] is not None:
            return  # Its own checks noticed that what must be durable is not.
        if asyncio.run(load.lost(alone.uri())):
            return
    raise AssertionError("nothing confirmed was lost without a single fsync")


def copied(a: Site, b: Site) -> None:
    """A network of both, and a resource whose copy is whole."""
    make_network(a, b)
    create(a, "pg")
    until(lambda: a.peer()["disk_state"] == "UpToDate", what="the copy is there")


@pytest.fixture
def pair(disk: PowerDisk, tmp_path: Path) -> Iterator[tuple[PowerSite, Site]]:
    """A primary on the disk, and a copy whose power stays."""
    a = PowerSite(tmp_path, "a", disk.mount / "a")
    with some_sites(tmp_path, "b") as (b,):
        try:
            copied(a, b)
            yield a, b
        finally:
            a.end()


def rejoined(a: Site, b: Site, resyncs: int) -> None:
    """The copy follows again, from where it was; it was never ahead of what the primary has."""
    until(lambda: a.status().get("position"), what="the primary is open")
    # Nobody writes: what the primary has sealed now is what it remembered.
    copy, primary = b.status()["position"], a.status()["position"]
    assert copy["durable_epoch"] <= primary["epoch"], (copy, primary)
    until(lambda: a.peer()["state"] in ("Stream", "Fold"), what="the copy follows")
    a.call("resource.wait", name="pg", kind="applied", timeout_s=60)
    assert a.peer()["resyncs"] == resyncs
    assert b.status()["position"]["applied_epoch"] == a.status()["position"]["epoch"]


async def content(site: Site) -> bytes:
    async with await NbdClient.connect(site.uri()) as client:
        return bytes(await client.read(0, SLOTS * SLOT_BLOCKS * BLOCK))


def test_a_copy_is_never_ahead_of_a_primary_that_lost_its_power(
    pair: tuple[PowerSite, Site], disk: PowerDisk
):
    a, b = pair
    load, chance = Load(4 + SEED), random.Random(4 + SEED)
    for _ in range(ROUNDS):
        resyncs = a.peer()["resyncs"]
        after_s = chance.uniform(0.5, 2.5)
        asyncio.run(load_until_the_cut(load, a.uri(), lambda: cut(a, disk), after_s))
        restart(a, disk)
        rejoined(a, b, resyncs)
        assert asyncio.run(load.lost(a.uri())) == []
        assert asyncio.run(content(a)) == asyncio.run(content(b))
    assert load.flushes > 5 * ROUNDS
    assert a.crashes() == b.crashes() == []


def test_a_primary_that_does_not_sync_is_caught_by_its_copy(
    pair: tuple[PowerSite, Site], disk: PowerDisk
):
    a, b = pair
    a.stop()
    a.has_no_sync = True
    a.restart()
    load, chance = Load(5 + SEED), random.Random(5 + SEED)
    for _ in range(10):
        resyncs = a.peer()["resyncs"]
        after_s = chance.uniform(0.5, 1.5)
        asyncio.run(load_until_the_cut(load, a.uri(), lambda: cut(a, disk), after_s))
        disk.power_on()
        try:
            a.restart()
            if a.status()["error"] is not None:
                return  # Its own checks noticed that what must be durable is not.
            rejoined(a, b, resyncs)
        except (AssertionError, GeomirrorError):
            return  # It does not start, or the copy is ahead, diverged, or had to be copied.
        if asyncio.run(load.lost(a.uri())):
            return
    raise AssertionError("a primary without a single fsync kept what it had sent")


@pytest.fixture
def mirror(disk: PowerDisk, tmp_path: Path) -> Iterator[tuple[Site, PowerSite]]:
    """A copy on the disk, and a primary whose power stays."""
    b = PowerSite(tmp_path, "b", disk.mount / "b")
    with some_sites(tmp_path, "a") as (a,):
        try:
            copied(a, b)
            yield a, b
        finally:
            b.end()


def reported_until_the_cut(
    load: Load, mirror: tuple[Site, PowerSite], disk: PowerDisk, seconds: float
) -> int:
    """Write at the primary, cut the copy's power; the epoch that it has reported durable."""
    a, b = mirror
    until(lambda: a.peer()["state"] in ("Stream", "Fold"))
    stop_at = time.monotonic() + seconds
    reported = asyncio.run(_load_while(load, a, stop_at, lambda: cut(b, disk)))
    assert reported > 0
    restart(b, disk)
    return reported


def test_what_a_mirror_reported_outlives_its_power(mirror: tuple[Site, PowerSite], disk: PowerDisk):
    a, b = mirror
    load, chance = Load(3 + SEED), random.Random(3 + SEED)
    for _ in range(ROUNDS):
        reported = reported_until_the_cut(load, mirror, disk, chance.uniform(1.0, 2.5))
        position = until(lambda: b.status()["position"])
        assert position["durable_epoch"] >= reported
    until(lambda: count_links(a) == 1)
    a.call("resource.wait", name="pg", kind="applied", timeout_s=60)
    # A slow machine fills the small journal while the mirror starts; nothing else is a reason.
    assert a.peer()["resyncs"] == len(a.events("journal_overflow"))
    assert asyncio.run(load.lost(b.uri())) == []
    assert a.crashes() == b.crashes() == []


def test_a_mirror_that_does_not_sync_reports_what_it_has_not(
    mirror: tuple[Site, PowerSite], disk: PowerDisk
):
    _, b = mirror
    b.stop()
    b.has_no_sync = True
    b.restart()
    load, chance = Load(6 + SEED), random.Random(6 + SEED)
    for _ in range(10):
        reported = reported_until_the_cut(load, mirror, disk, chance.uniform(1.0, 2.0))
        resource: dict[str, Any] = b.status()
        if resource["error"] is not None:
            return  # Its own checks noticed it.
        if resource["position"]["durable_epoch"] < reported:
            return
    raise AssertionError("a mirror without a single fsync had all that it reported")


async def _load_while(load: Load, site: Site, stop_at: float, cut: object) -> int:
    """Write at the primary until the mirror's power is cut; what it had reported by then."""
    task = asyncio.create_task(load.run(site.uri()))
    await asyncio.to_thread(until, lambda: site.peer()["position"]["epoch"], 30, "a report")
    await asyncio.sleep(max(0.0, stop_at - time.monotonic()))
    assert callable(cut)
    await asyncio.to_thread(cut)
    reported = int(site.peer()["position"]["epoch"])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return reported
