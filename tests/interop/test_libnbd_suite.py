"""libnbd's interop tests, and of its others those that judge a server: unchanged, against ours."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from geomirror.limits import KIB, MIB
from geomirror.nbd.client_io import NbdClient
from tests.interop.libnbd_suite import Program, Suite, find_source
from tests.nbd.certificates import Authority
from tests.system.activation import listen_unix, start_with_socket
from tests.system.support import (
    Site,
    create,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
SPLICE = Path(__file__).parent / "splice.py"
PYTHON = "/usr/bin/python3"
SIZE = MIB
"""What `interop.c` and `socket-activation.c` expect."""

NOT_FOR_US = {
    "interop-qemu-block-size.sh": "starts qemu-nbd with a sector size that it forces on clients",
    "interop-qemu-storage-daemon.sh": "starts qemu-storage-daemon with a qcow2 of its own",
    "structured-read.c": "wants qemu's division of a READ into a hole and data; ours is one chunk",
    "structured-read.sh": "makes the qcow2 for structured-read.c",
    "dirty-bitmap.sh": "makes the qcow2 for dirty-bitmap.c, which is run",
    "requires.c": "no test",
}
"""Files of libnbd's interop/ that are not run, and why."""


@dataclass
class World:
    suite: Suite
    east: Site
    west: Site
    tls_port: int

    def started(self, volume: str, *more: str) -> list[str]:
        return self.east.command("nbd", volume, *more)

    def stdio(self) -> list[str]:
        return self.started("memory-1048576", "--stdio")

    def tls(self) -> list[str]:
        return [PYTHON, str(SPLICE), "localhost", str(self.tls_port)]

    def daemon(self) -> list[str]:
        return [PYTHON, str(SPLICE), str(self.east.data_dir / "nbd.sock")]


def fill(site: Site, name: str, size: int) -> None:
    """What nbdkit's pattern plugin shows: at each eighth byte its offset, big endian."""

    async def write() -> None:
        async with await NbdClient.connect(site.uri(name)) as client:
            for at in range(0, size, MIB):
                numbers = range(at, min(at + MIB, size), 8)
                await client.write(at, struct.pack(f">{len(numbers)}Q", *numbers))
            await client.flush()

    asyncio.run(write())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    suite = Suite(find_source(), tmp_path_factory.mktemp("suite"))
    root = tmp_path_factory.mktemp("libnbd")
    authority = Authority(suite.work / "tests" / "pki")
    (suite.work / "tests" / "keys.psk").write_text("alice:0123456789abcdef\n")
    with some_sites(root, "east-1", "west-1") as (east, west):
        make_network(east, west)
        port = free_port()
        certificate, key = authority.server
        config = east.data_dir / "geomirror.toml"
        config.write_text(
            f'[nbd]\ntcp_listen = "127.0.0.1:{port}"\ntls_certificate = "{certificate}"\n'
            f'tls_key = "{key}"\ntls_ca = "{authority.ca}"\n'
        )
        config.chmod(0o600)
        east.stop()
        east.restart()
        for name in ("memory-1048576", "null-1048576"):
            create(east, name, size="1M", secondary=None)
        create(east, "memory-2097152", size="2M", secondary=None)
        create(east, "memory-68157440", size="65M", secondary=None)
        for size in (512, 1024, 8 * MIB, 64 * MIB):
            create(east, f"pattern-{size}", size=str(size), secondary=None)
            fill(east, f"pattern-{size}", size)
        suite.replace_nbdkit(east.data_dir)
        yield World(suite, east, west, port)
        assert east.crashes() == west.crashes() == []


REQUIRED = {"CERTS": "1", "TLS_MODE": "LIBNBD_TLS_REQUIRE", "EXPORT_NAME": '"null-1048576"'}
ALLOWED = {"TLS_MODE": "LIBNBD_TLS_ALLOW"}
ONE = {"EXPORTS": '"memory-1048576/0"', "DESCRIPTIONS": '"primary of memory-1048576/0"'}
NAMES = ("memory-1048576", "memory-2097152", "memory-68157440", "null-1048576")
PATTERNS = tuple(f"pattern-{size}" for size in (512, 1024, 64 * MIB, 8 * MIB))
ALL = {
    "EXPORTS": ", ".join(f'"{name}/0"' for name in sorted([*NAMES, *PATTERNS])),
    "DESCRIPTIONS": ", ".join(f'"primary of {name}/0"' for name in sorted([*NAMES, *PATTERNS])),
}
ACTIVATED = {"SOCKET_ACTIVATION": "1"}
VOLUME = "memory-1048576"
INTEROP: dict[str, Callable[[World], Program]] = {
    "interop": lambda w: Program("interop", "interop/interop.c", w.stdio()),
    "interop-activated": lambda w: Program(
        "interop-activated", "interop/interop.c", w.started(VOLUME), ACTIVATED
    ),
    "interop-export-name": lambda w: Program(
        *("interop-export-name", "interop/interop.c", w.started(VOLUME)),
        {**ACTIVATED, "EXPORT_NAME": f'"{VOLUME}/0"'},
    ),
    "interop-tls-certs": lambda w: Program(
        "interop-tls-certs", "interop/interop.c", w.tls(), REQUIRED
    ),
    "interop-tls-certs-allow-enabled": lambda w: Program(
        "interop-tls-certs-allow-enabled", "interop/interop.c", w.tls(), {**REQUIRED, **ALLOWED}
    ),
    "interop-tls-certs-allow-fallback": lambda w: Program(
        *("interop-tls-certs-allow-fallback", "interop/interop.c", w.stdio()),
        {**ALLOWED, "CERTS": "1", "TLS_FALLBACK": "1"},
    ),
    "interop-tls-psk-allow-fallback": lambda w: Program(
        *("interop-tls-psk-allow-fallback", "interop/interop.c", w.stdio()),
        {**ALLOWED, "PSK": "1", "TLS_FALLBACK": "1"},
    ),
    "socket-activation": lambda w: Program(
        "socket-activation", "interop/socket-activation.c", w.started(VOLUME)
    ),
    "list-exports": lambda w: Program("list-exports", "interop/list-exports.c", w.stdio(), ONE),
    "list-exports-activated": lambda w: Program(
        *("list-exports-activated", "interop/list-exports.c", w.started(VOLUME)),
        {**ONE, **ACTIVATED},
    ),
    "list-exports-daemon": lambda w: Program(
        "list-exports-daemon", "interop/list-exports.c", w.daemon(), ALL
    ),
}


