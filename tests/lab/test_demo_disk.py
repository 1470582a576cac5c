"""The demo's disk and writer with real tools, without any daemon of ours."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import NotFoundError
from geomirror.lab.demo_files import (
    changed_blocks,
    copy_files_out,
    list_files,
    put_directory,
    remove_directory,
)
from geomirror.lab.demo_image import (
    LEDGER_FILE_BYTES,
    LEDGER_FILES,
    find_tool,
    is_file_system_clean,
    make_file_system,
    prepare,
)
from geomirror.lab.demo_ledger import BlockMaker, Ledger
from geomirror.lab.demo_mistake import LOST, are_same, originals
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


async def test_files_are_deleted_seen_in_an_older_image_and_put_back(tmp_path: Path) -> None:
    for tool in ("mke2fs", "e2fsck", "debugfs"):
        needs(tool)
    stage, files, size = prepare(tmp_path, IMAGE_BYTES, BlockMaker(SeededEntropy(1)))
    image = await make_file_system(tmp_path / "image.ext4", stage, IMAGE_BYTES, files, size)
    damaged, repaired = tmp_path / "damaged.ext4", tmp_path / "repaired.ext4"
    assert await list_files(image.path, LOST) == [path.name for path in originals()]
    assert await list_files(image.path, "/nowhere") == []
    shutil.copyfile(image.path, damaged)
    await remove_directory(damaged, LOST)
    assert await list_files(damaged, LOST) == []
    assert (await is_file_system_clean(damaged))[0]

    # The blocks that differ are all that has to be written to a volume to make it the other.
    blocks = changed_blocks(image.path, damaged)
    assert 0 < len(blocks) < 50
    assert not {offset for offset, _ in blocks} & set(image.slot_offsets)
    shutil.copyfile(image.path, tmp_path / "other.ext4")
    with (tmp_path / "other.ext4").open("r+b") as file:
        for offset, content in blocks:
            assert len(content) == BLOCK_BYTES
            file.seek(offset)
            file.write(content)
    assert (tmp_path / "other.ext4").read_bytes() == damaged.read_bytes()

    found = await copy_files_out(image.path, LOST, tmp_path / "found")
    assert are_same(found, originals())
    shutil.copyfile(damaged, repaired)
    await put_directory(repaired, LOST, found)
    assert (await is_file_system_clean(repaired))[0]
    assert are_same(await copy_files_out(repaired, LOST, tmp_path / "again"), originals())
    assert not are_same(found[1:], originals())
    assert not are_same([], [])
