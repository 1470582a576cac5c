"""Real daemons under which an older state of the disk is put back: it is said, it does not win."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, quick_start, some_sites, until, wait_applied
from tests.system.trio import (
    agreed,
    branch_letters,
    branches,
    has_all,
    letters,
    outranked,
    put,
    streams,
    trio,
)

SOCKETS = shutil.ignore_patterns("*.sock")
pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def version(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def write_version(a: Site, number: int) -> None:
    """Overwrite the first megabyte."""
    asyncio.run(a.write(0, version(number)))
    wait_applied(a)


def take_disk(site: Site, older: Path) -> None:
    """Stop the node and keep its disk as it is now."""
    site.stop()
    shutil.copytree(site.data_dir, older, symlinks=True, ignore=SOCKETS)
    site.restart()


def put_back(site: Site, older: Path) -> None:
    """Stop the node; its disk is the older one again."""
    site.stop()
    shutil.rmtree(site.data_dir)
    shutil.copytree(older, site.data_dir, symlinks=True, ignore=SOCKETS)
    site.restart()


async def read_uri(uri: str, offset: int) -> bytes:
    async with await NbdClient.connect(uri) as client:
        return bytes(await client.read(offset, MIB))


def refused(a: Site, peer: str) -> dict[str, Any]:
    """The peer's object at a primary that was told of its older disk."""

    def told() -> dict[str, Any] | None:
        peers = {each["node"]: each for each in a.status()["peers"]}
        found = peers.get(peer)
        return found if found is not None and "put back" in found["reason"] else None

    found: dict[str, Any] = until(told, what="it is told")
    assert found["state"] == "Refused"
    return found


def test_a_secondary_whose_disk_was_put_back_is_noticed_and_brought_up_to_date(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        for number in range(2):
            write_version(a, number)
        take_disk(b, tmp_path / "older")
        write_version(a, 2)
        newest, wire_bytes = a.peer()["position"]["applied_epoch"], a.peer()["wire_bytes"]
        put_back(b, tmp_path / "older")
        found = until(lambda: a.events("peer_gone_back"), what="it is noticed")[0]
        assert found["from_epoch"] >= newest > found["epoch"]
        wait_applied(a)
        assert asyncio.run(b.read(0, MIB)) == version(2)
        # The primary had let the epochs go, which were durable at every copy and in its own image,
        # or had not yet: it is copied, or streamed to. Either way only what differs crosses.
        assert a.peer()["resyncs"] <= 1
        assert a.peer()["wire_bytes"] - wire_bytes < 2 * MIB
        assert a.peer()["reason"] == ""
        assert len(a.events("peer_gone_back")) == 1
        assert a.crashes() == b.crashes() == []


@pytest.mark.parametrize("kept", ["west-1", "east-1"])
def test_a_primary_whose_disk_was_put_back_does_not_win(tmp_path: Path, kept: str):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        for number in range(2):
            write_version(a, number)
        take_disk(a, tmp_path / "older")
        write_version(a, 2)
        held = b.status()["position"]["applied_epoch"]
        put_back(a, tmp_path / "older")
        written = 50

        def has_passed() -> bool:
            """It goes on to numbers that the copy has, and past them."""
            nonlocal written
            written += 1
            asyncio.run(a.write(4 * MIB, version(written)))
            return bool(a.status()["position"]["epoch"] > held)

        until(has_passed, what="it has passed the copy")
        found = refused(a, "west-1")
        assert "put back to an older state" in b.peer()["reason"]
        assert f"-{held}, which this copy has" in found["reason"]
        assert "geomirror failover pg --to NODE" in a.status()["reason"]
        assert a.run("check", "pg", expected=2).startswith("CRITICAL - pg: west-1: ")
        assert [len(site.events("put_back")) for site in (a, b)] == [1, 1]
        assert b.status()["position"]["applied_epoch"] == held
        assert asyncio.run(b.read(0, MIB)) == version(2)

        # The way out that keeps what was lost there: the other one need not be stopped before.
        for site in (a, b):
            asked = ("failover", "pg", "--to", "west-1", "--dry-run")
            assert site.json(*asked)["primary"]["is_put_back"]
            said = " ".join(site.run(*asked).split())
            assert "primary east-1 answers; its disk was put back to an older state" in said, said
            assert "promoted at west-1 itself, the copy takes its place" in said
            assert "refused:" not in said and "switchover" not in said
        with_hint = a.error("failover", "pg", "--to", "west-1", "--yes", expected=5, code="refused")
        assert "give the command at west-1" in with_hint
        b.run("failover", "pg", "--to", "west-1", "--yes")
        assert asyncio.run(b.read(0, MIB)) == version(2)
        tail = outranked(a, "superseded")
        assert tail["branch_epoch"] < held, "where the disks parted, not where the numbers do"
        b.run("resolve", "pg", "--keep", kept, "--yes")
        primary, other = (b, a) if kept == "west-1" else (a, b)
        newest = {"west-1": version(2), "east-1": version(1)}
        until(lambda: other.status()["role"] == "secondary", what="the other one follows")
        wait_applied(primary)
        for site in (a, b):
            assert asyncio.run(site.read(0, MIB)) == newest[kept]
        (branch,) = branches(other)
        assert branch.startswith("orphan-")
        shown = other.json("branch", "view", "pg", branch)["nbd_uri"]
        expected = (0, version(2)) if other is b else (4 * MIB, version(written))
        assert asyncio.run(read_uri(shown, expected[0])) == expected[1]
        assert a.crashes() == b.crashes() == []


def test_a_copy_that_was_away_and_one_that_was_not(tmp_path: Path):
    """One follows the older disk, since it lost nothing by that; both come back when the other one
    is promoted, with what they wrote since then as a branch."""
    with trio(tmp_path) as sites:
        a, b, c = sites
        put(a, 0, "1")
        wait_applied(a)
        take_disk(a, tmp_path / "older")
        until(lambda: streams(a, "west-1", "north-1"), what="it streams again")
        wait_applied(a)
        c.stop()
        put(a, 1, "2")
        until(lambda: has_all(a, "west-1"), what="west-1 has what north-1 has not")
        held = b.status()["position"]["epoch"]
        put_back(a, tmp_path / "older")
        put(a, 1, "x")
        c.restart()
        refused(a, "west-1")
        until(lambda: has_all(a, "north-1"), what="it follows")
        assert (letters(c, 2), letters(b, 2)) == ("1x", "12")
        b.run("failover", "pg", "--to", "west-1", "--yes")
        assert outranked(a, "superseded")["branch_epoch"] < held
        assert outranked(c, "diverged")["branch_epoch"] < held
        done = b.json("resolve", "pg", "--keep", "west-1", "--yes")
        assert done["is_resolved"]
        agreed(b, sites, "12")
        for site in (a, c):
            assert [branch_letters(site, name, 2) for name in branches(site)] == ["1x"], site.name
