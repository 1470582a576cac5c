"""Second act: files are deleted by mistake, at all sites at once, and looked at as they were.

Replication is no backup: it ships the mistake, too. A mark gave the moment before a name; a view at
a secondary serves the volume of that moment while the primary goes on being written.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from geomirror.lab.demo_compare import image_of
from geomirror.lab.demo_files import (
    changed_blocks,
    copy_files_out,
    list_files,
    put_directory,
    remove_directory,
)
from geomirror.lab.demo_image import FIRST, is_file_system_clean
from geomirror.lab.demo_nbd import Writing, copy_out, read_a_block, write_blocks
from geomirror.lab.demo_stage import Stage
from geomirror.lab.lab_io import LabNode
from geomirror.limits import MIB

MARK = "before-the-rm"
LOST = f"/python/{FIRST}"
"""A package of the Python library; the image has it from this machine."""
WRITE_BYTES_PER_SECOND = 1 * MIB


def originals() -> list[Path]:
    """The files that `LOST` was made from."""
    root = Path(sysconfig.get_paths()["stdlib"]) / FIRST
    return sorted(path for path in root.iterdir() if path.is_file())


def are_same(files: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether both have the same names and contents, and are any at all."""
    found = [{path.name: path.read_bytes() for path in each} for each in (files, others)]
    return bool(files) and found[0] == found[1]


class MistakeAct:
    """Plays it once."""

    def __init__(self, stage: Stage, digest: str) -> None:
        """`digest` is that of the volume, which stands still and is in `image_of` the primary."""
        self._stage = stage
        self._digest = digest
        self._damaged = stage.directory / "damaged.ext4"
        self._seen = stage.directory / "view.ext4"

    async def play(self) -> None:
        """Mark, delete, look, put back."""
        stage, view = self._stage, self._stage.view
        await stage.run(stage.primary, "resume", stage.resource)
        with view.step("a mark, then writing goes on"):
            made = await stage.run(stage.primary, "mark", stage.resource, MARK)
            view.fact(f"{MARK} is epoch {made['epoch']}, {made['consistency']}-consistent")
        async with (
            stage.sampler(stage.primary),
            Writing(stage.uri, stage.ledger, WRITE_BYTES_PER_SECOND) as writing,
        ):
            with view.step(f"somebody runs rm -r {LOST} on the primary"):
                await self._damage()
            with view.step(f"a view of {MARK} at {stage.first.name}"):
                await self._look()
            with view.step("the files copied back from the view"):
                await self._put_back()
            await writing.stop()

    async def _damage(self) -> None:
        """Delete the files as a mounted file system would, seen from its disk."""
        stage, before = self._stage, image_of(self._stage, self._stage.primary)
        lost = await list_files(before, LOST)
        await asyncio.to_thread(shutil.copyfile, before, self._damaged)
        await remove_directory(self._damaged, LOST)
        blocks = await asyncio.to_thread(changed_blocks, before, self._damaged)
        await write_blocks(stage.uri, blocks)
        await stage.wait_applied(stage.primary)
        left = await asyncio.gather(*(self._left(node) for node in (stage.first, stage.second)))
        stage.report.check("damage_was_done", bool(lost) and bool(blocks), "nothing was deleted")
        stage.report.check("damage_reached_every_site", not any(left), f"still there: {left}")
        stage.report.figures |= {"damaged_files": len(lost), "damaged_blocks": len(blocks)}
        stage.view.fact(
            f"{len(lost)} files are gone ({', '.join(lost[:3])}, …), at all three sites: "
            "replication is no backup"
        )

    async def _left(self, node: LabNode) -> list[str]:
        path = self._stage.directory / f"damaged-{node.name}.ext4"
        found = await self._stage.status(node)
        await copy_out(found["volumes"][0]["nbd_uri"], path)
        left = await list_files(path, LOST)
        is_clean, output = await is_file_system_clean(path)
        name = f"damaged_mirror_{node.site}_e2fsck_clean"
        self._stage.report.check(name, is_clean, output[-200:])
        path.unlink()
        return left

    async def _look(self) -> None:
        stage, node, loop = self._stage, self._stage.first, asyncio.get_running_loop()
        begin, writes = loop.time(), self._stage.ledger.write_count
        made = await stage.run(node, "view", "create", stage.resource, "--at", MARK)
        await read_a_block(made["nbd_uri"])
        seconds = loop.time() - begin
        stage.report.figures["view_seconds"] = round(seconds, 3)
        await copy_out(made["nbd_uri"], self._seen)
        went_on = stage.ledger.write_count - writes
        await stage.run(node, "view", "delete", stage.resource, made["name"])
        image = await asyncio.to_thread(self._seen.read_bytes)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(image).hexdigest())
        check = stage.report.check
        check("view_identical_to_the_marked_moment", digest == self._digest, "bytes differ")
        is_clean, output = await is_file_system_clean(self._seen)
        check("view_e2fsck_clean", is_clean, output[-200:])
        check("view_did_not_hold_up_the_writer", went_on > 0, "no write meanwhile")
        stage.view.fact(
            f"readable after {seconds:.1f} s; byte for byte the volume of that moment, e2fsck is "
            f"clean; {went_on:,} writes meanwhile"
        )

    async def _put_back(self) -> None:
        stage, repaired = self._stage, self._stage.directory / "repaired.ext4"
        files = await copy_files_out(self._seen, LOST, stage.directory / "found")
        is_same = are_same(files, originals())
        stage.report.check("view_has_the_lost_files", is_same, f"found {len(files)}")
        await asyncio.to_thread(shutil.copyfile, self._damaged, repaired)
        await put_directory(repaired, LOST, files)
        blocks = await asyncio.to_thread(changed_blocks, self._damaged, repaired)
        await write_blocks(stage.uri, blocks)
        await stage.wait_applied(stage.primary)
        for path in (self._damaged, self._seen, repaired):
            path.unlink()
        stage.view.fact(f"{len(files)} files, equal to the originals")
