"""Who reads a copy keeps it still, for a while: then the copy goes on, and the reader is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.errors import StorageError
from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, create, make_network, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
PIN_S = 3
BEGIN = """
import dataclasses, json, sys
from geomirror import limits
limits.PRODUCTION = dataclasses.replace(limits.PRODUCTION, **json.loads(sys.argv.pop(1)))
from geomirror.__main__ import main
main()
"""


class LimitedSite(Site):
    """A node with bounds that no operator can set: a minute is long in a test."""

    def start(self) -> None:
        assert self.process is None
        bounds = json.dumps({"reader_pin_ns_max": PIN_S * 1_000_000_000})
        run = ["--data-dir", str(self.data_dir), "node", "run"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BEGIN, bounds, *run], stderr=log, cwd=self.root
            )


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    a, b = Site(tmp_path, "a"), LimitedSite(tmp_path, "b")
    try:
        make_network(a, b)
        create(a, "pg")
        yield a, b
        assert a.crashes() == b.crashes() == []
    finally:
        a.end()
        b.end()


async def first(client: NbdClient) -> str:
    return chr((await client.read(MIB, 1))[0])


async def test_a_reader_sees_one_epoch_until_its_time_is_over(sites: tuple[Site, Site]) -> None:
    a, b = sites
    await a.write(MIB, b"1" * 4096)
    wait_applied(a)
    async with await NbdClient.connect(b.uri()) as reader:
        assert await first(reader) == "1"
        pinned = b.status()["position"]
        began = time.monotonic()
        await a.write(MIB, b"2" * 4096)
        a.call("resource.wait", name="pg", kind="durable", timeout_s=60)
        assert time.monotonic() - began < PIN_S, "too slow a machine for this story"
        position = b.status()["position"]
        assert position["applied_epoch"] == pinned["applied_epoch"] < position["durable_epoch"]
        assert await first(reader) == "1"
        # Another reader shares the epoch, and the time.
        async with await NbdClient.connect(b.uri()) as second:
            assert await first(second) == "1"
            wait_applied(a)
            assert time.monotonic() - began >= PIN_S
            for late in (reader, second):
                with pytest.raises(StorageError, match="stale"):
                    await late.read(MIB, 1)
        async with await NbdClient.connect(b.uri()) as fresh:
            assert await first(fresh) == "2"
        # Stale is for good; whoever is stale holds nothing back any more.
        await a.write(MIB, b"3" * 4096)
        began = time.monotonic()
        wait_applied(a)
        assert time.monotonic() - began < PIN_S
        with pytest.raises(StorageError, match="stale"):
            await reader.read(0, 1)
    assert await b.read(MIB, 1) == b"3"


async def test_a_reader_that_leaves_in_time_costs_nothing(sites: tuple[Site, Site]) -> None:
    a, b = sites
    await a.write(MIB, b"1" * 4096)
    wait_applied(a)
    async with await NbdClient.connect(b.uri()) as reader:
        await a.write(MIB, b"2" * 4096)
        a.call("resource.wait", name="pg", kind="durable", timeout_s=60)
        assert await first(reader) == "1"
    began = time.monotonic()
    until(lambda: b.status()["position"]["applied_epoch"] == a.status()["position"]["epoch"])
    assert time.monotonic() - began < PIN_S
    assert await b.read(MIB, 1) == b"2"
