"""The steps of the quick start with real daemons; then what an operator does next."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, UserSite, quick_start, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    with some_sites(tmp_path, "a", "b") as (a, b):
        yield a, b


@pytest.fixture
def users_sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    with some_sites(tmp_path, "a", "b", kind=UserSite) as (a, b):
        yield a, b


async def write(site: Site, offset: int, data: bytes) -> None:
    async with await NbdClient.connect(site.uri()) as client:
        await client.write(offset, data)
        await client.flush()


async def read(site: Site, offset: int, length: int) -> bytes:
    async with await NbdClient.connect(site.uri()) as client:
        return bytes(await client.read(offset, length))


async def test_the_steps_of_the_quick_start(users_sites: tuple[Site, Site]) -> None:
    a, b = users_sites
    quick_start(a, b)
    found = a.json("status", "pg")
    assert {"schema_version", "node", "site", "resources"} <= found.keys()
    assert (found["node"], found["site"]) == ("east-1", "east")
    resource = found["resources"][0]
    expected = f"nbd+unix:///pg/0?socket={a.data_dir}/nbd.sock"
    assert resource["volumes"][0]["nbd_uri"] == expected
    check_shape(resource)
    data = os.urandom(MIB)
    await write(a, 3 * MIB + 123, data)
    a.run("wait", "pg", "--applied", "--timeout", "60")
    assert await read(b, 3 * MIB + 123, len(data)) == data
    check_modes(a.data_dir)
    check_modes(b.data_dir)
    assert b.resource()["role"] == "secondary"
    check_text(a)
    for site in users_sites:
        assert site.stop() == 0
        assert "Traceback" not in site.log()


def check_shape(resource: dict[str, Any]) -> None:
    """The keys of the contract, and their types."""
    assert {"name", "generation", "role", "state", "journal", "volumes", "position", "peers"} <= (
        resource.keys()
    )
    assert {"bytes_used", "bytes_total", "covers_seconds"} <= resource["journal"].keys()
    assert {"epoch", "lsn"} <= resource["position"].keys()
    peer = resource["peers"][0]
    assert {"epochs", "bytes", "seconds"} <= peer["lag"].keys()
    for key in ("logical_bytes", "wire_bytes", "resyncs", "rate_bytes_per_second"):
        assert isinstance(peer[key], int), key
    assert {"node", "site", "state", "disk_state", "path", "position"} <= peer.keys()
    assert {"rpo_seconds", "eta_seconds"} <= peer.keys()
    assert isinstance(peer["position"]["epoch"], int)


def check_modes(root: Path) -> None:
    """Files 0600, directories 0700."""
    for path in (root, *root.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))


def check_text(a: Site) -> None:
    text = a.run("status")
    assert "pg  primary  ok" in text
    assert re.search(r"west-1 +west +Stream +UpToDate", text)
    assert "state: healthy" in text
    assert a.run("check", "pg").startswith("OK - pg:")
    assert "west-1" in a.run("link", "list")
    assert a.json("link", "list")["links"][0]["is_established"]
    assert [n["node"] for n in a.json("node", "list")["nodes"]] == ["east-1", "west-1"]
    assert a.json("watch", "--count", "1")["node"] == "east-1"
    assert "pg" in a.run("watch", "--count", "1", "--interval", "0.2")
    kinds = {json.loads(line)["kind"] for line in a.run("events").splitlines()}
    assert {"node_started", "link_up", "resource_created"} <= kinds


async def test_kills_on_both_sides_lose_nothing_that_was_flushed(sites: tuple[Site, Site]) -> None:
    a, b = sites
    quick_start(a, b)
    first, second = os.urandom(2 * MIB), os.urandom(2 * MIB)
    await write(a, 0, first)
    a.run("wait", "pg", "--durable", "--timeout", "60")
    b.stop(signal.SIGKILL)
    until(lambda: a.peer()["state"] == "Disconnected")
    a.run("wait", "pg", "--durable", "--timeout", "0.5s", expected=6)
    await write(a, MIB, second)
    a.stop(signal.SIGKILL)
    a.restart()
    assert await read(a, 0, MIB) == first[:MIB]
    assert await read(a, MIB, 2 * MIB) == second
    b.start()
    a.run("wait", "pg", "--applied", "--timeout", "60")
    assert await read(b, 0, 3 * MIB) == first[:MIB] + second
    assert a.peer()["resyncs"] == 0


async def test_pause_holds_the_image_still_and_resume_goes_on(sites: tuple[Site, Site]) -> None:
    a, b = sites
    quick_start(a, b)
    await write(a, 0, b"1" * 4096)
    a.run("wait", "pg", "--applied", "--timeout", "60")
    b.run("pause", "pg", "--peer", "west-1")
    assert a.peer()["state"] == "Paused"
    assert "resume pg --peer west-1" in a.run("status", "pg")
    await write(a, 0, b"2" * 4096)
    a.run("wait", "pg", "--timeout", "500ms", expected=6)
    assert await read(b, 0, 4096) == b"1" * 4096
    a.run("resume", "pg")
    a.run("wait", "pg", "--applied", "--timeout", "60")
    assert await read(b, 0, 4096) == b"2" * 4096


async def test_delete_with_keep_data_leaves_plain_images(sites: tuple[Site, Site]) -> None:
    a, b = sites
    quick_start(a, b)
    data = os.urandom(MIB)
    await write(a, 5 * MIB, data)
    a.run("wait", "pg", "--durable", "--timeout", "60")
    a.run("resource", "delete", "pg", expected=2)
    result = a.json("resource", "delete", "pg", "--keep-data", "--yes")
    check_images(result["kept"], b.data_dir / "kept/pg/0.img", data)
    assert a.json("resource", "list")["resources"] == []
    a.run("status", "pg", expected=4)
    assert a.json("status", "pg", expected=4)["error"]["code"] == "not_found"


def check_images(kept: list[str], other: Path, data: bytes) -> None:
    image = Path(kept[0]).read_bytes()
    assert len(image) == 64 * MIB
    assert image[5 * MIB : 6 * MIB] == data
    until(other.exists)
    assert other.read_bytes() == image


async def test_an_adopted_image_is_kept_and_sent(sites: tuple[Site, Site], tmp_path: Path) -> None:
    a, b = sites
    quick_start(a, b)
    image = tmp_path / "disk.img"
    data = os.urandom(4 * MIB)
    image.write_bytes(data)
    create = ("resource", "create", "db", "--primary", "east-1", "--secondary", "west-1")
    backing = ("--backing", f"east-1={image}", "--journal-size", "256M")
    a.run(*create, *backing, "--size", "4M", expected=5)
    a.run(*create, *backing, "--adopt", "east-1")
    a.run("wait", "db", "--applied", "--timeout", "60")
    uri = b.resource("db")["volumes"][0]["nbd_uri"]
    async with await NbdClient.connect(uri) as client:
        assert bytes(await client.read(0, len(data))) == data


def test_mistakes_have_their_exit_codes_and_no_traceback(sites: tuple[Site, Site]) -> None:
    a, b = sites
    a.run("status", expected=3)
    a.run("node", "run", expected=4)
    a.run("network", "create", "ac me", "--site", "east", expected=2)
    quick_start(a, b)
    a.run("network", "create", "acme", "--site", "east", expected=5)
    a.run("node", "run", expected=5)
    token = a.run("token", "create", "--site", "south").strip()
    c = Site(a.data_dir.parent, "c")
    c.run("join", "-", stdin=token[:-3] + "xyz", expected=10)
    c.run("join", "-", stdin=token + "\n")
    Site(a.data_dir.parent, "d").run("join", token, expected=10)
    until(lambda: "pg" in a.run("resource", "list"))
    a.run("resource", "create", "x", "--size", "1Q", "--primary", "east-1", expected=2)
    a.run("resource", "create", "x", "--size", "1M", "--primary", "nobody", expected=4)
    a.run("resource", "create", "pg", "--size", "1M", "--primary", "east-1", expected=5)
    a.run("pause", "pg", "--peer", "nobody", expected=4)
    d = Site(a.data_dir.parent, "e")
    d.run("network", "create", "other", "--site", "x", "--listen", f"127.0.0.1:{a.port}")
    d.run("node", "run", expected=5)
    a.run("nonsense", expected=2)
    assert a.json("nonsense", expected=2)["error"]["code"] == "usage"


def test_reload_refuses_nonsense_and_says_what_wants_a_restart(sites: tuple[Site, Site]) -> None:
    a, b = sites
    quick_start(a, b)
    assert a.process is not None
    config = a.data_dir / "geomirror.toml"
    config.write_text("[node]\nlisten = 7\n")
    config.chmod(0o600)
    a.run("node", "check-config", expected=2)
    a.process.send_signal(signal.SIGHUP)
    until(lambda: "configuration_refused" in a.run("events"))
    config.write_text("[log]\nlevel = 'debug'\n[replication]\nepoch_age_ms = 100\n")
    a.run("node", "check-config")
    a.process.send_signal(signal.SIGHUP)
    until(lambda: "configuration_reloaded" in a.run("events"))
    event = [json.loads(e) for e in a.run("events").splitlines() if "reloaded" in e][-1]
    assert event["restart_needed_for"] == ["replication.epoch_age_ms"]


async def test_a_resource_alone_over_tcp_and_its_image_survives_a_restart(
    sites: tuple[Site, Site],
) -> None:
    a, _ = sites
    listen = ("--listen", f"127.0.0.1:{a.port}")
    a.run("network", "create", "acme", "--site", "east", "--node", "n", *listen)
    config = a.data_dir / "geomirror.toml"
    config.write_text('[nbd]\ntcp_listen = "127.0.0.1:0"\n')
    config.chmod(0o600)
    a.restart()
    create = ("resource", "create", "solo", "--primary", "n", "--journal-size", "256M")
    a.run(*create, "--size", "8M", "--size", "4M")
    volumes = a.resource("solo")["volumes"]
    assert [volume["size_bytes"] for volume in volumes] == [8 * MIB, 4 * MIB]
    assert volumes[1]["nbd_tcp_uri"].endswith("/solo/1")
    async with await NbdClient.connect(volumes[1]["nbd_tcp_uri"]) as client:
        await client.write(123, b"hello")
    a.run("wait", "solo", "--timeout", "10")
    a.run("check", "solo", expected=1)
    assert "state: alone" in a.run("status")
    assert a.stop() == 0
    assert (a.data_dir / "resources/solo/volumes/1.img").read_bytes()[123:128] == b"hello"
    a.restart()
    until(lambda: a.resource("solo")["volumes"][1]["nbd_uri"])
    async with await NbdClient.connect(a.resource("solo")["volumes"][1]["nbd_uri"]) as client:
        assert bytes(await client.read(123, 5)) == b"hello"


def test_status_starts_fast_and_without_heavy_modules(sites: tuple[Site, Site]) -> None:
    a, _ = sites
    a.run("network", "create", "acme", "--site", "east", "--listen", f"127.0.0.1:{a.port}")
    a.restart()
    a.run("status")
    program = (
        "import sys; from geomirror.cli.main import run;"
        f"code = run(['--data-dir', {str(a.data_dir)!r}, 'status']);"
        "heavy = {'numpy', 'aiohttp', 'cryptography', 'structlog', 'asyncio'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy or code else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    assert a.stop() == 0
