"""The secondary's answers in a resync: digests of what its images hold, in the order of each ask.

```
 ask ─▶ bounds ─▶ queue ─▶ smallest units first ─▶ job, ≤ 16 MiB read ─▶ digests of a part ─▶ …
```
Smaller units go first, because data is waiting for them. Invariant: what is told is durable in the
images: before the first digest everything that earlier lives wrote is synced, and what this resync
copies is only asked for before it is copied (else a power cut could take back what was counted as
held). Deliberately not here: what equal digests mean (`resync_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from geomirror.errors import LimitExceededError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, REGION_BYTES, Limits
from geomirror.volume.image import Image
from geomirror.volume.tree_digest import DIGEST_BYTES, READ_BYTES_MAX, REGION_BLOCKS, TreeDigest
from geomirror.wan_protocol.messages import ResyncAsk, ResyncDigests

ASKS_MAX = 1024
"""Asks that wait for an answer."""
RUNS_MAX = 1024
"""Runs of one ask."""
UNITS_MAX = 1 << 14
"""Units of one ask: 256 KiB of digests, in several messages."""
NODE_BLOCKS_MAX = 1 << 16
"""Of one unit: 256 MiB, read by one job."""
DATA_RANGES_MAX = 64
"""Parts of a run of nodes that are told from holes at once."""
KNOWN_MAX = 1024
"""Nodes whose regions are likely to be asked for next: 16 KiB each."""
Run = tuple[int, int, int]
"""(volume, first block, units)."""
Known = dict[tuple[int, int], list[bytes]]
"""(volume, first block) of a node -> digests of its regions."""


@dataclass
class DigestJob:
    """Digests of a first part of `runs`, as much as `bytes_max` of reading makes."""

    images: Mapping[int, Image]
    key: TreeDigest
    request: int
    unit_blocks: int
    runs: list[Run]
    known: Known
    """Of nodes answered before. Not changed."""
    bytes_max: int
    is_first: bool
    """Of its resync."""
    digests: list[bytes] = field(default_factory=list)
    """After `run`."""
    found: Known = field(default_factory=dict)
    """After `run`: regions of the nodes that are answered now."""

    def run(self) -> None:
        """Blocking; may be repeated. Raises StorageError."""
        self.digests, self.found = [], {}
        if self.is_first:
            for image in self.images.values():
                image.fdatasync()
        began = self.key.read_bytes
        self._bound = began + self.bytes_max
        self._expect()
        for volume, first, units in self.runs:
            image = self.images[volume]
            is_node = self.unit_blocks > REGION_BLOCKS
            done = self._nodes if is_node else self._leaves
            if not done(volume, image, first, units):
                return

    def _expect(self) -> None:
        """Scattered regions: a disk that is asked for one at a time is slower than the link."""
        if len(self.runs) == 1 or self.unit_blocks > REGION_BLOCKS:
            return  # Read from end to end.
        unit_bytes, left = self.unit_blocks * BLOCK_BYTES, self.bytes_max
        for volume, first, units in self.runs:
            image, offset = self.images[volume], first * BLOCK_BYTES
            length = min(units * unit_bytes, image.size_bytes - offset, left)
            if length > 0 and (volume, first) not in self.known:
                image.expect_reads([(offset, length)])
                left -= length

    @property
    def _is_enough(self) -> bool:
        return self.key.read_bytes >= self._bound

    def _leaves(self, volume: int, image: Image, first: int, units: int) -> bool:
        """Digests of blocks or regions; whether the run was done to its end."""
        kept = self.known.get((volume, first), [])
        if self.unit_blocks == REGION_BLOCKS and len(kept) == units:
            self.digests += kept
            return True
        unit_bytes = self.unit_blocks * BLOCK_BYTES
        offset, at_once = first * BLOCK_BYTES, READ_BYTES_MAX // unit_bytes
        for at in range(0, units, at_once):
            if self._is_enough:
                return False
            start = offset + at * unit_bytes
            stop = min(start + min(at_once, units - at) * unit_bytes, image.size_bytes)
            self.digests += self.key.leaves(image, start, stop, unit_bytes)
        return True

    def _nodes(self, volume: int, image: Image, first: int, units: int) -> bool:
        unit_bytes = self.unit_blocks * BLOCK_BYTES
        offset = first * BLOCK_BYTES
        end = min(offset + units * unit_bytes, image.size_bytes)
        solid: set[int] = set()
        for start, length in image.data_ranges(offset, end - offset, DATA_RANGES_MAX):
            last = (start + length - 1 - offset) // unit_bytes
            solid.update(range((start - offset) // unit_bytes, last + 1))
        for at in range(units):
            start = offset + at * unit_bytes
            stop = min(start + unit_bytes, end)
            if at not in solid:
                self.digests.append(self.key.of_zeros(stop - start))
                continue
            if self._is_enough:
                return False
            regions = self.key.leaves(image, start, stop, REGION_BYTES)
            self.found[volume, start // BLOCK_BYTES] = regions
            self.digests.append(self.key.node(regions))
        return True


@dataclass
class _Waiting:
    message: ResyncAsk
    runs: list[Run]
    """What is not answered yet."""
    answered: int = 0


class DigestAnswers:
    """The asks of one resync.

    :param sizes: of the volumes as of the resync's base.
    """

    def __init__(self, limits: Limits, key: int, sizes: Mapping[int, int]) -> None:
        self._limits = limits
        self._key = TreeDigest(key)
        self._sizes = dict(sizes)
        self._waiting: dict[int, _Waiting] = {}
        self._known: Known = {}
        self._is_first = True

    def add(self, message: ResyncAsk) -> None:
        """Take an ask. :raises RemoteProtocolError: out of bounds, or too many."""
        if len(self._waiting) >= ASKS_MAX or message.request in self._waiting:
            raise LimitExceededError(f"ask {message.request} while {len(self._waiting)} wait")
        units = message.unit_blocks
        is_leaf = units in (1, REGION_BLOCKS)
        is_node = 0 < units <= NODE_BLOCKS_MAX and units % REGION_BLOCKS == 0
        total = sum(count for _, _, count in message.runs)
        if not (is_leaf or is_node) or not 0 < len(message.runs) <= RUNS_MAX or total > UNITS_MAX:
            raise LimitExceededError(
                f"ask for {total} digests of {units} blocks in {len(message.runs)} runs"
            )
        for volume, first, count in message.runs:
            blocks = -(-self._sizes.get(volume, 0) // BLOCK_BYTES)
            is_aligned = first % min(units, REGION_BLOCKS) == 0
            if first < 0 or count <= 0 or not is_aligned or first + (count - 1) * units >= blocks:
                raise RemoteProtocolError(
                    f"ask for {count} digests from block {first} of volume {volume}, "
                    f"it has {blocks}"
                )
        self._waiting[message.request] = _Waiting(message, list(message.runs))

    def next_job(self, images: Mapping[int, Image]) -> DigestJob | None:
        """What to answer next; one job at a time."""
        if not self._waiting:
            return None
        waiting = min(self._waiting.values(), key=lambda each: each.message.unit_blocks)
        return DigestJob(
            images,
            self._key,
            waiting.message.request,
            waiting.message.unit_blocks,
            list(waiting.runs),
            self._known,
            4 * self._limits.resync_read_bytes_max,
            self._is_first,
        )

    def done(self, job: DigestJob) -> ResyncDigests:
        """The answer that a job has made."""
        self._is_first = False
        waiting = self._waiting[job.request]
        message = waiting.message
        for volume, first, _ in waiting.runs if job.unit_blocks == REGION_BLOCKS else ():
            self._known.pop((volume, first), None)
        self._known.update(job.found)
        while len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]
        first = waiting.answered
        waiting.answered += len(job.digests)
        waiting.runs = _without(waiting.runs, len(job.digests), job.unit_blocks)
        if not waiting.runs:
            del self._waiting[job.request]
        digests = b"".join(job.digests)
        assert len(digests) == len(job.digests) * DIGEST_BYTES
        return ResyncDigests(message.session, message.number, message.request, first, digests)


def _without(runs: list[Run], units: int, unit_blocks: int) -> list[Run]:
    """What is left of runs after their first units."""
    left: list[Run] = []
    for volume, first, count in runs:
        taken = min(units, count)
        units -= taken
        if taken < count:
            left.append((volume, first + taken * unit_blocks, count - taken))
    return left
