"""Marks by real daemons: made anywhere, told to everybody, and their states looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, make_network, some_sites, until

pytestmark = pytest.mark.system
SIZE = 4 * MIB


async def fill(site: Site, byte: int) -> None:
    await site.write(0, bytes([byte]) * SIZE)


async def first_bytes(uri: str) -> bytes:
    async with await NbdClient.connect(uri) as client:
        return bytes(await client.read(SIZE - 4096, 4096))


def listed(site: Site) -> dict[str, tuple[int, bool]]:
    marks = site.call("mark.list", name="pg")["marks"]
    return {each["name"]: (each["epoch"], each["viewable"]) for each in marks}


async def test_a_mark_is_seen_at_every_member_also_after_an_outage_and_a_kill(
    tmp_path: Path,
) -> None:
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        a.run(
            *("resource", "create", "pg", "--size", "64M", "--primary", "east-1"),
            *("--secondary", "west-1", "--secondary", "north-1", "--journal-size", "256M"),
        )
        until(lambda: all(p["state"] == "Stream" for p in a.status()["peers"]), what="streams")
        await fill(a, 1)
        made = b.json("mark", "pg", "first")
        assert (made["name"], made["resource"]) == ("first", "pg")
        await fill(a, 2)
        c.kill()
        second = a.json("mark", "pg", "second")
        assert second["epoch"] > made["epoch"]
        await fill(a, 3)
        a.kill()
        a.restart()
        a.uri()
        assert {"first", "second"} <= set(listed(a))
        c.restart()
        c.uri()
        a.run("wait", "pg", "--applied", "--timeout", "60")
        for site in (b, c):
            until(
                lambda site=site: all(
                    listed(site).get(name, (0, False))[1] for name in ("first", "second")
                ),
                what="marks in the image",
            )
            assert listed(site)["second"][0] == second["epoch"]
            for name, byte in (("first", 1), ("second", 2)):
                view = site.json("view", "create", "pg", "--at", name)
                assert view["epoch"] == listed(site)[name][0]
                assert await first_bytes(view["nbd_uri"]) == bytes([byte]) * 4096
        assert "second" in c.run("timeline", "pg")
        assert "can be viewed" in c.run("mark", "pg", "--list")

        assert "already" in c.error("mark", "pg", "first", expected=5, code="refused")
        a.error("mark", "pg", "12:00", expected=2, code="usage")
        a.error("mark", "pg", expected=2, code="usage")
        a.error("mark", "pg", "nosuch", "--delete", expected=4, code="not_found")
        c.run("mark", "pg", "first", "--delete")
        for site in (a, b, c):
            until(lambda site=site: set(listed(site)) == {"second"}, what="deleted everywhere")
        assert not a.crashes() + b.crashes() + c.crashes()
