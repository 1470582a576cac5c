"""Rewinding by a real daemon: back, looked at, exported, and returned, also after a kill."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, create, some_sites

pytestmark = pytest.mark.system
SIZE = 16 * MIB


def alone(site: Site) -> None:
    site.run(
        *("network", "create", "acme", "--site", "east", "--node", "east-1"),
        *("--listen", f"127.0.0.1:{site.port}"),
    )
    site.restart()
    create(site, "pg", size="16M", secondary=None)


async def put(site: Site, data: bytes) -> None:
    async with await NbdClient.connect(site.uri()) as client:
        for offset in range(0, len(data), MIB):
            await client.write(offset, data[offset : offset + MIB])
        await client.flush()


async def content(uri: str) -> bytes:
    async with await NbdClient.connect(uri) as client:
        return bytes(await client.read(0, SIZE))


async def test_a_rewind_goes_back_and_its_branch_is_all_that_came_later(tmp_path: Path) -> None:
    chance = random.Random(5)
    with some_sites(tmp_path, "a") as (a,):
        alone(a)
        old = chance.randbytes(SIZE // 2).ljust(SIZE, b"\0")
        new = old[: SIZE // 4] + chance.randbytes(SIZE // 2) + old[: SIZE // 4]
        await put(a, old)
        a.run("mark", "pg", "before-upgrade")
        await put(a, new)

        async with await NbdClient.connect(a.uri()):
            text = a.error(
                "rewind", "pg", "--to", "before-upgrade", "--yes", expected=5, code="in_use"
            )
            assert "has clients" in text
        plan = a.json("rewind", "pg", "--to", "before-upgrade", "--dry-run")
        assert plan["is_possible"]
        assert plan["cut_off"]["epochs"] > 0
        assert await content(a.uri()) == new, "a dry run changes nothing"

        done = a.json("rewind", "pg", "--to", "before-upgrade", "--yes")
        branch = done["branch"]
        assert done["epoch"] == plan["epoch"]
        assert await content(a.uri()) == old
        listed = a.json("branch", "list", "pg")
        assert [each["name"] for each in listed["branches"]] == [branch]
        assert listed["branches"][0]["is_viewable"]
        later = b"later" * 1000 + bytes(120)
        await put(a, later)
        a.kill()
        a.restart()
        assert await content(a.uri()) == later + old[len(later) :]

        view = a.json("branch", "view", "pg", branch)
        assert await content(view["nbd_uri"]) == new
        a.error("branch", "drop", "pg", branch, "--yes", expected=5, code="refused")
        a.run("view", "delete", "pg", view["name"])
        a.error("branch", "drop", "pg", branch, "--yes", expected=5, code="refused")
        image = tmp_path / "branch.img"
        out = a.json("branch", "export", "pg", branch, str(image))
        assert image.read_bytes() == new
        assert out["size_bytes"] == SIZE
        a.error("branch", "export", "pg", branch, str(image), expected=5, code="refused")
        assert image.read_bytes() == new

        back = a.json("rewind", "rollback", "pg")
        assert await content(a.uri()) == new
        names = [each["name"] for each in a.json("branch", "list", "pg")["branches"]]
        assert names == [back["branch"]]
        view = a.json("branch", "view", "pg", back["branch"])
        assert await content(view["nbd_uri"]) == later + old[len(later) :]
        a.run("view", "delete", "pg", view["name"])
        a.run("branch", "drop", "pg", back["branch"], "--yes")
        assert a.json("branch", "list", "pg")["branches"] == []
        a.error("rewind", "commit", "pg", "--yes", expected=4, code="not_found")


async def test_a_committed_rewind_cannot_be_taken_back(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a") as (a,):
        alone(a)
        await put(a, b"1" * MIB)
        a.run("mark", "pg", "one")
        await put(a, b"2" * MIB)
        a.run("rewind", "pg", "--to", "one", "--yes")
        a.run("rewind", "commit", "pg", "--yes")
        assert (await content(a.uri()))[:MIB] == b"1" * MIB
        a.error("rewind", "rollback", "pg", expected=4, code="not_found")
        assert a.json("branch", "list", "pg")["branches"] == []


async def test_damage_on_the_way_back_is_found_by_the_dry_run(tmp_path: Path) -> None:
    chance = random.Random(6)
    with some_sites(tmp_path, "a") as (a,):
        alone(a)
        await put(a, chance.randbytes(2 * MIB))
        a.run("mark", "pg", "one")
        new = chance.randbytes(2 * MIB)
        await put(a, new)
        a.stop()  # Everything is applied, over undo.
        a.restart()
        assert a.json("rewind", "pg", "--to", "one", "--dry-run")["is_possible"]
        newest = max(a.data_dir.rglob("undo/*.und"))
        with newest.open("r+b") as file:
            file.seek(newest.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        plan = a.json("rewind", "pg", "--to", "one", "--dry-run", expected=5)
        assert plan["refusal"]["code"] == "integrity"
        assert newest.name in plan["refusal"]["message"]
        assert (
            "cannot be rewound"
            in a.outcome("rewind", "pg", "--to", "one", "--dry-run", expected=5)[0]
        )
        assert (await content(a.uri()))[: 2 * MIB] == new
        assert a.crashes() == []
