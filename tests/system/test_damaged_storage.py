"""Damaged files of a resource: told with cause and exit code, and nothing is changed."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.volume.superblock import NAME, SLOT_BYTES, parse_slot
from tests.system.support import MIB, Site, create, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
FIRST, SECOND = random.Random(1).randbytes(MIB), random.Random(2).randbytes(MIB)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One node with two resources."""
    with some_sites(tmp_path_factory.mktemp("node"), "a") as (a,):
        listen = ("--listen", f"127.0.0.1:{a.port}")
        a.run("network", "create", "acme", "--site", "east", "--node", "east-1", *listen)
        a.restart()
        for name in ("pg", "other"):
            create(a, name, secondary=None)
        a.kill()
        yield a


@pytest.fixture
def site(node: Site) -> Iterator[Site]:
    """The node, dead, with flushed data in the journals; every test leaves it whole and dead."""
    node.log_path.unlink()
    node.restart()
    for name in ("pg", "other"):
        asyncio.run(node.write(0, FIRST, name))
        asyncio.run(node.write(MIB, SECOND, name))
    node.kill()
    yield node
    node.end()


def directory(site: Site) -> Path:
    return site.data_dir / "resources" / "pg"


def flip(path: Path, offset: int) -> None:
    """Change one byte; twice is not at all."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def contents(root: Path) -> dict[str, str]:
    """Hashes of all files of a resource."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


async def check_served(site: Site, name: str) -> None:
    assert await site.read(0, 2 * MIB, name) == FIRST + SECOND
    assert site.status(name)["error"] is None


async def check_fails_alone(site: Site, *, exit_code: int, code: str) -> str:
    """pg is not served and untouched, and every way of asking says why; `other` is served."""
    before = contents(directory(site))
    site.restart()
    await check_served(site, "other")
    found = site.resource("pg")
    assert (found["state"], found["error"]["code"]) == ("failed", code)
    assert found["volumes"][0]["nbd_uri"] is None
    said = site.error("wait", "pg", "--timeout", "1", expected=exit_code, code=code)
    assert found["error"]["message"] in said
    assert "not served" in site.run("status", "pg")
    assert site.run("check", "pg", expected=2).startswith("CRITICAL")
    reasons = [event["reason"] for event in site.events("resource_failed")]
    assert len(reasons) == 1
    assert site.crashes() == []
    assert site.stop() == 0
    assert contents(directory(site)) == before
    return said


async def test_one_damaged_copy_of_the_superblock_is_harmless(site: Site):
    path = directory(site) / NAME
    data = path.read_bytes()
    slots = [parse_slot(data[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
    newest = max((slot.sequence, index) for index, slot in enumerate(slots) if slot)[1]
    flip(path, newest * SLOT_BYTES + 100)
    site.restart()
    await check_served(site, "pg")
    await site.write(2 * MIB, FIRST)
    site.kill()
    site.restart()
    assert await site.read(0, 3 * MIB) == FIRST + SECOND + FIRST
    assert site.crashes() == []


async def test_two_damaged_copies_stop_that_resource_only(site: Site):
    path = directory(site) / NAME
    for slot in (0, 1):
        flip(path, slot * SLOT_BYTES + 100)
    said = await check_fails_alone(site, exit_code=9, code="integrity")
    assert "both copies" in said
    assert "resource delete" in said
    for slot in (0, 1):
        flip(path, slot * SLOT_BYTES + 100)
    site.restart()
    await check_served(site, "pg")


async def test_a_journal_damaged_in_the_middle_is_fenced(site: Site):
    segment, offset = find(directory(site) / "journal", FIRST[5000:5100])
    flip(segment, offset)
    said = await check_fails_alone(site, exit_code=5, code="fenced")
    assert segment.name in said
    assert "damaged" in said
    flip(segment, offset)
    site.restart()
    await check_served(site, "pg")


async def test_a_missing_journal_segment_is_fenced(site: Site):
    # Each recovery goes on in a segment of its own; that one tells that there was one before it.
    site.restart()
    await site.write(MIB, SECOND)
    site.kill()
    # Not the oldest one: that may be there for a way back only, and nobody misses it.
    segment, _ = find(directory(site) / "journal", SECOND[5000:5100])
    aside = site.root / "aside"
    segment.rename(aside)
    await check_fails_alone(site, exit_code=5, code="fenced")
    aside.rename(segment)
    site.restart()
    await check_served(site, "pg")
    assert not aside.exists()


async def test_a_lost_directory_or_image_is_not_made_anew(site: Site):
    aside = site.root / "aside"
    directory(site).rename(aside)
    await check_fails_alone(site, exit_code=4, code="not_found")
    aside.rename(directory(site))
    image = directory(site) / "volumes" / "0.img"
    image.rename(aside)
    site.restart()
    await check_served(site, "other")
    assert site.resource("pg")["state"] == "failed"
    assert "0.img" in site.resource("pg")["error"]["message"]
    assert not image.exists()
    site.kill()
    aside.rename(image)
    site.restart()
    await check_served(site, "pg")


def test_damaged_files_of_the_node_keep_it_from_starting(site: Site):
    for name in (
        "resources.json",
        "network/network.json",
        "network/membership.json",
        "identity/node.key",
        "identity/node.crt",
    ):
        path = site.data_dir / name
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2] + b"\xff" + good[len(good) // 2 + 1 :])
        if name in ("resources.json", "identity/node.key"):
            said = site.failed_start(expected=9)
        else:
            said = site.error("node", "show", expected=9, code="integrity")
        assert name in said
        path.write_bytes(good)
    site.restart()
    until(lambda: site.status("pg")["state"] == "ok")


def find(journal: Path, data: bytes) -> tuple[Path, int]:
    """Where bytes lie in the journal: the newest place, since older ones may be destaged, and what
    is destaged is not read again."""
    for path in sorted(journal.glob("[0-9]*"), reverse=True):
        offset = path.read_bytes().rfind(data)
        if offset >= 0:
            return path, offset
    raise AssertionError("not in the journal")
