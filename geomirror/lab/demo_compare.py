"""Looks at all copies of a volume that stands still, byte by byte."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from geomirror.lab.demo_image import is_file_system_clean
from geomirror.lab.demo_nbd import copy_out
from geomirror.lab.demo_stage import Stage
from geomirror.lab.lab_io import LabNode

OF_A_COPY = (
    "_at_the_last_epoch",
    "_has_every_flushed_write",
    "_is_a_moment_of_the_history",
    "_e2fsck_clean",
    "_identical",
)
"""Ends of the names of checks of one copy."""


async def compare(stage: Stage, prefix: str = "") -> str:
    """Read, judge and compare the volume at all nodes; replication is paused.

    :param prefix: of the checks' names.
    :returns: SHA-256 of the primary's content, which is left in `image_of(stage, stage.primary)`.
    """
    epoch = int((await stage.status(stage.primary))["position"]["epoch"])
    digests = await asyncio.gather(*(_inspect(stage, node, epoch, prefix) for node in stage.nodes))
    for node, digest in zip(stage.nodes[1:], digests[1:], strict=True):
        name = f"{prefix}mirror_{node.site}_identical"
        stage.report.check(name, digest == digests[0], "bytes differ")
    return digests[0]


def image_of(stage: Stage, node: LabNode) -> Path:
    """Where a node's volume is copied to."""
    return stage.directory / f"read-{node.name}.ext4"


async def _inspect(stage: Stage, node: LabNode, epoch: int, prefix: str) -> str:
    """Read a node's volume, judge what is in it, and return its SHA-256."""
    name = prefix + ("primary" if node is stage.primary else f"mirror_{node.site}")
    check = stage.report.check
    found = await stage.status(node)
    path = image_of(stage, node)
    path.unlink(missing_ok=True)
    await copy_out(found["volumes"][0]["nbd_uri"], path)
    again = await stage.status(node)
    epochs = [epoch, *(document["position"]["epoch"] for document in (found, again))]
    check(f"{name}_at_the_last_epoch", len(set(epochs)) == 1, f"primary, before, after: {epochs}")
    image = await asyncio.to_thread(path.read_bytes)
    verdict = stage.ledger.judge_image(memoryview(image))
    missing = verdict.missing_confirmed
    check(f"{name}_has_every_flushed_write", not missing, f"{len(missing)} are missing")
    check(f"{name}_is_a_moment_of_the_history", verdict.is_legal_cut, repr(verdict)[:200])
    is_clean, output = await is_file_system_clean(path)
    check(f"{name}_e2fsck_clean", is_clean, output[-200:])
    return await asyncio.to_thread(lambda: hashlib.sha256(image).hexdigest())
