"""Real NBD clients: nbdinfo, nbdcopy, qemu-img, qemu-io, fio, nbdfuse; each against our server over
a disk in RAM, and against real daemons, whose copy is judged, too.

A client that is not installed skips its tests, naming the tool; in CI it is a failure.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.interop.clients import run, tool
from tests.interop.served_disks import SIZE, DaemonServed, RamServed, Served, daemons

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonServed]:
    with daemons(tmp_path_factory.mktemp("real")) as found:
        yield found


@pytest.fixture(params=["ram", "daemons"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> RamServed | DaemonServed:
    if request.param == "ram":
        return RamServed(tmp_path / "n.sock")
    found = request.getfixturevalue("real")
    assert isinstance(found, DaemonServed)
    return found


@pytest.fixture
async def served(
    disk: RamServed | DaemonServed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    # Clients leave files where they run: fio its verify state.
    monkeypatch.chdir(tmp_path)
    async with disk.running() as found:
        yield found


@pytest.fixture
async def ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RamServed]:
    """For what only a disk in RAM shows."""
    monkeypatch.chdir(tmp_path)
    async with RamServed(tmp_path / "n.sock").running() as found:
        yield found


def pattern(seed: int) -> bytes:
    """A sparse disk image: random megabytes between empty ones."""
    chance = random.Random(seed)
    return b"".join(
        chance.randbytes(1 << 20) if chance.random() < 0.5 else bytes(1 << 20)
        for _ in range(SIZE >> 20)
    )


async def test_nbdinfo_reads_size_flags_contexts_and_block_sizes(served: Served) -> None:
    told = json.loads(await run("nbdinfo", "--json", served.uri("vol")))
    export = told["exports"][0]
    assert told["protocol"] == "newstyle-fixed"
    assert told["structured"] is True
    assert export["export-size"] == SIZE
    assert export["description"] == served.description
    assert tuple(export["contexts"]) == served.contexts
    can = {key: export[key] for key in export if key.startswith(("can_", "is_"))}
    assert can.pop("is_rotational") is False
    assert can.pop("is_read_only") is False
    assert can
    assert all(can.values()), can
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
    assert export["block_size_maximum"] == 32 << 20


async def test_nbdinfo_lists_the_exports(served: Served) -> None:
    told = json.loads(await run("nbdinfo", "--json", "--list", served.uri()))
    names = sorted(export["export-name"] for export in told["exports"])
    assert tuple(names) == served.names


async def test_nbdinfo_sees_a_read_only_export_and_an_unknown_one(served: Served) -> None:
    told = json.loads(await run("nbdinfo", "--json", served.uri("ro")))
    assert told["exports"][0]["is_read_only"] is True
    output = await run("nbdinfo", served.uri("nope"), is_failure_wanted=True)
    assert "nope" in output


async def test_nbdinfo_map_shows_data_and_holes(served: Served) -> None:
    await served.fill(bytes(1 << 20) + b"x" * (1 << 20) + bytes(SIZE - (2 << 20)))
    # Zeros that were written are content; what is discarded is a hole.
    await run("qemu-io", "-f", "raw", "-c", "discard 0 1M", "-c", "discard 2M 14M", served.uri())
    extents = json.loads(await run("nbdinfo", "--json", "--map", served.uri()))
    found = [(extent["offset"], extent["length"], extent["type"]) for extent in extents]
    assert found == [
        (0, 1 << 20, 3),
        (1 << 20, 1 << 20, 0),
        (2 << 20, SIZE - (2 << 20), 3),
    ]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_nbdcopy_copies_in_and_out(served: Served, tmp_path: Path, transport: str) -> None:
    uri = served.uri() if transport == "unix" else served.tcp
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    image = pattern(1)
    source.write_bytes(image)
    await served.fill(b"\xee" * SIZE)
    await run("nbdcopy", "--flush", source, uri)
    assert await served.content() == image
    served.check_flushed()
    await run("nbdcopy", uri, target)
    assert target.read_bytes() == image
    await served.judge_copy()


async def test_nbdcopy_between_two_exports_over_many_connections(served: Served) -> None:
    await served.fill_read_only(pattern(2))
    await run("nbdcopy", "-C", "4", served.uri("ro"), served.uri())
    assert await served.content() == pattern(2)
    await served.judge_copy()


async def test_nbdcopy_cannot_write_to_a_read_only_export(served: Served, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(pattern(3))
    before = await served.content("ro")
    await run("nbdcopy", source, served.uri("ro"), is_failure_wanted=True)
    assert await served.content("ro") == before


async def test_qemu_io_writes_zeroes_discards_and_reads_back(served: Served) -> None:
    commands = [
        "write -P 0xab 512 1M",
        "write -P 0xcd 777 333",
        "write -f -P 0x11 4M 64k",
        "write -z 5M 1M",
        "write -z -u 6M 1M",
        "discard 100k 100k",
        "flush",
        "read -P 0xcd 777 333",
        "read -P 0xab 1110 4000",
        "read -P 0 100k 100k",
        "read -P 0x11 4M 64k",
        "read -P 0 5M 2M",
        "aio_write -P 0x77 8M 2M",
        "aio_flush",
        "read -P 0x77 8M 2M",
    ]
    await served.fill(b"\xee" * SIZE)
    arguments = [part for command in commands for part in ("-c", command)]
    output = await run("qemu-io", "-f", "raw", *arguments, served.uri())
    assert "verification failed" not in output
    content = await served.content()
    assert content[777:1110] == b"\xcd" * 333
    assert content[5 << 20 : 7 << 20] == bytes(2 << 20)
    assert content[7 << 20 : 8 << 20] == b"\xee" * (1 << 20)
    served.check_fua()
    await served.judge_copy()


async def test_qemu_io_respects_a_minimum_block(ram: RamServed) -> None:
    await run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 5000 100", ram.uri("picky"))
    assert ram.picky.data[5000:5100] == b"\x5a" * 100
    assert not any(ram.picky.data[:5000])


async def test_qemu_io_past_the_end_and_read_only_fail_cleanly(served: Served) -> None:
    await served.fill(bytes(SIZE))
    past = ("-c", f"write {SIZE - 512} 1024")
    await run("qemu-io", "-f", "raw", *past, served.uri(), is_failure_wanted=True)
    await run("qemu-io", "-f", "raw", "-c", "write 0 4k", served.uri("ro"), is_failure_wanted=True)
    assert not any(await served.content())


async def test_qemu_img_maps_converts_and_compares(served: Served, tmp_path: Path) -> None:
    image = tmp_path / "source.img"
    image.write_bytes(pattern(4))
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, served.uri())
    assert await served.content() == image.read_bytes()
    output = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, served.uri())
    assert "identical" in output
    extents = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", served.uri()))
    assert any(extent["data"] for extent in extents)
    assert any(extent["zero"] for extent in extents)
    await served.judge_copy()


@pytest.mark.parametrize(("jobs", "mode"), [(1, "randwrite"), (4, "randrw")])
async def test_fio_verifies_what_it_wrote(served: Served, jobs: int, mode: str) -> None:
    part = SIZE // jobs
    output = await run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={served.uri()}",
        f"--rw={mode}",
        "--bsrange=512-64k",
        "--bs_unaligned=1",
        "--iodepth=32",
        f"--numjobs={jobs}",
        f"--size={part}",
        f"--offset_increment={part}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randrepeat=1",
        "--fsync=50",
        "--output-format=json",
    )
    report = json.loads(output[output.index("{") :])
    assert [job["error"] for job in report["jobs"]] == [0] * jobs
    assert sum(job["write"]["total_ios"] for job in report["jobs"]) > 100
    served.check_flushed()
    await served.judge_copy()


async def test_fio_trims(served: Served) -> None:
    await served.fill(b"\xee" * SIZE)
    uri = f"--uri={served.uri()}"
    await run("fio", "--name=t", "--ioengine=nbd", uri, "--rw=trim", "--bs=64k", f"--size={SIZE}")
    assert not any(await served.content())
    await served.judge_copy()


async def test_nbdfuse_carries_a_file_system_image(served: Served, tmp_path: Path) -> None:
    program = tool("nbdfuse")
    if os.geteuid() != 0:
        tool("fusermount3")  # root mounts and unmounts without it
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be used here")
    image, mount = tmp_path / "fs.img", tmp_path / "mount"
    mount.mkdir()
    image.write_bytes(b"")
    os.truncate(image, SIZE)
    await run("mke2fs", "-q", "-F", "-t", "ext4", "-d", Path(__file__).parent, image)
    process = await asyncio.create_subprocess_exec(program, str(mount), served.uri())
    try:
        disk = mount / "nbd"
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(disk.exists):
                assert process.returncode is None
                await asyncio.sleep(0.05)
        await run("dd", f"if={image}", f"of={disk}", "bs=1M", "conv=notrunc,fsync")
        assert await served.content() == image.read_bytes()
        served.check_flushed()
        await run("e2fsck", "-fn", disk)
    finally:
        # SIGTERM makes nbdfuse unmount; a mount left behind would outlive the test.
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    assert not mount.is_mount()
    await served.judge_copy()
