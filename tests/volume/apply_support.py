"""A small world for apply and undo tests: a disk in memory, a fake journal, and epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from geomirror.limits import BLOCK_BYTES, KIB, SIMULATION
from geomirror.volume.apply import ApplyJob
from geomirror.volume.epoch_table import ENTRY, HASH_ZERO, KIND_DATA, KIND_ZERO, Epoch, Table
from geomirror.volume.image import Image
from geomirror.volume.store import Store
from geomirror.volume.undo import UndoStore
from geomirror.volume.view import View

GENERATION = bytes(range(16))
LIMITS = replace(SIMULATION, undo_passes_max=64, undo_inspected_max=64)


@dataclass
class FakeJournal:
    """Contents by address, with headers' worth of space between them, as in the real journal."""

    data: bytearray = field(default_factory=lambda: bytearray(4096 + 72))
    reads: int = 0

    def put(self, content: bytes) -> int:
        room = -len(self.data) % LIMITS.segment_bytes
        if room < len(content):
            self.data += bytes(room + 4096)
        address = len(self.data)
        self.data += content + bytes(72)
        return address

    def read_into(self, address: int, buffer: memoryview) -> None:
        self.reads += 1
        length = len(buffer)
        first, last = address // LIMITS.segment_bytes, (address + length - 1)
        assert first == last // LIMITS.segment_bytes, "a read across segments"
        assert address >= 0 and address + length <= len(self.data)
        buffer[:] = self.data[address : address + length]


Change = tuple[int, int, bytes | int, int]  # volume, block, content or run of zeros, flags


class World:
    """Volumes, epochs over them, and the model of what every epoch holds."""

    def __init__(self, sizes: Sequence[int], old: Callable[[int], bytes]) -> None:
        self.sizes = list(sizes)
        self.journal = FakeJournal()
        self.states = [{volume: old(volume) for volume in range(len(sizes))}]
        self.epochs: list[Epoch] = []

    def epoch(self, changes: Sequence[Change]) -> None:
        """Add an epoch; changes do not overlap."""
        rows = []
        state = {volume: bytearray(content) for volume, content in self.states[-1].items()}
        for volume, block, what, flags in sorted(changes, key=lambda c: c[:2]):
            offset = block * BLOCK_BYTES
            if isinstance(what, int):
                end = min(offset + what * BLOCK_BYTES, self.sizes[volume])
                state[volume][offset:end] = bytes(end - offset)
                rows.append((volume, KIND_ZERO, flags, what, block, 0, 0, 0))
            else:
                state[volume][offset : offset + len(what)] = what
                digest = xxhash.xxh3_128_intdigest(what)
                low, high = digest & (1 << 64) - 1, digest >> 64
                address = self.journal.put(what)
                rows.append((volume, KIND_DATA, 0, 1, block, address, low, high))
        assert all(len(state[v]) == size for v, size in enumerate(self.sizes))
        table: Table = np.array(rows, dtype=ENTRY)
        number = len(self.epochs) + 1
        self.epochs.append(
            Epoch(number, number, GENERATION, number * 10, number * 10 + 10, 0, HASH_ZERO, table)
        )
        self.states.append({volume: bytes(content) for volume, content in state.items()})

    def create_images(self, store: Store) -> None:
        """Make the backing files with the content of epoch 0, durable."""
        for volume, size in enumerate(self.sizes):
            file = store.create(f"volumes/{volume}.img", size)
            content = self.states[0][volume]
            for offset, length in _stretches(content):
                file.pwritev([content[offset : offset + length]], offset)
            file.fdatasync()
            file.close()
        store.sync_directory("volumes")
        store.sync_directory()

    def images(self, store: Store) -> dict[int, Image]:
        return {
            volume: Image(volume, str(volume), size, store.open(f"volumes/{volume}.img"))
            for volume, size in enumerate(self.sizes)
        }

    def job(
        self,
        store_images: dict[int, Image],
        undo: UndoStore,
        from_epoch: int,
        to_epoch: int,
        *,
        with_undo: bool = True,
    ) -> ApplyJob:
        epochs = self.epochs[from_epoch:to_epoch]
        return ApplyJob(
            from_epoch,
            to_epoch,
            lambda: epochs,
            self.journal.read_into,
            store_images,
            undo,
            LIMITS,
            with_undo=with_undo,
        )


def content_of(images: dict[int, Image]) -> dict[int, bytes]:
    return {volume: image.read(0, image.size_bytes) for volume, image in images.items()}


def view_of(images: dict[int, Image], store: Store, undo: UndoStore, epoch: int) -> View:
    return View(epoch, images, lambda: undo.history, store.open, 1 << 20)


def restored(
    images: dict[int, Image], store: Store, undo: UndoStore, epoch: int
) -> dict[int, bytes]:
    """What undo says the volumes held at `epoch`."""
    view = view_of(images, store, undo, epoch)
    return {volume: view.read(volume, 0, image.size_bytes) for volume, image in images.items()}


def _stretches(content: bytes) -> list[tuple[int, int]]:
    """Parts of 64 KiB that hold data, so that the images have holes."""
    step = 64 * KIB
    return [
        (at, len(content[at : at + step]))
        for at in range(0, len(content), step)
        if content[at : at + step].count(0) != len(content[at : at + step])
    ]
