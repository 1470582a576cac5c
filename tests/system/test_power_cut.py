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

import pytest

from tests.system.power import Load, PowerDisk, PowerSite, require_power
from tests.system.support import SEED, Site, count_links, create, make_network, some_sites, until

ROUNDS = int(os.environ.get("GEOMIRROR_POWER_CUTS", "2"))
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
    """Write for a while, then cut the power in the middle of it."""
    task = asyncio.create_task(load.run(uri))
    await asyncio.sleep(after_s)
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
    assert load.flushes > 20 * ROUNDS
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
        resource = until(lambda: _opened(alone))
        if resource["error"] is not None:
            return  # Its own checks noticed that what must be durable is not.
        if asyncio.run(load.lost(alone.uri())):
            return
    raise AssertionError("nothing confirmed was lost without a single fsync")


def _opened(site: Site) -> object:
    found = site.status()
    return None if found["state"] == "opening" else found


def test_what_a_mirror_reported_outlives_its_power(disk: PowerDisk, tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        b.data_dir = disk.mount / "b"
        make_network(a, b)
        create(a, "pg")
        load, chance = Load(3 + SEED), random.Random(3 + SEED)
        for _ in range(ROUNDS):
            until(lambda: a.peer()["state"] in ("Stream", "Fold"))
            stop_at = time.monotonic() + chance.uniform(1.0, 2.5)
            reported = asyncio.run(_load_while(load, a, stop_at, lambda: cut(b, disk)))
            assert reported > 0
            restart(b, disk)
            position = until(lambda: b.status()["position"])
            assert position["durable_epoch"] >= reported
        until(lambda: count_links(a) == 1)
        a.call("resource.wait", name="pg", kind="applied", timeout_s=60)
        # A slow machine fills the small journal while the mirror starts; nothing else is a reason.
        assert a.peer()["resyncs"] == len(a.events("journal_overflow"))
        assert asyncio.run(load.lost(b.uri())) == []
        assert a.crashes() == b.crashes() == []


async def _load_while(load: Load, site: Site, stop_at: float, cut: object) -> int:
    """Write at the primary until the mirror's power is cut; what it had reported by then."""
    task = asyncio.create_task(load.run(site.uri()))
    await asyncio.sleep(max(0.0, stop_at - time.monotonic()))
    assert callable(cut)
    await asyncio.to_thread(cut)
    reported = int(site.peer()["position"]["epoch"])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return reported
