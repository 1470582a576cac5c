"""History that is damaged, copied or has no room, under real daemons: it is said, nothing
wrong is ever shown, and replication goes on."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import GeomirrorError, NoSpaceError
from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, quick_start, some_sites, until, wait_applied

SOCKETS = shutil.ignore_patterns("*.sock")
pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


def version(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def write_versions(a: Site, count: int, first: int = 0) -> list[int]:
    """Overwrite the first megabyte; the epoch of each version at the secondary."""
    epochs = []
    for number in range(first, first + count):
        asyncio.run(a.write(0, version(number)))
        wait_applied(a)
        epochs.append(int(a.peer()["position"]["applied_epoch"]))
    return epochs


async def read_uri(uri: str, length: int = MIB) -> bytes:
    async with await NbdClient.connect(uri) as client:
        return bytes(await client.read(0, length))


def seen(site: Site, epoch: int) -> bytes:
    """What a view of the epoch shows."""
    view = site.json("view", "create", "pg", "--at", f"epoch:{epoch}")
    try:
        assert view["epoch"] == epoch
        return asyncio.run(read_uri(view["nbd_uri"]))
    finally:
        site.run("view", "delete", "pg", view["name"])


def undo_files(site: Site) -> list[Path]:
    return sorted((site.data_dir / "resources/pg/undo").glob("*.und"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 0x10
        file.seek(offset)
        file.write(bytes([byte]))


def unusable(site: Site) -> list[dict[str, Any]]:
    return list(site.call("resource.timeline", name="pg")["undo"]["unusable"])


def caught_up(a: Site, number: int) -> None:
    asyncio.run(a.write(2 * MIB, version(number)))
    wait_applied(a)


def test_damaged_undo_ends_history_there_and_is_said_and_replication_goes_on(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        epochs = write_versions(a, 6)
        b.stop()
        header, newest = undo_files(b)[1], undo_files(b)[-1]
        flip(header, 30)
        b.restart()
        until(lambda: b.events("history_damaged"), what="the damage is told")
        (found,) = unusable(b)
        assert found["kind"] == "damaged"
        assert header.name in found["reason"]
        first = found["to_epoch"]
        # The state there can be had, but when it was cut stood in the damaged file.
        oldest = b.call("resource.timeline", name="pg")["points"][0]["epoch"]
        assert oldest == min(epoch for epoch in epochs if epoch > first)
        text = b.run("timeline", "pg")
        assert f"no point before epoch {first}" in text
        assert f"undo file undo/{header.name} is damaged" in text
        status = b.status()
        assert status["state"] in ("ok", "degraded")
        assert "is damaged" in status["history"]["alarm"]
        said = b.run("check", "pg", expected=1)
        assert f"history here: no point before epoch {first}" in said
        said = b.error(
            "view", "create", "pg", "--at", f"epoch:{epochs[0]}", expected=4, code="not_found"
        )
        assert f"before the oldest point kept here, epoch {oldest}" in said
        assert f"epoch:{oldest}" in said
        for number, epoch in enumerate(epochs):
            if epoch >= oldest:
                assert seen(b, epoch) == version(number)
        caught_up(a, 100)
        # A part of a file that only a reader meets.
        view = b.json("view", "create", "pg", "--at", f"epoch:{epochs[-2]}")
        flip(newest, 200)
        with pytest.raises(GeomirrorError):
            asyncio.run(read_uri(view["nbd_uri"]))
        until(lambda: len(unusable(b)) == 2, what="the reader's find is known")
        assert newest.name in unusable(b)[-1]["reason"]
        caught_up(a, 101)
        assert asyncio.run(b.read(0, MIB)) == version(5)
        b.kill()
        b.restart()
        until(lambda: len(unusable(b)) == 2, what="it is known after a restart")
        b.stop()
        last = undo_files(b)[-1]
        last.unlink()
        b.restart()
        until(lambda: unusable(b) and unusable(b)[-1]["kind"] == "missing")
        caught_up(a, 102)
        assert a.peer()["resyncs"] == 0
        assert a.crashes() == b.crashes() == []


def test_two_daemons_of_one_identity_are_told_and_only_one_is_used(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        write_versions(a, 1)
        b.stop()
        clone = Site(tmp_path, "clone")
        shutil.copytree(b.data_dir, clone.data_dir, symlinks=True, ignore=SOCKETS)
        # On a machine of its own it would have the same port.
        (clone.data_dir / "geomirror.toml").write_text(
            f'[node]\nlisten = "127.0.0.1:{clone.port}"\n'
        )
        try:
            b.restart()
            clone.restart()

            def told() -> bool:
                return any("two daemons" in each["reason"] for each in a.events("link_stalled"))

            until(told, what="the twins are noticed")
            for number in range(3):
                caught_up(a, number)
            clone.stop()
            b.stop()
            b.restart()
            caught_up(a, 9)
            assert asyncio.run(b.read(2 * MIB, MIB)) == version(9)
        finally:
            clone.end()
        assert a.crashes() == b.crashes() == clone.crashes() == []


def test_points_from_before_a_promotion_stay_and_views_of_them_too(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        epochs = write_versions(a, 4)
        view = b.json("view", "create", "pg", "--at", f"epoch:{epochs[1]}")
        assert asyncio.run(read_uri(view["nbd_uri"])) == version(1)
        a.run("switchover", "pg", "--to", "west-1")
        assert asyncio.run(read_uri(view["nbd_uri"])) == version(1)
        for number, epoch in enumerate(epochs):
            assert seen(b, epoch) == version(number)
        asyncio.run(b.write(0, version(9)))
        b.kill()
        b.restart()
        listed = until(lambda: b.json("view", "list", "pg")["views"])[0]
        assert (listed["state"], listed["epoch"]) == ("served", epochs[1])
        assert asyncio.run(read_uri(view["nbd_uri"])) == version(1)
        for number, epoch in enumerate(epochs):
            assert seen(b, epoch) == version(number)
        assert asyncio.run(b.read(0, MIB)) == version(9)
        assert a.crashes() == b.crashes() == []


def test_times_that_cannot_be_had_are_refused_with_what_is_nearest(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        epochs = write_versions(a, 3)
        newest = b.call("resource.timeline", name="pg")["points"][-1]

        def refused(*command: str, expected: int, code: str) -> str:
            return b.error(*command, expected=expected, code=code)

        for command in (
            ("view", "create", "pg", "--at"),
            ("drill", "pg", "--check", "true", "--at"),
        ):
            said = refused(*command, "2000-01-01T00:00:00Z", expected=4, code="not_found")
            assert "before the oldest point kept here, epoch" in said
            assert "the nearest one is epoch:" in said
            said = refused(*command, "2100-01-01T00:00:00Z", expected=2, code="usage")
            assert "is yet to come" in said
            assert f"the newest point is epoch {newest['epoch']}" in said
            said = refused(*command, "epoch:1000000", expected=4, code="not_found")
            assert f"the newest point is epoch {newest['epoch']}" in said
            refused(*command, "nosuchmark", expected=4, code="not_found")
            refused(*command, "2026-02-30", expected=2, code="usage")
        view = b.json("view", "create", "pg", "--at", f"epoch:{epochs[1]}")
        assert (view["why"], view["later"]) == ("", None)
        between = b.json("view", "create", "pg", "--at", "-0s")
        assert between["epoch"] == newest["epoch"]
        assert between["why"] == "nothing newer is here"
        # The primary's points for a rewind.
        create = ("resource", "create", "solo", "--size", "64M", "--primary", "east-1")
        a.run(*create, "--journal-size", "256M")
        asyncio.run(a.write(0, version(1), "solo"))
        for when, expected, code in (
            ("2000-01-01T00:00:00Z", 4, "not_found"),
            ("2100-01-01T00:00:00Z", 2, "usage"),
            ("epoch:1000000", 4, "not_found"),
        ):
            a.error("rewind", "solo", "--to", when, "--yes", expected=expected, code=code)
        assert a.crashes() == b.crashes() == []


def test_a_full_quota_is_the_views_alone_and_expiry_outlives_restarts(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        epochs = write_versions(a, 2)
        view = b.json(
            *("view", "create", "pg", "--at", f"epoch:{epochs[0]}", "--writable"),
            *("--quota", "1M", "--expires", "6s"),
        )
        lasting = b.json("view", "create", "pg", "--at", f"epoch:{epochs[0]}", "--expires", "1h")

        async def fill() -> None:
            async with await NbdClient.connect(view["nbd_uri"]) as client:
                await client.write(4 * MIB, bytes(MIB))
                with pytest.raises(NoSpaceError):
                    await client.write(8 * MIB, bytes([1]) * 4096)
                await client.write(4 * MIB, bytes([2]) * 4096)
                await client.flush()

        asyncio.run(fill())
        caught_up(a, 7)
        assert b.status()["state"] == "ok"
        b.stop()
        b.restart()
        names = until(lambda: {v["name"] for v in b.json("view", "list", "pg")["views"]})
        assert lasting["name"] in names
        until(
            lambda: [v["name"] for v in b.json("view", "list", "pg")["views"]] == [lasting["name"]],
            what="the one that was to end has ended",
        )
        assert not list((b.data_dir / "resources/pg/views").glob(f"{view['name']}.*"))
        assert a.crashes() == b.crashes() == []


def test_a_resync_without_room_for_undo_waits_and_goes_in_place_when_told_to(tmp_path: Path):
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        (epoch,) = write_versions(a, 1)
        b.error("resync", "pg", "--in-place", "--yes", expected=5, code="refused")
        b.error("resync", "pg", expected=2, code="usage")
        b.stop()
        config = b.data_dir / "geomirror.toml"
        config.write_text("[storage]\nresync_undo_bytes_max = 262144\n")
        config.chmod(0o600)
        asyncio.run(overflow(a))
        b.restart()
        until(lambda: b.status()["state"] == "storage_full", timeout_s=90, what="no room for undo")
        status = b.status()
        assert status["disk_state"] == "Consistent"
        held = status["position"]["epoch"]
        assert held >= epoch
        assert "undo of a resync would need more" in status["reason"]
        assert asyncio.run(b.read(0, MIB)) == version(0)
        plan = a.json("resync", "pg", "--in-place", "--node", "west-1", "--dry-run")
        assert (plan["epoch"], plan["is_dry_run"]) == (held, True)
        b.error("resync", "pg", "--in-place", expected=2, code="usage")
        a.run("resync", "pg", "--in-place", "--node", "west-1", "--yes")
        assert b.events("held_given_up")
        wait_applied(a, timeout_s=90)
        until(lambda: b.status()["disk_state"] == "UpToDate")
        expected = asyncio.run(a.read(0, 32 * MIB))
        assert asyncio.run(b.read(0, 32 * MIB)) == expected
        assert a.crashes() == b.crashes() == []


async def overflow(a: Site) -> None:
    """Write until the journal cannot hold the peer's backlog."""
    chance = random.Random(3)
    async with await NbdClient.connect(a.uri()) as client:
        for number in range(400):
            if number % 20 == 0 and a.peer()["resyncs"]:
                return
            await client.write(number % 32 * MIB, chance.randbytes(MIB))
            if number % 8 == 7:
                await client.flush()
    raise AssertionError("it never overflows")
