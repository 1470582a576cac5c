"""Incremental backup with other people's tools: what a peer lacks, as qemu's dirty bitmaps.

Two real nodes; `west-1` is paused, and what is written meanwhile is what it lacks.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.limits import KIB, MIB
from geomirror.nbd.client_io import NbdClient
from tests.interop.clients import run, tool
from tests.system.support import Site, create, make_network, some_sites, until, wait_applied

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
SIZE = 64 * MIB
WEST = "qemu:dirty-bitmap:unsynced-west-1"
UNSYNCED, PENDING = "x-geomirror:unsynced", "x-geomirror:pending"

LIBNBD_BACKUP = """
import sys, nbd
uri, context, path = sys.argv[1:]
handle = nbd.NBD()
handle.add_meta_context(context)
handle.connect_uri(uri)
assert handle.can_meta_context(context)
dirty, size, offset = [], handle.get_size(), 0
while offset < size:
    found = []
    handle.block_status(min(size - offset, 1 << 30), offset,
                        lambda name, at, entries, error: found.append((name, at, entries)))
    ((name, at, entries),) = found
    assert (name, at) == (context, offset)
    for length, flags in zip(entries[::2], entries[1::2]):
        if flags & 1:
            dirty.append((offset, length))
        offset += length
with open(path, "r+b") as backup:
    for start, length in dirty:
        for at in range(start, start + length, 1 << 20):
            backup.seek(at)
            backup.write(handle.pread(min(1 << 20, start + length - at), at))
print(sum(length for start, length in dirty))
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    with some_sites(tmp_path_factory.mktemp("maps"), "east-1", "west-1") as (east, west):
        make_network(east, west)
        yield east, west
        assert [*east.crashes(), *west.crashes()] == []


@pytest.fixture
def sites(network: tuple[Site, Site]) -> Iterator[tuple[Site, Site]]:
    """A new resource "pg", in sync at both."""
    east, west = network
    create(east, "pg")
    wait_applied(east)
    yield east, west
    east.run("resource", "delete", "pg", "--yes")
    until(lambda: not west.call("status")["resources"], what="deletion at west-1")


async def write(site: Site, *ranges: tuple[int, int], seed: int = 1) -> None:
    async with await NbdClient.connect(site.uri()) as client:
        for offset, length in ranges:
            await client.write(offset, random.Random(seed + offset).randbytes(length))
        await client.flush()


