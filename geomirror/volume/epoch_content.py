"""The volumes as of one sealed epoch, read while writers write and passes are applied.

```
 block ─▶ changed in (applied, e]? ─ yes ─▶ journal, where the newest of those tables says
                                   └ no ──▶ View of the applied epoch: image, or undo of a pass
                                            that has begun since
```
Invariant: both roles keep content like this, so two nodes that have the same epoch read the same
bytes of it, whatever either of them does meanwhile. What can be read now stays readable until
`release`: the journal is pinned, and the undo.
Deliberately not here: who compares what with whom (`wan_protocol.verifying`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from geomirror.errors import LimitExceededError, NotFoundError, RefusedError
from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.volume.digest import ZERO_DIGEST, Halves, digests_of
from geomirror.volume.engine_base import EngineBase
from geomirror.volume.engine_recovery import read_epoch
from geomirror.volume.view import View
from geomirror.volume.view_index import IMAGE, ZERO, Layer, Places
from geomirror.volume.zero_blocks import ZERO_BLOCK

DIGEST_BYTES = 16
_READ_BLOCKS_MAX = 1 * MIB // BLOCK_BYTES
"""Contents in memory at once, while they are digested."""
_Mask = npt.NDArray[np.bool_]


class EpochContent:
    """All volumes at `epoch`. Made and released on the event loop; all else blocks, on any one
    thread at a time.

    :param owner: name of the pins; only one at a time of an engine may have it.
    :raises NotFoundError: the epoch is not sealed here, is older than the applied one, or lies
        within a fold.
    :raises RefusedError: this copy is not consistent.
    :raises LimitExceededError: too much of the journal waits to be applied.
    """

    def __init__(self, engine: EngineBase, epoch: int, owner: str) -> None:
        superblock, limits = engine.superblock, engine.limits
        if superblock.data_state != "consistent":
            raise RefusedError(f'this copy of "{superblock.name}" is not consistent')
        base = engine.applied_epoch
        infos = [each for each in engine.unapplied_epochs() if each.number <= epoch]
        reached = infos[-1].number if infos else base
        if reached != epoch or epoch > engine.sealed_epoch:
            raise NotFoundError(f'epoch {epoch} of "{superblock.name}" is no state of this copy')
        if sum(each.entries for each in infos) > limits.sealed_entries_max:
            raise LimitExceededError("too much waits to be applied")
        self.epoch = epoch
        self.sizes = engine.sizes.at(epoch)
        """Bytes of each volume at the epoch."""
        self._images = dict(engine.images)
        self._journal, self._limits, self._undo = engine.journal, limits, engine.undo
        self._lsns = [each.record_lsn for each in infos]
        self._overlay: Layer | None = None
        undo = engine.undo
        self._view = View(
            base, self._images, lambda: undo.history, engine.store.open, limits.view_entries_max
        )
        self._owner = owner
        undo.pin(owner, base)
        self._pin = engine.journal.pin(engine.scan_lsn, owner)

    def release(self) -> None:
        """Hold nothing any more, with no thread reading; may be called twice."""
        self._pin.release()
        self._undo.unpin(self._owner)

    def block_count(self, volume: int) -> int:
        """Blocks of a volume at the epoch; the last may be short."""
        return -(-self.sizes.get(volume, 0) // BLOCK_BYTES)

    def occupied(self, volume: int, first: int, count: int) -> _Mask:
        """Which blocks may hold anything but zeros; holes are found without reading them.

        Raises as `read`.
        """
        # In this order: what a pass changes after it was looked at is in `changed`.
        mask = self._image_data(volume, first, count)
        mask |= self._view.changed(volume, first, count)
        places = self._places(volume, first, count)
        return np.where(places == IMAGE, mask, places != ZERO)

    def read(self, volume: int, blocks: Sequence[int]) -> Iterator[bytes]:
        """The contents of blocks, ascending; of a volume's short last one the bytes that exist.

        :raises NotFoundError: the undo of a pass that began since is not kept.
        :raises StorageError: a device failed. :raises IntegrityError: a table or the undo of a pass
            is damaged.
        """
        if not blocks:
            return
        first = blocks[0]
        places = self._places(volume, first, blocks[-1] - first + 1)
        sources = places[np.array(blocks, dtype=np.int64) - first].tolist()
        end = 0
        while end < len(blocks):
            head, source, block = end, sources[end], blocks[end]
            end += 1
            while source == IMAGE and end < len(blocks) and sources[end] == IMAGE:
                if blocks[end] != blocks[end - 1] + 1:
                    break
                end += 1
            length = self._block_bytes(volume, blocks[end - 1]) + (end - head - 1) * BLOCK_BYTES
            if source == ZERO:
                yield bytes(length)
            elif source != IMAGE:
                yield self._journal.read(source, length)
            else:
                data = self._view.read(volume, block * BLOCK_BYTES, length)
                for at in range(0, length, BLOCK_BYTES):
                    yield data[at : at + BLOCK_BYTES]

    def _block_bytes(self, volume: int, block: int) -> int:
        return min(BLOCK_BYTES, self.sizes[volume] - block * BLOCK_BYTES)

    def _places(self, volume: int, first: int, count: int) -> Places:
        """Where each block lies: a journal address, `ZERO`, or `IMAGE` if it is the view's."""
        if self._overlay is None:
            tables = [read_epoch(self._journal, self._limits, lsn)[0].table for lsn in self._lsns]
            self._overlay = Layer.of(tables)
        places = np.empty(count, dtype=np.int64)
        places.fill(IMAGE)
        self._overlay.enter(places, volume, first)
        return places

    def _image_data(self, volume: int, first: int, count: int) -> _Mask:
        mask = np.zeros(count, dtype=np.bool_)
        image = self._images.get(volume)
        offset = first * BLOCK_BYTES
        if image is None or offset >= image.size_bytes:
            return mask  # Grown since: all of that is in the tables.
        length = min(count * BLOCK_BYTES, image.size_bytes - offset)
        for start, size in image.data_ranges(offset, length):
            low = start // BLOCK_BYTES - first
            mask[low : -(-(start + size) // BLOCK_BYTES) - first] = True
        return mask


class RangeDigests:
    """A job: the digests of blocks of a volume at a sealed epoch, region by region.

    :param count: blocks of the range, which lies in the volume.
    :param region_blocks: it stops only after so many blocks, or at the end.
    :param bytes_max: and stops at the first such place where so much was read.
    """

    def __init__(
        self,
        content: EpochContent,
        volume: int,
        first: int,
        count: int,
        *,
        region_blocks: int,
        bytes_max: int,
    ) -> None:
        assert 0 <= first < first + count <= content.block_count(volume)
        self.content = content
        self.volume = volume
        self.first = first
        self.count = count
        """After `run`: blocks covered."""
        self.read_bytes = 0
        """After `run`: data looked at; holes count nothing."""
        self.low: Halves = np.zeros(count, dtype=np.uint64)
        self.high: Halves = np.zeros(count, dtype=np.uint64)
        """After `run`: XXH3-128 of each block covered; of zeros, zero."""
        self._region_blocks = region_blocks
        self._bytes_max = bytes_max

    def run(self) -> None:
        """Read and digest. Raises as `EpochContent.read`."""
        self.read_bytes = 0
        occupied = self.content.occupied(self.volume, self.first, self.count)
        self.count = self._end(occupied)
        self.low, self.high = self.low[: self.count], self.high[: self.count]
        numbers = occupied[: self.count].nonzero()[0]
        for start in range(0, len(numbers), _READ_BLOCKS_MAX):
            self._digest(numbers[start : start + _READ_BLOCKS_MAX])

    def _end(self, occupied: _Mask) -> int:
        """The first end of a region by which so much is read, or the end of the range."""
        step = self._region_blocks
        read_blocks = occupied.cumsum()[step - 1 :: step]
        enough = int(read_blocks.searchsorted(-(-self._bytes_max // BLOCK_BYTES)))
        return min((enough + 1) * step, self.count)

    def _digest(self, numbers: npt.NDArray[np.int64]) -> None:
        blocks = (numbers + self.first).tolist()
        contents = list(self.content.read(self.volume, blocks))
        self.read_bytes += sum(map(len, contents))
        self.low[numbers], self.high[numbers] = digests_of(contents)
        # The digest is a hint only: equal contents are compared really.
        zeros = (self.low[numbers] == ZERO_DIGEST[0]).nonzero()[0].tolist()
        zeros = [at for at in zeros if contents[at] == ZERO_BLOCK]
        if len(contents[-1]) < BLOCK_BYTES and not any(contents[-1]):
            zeros.append(len(contents) - 1)
        self.low[numbers[zeros]] = self.high[numbers[zeros]] = 0


def digest_pairs(low: Halves, high: Halves) -> bytes:
    """Digests as they are sent: 16 bytes each, little endian."""
    return np.stack([low, high], axis=1).astype("<u8").tobytes()


def region_digests(low: Halves, high: Halves, region_blocks: int) -> bytes:
    """16 bytes for each region of so many blocks: XXH3-128 of its blocks' digests, in order."""
    pairs, step = digest_pairs(low, high), region_blocks * DIGEST_BYTES
    regions = (pairs[at : at + step] for at in range(0, len(pairs), step))
    return b"".join(map(xxhash.xxh3_128_digest, regions))
