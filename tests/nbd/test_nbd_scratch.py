"""A scratch file over a disk: reads see both, and the disk stays as it is."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.errors import GeomirrorError
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.constants import CMD_WRITE, CMD_WRITE_ZEROES
from geomirror.nbd.protocol import Request
from geomirror.nbd.scratch_export_io import ScratchExport
from geomirror.nbd.server_io import NbdServer
from tests.nbd.ram_export import RamExport

SIZE = 1 << 20


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[RamExport, ScratchExport, NbdClient]]:
    disk = RamExport(data=bytearray(random.Random(1).randbytes(SIZE)), is_read_only=True)
    scratch = ScratchExport(disk, tmp_path / "scratch", 64 << 10)
    assert not (tmp_path / "scratch").exists()
    server = NbdServer(lambda: {"ram": scratch})
    await server.start_unix(tmp_path / "s")
    client = await NbdClient.connect(f"nbd+unix:///ram?socket={tmp_path / 's'}")
    yield disk, scratch, client
    await client.close()
    await server.stop()
    scratch.end()
    assert disk.open_count == 0


async def test_what_is_written_is_read_and_the_disk_does_not_change(served) -> None:
    disk, scratch, client = served
    before = bytes(disk.data)
    await client.write(512, b"a" * 1024)
    await client.write(1024, b"b" * 512, is_fua=True)
    await client.trim(65536 - 512, 1024)
    await client.flush()
    wanted = bytearray(before)
    wanted[512:1536] = b"a" * 512 + b"b" * 512
    wanted[65024:66048] = bytes(1024)
    assert await client.read(0, SIZE) == wanted
    assert disk.data == before
    assert scratch.scratch_bytes == 2048


async def test_it_is_bounded_and_says_so(served) -> None:
    disk, _, client = served
    await client.write(0, b"x" * (64 << 10))
    await client.write(0, b"y" * (64 << 10))
    with pytest.raises(GeomirrorError) as caught:
        await client.write(64 << 10, b"z" * 512)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert bytes(await client.read(0, 64 << 10)) == b"y" * (64 << 10)
    assert await client.read(64 << 10, 512) == disk.data[64 << 10 :][:512]


async def test_an_error_of_the_disk_is_passed_on(served) -> None:
    disk, _, client = served
    await client.write(0, b"x" * 512)
    disk.fail_errno = errno.EIO
    with pytest.raises(GeomirrorError):
        await client.read(0, 512)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_any_writes_read_like_a_plain_disk(tmp_path_factory, seed: int) -> None:
    chance = random.Random(seed)
    size = 300 * 512
    base = chance.randbytes(size)
    disk = RamExport(data=bytearray(base), size_bytes=size)
    path = tmp_path_factory.mktemp("scratch") / "s"
    scratch = ScratchExport(disk, path, size)
    model = bytearray(base)
    try:
        for _ in range(chance.randrange(1, 12)):
            first = chance.randrange(300)
            count = chance.randrange(1, 301 - first)
            offset, length = first * 512, count * 512
            payload = chance.randbytes(length) if chance.random() < 0.7 else None
            command = CMD_WRITE_ZEROES if payload is None else CMD_WRITE
            view = None if payload is None else memoryview(payload)
            assert scratch._change(Request(command, 0, 1, offset, length, view)) == 0
            model[offset : offset + length] = payload or bytes(length)
            first = chance.randrange(300)
            end = chance.randrange(first + 1, 301) * 512
            found = scratch.overlay(first * 512, [base[first * 512 : end]])
            assert b"".join(found) == model[first * 512 : end]
    finally:
        scratch.end()
