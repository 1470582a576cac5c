"""The volumes as they were at one epoch, read while apply passes go on changing the images.

```
 block ─▶ changed since? ─ yes ─▶ undo file of the first pass after the epoch that holds it
                         └ no ──▶ image ─▶ did a pass begin meanwhile? ─ yes ─▶ look again
```
Undo is durable, and known here, before its pass changes an image block (I6): a block that was read
from the image is the epoch's unless the history shows another pass afterwards. So no lock is held
and applying never waits for a view.
Deliberately not here: who may keep how much for how long (`undo` pins, the node's views).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from geomirror.errors import IntegrityError, NotFoundError, StorageError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.arrays import run_heads, run_lengths
from geomirror.volume.store import File
from geomirror.volume.undo_chunks import BLOCKS_PER_CHUNK, damage
from geomirror.volume.undo_file import PassInfo
from geomirror.volume.undo_group import GroupTables, reading
from geomirror.volume.undo_history import History
from geomirror.volume.undo_tables import PassTables
from geomirror.volume.view_index import (
    IMAGE,
    ZERO,
    PassRuns,
    Places,
    ViewIndex,
    block_of,
    file_of,
)

_ATTEMPTS_MAX = 100
"""Passes begin a few times a second, and a read takes milliseconds."""


class ViewedImage(Protocol):
    """What a view needs of a volume's image (`image.Image`)."""

    @property
    def size_bytes(self) -> int:
        """Size of the volume."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""


class View:
    """All volumes at `epoch`. Reads block and may run on several threads at once.

    :param history: what undo is kept now (`UndoStore.history`).
    :param entries_max: blocks changed since the epoch that are indexed, 20 bytes each.
    :param suspect: told the undo file that could not be read (`UndoStore.suspect`).
    :raises NotFoundError: the state is not kept.
    """

    def __init__(
        self,
        epoch: int,
        images: Mapping[int, ViewedImage],
        history: Callable[[], History],
        open_file: Callable[[str], File],
        entries_max: int,
        suspect: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.epoch = epoch
        self._suspect = suspect
        self._images = images
        self._history = history
        self._open_file = open_file
        self._entries_max = entries_max
        self._incarnation = history().incarnation
        self._index = ViewIndex(epoch)
        self._latest: tuple[History, ViewIndex] | None = None
        """The history that was looked at last, and its index."""
        history().since(epoch)

    def prepare(self) -> None:
        """Index what was changed since the epoch, which the first read would do otherwise."""
        self._current(self._history())

    def size_of(self, volume: int) -> int:
        """Size of a volume at the epoch, in bytes; 0 when it was added later. Raises as `read`.

        A pass that runs meanwhile is in the history before the image has another size.
        """
        size_bytes = self._images[volume].size_bytes
        return self._current(self._history()).sizes.get(volume, size_bytes)

    def read(self, volume: int, offset: int, length: int) -> bytes:
        """The bytes of a range, at most some MiB, as they were.

        :raises NotFoundError: the state is not kept any more. :raises LimitExceededError: too much
            was changed since. :raises IntegrityError: an undo file is damaged.
        """
        first = offset // BLOCK_BYTES
        count = -(-(offset + length) // BLOCK_BYTES) - first
        for _ in range(_ATTEMPTS_MAX):
            history = self._history()
            try:
                index = self._current(history)
                places = index.places(volume, first, count)
                content = self._collect(index, volume, first, places)
            except (NotFoundError, StorageError):
                if self._history() is history:
                    raise
                continue  # Passes were merged: their contents are in another file now.
            if self._history() is history or not bool((places == IMAGE).any()):
                start = offset - first * BLOCK_BYTES
                return bytes(memoryview(content)[start : start + length])
        raise StorageError(f"view of epoch {self.epoch}: the undo changes too fast to be read")

    def changed(self, volume: int, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Which blocks of a range were changed since the epoch, as far as a pass has begun.

        What is looked at in the image before this call is the epoch's where it says False.
        Raises as `read`.
        """
        for _ in range(_ATTEMPTS_MAX):
            history = self._history()
            try:
                places = self._current(history).places(volume, first, count)
                return np.not_equal(places, IMAGE)
            except (NotFoundError, StorageError):
                if self._history() is history:
                    raise
        raise StorageError(f"view of epoch {self.epoch}: the undo changes too fast to be read")

    def _current(self, history: History) -> ViewIndex:
        """The index of `history`."""
        latest = self._latest
        if latest is not None and latest[0] is history:
            return latest[1]
        if history.incarnation != self._incarnation:
            raise NotFoundError(
                f"the state at epoch {self.epoch} is gone: this copy was made anew since"
            )
        index, passes = self._index, history.since(self.epoch)
        if index.passes == passes:
            self._latest = history, index
            return index
        if passes[: len(index.passes)] != index.passes:
            index = index.following(passes, self._read_tables) or ViewIndex(self.epoch)
        added = passes[len(index.passes) :]
        # Two threads may make the same one: it is never changed, so either will do.
        self._index = index = index.extended(added, self._read_tables, self._entries_max)
        self._latest = history, index
        return index

    def _read_tables(self, info: PassInfo) -> PassRuns:
        with self._suspecting(info.name), closing(reading(self._open_file, info.name)) as file:
            return GroupTables(file, info) if info.is_part else PassTables(file, info.name)

    @contextmanager
    def _suspecting(self, name: str) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, NotFoundError, StorageError):
            self._suspect(name)
            raise

    def _collect(self, index: ViewIndex, volume: int, first: int, places: Places) -> bytearray:
        """The contents of blocks from `first` on; a short last block is padded."""
        content = bytearray(len(places) * BLOCK_BYTES)
        self._read_image(content, volume, first, places)
        chosen: dict[int, list[tuple[int, int]]] = {}
        numbers = (places > ZERO).nonzero()[0]
        for block, place in zip(numbers.tolist(), places[numbers].tolist(), strict=True):
            chosen.setdefault(file_of(place), []).append((block, block_of(place)))
        for file_number in sorted(chosen):
            self._read_file(content, index, file_number, chosen[file_number])
        return content

    def _read_image(self, content: bytearray, volume: int, first: int, places: Places) -> None:
        image = self._images[volume]
        unchanged = (places == IMAGE).nonzero()[0]
        if not len(unchanged):
            return
        runs = [(int(unchanged[0]), len(unchanged))]
        if int(unchanged[-1]) - runs[0][0] >= len(unchanged):
            heads = run_heads(unchanged[1:] - unchanged[:-1] != 1)
            lengths = run_lengths(heads, len(unchanged)).tolist()
            runs = list(zip(unchanged[heads].tolist(), lengths, strict=True))
        for at, blocks in runs:
            offset = (first + at) * BLOCK_BYTES
            length = min(blocks * BLOCK_BYTES, image.size_bytes - offset)
            content[at * BLOCK_BYTES : at * BLOCK_BYTES + length] = image.read(offset, length)

    def _read_file(
        self, content: bytearray, index: ViewIndex, number: int, blocks: list[tuple[int, int]]
    ) -> None:
        """Copy blocks from one undo file: (number in the range, where it lies, in blocks)."""
        chunks = index.files[number]
        with self._suspecting(chunks.name), closing(reading(self._open_file, chunks.name)) as file:
            held, raw = -1, b""
            for block, place in blocks:
                chunk, inside = divmod(place, BLOCKS_PER_CHUNK)
                if chunk != held:
                    held, raw = chunk, chunks.read(file, chunk)
                start = inside * BLOCK_BYTES
                old = raw[start : start + BLOCK_BYTES]
                if len(old) != BLOCK_BYTES:
                    raise damage(chunks.name, f"has a damaged chunk {chunk}")
                content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = old
