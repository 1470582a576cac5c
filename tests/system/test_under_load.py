"""Real daemons under load: killed, restarted, huge and many volumes; nothing answered is lost.

`GEOMIRROR_KILLS=50` makes it as many rounds of kills as that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.errors import GeomirrorError
from geomirror.nbd.client_io import NbdClient
from tests.system.support import (
    MIB,
    SEED,
    Site,
    create,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
KILL_ROUNDS = int(os.environ.get("GEOMIRROR_KILLS", "2"))
BLOCKS = 2048
BLOCK_BYTES = 4096
TAG = struct.Struct("<Q")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    with some_sites(tmp_path_factory.mktemp("pair"), "a", "b") as (a, b):
        make_network(a, b)
        yield a, b
        assert a.crashes() == b.crashes() == []


def block_of(tag: int) -> bytes:
    return TAG.pack(tag) * (BLOCK_BYTES // TAG.size)


class Load:
    """Writers that number their writes, and know which blocks must hold which number."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site = site
        self.answered = [0] * BLOCKS
        self.under_way: list[set[int]] = [set() for _ in range(BLOCKS)]
        self.count = 0
        self._chance = random.Random(seed)
        self._tags = itertools.count(1)

    async def run(self, writers: int = 16) -> None:
        """Until the connection is lost."""
        async with await NbdClient.connect(self.site.uri()) as client:
            # Each writer has its own blocks: what overlaps in time has no order to check.
            tasks = [asyncio.ensure_future(self._write(client, i, writers)) for i in range(writers)]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            results = await asyncio.gather(*done, *pending, return_exceptions=True)
            errors = [r for r in results if not isinstance(r, asyncio.CancelledError)]
            assert all(isinstance(error, GeomirrorError) for error in errors), errors

    async def _write(self, client: NbdClient, writer: int, writers: int) -> None:
        while True:
            block = self._chance.randrange(BLOCKS // writers) * writers + writer
            tag = next(self._tags)
            self.under_way[block].add(tag)
            await client.write(block * BLOCK_BYTES, block_of(tag), is_fua=tag % 50 == 0)
            self.answered[block] = tag
            self.under_way[block].clear()
            self.count += 1
            # About 6 MiB/s: a journal of 256 MiB has to outlast the time that a restart takes.
            await asyncio.sleep(0.01)

    def check(self, image: bytes) -> None:
        """Every block holds its last answered write, or one that was not answered, whole."""
        for block, tag in enumerate(self.answered):
            data = image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            (found,) = TAG.unpack_from(data)
            assert data == block_of(found), f"block {block} is torn"
            assert found == tag or found in self.under_way[block], f"block {block}"
            self.answered[block] = found
            self.under_way[block].clear()


async def wait_for_progress(load: Load, writes: int) -> None:
    goal = load.count + writes
    async with asyncio.timeout(60):
        while load.count < goal:
            await asyncio.sleep(0.01)


@pytest.mark.timeout(90 + 60 * KILL_ROUNDS)
async def test_kills_on_both_sides_under_load_lose_no_answered_write(pair):
    a, b = pair
    await asyncio.to_thread(create, a, "pg")
    load = Load(a, seed=1 + SEED)
    for round_number in range(KILL_ROUNDS):
        writing = asyncio.ensure_future(load.run())
        await wait_for_progress(load, 500)
        b.kill()
        await wait_for_progress(load, 500)
        await asyncio.to_thread(b.restart)
        await wait_for_progress(load, 500)
        a.kill()
        await writing
        await asyncio.to_thread(a.restart)
        load.check(await a.read(0, BLOCKS * BLOCK_BYTES))
        if round_number % 2 == 0:
            # Both at once, the secondary perhaps in the middle of an apply.
            b.kill()
            await asyncio.to_thread(b.restart)
    await asyncio.to_thread(wait_applied, a)
    image = await b.read(0, BLOCKS * BLOCK_BYTES)
    load.check(image)
    assert image == await a.read(0, BLOCKS * BLOCK_BYTES)
    peer = a.peer()
    # On a slow machine the small journal was filled to a quarter: Fold stays for a while.
    assert peer["resyncs"] == 0
    assert peer["state"] in ("Stream", "Fold")
    await asyncio.to_thread(a.run, "resource", "delete", "pg", "--yes")


async def test_two_volumes_keep_one_order_at_the_other_site(pair):
    a, b = pair
    await asyncio.to_thread(create, a, "two", "--size", "8M", size="8M")
    await asyncio.to_thread(wait_applied, a, "two")
    written = 0
    is_stopping = False

    async def write() -> None:
        nonlocal written
        async with (
            await NbdClient.connect(a.uri("two", 0)) as first,
            await NbdClient.connect(a.uri("two", 1)) as second,
        ):
            while not is_stopping:
                # The second volume's write is only begun when the first one's is answered.
                await first.write(0, block_of(written + 1))
                await second.write(BLOCK_BYTES, block_of(written + 1))
                written += 1

    writing = asyncio.ensure_future(write())
    seen, epoch = set(), applied(b)
    try:
        for _ in range(6):
            await asyncio.to_thread(until, lambda last=epoch: applied(b) > last)
            await asyncio.to_thread(a.call, "resource.pause", name="two")
            first, second = await read_both(b)
            assert first in (second, second + 1), "the volumes are of different moments"
            seen.add(first)
            epoch = applied(b)
            await asyncio.to_thread(a.call, "resource.resume", name="two")
    finally:
        is_stopping = True
        await writing
    assert len(seen) >= 5
    await asyncio.to_thread(wait_applied, a, "two")
    assert await b.read(BLOCK_BYTES, BLOCK_BYTES, "two", 1) == block_of(written)
    await asyncio.to_thread(a.run, "resource", "delete", "two", "--yes")


def applied(site: Site) -> int:
    return int(site.status("two")["position"]["epoch"])


async def read_both(b: Site) -> tuple[int, int]:
    """The numbers in both volumes, at one epoch: what was under way is still applied."""
    while True:
        epoch = applied(b)
        first = TAG.unpack_from(await b.read(0, 8, "two", 0))[0]
        second = TAG.unpack_from(await b.read(BLOCK_BYTES, 8, "two", 1))[0]
        if applied(b) == epoch:
            return first, second


async def test_a_sparse_volume_of_4_tib_costs_neither_time_nor_memory(pair):
    a, b = pair
    memory_bytes = [site.rss_bytes() for site in (a, b)]
    size = 4 << 40
    began = time.monotonic()
    parameters = {"primary": "east-1", "secondaries": ["west-1"], "sizes": [size]}
    journal = {"journal_bytes": 256 * MIB}
    await asyncio.to_thread(a.call, "resource.create", name="huge", **parameters, **journal)
    seconds = time.monotonic() - began
    chance = random.Random(1)
    offsets = [0, size - BLOCK_BYTES, *(chance.randrange(size // 512) * 512 for _ in range(300))]
    offsets = [min(offset, size - BLOCK_BYTES) for offset in offsets]
    trimmed = [(1 << 40) + chance.randrange(1 << 30) // 512 * 512 for _ in range(20)]
    trimmed = [min(at, (1 << 40) + (1 << 30) - BLOCK_BYTES) for at in trimmed]
    offsets += trimmed
    async with await NbdClient.connect(a.uri("huge")) as client:
        assert client.size_bytes == size
        for tag, offset in enumerate(offsets):
            await client.write(offset, block_of(tag + 1))
        await asyncio.to_thread(wait_applied, a, "huge")
        await client.trim(1 << 40, 1 << 30)
        await client.flush()
    await asyncio.to_thread(wait_applied, a, "huge")
    for site in (a, b):
        async with await NbdClient.connect(site.uri("huge")) as client:
            for tag, offset in enumerate(offsets):
                is_trimmed = 1 << 40 <= offset < (1 << 40) + (1 << 30)
                expected = bytes(BLOCK_BYTES) if is_trimmed else block_of(tag + 1)
                assert bytes(await client.read(offset, BLOCK_BYTES)) == expected, offset
    growth = [s.rss_bytes() - m for s, m in zip((a, b), memory_bytes, strict=True)]
    assert max(growth) < 150 * MIB, growth
    assert seconds < 2, seconds
    await asyncio.to_thread(a.run, "resource", "delete", "huge", "--yes")


def fio(uri: str, directory: Path, *arguments: str) -> None:
    """fio with its verify headers; its files stay in `directory`."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    command = ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite"]
    command += ["--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=32", "--size=16m"]
    command += ["--verify=crc32c", "--verify_fatal=1", "--randrepeat=1", "--output-format=json"]
    done = subprocess.run(
        [*command, *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert [job["error"] for job in report["jobs"]] == [0]


def test_what_fio_wrote_here_it_verifies_there(pair, tmp_path: Path):
    a, b = pair
    create(a, "fio")
    fio(a.uri("fio"), tmp_path, "--do_verify=0", "--fsync=100")
    b.stop(signal.SIGKILL)
    b.restart()
    wait_applied(a, "fio")
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "local-load-0-verify.state").unlink()
    fio(b.uri("fio"), tmp_path, "--verify_only")
    until(lambda: a.peer("fio")["disk_state"] == "UpToDate")
    a.run("resource", "delete", "fio", "--yes")
