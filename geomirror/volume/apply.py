"""Applying sealed epochs to the image; on the primary this is called destage.

```
 epochs (d, e] ──merge──▶ table ──▶ 1 old blocks: image ──▶ undo file, durable       (I6)
                                ──▶ 2 new blocks: journal ──▶ image, in the journal's order
                                ──▶ 3 fdatasync of the touched images
```
The caller moves the checkpoint afterwards. After a crash anywhere the same job is run again: it
finds the durable undo file and uses it, and writing the same blocks twice changes nothing.
Memory: `apply_read_bytes_max` of new contents and 1 MiB of old ones, whatever the size of the pass;
and the tables: 40 bytes for each block or run of zeros that changes, and what `pass_room` bounds.
Deliberately not here: which epochs are applied and when (`engine`), how old contents are read
(`before_images`) and in which order new ones are (`new_contents`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.arrays import run_heads
from geomirror.volume.before_images import BeforeImages, OldImage
from geomirror.volume.epoch_table import FLAG_PUNCH, KIND_DATA, Epoch, Table, empty_table
from geomirror.volume.merge import Keys, merge_tables
from geomirror.volume.new_contents import plan_chunks, write_runs
from geomirror.volume.pass_room import PassRoom
from geomirror.volume.store import Buffer
from geomirror.volume.undo import StoppedError, UndoStore
from geomirror.volume.undo_file import PassLabel, UndoWriter
from geomirror.volume.undo_open import OpenPass
from geomirror.volume.volume_change import VolumeChange, merge_changes

__all__ = ["ApplyImage", "ApplyJob", "merge_tables"]

NO_BOUND = 1 << 62
"""How much there may be, `PassRoom` says."""


class ApplyImage(OldImage, Protocol):
    """What applying needs of a volume's image (`image.Image`)."""

    def grown(self, size_bytes: int) -> Self:
        """The same volume with another size; what is under it is large enough."""

    def write_runs(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """Write (offset, contents that follow each other), ascending; not durable yet."""

    def zero(self, first_block: int, count: int, *, punch: bool) -> None:
        """Make blocks read as zeros; with `punch`, free their space."""

    def fdatasync(self) -> None:
        """Make everything written durable."""


class ApplyJob:
    """Brings the images from `from_epoch` to `to_epoch`; blocking, for a worker thread.

    :param load: the epochs (from_epoch, to_epoch], ascending; called inside `run`.
    :param read_into: journal contents, from an address on into a buffer.
    :param with_undo: False for a copy that has no consistent state to go back to (first
        sync): no before-images are kept, but in `open_pass`.
    :param open_pass: of a resync whose end is not applied yet; it takes the before-images.
    """

    def __init__(
        self,
        from_epoch: int,
        to_epoch: int,
        load: Callable[[], Sequence[Epoch]],
        read_into: Callable[[int, memoryview], None],
        images: Mapping[int, ApplyImage],
        undo: UndoStore,
        limits: Limits,
        *,
        with_undo: bool = True,
        open_pass: OpenPass | None = None,
    ) -> None:
        assert from_epoch < to_epoch
        self.from_epoch = from_epoch
        self.to_epoch = to_epoch
        self.with_undo = with_undo
        self._open_pass = open_pass
        self._load = load
        self._read_into = read_into
        self._images = images
        """As they are before the pass."""
        self.old_images: Mapping[int, OldImage] = images
        """How they read, where that is not what is in their files."""
        self._grown: dict[int, ApplyImage] = {}
        """Those that the pass makes larger, as they are after it."""
        self._undo = undo
        self._limits = limits
        self.table: Table = empty_table()
        """After `run`: what was applied, newest version of each block."""
        self.chain_hash = b""
        """After `run`: H(to_epoch)."""
        self.changes: tuple[VolumeChange, ...] = ()
        """After `run`: volumes that the pass grew or added."""
        self.bytes_written = 0
        """After `run`: data written to images; zeros count nothing."""
        self.undo_bytes = 0
        """After `run`: size of the undo file that covers the pass."""
        self.is_stopped = False
        """After `run`: it was stopped; the pass may be half applied, and is to be run again."""
        self._is_stop_wanted = False

    def stop(self) -> None:
        """Somebody waits: end `run` as soon as may be, whether or not it is done. Any thread."""
        self._is_stop_wanted = True

    def run(self) -> None:
        """Apply; when this returns the images hold `to_epoch` durably, unless it was stopped.

        :raises StorageError: a device failed; the image may be half applied and the pass has to
            be run again (same epochs) before the image is read.
        """
        try:
            self._apply()
        except StoppedError:
            self.is_stopped = True

    def _check_stop(self) -> None:
        if self._is_stop_wanted:
            raise StoppedError

    def _apply(self) -> None:
        epochs = self._load()
        expected = self.from_epoch + 1
        for epoch in epochs:
            assert epoch.first_number == expected, "epochs must follow each other"
            expected = epoch.number + 1
        assert expected == self.to_epoch + 1
        self.table = merge_tables([epoch.table for epoch in epochs])
        self.chain_hash = epochs[-1].chain_hash
        self.changes = merge_changes(each for epoch in epochs for each in epoch.changes)
        self._grown = {
            each.index: self._images[each.index].grown(each.size_bytes) for each in self.changes
        }
        if self.with_undo:
            self._save_old(epochs[-1])
        elif self._open_pass is not None:
            self._open_pass.save(self.table, self._images)
        self._write_zeros()
        self._write_data()
        self._check_stop()
        for volume, _ in _by_volume(self.table):
            self._target(volume).fdatasync()

    def _target(self, volume: int) -> ApplyImage:
        return self._grown.get(volume) or self._images[volume]

    def _save_old(self, last: Epoch) -> None:
        pending = self._undo.pending_pass(self.from_epoch)
        assert pending in (None, (self.from_epoch, self.to_epoch)), "a half-applied pass is first"
        found = self._undo.find(self.from_epoch, self.to_epoch, last.generation)
        if found is None:
            label = PassLabel(
                last.generation, self.from_epoch, self.to_epoch, last.wall_ns, last.chain_hash
            )
            found = self._undo.write(label, self._fill_undo)
        self.undo_bytes = found.stored_bytes

    def _fill_undo(self, writer: UndoWriter) -> None:
        room = PassRoom(self._limits, self._undo.free_bytes)
        is_bounded = self._undo.kept_after is None

        def look() -> None:
            self._check_stop()
            if is_bounded:
                room.check(writer)

        for volume, entries in _by_volume(self.table):
            BeforeImages(writer, volume, self.old_images[volume], NO_BOUND, look).save(entries)
        for change in self.changes:
            writer.add_size(change.index, change.old_size_bytes)

    def _write_zeros(self) -> None:
        zeros = self.table[self.table["kind"] != KIND_DATA]
        if not len(zeros):
            return
        fields = ["volume", "flags", "count", "block"]
        for volume, flags, count, block in zeros[fields].tolist():
            self._check_stop()
            self._target(volume).zero(block, count, punch=bool(flags & FLAG_PUNCH))

    def _write_data(self) -> None:
        """Write the new contents, some of them at a time as they lie in the journal."""
        data = self.table[self.table["kind"] == KIND_DATA]
        if not len(data):
            return
        limits = self._limits
        volumes, blocks = data["volume"].astype(np.int64), data["block"].astype(np.int64)
        sizes = self._sizes(volumes, blocks)
        addresses = data["address"].astype(np.int64)
        chunks = plan_chunks(addresses, sizes, limits.segment_bytes, limits.apply_read_bytes_max)
        # Not a bytearray, which would be zeroed first.
        buffer = np.empty(max(chunk.size_bytes for chunk in chunks), dtype=np.uint8).data
        for chunk in chunks:
            self._check_stop()
            for address, position, length in chunk.reads:
                self._read_into(address, buffer[position : position + length])
            rows = chunk.rows
            for volume, part in _parts(volumes[rows]):
                chosen = rows[part]
                runs = write_runs(blocks[chosen], chunk.positions[part], sizes[chosen], buffer)
                self._target(volume).write_runs(runs)
        self.bytes_written = int(sizes.sum())

    def _sizes(self, volumes: Keys, blocks: Keys) -> Keys:
        """Bytes that exist of each block: fewer than 4096 for a volume's last one only."""
        sizes = np.full(len(blocks), BLOCK_BYTES, dtype=np.int64)
        for volume, part in _parts(volumes):
            last = part.stop - 1
            short = (int(blocks[last]) + 1) * BLOCK_BYTES - self._target(volume).size_bytes
            assert short < BLOCK_BYTES, "a block beyond the end of the volume"
            sizes[last] -= max(short, 0)
        return sizes


def _by_volume(table: Table) -> Iterator[tuple[int, Table]]:
    for volume, part in _parts(table["volume"]):
        yield volume, table[part]


def _parts(volumes: npt.NDArray[np.integer[Any]]) -> Iterator[tuple[int, slice]]:
    """Each volume of an ascending column, and its rows."""
    if not len(volumes):
        return
    if volumes[0] == volumes[-1]:
        yield int(volumes[0]), slice(0, len(volumes))
        return
    heads = run_heads(volumes[1:] != volumes[:-1]).tolist()
    for start, end in zip(heads, [*heads[1:], len(volumes)], strict=True):
        yield int(volumes[start]), slice(start, end)
