"""What a resync compares and copies next: asks, and what comes of the answers.

```
 dirty run ─┬─ whole nodes ─ask─▶ compare with ours ─┬─ equal ──────────────────────▶ done
            │                                        ├─ zeros there ────────────────▶ copy data
            │                                        └─ differ ─ask regions─┬─ equal ▶ done
            │                                                               └─ differ ─┐
            └─ parts of nodes ─────────────────────────────ask blocks◀─────────────────┘
                                                               └▶ compare, copy what differs
```
A node that is equal costs 16 bytes, one round trip shared with a thousand others, and reading. The
peer's digests are of what it holds durably before anything of these blocks is copied, and ours are
of sealed content at the base epoch or later; later epochs are streamed. So it does not matter which
of the two is older. A peer that gives no digests is sent everything in dirty regions.
Deliberately not here: reading (`resync_job`, `resync_compare`), frames (`resync_sender`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from geomirror.errors import RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, REGION_BYTES, Limits
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.tree_digest import DIGEST_BYTES, REGION_BLOCKS, TreeDigest
from geomirror.wan_protocol.messages import ResyncDigests

ASK_BLOCKS = 2048
"""Blocks of one ask, about: 8 MiB. Larger ones would let the first data wait for longer."""
BLOCKS_AHEAD_MAX = 1 << 16
"""Digests of blocks that are asked for or wait to be compared: 1 MiB. With single blocks changed
in 4096 regions that is 16 MiB of data on their way."""
ASK_NODES = 256
NODES_AHEAD_MAX = 4096
"""Nodes asked for or waiting to be compared: 64 GiB of volume, which may be holes."""
ASK_REGION_NODES = 8
REGION_NODES_MAX = 64
"""Nodes whose regions are asked for."""
WANTED_MAX = 8192
"""Runs of regions that wait to be asked for; beyond it no more nodes are looked into."""
ASKS_AHEAD_MAX = 512
"""Asks without a whole answer; half of what a peer takes (`resync_answer`)."""
ZEROS = b""
"""Instead of digests: the peer holds nothing but zeros."""


@dataclass(frozen=True)
class Part:
    """Blocks of one volume to be compared and copied."""

    volume: int
    first: int
    blocks: int
    theirs: bytes | None
    """Digests of the peer's units, `ZEROS`, or None: not known."""
    unit_blocks: int = 1

    def rest(self, blocks: int) -> Part:
        """What is left after some blocks, whole units of them."""
        theirs = self.theirs
        if theirs:
            theirs = theirs[blocks // self.unit_blocks * DIGEST_BYTES :]
        first, left = self.first + blocks, self.blocks - blocks
        return Part(self.volume, first, left, theirs, self.unit_blocks)


@dataclass(frozen=True)
class Differing:
    """A node that differs, with digests of what we hold of its regions."""

    volume: int
    first: int
    blocks: int
    ours: list[bytes]
    """Empty for a region that is not sealed as a whole: its blocks are looked at one by one."""


@dataclass
class _Ask:
    unit_blocks: int
    parts: list[Part]
    """What is not answered yet; without digests."""
    nodes: list[Differing] = field(default_factory=list)
    """An ask for regions: of these."""
    answered: int = 0


class ResyncPlan:
    """Of one resync.

    :param sizes: bytes of each volume as of the base epoch.
    :param has_digests: the peer answers asks.
    """

    def __init__(
        self,
        bitmap: DirtyBitmap,
        sizes: Mapping[int, int],
        limits: Limits,
        *,
        has_digests: bool,
        key: int,
    ) -> None:
        self.key = TreeDigest(key)
        self.has_digests = has_digests
        self.equal: list[tuple[int, int, int]] = []
        """(volume, first region, end) found equal since this was last emptied."""
        self._sizes = sizes
        self._bitmap = bitmap
        self._node_regions = limits.resync_node_regions
        self._cursor = (0, 0)
        self._ahead: tuple[int, int, deque[tuple[int, int]]] = (-1, 0, deque())
        """Dirty runs of a volume, up to a region. To look for each of thousands costs more."""
        self._asks: dict[int, _Ask] = {}
        self._request = 0
        self._wanted: deque[Part] = deque()
        """Regions that differ, to be asked for block by block."""
        self._differing: deque[Differing] = deque()
        self._copies: deque[Part] = deque()
        self._nodes: deque[Part] = deque()
        self._blocks_ahead = 0
        self._nodes_ahead = 0

    @property
    def is_done(self) -> bool:
        """Nothing is left to ask, to wait for or to read."""
        waits = self._asks or self._wanted or self._differing or self._copies or self._nodes
        return not waits and self._next_dirty() is None

    # What is dirty, in order.

    def _next_dirty(self) -> Part | None:
        """The next dirty run, or the first part of it: whole nodes, or less than a node."""
        volumes = self._bitmap.volumes
        for at in range(self._cursor[0], len(volumes)):
            volume, size = volumes[at], self._sizes.get(volumes[at], 0)
            first = self._cursor[1] if at == self._cursor[0] else 0
            regions = -(-size // REGION_BYTES)
            if first >= regions:
                continue
            run = self._next_run(volume, first)
            if run is None or run[0] >= regions:
                continue
            start, end = run[0], min(run[1], regions)
            unit = REGION_BLOCKS
            if self.has_digests:
                end, unit = self._cut(start, end, regions)
            self._cursor = (at, start)
            blocks = min(end * REGION_BLOCKS, -(-size // BLOCK_BYTES)) - start * REGION_BLOCKS
            return Part(volume, start * REGION_BLOCKS, blocks, None, unit)
        return None

    def _next_run(self, volume: int, first: int) -> tuple[int, int] | None:
        """(first region, end) of the next dirty run; a long one may come in parts.

        What becomes dirty meanwhile is of epochs after the base, which are streamed.
        """
        looked_at, end, runs = self._ahead
        if looked_at == volume and first < end:
            while runs and runs[0][1] <= first:
                runs.popleft()
            if runs:
                return max(runs[0][0], first), runs[0][1]
            first = end
        found = self._bitmap.next_run(volume, first, 1)
        if found is None:
            return None
        span = ASK_NODES * self._node_regions
        end = found[0] - found[0] % span + span
        runs = deque(self._bitmap.runs_within(volume, found[0], end))
        self._ahead = volume, end, runs
        return runs[0]

    def _cut(self, start: int, end: int, regions: int) -> tuple[int, int]:
        """(end, blocks of a unit) of the first part of a run."""
        size = self._node_regions
        following = start - start % size + size
        if start % size == 0 and end >= min(following, regions):
            return end if end == regions else end - end % size, size * REGION_BLOCKS
        return min(end, following), 1

    def _pass(self, part: Part) -> None:
        self._cursor = (self._cursor[0], -(-(part.first + part.blocks) // REGION_BLOCKS))

    # Asking.

    def next_asks(self) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
        """(request, blocks of a unit, runs) of what is asked now, in this order."""
        if not self.has_digests:
            return
        while len(self._asks) < ASKS_AHEAD_MAX and (ask := self._next_ask()) is not None:
            self._request += 1
            self._asks[self._request] = ask
            runs = [
                (part.volume, part.first, -(-part.blocks // ask.unit_blocks)) for part in ask.parts
            ]
            yield self._request, ask.unit_blocks, runs

    def _next_ask(self) -> _Ask | None:
        if self._blocks_ahead + ASK_BLOCKS <= BLOCKS_AHEAD_MAX:
            parts = self._next_regions()
            if parts:
                self._blocks_ahead += sum(part.blocks for part in parts)
                return _Ask(1, parts)
        asked = sum(len(ask.nodes) for ask in self._asks.values())
        if self._differing and len(self._wanted) < WANTED_MAX and asked < REGION_NODES_MAX:
            count = min(ASK_REGION_NODES, len(self._differing))
            nodes = [self._differing.popleft() for _ in range(count)]
            parts = [Part(n.volume, n.first, n.blocks, None, REGION_BLOCKS) for n in nodes]
            return _Ask(REGION_BLOCKS, parts, nodes)
        part = self._next_dirty()
        is_node = part is not None and part.unit_blocks > 1
        if part is None or not is_node or self._nodes_ahead + ASK_NODES > NODES_AHEAD_MAX:
            return None
        self._pass(part)
        self._nodes_ahead += -(-part.blocks // part.unit_blocks)
        return _Ask(part.unit_blocks, [part])

    def _next_regions(self) -> list[Part]:
        """Regions to ask for block by block, as much as one ask takes."""
        parts: list[Part] = []
        left = ASK_BLOCKS
        while left >= REGION_BLOCKS:
            if self._wanted:
                part = self._wanted.popleft()
            else:
                found = self._next_dirty()
                if found is None or found.unit_blocks > 1:
                    break
                part = found
                self._pass(found)
            if part.blocks > left:
                whole = left // REGION_BLOCKS * REGION_BLOCKS
                self._wanted.appendleft(part.rest(whole))
                part = Part(part.volume, part.first, whole, None)
            parts.append(part)
            left -= part.blocks
        return parts

    # Answers.

    def answer(self, message: ResyncDigests) -> None:
        """Take a part of what was asked.

        :raises RemoteProtocolError: it was not asked, or is not what follows.
        """
        ask = self._asks.get(message.request)
        count, rest = divmod(len(message.digests), DIGEST_BYTES)
        if ask is None or rest or count == 0 or message.first != ask.answered:
            raise RemoteProtocolError(
                f"{len(message.digests)} bytes of digests for ask {message.request} "
                f"from {message.first}"
            )
        ask.answered += count
        at = 0
        while at < count and ask.parts:
            part = ask.parts[0]
            units = min(count - at, -(-part.blocks // ask.unit_blocks))
            blocks = min(units * ask.unit_blocks, part.blocks)
            theirs = message.digests[at * DIGEST_BYTES : (at + units) * DIGEST_BYTES]
            self._answered(ask, Part(part.volume, part.first, blocks, theirs, ask.unit_blocks))
            at += units
            if blocks < part.blocks:
                ask.parts[0] = part.rest(blocks)
            else:
                ask.parts.pop(0)
                if ask.nodes:
                    ask.nodes.pop(0)
        if at < count:
            raise RemoteProtocolError(f"ask {message.request}: {count - at} digests too many")
        if not ask.parts:
            del self._asks[message.request]

    def _answered(self, ask: _Ask, part: Part) -> None:
        if ask.nodes:
            self._compare_regions(ask.nodes[0], part)
        elif ask.unit_blocks == 1:
            self._copies.append(part)
        else:
            self._nodes.append(part)

    def _compare_regions(self, node: Differing, part: Part) -> None:
        """Which regions of a node differ."""
        assert part.theirs is not None
        before = (part.first - node.first) // REGION_BLOCKS
        for at in range(-(-part.blocks // REGION_BLOCKS)):
            first = part.first + at * REGION_BLOCKS
            blocks = min(REGION_BLOCKS, part.first + part.blocks - first)
            theirs = part.theirs[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
            if theirs == node.ours[before + at]:
                region = first // REGION_BLOCKS
                self.equal.append((part.volume, region, region + 1))
            elif theirs == self.key.of_zeros(self._bytes(part.volume, first, blocks)):
                self._blocks_ahead += blocks
                self._copies.append(Part(part.volume, first, blocks, ZEROS))
            else:
                self._wanted.append(Part(part.volume, first, blocks, None))

    def _bytes(self, volume: int, first: int, blocks: int) -> int:
        return min((first + blocks) * BLOCK_BYTES, self._sizes[volume]) - first * BLOCK_BYTES

    # Reading.

    def next_copies(self, blocks_max: int) -> list[Part]:
        """Parts to be compared block by block and copied; at least one, if there is any.

        One that is longer than `blocks_max` comes alone: what is not read of it comes back.
        """
        if not self.has_digests and not self._copies:
            part = self._next_dirty()
            if part is not None:
                self._pass(part)
                self._copies.append(Part(part.volume, part.first, part.blocks, None))
        parts: list[Part] = []
        left = blocks_max
        while self._copies and (not parts or self._copies[0].blocks <= left):
            parts.append(self._copies.popleft())
            left -= parts[-1].blocks
        return parts

    def next_nodes(self) -> Part | None:
        """Nodes to be compared; what is not read of them comes back."""
        if not self._nodes or len(self._differing) >= REGION_NODES_MAX:
            return None
        return self._nodes.popleft()

    def copied(self, part: Part, blocks: int) -> None:
        """So many blocks of the part are read; the rest has to be read next."""
        if part.theirs is not None:
            self._blocks_ahead -= blocks
        if blocks < part.blocks:
            self._copies.appendleft(part.rest(blocks))

    def compared(
        self, part: Part, blocks: int, zeros: list[Part], differing: list[Differing]
    ) -> None:
        """So many blocks of the nodes are compared: in these the peer has zeros and we have not,
        these differ, all others are equal."""
        self._nodes_ahead -= -(-blocks // part.unit_blocks)
        if blocks < part.blocks:
            self._nodes.appendleft(part.rest(blocks))
        for each in zeros:
            self._blocks_ahead += each.blocks
        self._copies.extend(zeros)
        self._differing.extend(differing)
