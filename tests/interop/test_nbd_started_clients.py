"""Clients that start their own server: `geomirror nbd` for nbdinfo, nbdcopy and nbdfuse."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.interop.clients import run, tool
from tests.system.activation import listen_unix, start_with_socket
from tests.system.support import Site, create, some_sites, until

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
SIZE = 16 << 20


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One node, primary of "pg" with two volumes and of "other"."""
    with some_sites(tmp_path_factory.mktemp("started"), "east-1") as (found,):
        found.run(
            *("network", "create", "acme", "--site", "east", "--node", "east-1"),
            *("--listen", f"127.0.0.1:{found.port}"),
        )
        found.restart()
        create(found, "pg", "--size", "16M", size="32M", secondary=None)
        create(found, "other", size="1M", secondary=None)
        yield found
        assert found.crashes() == []


def server_of(site: Site, volume: str, *more: str) -> list[str]:
    return site.command("nbd", volume, *more)


async def test_nbdinfo_starts_a_server_of_one_volume(site: Site) -> None:
    told = json.loads(await run("nbdinfo", "--json", "--", "[", *server_of(site, "pg"), "]"))
    (export,) = told["exports"]
    assert export["export-size"] == SIZE
    assert export["contexts"][0] == "base:allocation"
    size = await run("nbdinfo", "--size", "--", "[", *server_of(site, "pg/1"), "]")
    assert int(size) == 32 << 20


async def test_nbdinfo_lists_nothing_but_that_volume(site: Site) -> None:
    told = json.loads(
        await run("nbdinfo", "--json", "--list", "--", "[", *server_of(site, "pg/1"), "]")
    )
    assert [export["export-name"] for export in told["exports"]] == ["pg/1"]


async def test_nbdcopy_copies_in_and_out(site: Site, tmp_path: Path) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    source.write_bytes(random.Random(5).randbytes(SIZE))
    await run("nbdcopy", "--flush", source, "--", "[", *server_of(site, "pg"), "]")
    await run("nbdcopy", "--", "[", *server_of(site, "pg"), "]", target)
    assert target.read_bytes() == source.read_bytes()
    assert await site.read(SIZE - 4096, 4096) == source.read_bytes()[-4096:]


async def test_nbdcopy_from_one_volume_to_another(site: Site) -> None:
    await site.write(123, b"between two started servers")
    both = ("--", "[", *server_of(site, "pg/0"), "]", "[", *server_of(site, "pg/1"), "]")
    await run("nbdcopy", *both)
    assert await site.read(123, 27, volume=1) == b"between two started servers"


async def test_a_volume_that_is_not_there_fails_the_client(site: Site) -> None:
    said = await run("nbdinfo", "--", "[", *server_of(site, "nope"), "]", is_failure_wanted=True)
    assert 'no resource "nope"' in said


async def test_nbdfuse_speaks_over_standard_streams(site: Site, tmp_path: Path) -> None:
    program = tool("nbdfuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be used here")
    mount = tmp_path / "mount"
    mount.mkdir()
    await site.write(0, b"a disk over stdin and stdout")
    process = await asyncio.create_subprocess_exec(
        program, str(mount), "--command", *server_of(site, "pg", "--stdio")
    )
    try:
        disk = mount / "nbd"
        async with asyncio.timeout(30):
            while not await asyncio.to_thread(disk.exists):
                assert process.returncode is None
                await asyncio.sleep(0.05)
        await run("dd", f"if={disk}", f"of={tmp_path / 'copy'}", "bs=1M")
        assert (tmp_path / "copy").read_bytes()[:28] == b"a disk over stdin and stdout"
        assert (tmp_path / "copy").stat().st_size == SIZE
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    assert not mount.is_mount()


def test_standard_streams_end_with_the_client(site: Site) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            server_of(site, "pg", "--stdio"), stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
        )
        theirs.close()
        assert ours.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\0\3"
        ours.close()
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0


async def test_a_server_ends_with_sigterm_and_serves_many_until_then(
    site: Site, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with listen_unix(path) as listener:
        process = start_with_socket(server_of(site, "pg"), listener)
        clients = [await NbdClient.connect(f"nbd+unix:///?socket={path}") for _ in range(4)]
        for at, client in enumerate(clients):
            await client.write(at * 4096, bytes([at]) * 4096)
        assert await clients[0].read(3 * 4096, 1) == b"\3"
        for client in clients:
            await client.close()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0


async def test_an_orphaned_server_goes_when_its_last_client_has_gone(
    site: Site, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with listen_unix(path) as listener:
        # The shell is the parent; it dies without a word, as a killed client does.
        command = ["/bin/sh", "-c", '"$@" & echo $! >"$0.pid"; sleep 60', str(path)]
        hold = ["/bin/sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh", *server_of(site, "pg")]
        parent = start_with_socket([*command, *hold], listener)
        client = await NbdClient.connect(f"nbd+unix:///?socket={path}", timeout_s=30)
        pid = int((tmp_path / "s.pid").read_text())
        parent.kill()
        parent.wait()
        assert await client.read(0, 4096)
        await client.close()
        await asyncio.to_thread(until, lambda: not Path(f"/proc/{pid}").exists())


def test_without_a_client_it_says_how_it_is_used(site: Site) -> None:
    said = site.error("nbd", "pg", expected=2, code="usage")
    assert "--stdio" in said
    assert "no daemon" in Site(site.root, "west-1").error(
        "nbd", "pg", "--stdio", expected=3, code="unreachable"
    )
    assert 'has no volume "7"' in site.error("nbd", "pg/7", "--stdio", expected=4, code="not_found")
