"""The undo of a copy that is being made anew, in place: an open pass that grows group by group.

```
 copied or applied block ─▶ saved before? ─ no ─▶ before-image ─▶ group, fdatasync ─▶ image
                                         └ yes ─────────────────────────────────────▶ image
 header 128 │ group │ group │ …            closed: + tables, footer, header: an ordinary undo file
```
Invariant (I6, I11): the first before-image of each block is durable before the image changes, and
only the first is kept; so groups and image together are the state before the pass at every moment.
The format is in `docs/disk_format.md`. One job at a time uses an open pass; `publish` lets views on
other threads see each group before its image blocks change.
Deliberately not here: when a pass begins and ends (`engine_held`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Protocol

import numpy as np

from geomirror.errors import (
    FencedError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    StorageError,
)
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.before_images import BeforeImages, OldImage
from geomirror.volume.epoch_table import Table
from geomirror.volume.merge import keys_of
from geomirror.volume.saved_blocks import SavedBlocks
from geomirror.volume.store import Buffer, File, Store
from geomirror.volume.superblock import HeldRecord
from geomirror.volume.undo import DIRECTORY, UndoStore
from geomirror.volume.undo_chunks import CHUNK, CHUNK_BYTES
from geomirror.volume.undo_file import (
    HEADER_BYTES,
    KIND_ZERO,
    OPEN_EPOCH,
    PassInfo,
    PassLabel,
    size_entries,
    write_end,
)
from geomirror.volume.undo_group import (
    Group,
    GroupWriter,
    closed_name,
    later_group,
    open_name,
    read_group,
)

_GROUP_COST_BYTES = CHUNK_BYTES
"""What a group counts at least: zeros have no bytes, but each run of them is a call."""
_NO_BOUND = 1 << 62
"""The file is bounded as it is stored."""


class RestoredImage(OldImage, Protocol):
    """What writing before-images back needs of a volume's image."""

    def write_runs(self, runs: list[tuple[int, list[Buffer]]]) -> None:
        """Write (offset, contents that follow each other), ascending; not durable yet."""

    def zero(self, first_block: int, count: int, *, punch: bool) -> None:
        """Make blocks read as zeros; with `punch`, free their space."""

    def fdatasync(self) -> None:
        """Make everything written durable."""


