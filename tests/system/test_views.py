"""Views of a secondary by real daemons and real clients, while the primary goes on writing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest

from geomirror.errors import GeomirrorError
from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, SEED, Site, quick_start, some_sites, until

pytestmark = pytest.mark.system
SIZE = 64 * MIB


class Writer:
    """Writes everywhere without a pause, through one connection."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.writes = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Writer:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        chance = random.Random(1 + SEED)
        async with await NbdClient.connect(self.uri) as client:
            while True:
                # The upper half only: the lower one is what the test compares.
                offset = SIZE // 2 + chance.randrange(SIZE // 8192) * 4096
                await client.write(offset, chance.randbytes(4096))
                self.writes += 1
                if self.writes % 50 == 0:
                    await client.flush()
                    await asyncio.sleep(0.01)


async def digest(uri: str, length: int = SIZE) -> str:
    found = hashlib.sha256()
    async with await NbdClient.connect(uri) as client:
        for offset in range(0, length, MIB):
            found.update(bytes(await client.read(offset, MIB)))
    return found.hexdigest()


async def versions(a: Site, count: int) -> list[tuple[int, str]]:
    """Fill the lower half several times; (epoch at the secondary, sha256) of each."""
    found = []
    for number in range(count):
        data = random.Random(number).randbytes(SIZE // 2)
        async with await NbdClient.connect(a.uri()) as client:
            for offset in range(0, len(data), 4 * MIB):
                await client.write(offset, data[offset : offset + 4 * MIB])
            await client.flush()
        epoch = a.json("wait", "pg", "--applied", "--timeout", "60")["position"]["epoch"]
        found.append((epoch, hashlib.sha256(data).hexdigest()))
    return found


async def test_every_version_is_seen_while_writing_goes_on(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        found = await versions(a, 3)
        async with Writer(a.uri()) as writer:
            until_some = writer.writes + 200
            while writer.writes < until_some:
                await asyncio.sleep(0.05)
            for epoch, expected in found:
                view = b.json("view", "create", "pg", "--at", f"epoch:{epoch}")
                assert view["epoch"] == epoch
                before = writer.writes
                first = await digest(view["nbd_uri"])
                assert await digest(view["nbd_uri"], SIZE // 2) == expected
                await asyncio.sleep(0.5)
                assert await digest(view["nbd_uri"]) == first, "it does not move"
                assert writer.writes > before, "nobody waits for it"
                b.run("view", "delete", "pg", view["name"])
        assert b.json("view", "list", "pg")["views"] == []
        assert a.peer()["resyncs"] == 0
        assert not a.crashes() + b.crashes()


async def test_a_writable_view_survives_a_kill_and_changes_nothing(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        (epoch, expected), (_, newest) = await versions(a, 2)
        view = b.json(
            *("view", "create", "pg", "--at", f"epoch:{epoch}", "--writable"),
            *("--quota", "1M", "--expires", "1h"),
        )
        uri = view["nbd_uri"]
        data = os.urandom(3 * 4096)
        async with await NbdClient.connect(uri) as client:
            await client.write(5000, data)
            await client.flush()
            with pytest.raises(GeomirrorError):
                await client.write(8 * MIB, bytes(2 * MIB))
        b.kill()
        b.restart()
        listed = until(lambda: _views(b), what="views after a restart")[0]
        assert (listed["state"], listed["written_bytes"]) == ("served", 4 * 4096)
        async with await NbdClient.connect(uri) as client:
            assert await client.read(5000, len(data)) == data
            await client.write(5000, bytes(len(data)))
        assert await digest(b.uri(), SIZE // 2) == newest
        assert await digest(a.uri(), SIZE // 2) == newest
        other = b.json("view", "create", "pg", "--at", f"epoch:{epoch}")
        assert await digest(other["nbd_uri"], SIZE // 2) == expected, "not in another view"
        b.run("view", "delete", "pg", view["name"])
        b.run("view", "delete", "pg", other["name"])
        left = list((b.data_dir / "resources/pg/views").iterdir())
        assert left == []


def _views(site: Site) -> list[dict[str, object]]:
    try:
        return list(site.call("view.list", name="pg")["views"])
    except GeomirrorError:
        return []


async def test_views_expire_are_bounded_and_are_made_elsewhere(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        await versions(a, 1)
        view = a.json("view", "create", "pg", "--node", "west-1", "--expires", "1s")
        assert view["node"] == "west-1"
        async with await NbdClient.connect(view["nbd_uri"]) as client:
            await client.read(0, 4096)
            until(lambda: not _views(b), what="expiry")
            with pytest.raises(GeomirrorError):
                await client.read(0, 4096)
        until(lambda: b.events("view_expired"), what="expiry is told")
        for _ in range(4):
            b.run("view", "create", "pg")
        assert "has 4 views here already" in b.error(
            "view", "create", "pg", expected=5, code="refused"
        )
        b.run("view", "delete", "pg", "v1")
        assert "before the oldest point" in a.error(
            *("view", "create", "pg", "--at", "epoch:0", "--node", "west-1"),
            expected=4,
            code="not_found",
        )
        a.error("view", "create", "pg", "--node", "nosuch-1", expected=4, code="not_found")
        assert "no time of the day" in a.error(
            "view", "create", "pg", "--at", "99:99", expected=2, code="usage"
        )
        points = b.json("timeline", "pg")["points"]
        assert points
        assert points[-1]["epoch"] == b.status()["position"]["applied_epoch"]
        assert "POINTS" in b.run("timeline", "pg")
        assert "EPOCH" in b.run("timeline", "pg", "--all")


@pytest.mark.skipif(
    shutil.which("nbdcopy") is None,
    reason="nbdcopy (package libnbd-bin) is not installed",
)
async def test_nbdcopy_reads_a_view(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        quick_start(a, b)
        (epoch, expected), _ = await versions(a, 2)
        uri = b.run("view", "create", "pg", "--at", f"epoch:{epoch}").strip()
        target = tmp_path / "out.img"
        copy = await asyncio.create_subprocess_exec("nbdcopy", uri, str(target))
        assert await copy.wait() == 0
        with target.open("rb") as file:
            assert hashlib.sha256(file.read(SIZE // 2)).hexdigest() == expected