async def nbd_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of what nbdinfo finds in a context."""
    told: list[dict[str, Any]] = json.loads(await run("nbdinfo", "--json", f"--map={context}", uri))
    assert sum(extent["length"] for extent in told) == SIZE
    return [(extent["offset"], extent["length"], extent["type"]) for extent in told]


def flagged(found: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(offset, length) for offset, length, flags in found if flags]


async def test_nbdinfo_lists_the_contexts_and_maps_what_the_peer_lacks(
    sites: tuple[Site, Site],
) -> None:
    east, west = sites
    told = json.loads(await run("nbdinfo", "--json", east.uri()))
    contexts = ["base:allocation", WEST, UNSYNCED, PENDING]
    assert told["exports"][0]["contexts"] == contexts
    listed = json.loads(await run("nbdinfo", "--json", "--list", east.uri()))
    assert listed["exports"][0]["contexts"] == contexts
    told = json.loads(await run("nbdinfo", "--json", west.uri()))
    assert told["exports"][0]["contexts"] == ["base:allocation"]
    assert await nbd_map(east.uri(), WEST) == [(0, SIZE, 0)]

    east.run("pause", "pg", "--peer", "west-1")
    await write(east, (MIB + 5, 100), (8 * MIB, 64 * KIB), (SIZE - 512, 512))
    dirty = [(MIB, 4096), (8 * MIB, 64 * KIB), (SIZE - 4096, 4096)]
    assert flagged(await nbd_map(east.uri(), WEST)) == dirty
    found = await nbd_map(east.uri(), UNSYNCED)
    assert flagged(found) == dirty
    assert {flags for _, _, flags in found} == {0, 3}, "the only peer lacks it: it is only here"
    totals = await run("nbdinfo", "--map=" + WEST, "--totals", east.uri())
    assert totals.split()[-1] == "dirty"
    assert str(sum(length for _, length in dirty)) in totals
    assert set(dirty) >= set(flagged(await nbd_map(east.uri(), PENDING)))
    # `geomirror nbd` for clients that start their server.
    started = ("--", "[", *east.command("nbd", "pg"), "]")
    told = json.loads(await run("nbdinfo", "--json", f"--map={WEST}", *started))
    assert [(e["offset"], e["length"]) for e in told if e["type"]] == dirty

    east.run("resume", "pg", "--peer", "west-1")
    wait_applied(east)
    assert await nbd_map(east.uri(), WEST) == [(0, SIZE, 0)]
    assert await nbd_map(east.uri(), UNSYNCED) == [(0, SIZE, 0)]


async def test_a_backup_of_the_secondary_and_what_libnbd_reads_here_make_the_primary(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    east, west = sites
    await write(east, *((at * MIB, 200 * KIB) for at in range(20)))
    wait_applied(east)
    east.run("pause", "pg", "--peer", "west-1")
    backup, expected = tmp_path / "backup.img", tmp_path / "expected.img"
    await run("nbdcopy", west.uri(), backup)
    ranges = [(at * MIB + 12345, 30_000) for at in range(5, 40, 3)]
    await write(east, *ranges, seed=99)
    async with await NbdClient.connect(east.uri()) as client:
        await client.trim(2 * MIB, MIB)
    await run("nbdcopy", east.uri(), expected)
    assert backup.read_bytes() != expected.read_bytes()
    script = tmp_path / "backup.py"
    script.write_text(LIBNBD_BACKUP)
    await require_libnbd()
    copied = await run("/usr/bin/python3", script, east.uri(), WEST, backup)
    assert len(ranges) * 30_000 < int(copied) < len(ranges) * 40_000 + MIB + 8192
    assert backup.read_bytes() == expected.read_bytes()


async def require_libnbd() -> None:
    """Debian's python3-libnbd is for Debian's Python."""
    tool("nbdsh")
    process = await asyncio.create_subprocess_exec("/usr/bin/python3", "-c", "import nbd")
    assert await process.wait() == 0, "python3-libnbd is not installed"


async def test_qemu_reads_the_map_as_a_dirty_bitmap(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    east, _ = sites
    east.run("pause", "pg")
    await write(east, (3 * MIB, MIB), (10 * MIB, 4 * KIB))
    node = f"driver=nbd,server.type=unix,server.path={east.data_dir}/nbd.sock,export=pg/0"
    image = f"{node},x-dirty-bitmap={WEST}"
    extents = json.loads(await run("qemu-img", "map", "--output=json", "--image-opts", image))
    # As with qemu's own bitmaps, what is dirty is shown as "no data here".
    dirty = [(e["start"], e["length"]) for e in extents if not e["data"]]
    assert dirty == [(3 * MIB, MIB), (10 * MIB, 4 * KIB)]
    assert sum(extent["length"] for extent in extents) == SIZE
    info = json.loads(await run("qemu-img", "info", "--output=json", east.uri()))
    assert info["virtual-size"] == SIZE
    copy = tmp_path / "copy.img"
    await run("qemu-img", "convert", "-O", "raw", east.uri(), copy)
    output = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, east.uri())
    assert "identical" in output
    wrong = f"{node},x-dirty-bitmap=qemu:dirty-bitmap:unsynced-nobody"
    said = await run("qemu-img", "map", "--image-opts", wrong, is_failure_wanted=True)
    assert "x-dirty-bitmap" in said


def overflows(site: Site) -> int:
    return len(site.events("journal_overflow"))


async def test_the_map_of_a_journal_that_overflowed_is_whole_regions(
    sites: tuple[Site, Site],
) -> None:
    east, _ = sites
    east.run("pause", "pg")
    async with await NbdClient.connect(east.uri()) as client:
        data, before = random.Random(3).randbytes(MIB), overflows(east)
        for at in range(400):
            if east.status()["peers"][0]["state"] == "Bitmap":
                break
            await client.write((at % 8) * MIB + 4096, data)
        assert overflows(east) > before
        await client.write(40 * MIB + 100, b"in the journal")
        await client.flush()
    # One MiB at 4 KiB touches 17 regions; the eight of them overlap.
    expected = [(0, 8 * MIB + 64 * KIB)]
    found = flagged(await nbd_map(east.uri(), WEST))
    assert found[:-1] == expected
    offset, length = found[-1]
    assert offset <= 40 * MIB < offset + length <= 40 * MIB + 64 * KIB
    east.run("resume", "pg")
    wait_applied(east)
    assert await nbd_map(east.uri(), WEST) == [(0, SIZE, 0)]


async def test_a_removed_peer_lacks_everything_for_who_asked_for_it(
    sites: tuple[Site, Site],
) -> None:
    east, _ = sites
    async with await NbdClient.connect(east.uri(), contexts=[WEST, UNSYNCED]) as client:
        assert await client.block_status(0, SIZE, WEST) == [(SIZE, 0)]
        east.run("resource", "remove-secondary", "pg", "west-1", "--yes")
        assert await client.block_status(0, SIZE, WEST) == [(SIZE, 1)]
        assert await client.block_status(0, SIZE, UNSYNCED) == [(SIZE, 3)]
    told = json.loads(await run("nbdinfo", "--json", east.uri()))
    assert told["exports"][0]["contexts"] == ["base:allocation", UNSYNCED, PENDING]


async def test_clients_without_structured_replies_have_no_contexts(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    east, _ = sites
    await write(east, (0, 8192))
    async with await NbdClient.connect(east.uri(), wants_structured=False) as client:
        assert client.export.contexts == {}
        assert bytes(await client.read(0, 8192)) == random.Random(1).randbytes(8192)