class OpenPass:
    """The before-images of everything that was changed since `label.from_epoch`.

    :param label: `to_epoch` and what belongs to it are not known yet.
    :param bytes_max: the file may grow so large.
    """

    def __init__(
        self, store: Store, undo: UndoStore, number: int, label: PassLabel, bytes_max: int
    ) -> None:
        self.number = number
        self.label = label
        self._store = store
        self._undo = undo
        self._bytes_max = bytes_max
        self.name = open_name(number)
        self._file: File | None = None
        self._groups: list[Group] = []
        self._infos: list[PassInfo] = []
        """What readers know of the first of them."""
        self._raw_sums = [0]
        """Old contents in so many of them."""
        self._end = HEADER_BYTES
        self._saved = SavedBlocks()

    @property
    def stored_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def load(self) -> None:
        """Take up what a stop or a crash left. Blocking; once, before anything else.

        :raises FencedError: groups that were durable are damaged.
        """
        names = {f"{DIRECTORY}/{name}" for name in self._store.list(DIRECTORY)}
        if closed_name(self.number) in names:
            # Closed, and the superblock does not say so yet: it is open.
            self._store.rename(closed_name(self.number), self.name)
            self._store.sync_directory(DIRECTORY)
        elif self.name not in names:
            return
        self._file = self._store.open(self.name)
        self._scan(self._file)
        for group in self._groups:
            self._saved.add(group.blocks())
        self._publish()

    def _scan(self, file: File) -> None:
        size = file.size()
        found: list[Group] = []
        end, durable, previous = HEADER_BYTES, 0, 0
        while end < size:
            try:
                group = read_group(file, self.name, end, size)
            except IntegrityError:
                break
            if group.sequence != len(found) or group.previous != previous:
                break
            found.append(group)
            durable = max(durable, group.durable)
            end, previous = group.end, group.check
        if durable > end or later_group(file, end, size):
            raise self._damaged()
        for at, group in enumerate(found):
            # One that a later one calls durable needs no look; the last job's may be torn.
            if group.end > durable and not group.is_whole(file):
                del found[at:]
                break
        self._groups = found
        self._end = found[-1].end if found else HEADER_BYTES

    def _damaged(self) -> FencedError:
        return FencedError(
            f"undo file {self.name} is damaged: the state at epoch {self.label.from_epoch}, from "
            "before the resync, cannot be restored",
            hint="keep the data directory; make this copy anew: geomirror resource "
            "remove-secondary, then add-secondary",
        )

    def save(self, table: Table, images: Mapping[int, OldImage]) -> None:
        """Make the before-images of all blocks of a table durable. Blocking.

        :raises NoSpaceError: they do not fit; nothing may be overwritten.
        :raises StorageError: nothing may be overwritten.
        """
        missing = self._saved.missing(table)
        if not len(missing):
            return
        file = self._opened()
        writer = GroupWriter(file, self.name, self._groups[-1:], self._end)
        for volume in np.unique(missing["volume"]).tolist():
            saver = BeforeImages(writer, volume, images[volume], _NO_BOUND)
            saver.save(missing[missing["volume"] == volume])
            if writer.end > self._bytes_max:
                break
        writer.flush()
        if writer.end > self._bytes_max:
            raise NoSpaceError(
                f"the undo of a resync would need more than {self._bytes_max} bytes; the copy "
                f"stays at epoch {self.label.from_epoch}",
                hint="raise storage.resync_undo_bytes_max in the node's configuration; restart it",
            )
        file.fdatasync()
        self._groups += writer.groups
        self._end = writer.end
        self._saved.add(missing)
        self._publish()

    def _opened(self) -> File:
        if self._file is None:
            file = self._store.create(self.name, 0)
            try:
                file.pwritev([bytes(HEADER_BYTES)], 0)
                self._store.sync_directory(DIRECTORY)
            except StorageError:
                file.close()
                self._store.unlink(self.name)
                raise
            self._file = file
        return self._file

    def _publish(self) -> None:
        added = self._groups[len(self._infos) :]
        self._infos += [group.info(self.label, self.name) for group in added]
        for info in self._infos[len(self._raw_sums) - 1 :]:
            self._raw_sums.append(self._raw_sums[-1] + info.raw_bytes)
        self._undo.show_open(self._infos)

    def close(self, label: PassLabel, grown: Mapping[int, int]) -> PassInfo:
        """Make an ordinary undo file of it, durably. Blocking; a crash leaves it open.

        :param grown: sizes before the pass of volumes that have another one now.
        :raises StorageError: it is still open.
        """
        file = self._opened()
        tables = [group.moved(at) for group, at in zip(self._groups, self._places(), strict=True)]
        table = np.concatenate([*tables, size_entries(grown)])
        table = table[keys_of(table).argsort(kind="stable")]
        skipped = np.zeros(1, dtype=CHUNK)
        chunks = []
        for group in self._groups:
            skipped["stored"] = group.body - group.start
            chunks += [skipped.copy(), group.chunks]
        all_chunks = np.concatenate(chunks) if chunks else np.zeros(0, dtype=CHUNK)
        stored_bytes = write_end(file, self._end, label, table, all_chunks)
        file.truncate(stored_bytes)
        file.fdatasync()
        self._store.rename(self.name, closed_name(self.number))
        self._store.sync_directory(DIRECTORY)
        file.close()
        self._file = None
        raw_bytes = sum(group.raw_bytes for group in self._groups)
        return PassInfo(
            label.generation,
            label.from_epoch,
            label.to_epoch,
            label.wall_ns,
            label.chain_hash,
            closed_name(self.number),
            is_resync=True,
            raw_bytes=raw_bytes,
            stored_bytes=stored_bytes,
        )

    def _places(self) -> list[int]:
        """Position of each group's contents among those of all: an area skipped takes one chunk."""
        places: list[int] = []
        rows = 0
        for group in self._groups:
            places.append((rows + 1) * CHUNK_BYTES)
            rows += 1 + len(group.chunks)
        return places

    def verify(self, bytes_max: int = _NO_BOUND) -> None:
        """Read about `bytes_max` of before-images through, the oldest first. Blocking; jobs may run
        meanwhile, and what they add is left out.

        :raises IntegrityError: one is damaged: the state from before cannot be restored.
        """
        groups, done_bytes = list(self._groups), 0
        if not groups:
            return
        try:
            # Not that of the jobs, which close it at the end of the resync.
            file = self._store.open(self.name)
        except (NotFoundError, StorageError):
            if self._store.exists(self.name):
                raise
            if self._store.exists(closed_name(self.number)):
                return  # That was now: nothing is held any more.
            raise self._unreadable("is missing") from None
        with closing(file):
            for group in groups:
                if done_bytes >= bytes_max:
                    break
                if not group.is_whole(file):
                    raise self._unreadable(f"is damaged at {group.start}")
                done_bytes += group.end - group.start

    def _unreadable(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"undo file {self.name} {what}: the state at epoch {self.label.from_epoch}, from "
            "before the resync, cannot be restored",
            hint="wait for the end of the resync, or promote another copy",
        )

    def restore(self, images: Mapping[int, RestoredImage]) -> None:
        """Write every before-image back: the images are at `label.from_epoch`, durably. Blocking.

        May be repeated. :raises StorageError: the images are half restored; do it again.
        """
        if self._file is not None:
            for group in self._groups:
                _restore_group(self._file, group, images)
        for image in images.values():
            image.fdatasync()

    @property
    def group_count(self) -> int:
        """Groups that it has."""
        return len(self._groups)

    @property
    def saved(self) -> SavedBlocks:
        """The blocks whose before-images it has."""
        return self._saved

    def bytes_from(self, first: int) -> int:
        """Old contents of the groups from `first` on."""
        return self._raw_sums[-1] - self._raw_sums[first]

    def restore_some(
        self,
        images: Mapping[int, RestoredImage],
        first: int,
        bytes_max: int,
        superseded: SavedBlocks,
    ) -> int:
        """Write about `bytes_max` of before-images back, those of group `first` and the following;
        durably. Blocking; may be repeated.

        :param superseded: blocks that hold something newer: these stay as they are.
        :returns: the first group that is left.
        :raises StorageError: as `restore`.
        """
        done_bytes = 0
        while first < len(self._groups) and done_bytes < bytes_max:
            assert self._file is not None
            _restore_group(self._file, self._groups[first], images, superseded)
            done_bytes += max(self._groups[first].raw_bytes, _GROUP_COST_BYTES)
            first += 1
        for image in images.values():
            image.fdatasync()
        return first

    def stop(self) -> None:
        """Close the file; nothing is synced."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _restore_group(
    file: File,
    group: Group,
    images: Mapping[int, RestoredImage],
    superseded: SavedBlocks | None = None,
) -> None:
    held, raw = -1, b""
    for volume, kind, block, count, position in _wanted(group, superseded):
        image = images[volume]
        if kind == KIND_ZERO:
            image.zero(block, count, punch=True)
            continue
        end = position + count * BLOCK_BYTES
        offset = block * BLOCK_BYTES
        while position < end:
            index, inside = divmod(position, CHUNK_BYTES)
            if index != held:
                held, raw = index, group.chunk_map.read(file, index)
            part = raw[inside : inside + min(end - position, CHUNK_BYTES - inside)]
            position += len(part)
            part = part[: image.size_bytes - offset]
            image.write_runs([(offset, [part])])
            offset += len(part)


def _wanted(
    group: Group, superseded: SavedBlocks | None
) -> Iterator[tuple[int, int, int, int, int]]:
    """(volume, kind, block, count, position) of a group's runs, without superseded blocks."""
    fields = ["volume", "kind", "block", "count", "position"]
    runs = group.table[fields].tolist()
    blocks = group.blocks()
    if superseded is None or not superseded.has_near(blocks):
        yield from runs
        return
    left = superseded.missing(blocks)
    keys, counts, own = keys_of(left).tolist(), left["count"].tolist(), keys_of(blocks).tolist()
    for (volume, kind, block, count, position), key in zip(runs, own, strict=True):
        for at in range(max(bisect_right(keys, key) - 1, 0), len(keys)):
            low, high = max(keys[at], key), min(keys[at] + counts[at], key + count)
            if keys[at] >= key + count:
                break
            if low < high:
                skipped = 0 if kind == KIND_ZERO else (low - key) * BLOCK_BYTES
                yield volume, kind, block + low - key, high - low, position + skipped


def open_pass_of(store: Store, undo: UndoStore, held: HeldRecord, limits: Limits) -> OpenPass:
    """The open pass that the superblock speaks of; `load` it unless it is new."""
    generation, chain_hash = bytes.fromhex(held.generation), bytes.fromhex(held.chain_hash)
    label = PassLabel(generation, held.epoch, OPEN_EPOCH, held.wall_ns, chain_hash)
    return OpenPass(store, undo, held.undo_number, label, limits.resync_undo_bytes_max)
