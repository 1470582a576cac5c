"""Real daemons whose flushes wait for each other, killed right after an answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import MIB, Site, create, make_network, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
CHUNK = MIB // 4


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """Two nodes with the resource "pg"."""
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg")
        yield a, b


def in_sync(site: Site) -> object:
    peers = site.status()["peers"]
    return peers[0]["in_sync"] if peers else None


def has_applied_all(site: Site) -> bool:
    position = site.status()["position"]
    return position is not None and position["applied_epoch"] == position["durable_epoch"]


def test_a_durable_flush_outlives_the_primary_and_a_kill_of_the_secondary(
    sites: tuple[Site, Site],
):
    a, b = sites
    a.run("resource", "set", "pg", "ack=durable", "degrade_after=block")
    until(lambda: in_sync(a) is True)
    assert a.peer()["ack"] == "durable"
    chance = random.Random(7)
    expected = b""
    for number in range(3):
        expected += chance.randbytes(CHUNK)
        asyncio.run(a.write(number * CHUNK, expected[-CHUNK:]))
        # The answer is there: nothing of what follows may take it back.
        b.kill()
        a.kill()
        b.restart()
        until(lambda: has_applied_all(b))
        assert asyncio.run(b.read(0, len(expected))) == expected
        a.restart()
        until(lambda: in_sync(a) is True)
    assert a.crashes() == b.crashes() == []


def test_a_secondary_that_is_away_is_given_up_said_so_and_taken_back(sites: tuple[Site, Site]):
    a, b = sites
    a.run("resource", "set", "pg", "ack=durable", "degrade_after=1s")
    until(lambda: in_sync(a) is True)
    b.kill()
    began = time.monotonic()
    asyncio.run(a.write(0, b"x" * CHUNK))
    took_s = time.monotonic() - began
    assert 0.9 <= took_s < 20
    assert in_sync(a) is False
    assert a.status()["state"] == "degraded"
    assert [e["peer"] for e in a.events("sync_degraded")] == ["west-1"]
    text = a.run("status", "pg")
    assert "durable, out of sync" in text
    assert "confirmed writes may be missing there" in text
    # Known in the next life, too; and flushes do not wait for it meanwhile.
    a.kill()
    a.restart()
    assert until(lambda: a.status()["peers"])[0]["in_sync"] is False
    asyncio.run(a.write(CHUNK, b"y" * CHUNK))
    b.restart()
    until(lambda: in_sync(a) is True)
    until(lambda: a.status()["state"] == "ok", timeout_s=90)
    a.run("wait", "pg", "--applied", "--timeout", "60")
    assert asyncio.run(b.read(0, 2 * CHUNK)) == b"x" * CHUNK + b"y" * CHUNK
    said = a.error("resource", "set", "pg", "ack=sometimes", expected=2, code="usage")
    assert "completed, received, durable, applied" in said
    assert a.crashes() == b.crashes() == []


def test_a_secondary_is_removed_and_added_while_a_client_writes(sites: tuple[Site, Site]):
    a, b = sites
    asyncio.run(a.write(0, b"1" * CHUNK))
    a.run("resource", "remove-secondary", "pg", "west-1", "--yes")
    until(lambda: b.call("resource.list")["resources"] == [])
    assert not (b.data_dir / "resources" / "pg").exists()
    asyncio.run(a.write(CHUNK, b"2" * CHUNK))
    a.run("resource", "add-secondary", "pg", "west-1")
    asyncio.run(a.write(2 * CHUNK, b"3" * CHUNK))
    a.run("wait", "pg", "--applied", "--timeout", "60")
    found = asyncio.run(b.read(0, 3 * CHUNK))
    assert found == b"1" * CHUNK + b"2" * CHUNK + b"3" * CHUNK
    assert a.crashes() == b.crashes() == []
