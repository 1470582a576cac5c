"""The demo's disk and writer with real tools, without any daemon of ours."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import NotFoundError
from geomirror.lab.demo_image import (
    LEDGER_FILE_BYTES,
    LEDGER_FILES,
    find_tool,
    is_file_system_clean,
    make_file_system,
    prepare,
)
from geomirror.lab.demo_ledger import BlockMaker, Ledger
from geomirror.lab.demo_nbd import Writer, copy_in, copy_out, judge_export
from geomirror.lab.process_io import Child
from geomirror.limits import BLOCK_BYTES, MIB

pytestmark = pytest.mark.interop

IMAGE_BYTES = 56 * MIB


def needs(tool: str) -> None:
    if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip(f"{tool} is not installed")


def test_a_missing_tool_is_named_with_its_package() -> None:
    with pytest.raises(NotFoundError, match="apt-get install nowhere"):
        find_tool("no-such-tool-of-geomirror", "nowhere")


@pytest.mark.parametrize("client", ["nbdcopy", "ours"])
async def test_files_of_a_real_file_system_are_overwritten_while_its_server_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    for tool in ("mke2fs", "e2fsck", "nbdkit") + (("nbdcopy",) if client == "nbdcopy" else ()):
        needs(tool)
    monkeypatch.setattr("geomirror.lab.demo_nbd.has_nbdcopy", lambda: client == "nbdcopy")
    maker = BlockMaker(SeededEntropy(1))
    stage, files, size = prepare(tmp_path, IMAGE_BYTES, maker)
    image = await make_file_system(tmp_path / "image", stage, IMAGE_BYTES, files, size)
    assert len(image.slot_offsets) == LEDGER_FILES * LEDGER_FILE_BYTES // BLOCK_BYTES
    assert (await is_file_system_clean(image.path))[0]
    disk, socket = tmp_path / "disk", tmp_path / "s"
    disk.touch()
    os.truncate(disk, IMAGE_BYTES)
    command = ["nbdkit", "-f", "-U", str(socket), "file", str(disk)]
    server = Child("nbdkit", command, tmp_path / "log", os.environ)

    async def serve() -> None:
        socket.unlink(missing_ok=True)
        await server.start()
        await server.wait_until(socket.exists, what="listening", timeout_s=10)

    uri = f"nbd+unix:///?socket={socket}"
    await serve()
    try:
        await copy_in(image.path, uri)
        ledger = Ledger(image.slot_offsets, maker, SeededEntropy(2))
        writer = Writer(uri, ledger, 8 * MIB)
        writing = asyncio.create_task(writer.run())
        await asyncio.sleep(0.5)
        await server.kill()
        await serve()
        await asyncio.sleep(0.5)
        writer.stop()
        await writing
        assert writer.reconnects == 1
        assert not writer.verdicts[0].missing_confirmed
        assert ledger.confirmed_count == ledger.write_count > 100
        assert not (await judge_export(uri, ledger)).missing_completed
        await copy_out(uri, tmp_path / "read")
    finally:
        await server.stop()
    verdict = ledger.judge_image(memoryview((tmp_path / "read").read_bytes()))
    assert verdict.is_legal_cut
    assert not verdict.missing_completed
    assert (await is_file_system_clean(tmp_path / "read"))[0]
