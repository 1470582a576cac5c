"""A history as the default levels keep it when nothing is short, as labels, passes or files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.undo_labels import full_labels
from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, PRODUCTION
from geomirror.volume.store import Buffer
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoWriter

GENERATION = bytes(range(16))
NOW = 1_700_000_000 // 3600 * 3600 * SECOND
BLOCKS = 4096
"""Blocks of the volume that the files are about."""


class RamFile:
    """As much of a file as writing undo takes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        content = b"".join(buffers)
        self.data += bytes(max(offset + len(content) - len(self.data), 0))
        self.data[offset : offset + len(content)] = content

    def fdatasync(self) -> None:
        """Nothing is lost."""


def labels(more_hours: int = 0) -> list[PassLabel]:
    """One pass in each step of each level, and what came in the last ten seconds, oldest first.

    :param more_hours: so many more at the old end.
    """
    return full_labels(PRODUCTION.undo_levels, GENERATION, NOW, more_hours)


def name_of(at: int, label: PassLabel) -> str:
    is_merged = label.to_epoch - label.from_epoch > 1
    return f"undo/{at + 1:016x}{'.m2' if is_merged else ''}.und"


def passes() -> list[PassInfo]:
    return [
        PassInfo(**vars(label), name=name_of(at, label), raw_bytes=4096, stored_bytes=500)
        for at, label in enumerate(labels())
    ]


def blocks_of(at: int) -> list[int]:
    """The blocks that the file at `at` holds: some that many others hold, and one of its own."""
    return sorted({at % 7, 100 + at % 1000, 1200 + at * 5 % 2800})


def content_of(at: int, block: int) -> bytes:
    return (b"%08x" % at + b"%08x" % block) * (BLOCK_BYTES // 16)


def file_of(at: int, label: PassLabel) -> bytes:
    """An undo file of the pass."""
    file = RamFile()
    writer = UndoWriter(file)  # type: ignore[arg-type]
    blocks = blocks_of(at)
    writer.add_blocks(0, np.array(blocks), b"".join(content_of(at, block) for block in blocks))
    writer.finish(label)
    return bytes(file.data)


def write_files(root: Path, found: Sequence[PassLabel]) -> None:
    """Undo files in a resource's directory, without waiting for the disk."""
    (root / "undo").mkdir(parents=True)
    for at, label in enumerate(found):
        (root / name_of(at, label)).write_bytes(file_of(at, label))
