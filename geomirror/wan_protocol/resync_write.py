"""Writes copied blocks into the images: what differs, after its before-image is durable.

Deliberately not here: which frames are due (`resync_receiver`), what is kept of them (`undo_open`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from geomirror.errors import BadFrameError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.epoch_table import FLAG_PUNCH, KIND_DATA, empty_table
from geomirror.volume.image import Image
from geomirror.volume.undo_open import OpenPass
from geomirror.wan_protocol.epoch_decode import DecodedFrame, FrameDecoder

_FIELDS = ["volume", "kind", "flags", "count", "block", "address"]
_Blocks = dict[int, dict[int, memoryview]]
_Zeros = list[tuple[int, int, int, bool]]


@dataclass
class ResyncWriteJob:
    """Decode frames and write their blocks into the images, durably."""

    images: dict[int, Image]
    open_pass: OpenPass | None
    """Takes the before-images; None while there is no state to go back to (first sync)."""
    decoder: FrameDecoder
    number: int
    frames: list[tuple[int, bytes]]
    damaged: set[int] = field(default_factory=set)
    """After `run`: frames whose content is not what was sent; they come again."""
    hostile: RemoteProtocolError | None = None
    """After `run`: why the session has to end; what came before is written."""

    def run(self) -> None:
        """Blocking; may be repeated. Raises StorageError, NoSpaceError: nothing is overwritten
        whose before-image is not durable."""
        self.damaged.clear()
        blocks: _Blocks = {}
        zeros: _Zeros = []
        for sequence, body in self.frames:
            try:
                self._collect(self.decoder.decode(body), blocks, zeros)
            except BadFrameError:
                self.damaged.add(sequence)
            except RemoteProtocolError as error:
                self.hostile = error
                self.damaged.add(sequence)
        if self.open_pass is not None:
            blocks = {volume: self._different(volume, found) for volume, found in blocks.items()}
            self._save(self.open_pass, blocks, zeros)
        for volume, block, count, is_punch in zeros:
            self.images[volume].zero(block, count, punch=is_punch)
        for volume, found in blocks.items():
            if found:
                self.images[volume].write_blocks(sorted(found.items()))
        for volume in sorted({volume for volume, *_ in zeros} | set(blocks)):
            self.images[volume].fdatasync()

    def _different(self, volume: int, blocks: dict[int, memoryview]) -> dict[int, memoryview]:
        """Those that the image does not hold already: they cost neither undo nor a write."""
        image, numbers = self.images[volume], sorted(blocks)
        ranges = [(block * BLOCK_BYTES, image.block_bytes(block)) for block in numbers]
        old = image.read_each(ranges)
        pairs = zip(numbers, old, strict=True)
        return {block: blocks[block] for block, content in pairs if blocks[block] != content}

    def _save(self, open_pass: OpenPass, blocks: _Blocks, zeros: _Zeros) -> None:
        table = empty_table(len(zeros) + sum(map(len, blocks.values())))
        rows = [(volume, block, count) for volume, block, count, _ in zeros]
        rows += [(volume, block, 1) for volume, found in blocks.items() for block in found]
        for column, name in enumerate(("volume", "block", "count")):
            table[name] = np.array([row[column] for row in rows], dtype=np.uint64)
        open_pass.save(table, self.images)

    def _collect(self, frame: DecodedFrame, blocks: _Blocks, zeros: _Zeros) -> None:
        view = memoryview(frame.data)
        for volume, kind, flags, count, block, address in frame.table[_FIELDS].tolist():
            if kind == KIND_DATA:
                length = self.images[volume].block_bytes(block)
                blocks.setdefault(volume, {})[block] = view[address : address + length]
            else:
                zeros.append((volume, block, count, bool(flags & FLAG_PUNCH)))
