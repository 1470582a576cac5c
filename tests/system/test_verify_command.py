"""A disk rots under real daemons: a verify finds it, heals it, and never cries wolf."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.support import (
    MIB,
    Site,
    create,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

BLOCK = 4096
SIZE = 32 * MIB + 512


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """Two linked nodes, a resource with 6 MiB of data in it, applied at the copy."""
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg", size=str(SIZE))
        until(lambda: a.peer()["state"] == "Stream", what="streaming")
        data = random.Random(1).randbytes(6 * MIB)
        asyncio.run(a.write(0, data))
        asyncio.run(a.write(SIZE - 512, data[:512]))
        wait_applied(a)
        yield a, b
        assert a.crashes() == b.crashes() == []


def image(site: Site) -> Path:
    return site.data_dir / "resources/pg/volumes/0.img"


def rot(site: Site, *offsets: int) -> None:
    """Bytes of the image file change, and nobody is told."""
    with image(site).open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            old = file.read(3)
            file.seek(offset)
            file.write(bytes(each ^ 0x55 for each in old))


def is_same(a: Site, b: Site) -> bool:
    wait_applied(a)
    return asyncio.run(a.read(0, SIZE)) == image(b).read_bytes()


def last(document: Any) -> Any:
    (peer,) = document["peers"]
    return peer["verify"]["last"]


@contextmanager
def load(site: Site, first: int, end: int) -> Iterator[None]:
    """Somebody overwrites a range again and again."""
    stop = threading.Event()
    chance = random.Random(7)

    async def write() -> None:
        async with await NbdClient.connect(site.uri()) as client:
            while not stop.is_set():
                for _ in range(32):
                    at = chance.randrange(first, end - 20000) // 512 * 512
                    await client.write(at, chance.randbytes(chance.randrange(1, 30) * 512))
                await client.flush()

    writer = threading.Thread(target=lambda: asyncio.run(write()))
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


def test_flipped_bytes_are_found_and_healed_and_the_next_verify_is_clean(pair):
    a, b = pair
    assert a.peer()["verify"]["last"] is None
    assert a.peer()["verify"]["every_seconds"] == 7 * 86400
    clean = last(a.json("verify", "pg", "--wait", "--rate", "100M"))
    assert (clean["result"], clean["compared_bytes"]) == ("clean", -(-SIZE // BLOCK) * BLOCK)
    a.run("check", "pg")

    before = a.status()["position"]["epoch"]
    rot(b, 5 * BLOCK + 17, 6 * BLOCK, 1000 * BLOCK, 3000 * BLOCK, SIZE - 5)
    rotten = image(b).read_bytes()[5 * BLOCK : 6 * BLOCK]
    assert not is_same(a, b)
    found = last(b.json("verify", "pg", "--wait", "--rate", "100M", expected=1))
    assert (found["result"], found["different_blocks"], found["healed_blocks"]) == ("healed", 5, 5)
    assert found["different"] == [
        {"volume": "0", "block": 5, "blocks": 2},
        {"volume": "0", "block": 1000, "blocks": 1},
        {"volume": "0", "block": 3000, "blocks": 1},
        {"volume": "0", "block": SIZE // BLOCK, "blocks": 1},
    ]
    assert is_same(a, b)
    assert len(a.events("verify_mismatch")) == 1
    assert "verify found 5 different blocks, healed" in a.run("check", "pg", expected=1)
    text = a.run("status", "pg")
    assert "volume 0, blocks 5 to 6" in text
    assert "They were written again and are the same." in text

    view = b.json("view", "create", "pg", "--at", f"epoch:{before}")
    seen = asyncio.run(_read(view["nbd_uri"], 5 * BLOCK, BLOCK))
    assert seen == rotten

    assert last(a.json("verify", "pg", "--wait", "--rate", "100M"))["result"] == "clean"
    a.run("check", "pg")
    assert is_same(a, b)


async def _read(uri: str, offset: int, length: int) -> bytes:
    async with await NbdClient.connect(uri) as client:
        return bytes(await client.read(offset, length))


def test_under_load_there_is_no_false_alarm_and_rot_is_found(pair):
    a, b = pair
    with load(a, 0, 4 * MIB):
        for _ in range(3):
            assert last(a.json("verify", "pg", "--wait", "--rate", "50M"))["result"] == "clean"
        rot(b, 5 * MIB + 1)
        found = last(a.json("verify", "pg", "--wait", "--rate", "50M", expected=1))
        assert found["different"] == [{"volume": "0", "block": 5 * MIB // BLOCK, "blocks": 1}]
        assert found["result"] == "healed"
        assert last(a.json("verify", "pg", "--wait", "--rate", "50M"))["result"] == "clean"
    assert is_same(a, b)


def test_without_healing_nothing_is_written_and_the_alarm_stays(pair):
    a, b = pair
    rot(b, 9 * BLOCK)
    before = image(b).read_bytes()
    for _ in range(2):
        found = last(a.json("verify", "pg", "--no-heal", "--wait", "--rate", "1G", expected=1))
        assert (found["result"], found["healed_blocks"]) == ("different", 0)
    assert image(b).read_bytes() == before
    assert "1 different block, not healed" in a.run("check", "pg", expected=2)
    a.error("verify", "pg", "--peer", "nowhere", expected=4, code="not_found")
    a.error("verify", "pg", "--stop", "--wait", expected=2, code="usage")
    a.run("verify", "pg", "--wait", expected=1)
    assert is_same(a, b)


def test_a_killed_primary_goes_on_with_a_verify_where_it_was(pair):
    a, b = pair
    rot(b, 2 * BLOCK, 6 * MIB - 1)
    a.run("verify", "pg", "--rate", "256K")

    def current() -> Any:
        return (a.peer()["verify"] or {}).get("current") or {}

    until(lambda: current().get("different_blocks") == 1, what="the first difference")
    until(lambda: current()["compared_bytes"] >= 2 * MIB, what="a part of it")
    # It is written down every ten seconds.
    book = a.data_dir / "resources/pg/verify.json"
    until(lambda: b'"healed_blocks":1' in book.read_bytes(), what="its position on disk")
    a.kill()
    a.restart()
    until(lambda: [p["state"] for p in a.status()["peers"]] == ["Stream"], what="streaming again")
    assert current()["different_blocks"] >= 1
    assert current()["compared_bytes"] > 0
    stopped = a.json("verify", "pg", "--stop")
    assert last(stopped)["result"] == "stopped"
    done = last(a.json("verify", "pg", "--wait", "--rate", "100M", expected=1))
    assert [each["block"] for each in done["different"]] == [6 * MIB // BLOCK - 1]
    assert is_same(a, b)


def scheduled(site: Site, result: str, after: str = "") -> Any:
    """The next comparison that nobody asked for and that came to this."""

    def found() -> Any:
        last = next((p["verify"]["last"] for p in site.status()["peers"]), None)
        is_new = last and last["is_scheduled"] and last["started_at"] > after
        return last if is_new and last["result"] == result else None

    return until(found, what=f"a scheduled verify that is {result}")


def test_copies_are_compared_by_themselves_again_and_again_and_healed_only_if_that_is_wanted(pair):
    a, b = pair
    a.error("resource", "set", "pg", "verify_every=soon", expected=2, code="usage")
    b.run("resource", "set", "pg", "verify_every=1s", "verify_rate=1G")
    clean = scheduled(a, "clean")
    assert clean["compared_bytes"] == -(-SIZE // BLOCK) * BLOCK
    assert scheduled(a, "clean", clean["started_at"])["started_at"] > clean["started_at"]
    # Each second one is under way for a moment, and said instead.
    until(lambda: "the same at" in a.run("status", "pg"), what="the last one is said")
    a.run("check", "pg")

    before = image(b).read_bytes()[7 * BLOCK : 8 * BLOCK]
    rot(b, 7 * BLOCK + 3)
    found = scheduled(a, "different")
    assert found["different"] == [{"volume": "0", "block": 7, "blocks": 1}]
    assert image(b).read_bytes()[7 * BLOCK : 8 * BLOCK] != before, "an alarm, no change"
    assert "1 different block, not healed" in a.run("check", "pg", expected=2)
    until(lambda: a.peer()["verify"]["is_overdue"], what="no clean one for two intervals")
    until(lambda: a.events("verify_overdue"), what="the event of it")

    a.run("resource", "set", "pg", "verify_heal=on")
    scheduled(a, "healed")
    healed = scheduled(a, "clean")
    assert is_same(a, b)
    until(lambda: not a.peer()["verify"]["is_overdue"], what="it is clean again")
    a.run("check", "pg")

    # The daemon's death is no reason to forget it; nor is a verify that somebody asks for.
    a.kill()
    a.restart()
    scheduled(a, "clean", healed["started_at"])
    assert last(a.json("verify", "pg", "--wait", "--rate", "1G"))["result"] == "clean"
    a.run("resource", "set", "pg", "verify_every=off")
    until(lambda: a.peer()["verify"]["state"] == "idle", what="none that runs")
    assert (a.peer()["verify"]["every_seconds"], a.peer()["verify"]["next_at"]) == (None, None)


def test_one_that_a_switchover_interrupts_goes_on_when_the_node_is_the_primary_again(pair):
    a, b = pair
    a.run("resource", "set", "pg", "verify_every=1s", "verify_rate=256K")

    def current(site: Site) -> Any:
        return (site.peer()["verify"] or {}).get("current") or {}

    until(lambda: current(a).get("compared_bytes", 0) >= MIB, what="a part of it")
    started_at = current(a)["started_at"]
    a.run("switchover", "pg", "--to", "west-1")
    until(lambda: current(b), what="the new primary compares, too")
    assert current(b)["started_at"] > started_at
    until(lambda: b.peer()["state"] == "Stream", what="streaming the other way")
    b.run("switchover", "pg", "--to", "east-1")
    again = until(lambda: current(a), what="it goes on")
    assert again["started_at"] == started_at
    assert again["compared_bytes"] >= MIB
    a.run("resource", "set", "pg", "verify_every=")
    # It is given no second life by the new interval, nor an end: it was begun as due.
    done = last(a.json("verify", "pg", "--wait", "--rate", "100M"))
    assert (done["result"], done["is_scheduled"]) == ("clean", False)