@pytest.mark.parametrize("name", INTEROP)
def test_a_program_of_interop_passes(world: World, name: str) -> None:
    world.suite.run(INTEROP[name](world))


def test_its_programs_notice_a_server_that_is_wrong(world: World) -> None:
    wrong = Program("wrong-size", "interop/interop.c", world.started("memory-2097152", "--stdio"))
    with pytest.raises(AssertionError, match="actual size 2097152 <> expected size 1048576"):
        world.suite.run(wrong)
    plain = Program("no-tls", "interop/interop.c", world.stdio(), REQUIRED)
    with pytest.raises(AssertionError, match="no-tls ended with"):
        world.suite.run(plain)


def test_dirty_bitmap_finds_what_a_paused_secondary_lacks(world: World) -> None:
    east = world.east
    create(east, "dirty", size="1M")

    async def write(*ranges: tuple[int, int]) -> None:
        async with await NbdClient.connect(east.uri("dirty")) as client:
            for at, length in ranges:
                await client.write(at, b"x" * length)
            await client.flush()

    asyncio.run(write((0, 64 * KIB)))
    wait_applied(east, "dirty")
    east.call("resource.pause", name="dirty", peer="west-1")

    async def write_more() -> None:
        await write((64 * KIB, 64 * KIB))
        async with await NbdClient.connect(east.uri("dirty")) as client:
            await client.zero(512 * KIB, 64 * KIB)

    asyncio.run(write_more())
    bitmap = "qemu:dirty-bitmap:unsynced-west-1"
    arguments = (bitmap, *world.started("dirty"))
    world.suite.run(Program("dirty-bitmap", "interop/dirty-bitmap.c", arguments=arguments))
    east.run("resource", "delete", "dirty", "--yes")
    until(lambda: not world.west.call("status")["resources"], what="deletion at west-1")


SERVER_ERRORS = ("errors-server-invalid-offset", "errors-server-unknown-flags")
CLIENT = (
    *("errors-bad-cookie", "errors-client-oversize", "errors-client-unknown-flags"),
    *("errors-client-zerosize", "errors-connect-twice", "errors-notify-not-blocked"),
    *("errors-pread-structured", "pread-initialize", "shutdown-flags"),
)


@pytest.mark.parametrize("name", [*SERVER_ERRORS, *CLIENT])
def test_a_program_for_nbdkit_passes_with_ours_of_that_name(world: World, name: str) -> None:
    world.suite.run(Program(name, f"tests/{name}.c"))


SCRIPTS = (
    *("200-connect-command.py", "210-opt-abort.py", "300-get-size.py", "400-pread.py"),
    *("405-pread-structured.py", "500-aio-pread.py", "505-aio-pread-callback.py"),
    "600-debug-callback.py",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_the_python_bindings_passes(world: World, name: str) -> None:
    world.suite.run_python(name)


PARALLEL = {"aio-parallel": 64 * MIB, "synch-parallel": 8 * MIB}


@pytest.mark.parametrize("name", PARALLEL)
def test_many_connections_read_what_they_wrote(world: World, name: str, tmp_path: Path) -> None:
    """Eight connections for ten seconds; the program compares every read with its own copy."""
    path = tmp_path / "s"
    with listen_unix(path) as listener:
        server = start_with_socket(world.started(f"pattern-{PARALLEL[name]}"), listener)
        try:
            said = world.suite.run(Program(name, f"tests/{name}.c", arguments=(str(path),)))
        finally:
            server.terminate()
            assert server.wait(30) == 0
    assert "bytes received" in said


def test_every_file_of_interop_is_run_or_has_its_reason(world: World) -> None:
    run = {Path(make(world).source).name for make in INTEROP.values()} | {"dirty-bitmap.c"}
    found = world.suite.names_in("interop")
    assert found <= run | NOT_FOR_US.keys(), "libnbd has a test that nobody looked at"
    assert not run & NOT_FOR_US.keys()
    assert run <= found
