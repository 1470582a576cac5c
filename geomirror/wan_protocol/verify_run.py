"""One verify of one peer: how far it is, what is asked, what was found. No I/O, no messages.

```
 volumes   ████████████▒▒▒▒▒░░░░░░░░░░   █ compared   ▒ asked, at the epoch of the round
                       └ position         └ cursor: the next span begins here
```
A span is a range of one volume. One that could not be compared goes to `todo` and is asked again at
a later epoch; `position` never passes it, so that a verify that is interrupted goes on there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from geomirror.errors import RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.digest import Halves
from geomirror.volume.epoch_content import DIGEST_BYTES, EpochContent, digest_pairs
from geomirror.wan_protocol.messages import VerifyAnswer
from geomirror.wan_protocol.verify_answering import ASK_BLOCKS_MAX

RUNNING, DONE, STOPPED = "running", "done", "stopped"
CLEAN, HEALED, DIFFERENT, NOT_HEALED = "clean", "healed", "different", "not_healed"
SPANS_KEPT = 4096
"""Ranges with healed blocks that are compared once more at the end."""


class Span(NamedTuple):
    """Blocks [first, first + blocks) of a volume."""

    volume: int
    first: int
    blocks: int


@dataclass(frozen=True)
class Ask:
    """A span that the peer is asked about, with the digests of its blocks here."""

    span: Span
    low: Halves
    high: Halves
    read_bytes: int


@dataclass(eq=False)
class Round:
    """What is compared at one epoch."""

    number: int
    epoch: int
    content: EpochContent | None
    left_bytes: int
    left_asks: int
    progress_ns: int
    asks: dict[int, Ask] = field(default_factory=dict)
    reading: Span | None = None
    is_over: bool = False


@dataclass
class Position:
    """Where a verify goes on, and what it had found by then; kept across restarts."""

    volume: int = 0
    block: int = 0
    compared_blocks: int = 0
    different_blocks: int = 0
    healed_blocks: int = 0
    runs: list[Span] = field(default_factory=list)
    """Of different blocks, the first ones."""


@dataclass(eq=False)
class VerifyRun:
    """A verify of one peer. `state` is `running`, `done` (see `result`) or `stopped`."""

    peer: str
    bytes_per_second: int
    is_healing: bool
    limits: Limits
    total_blocks: int
    found: Position = field(default_factory=Position)
    state: str = RUNNING
    reason: str = ""
    """Why it waits, or was stopped."""
    round: Round | None = None
    cursor: tuple[int, int] = (0, 0)
    todo: deque[Span] = field(default_factory=deque)
    to_heal: deque[tuple[int, int]] = field(default_factory=deque)
    heal_epoch: int = 0
    """What was written again is in it, or in an earlier one."""
    rechecks: list[Span] = field(default_factory=list)
    is_rechecking: bool = False
    unhealed_blocks: int = 0
    """Different again after they were healed."""
    not_before_ns: int = 0
    epoch: int = 0
    """Newest at which something was compared."""

    def __post_init__(self) -> None:
        self.cursor = (self.found.volume, self.found.block)

    @property
    def result(self) -> str:
        """What it came to, once it is done."""
        if self.unhealed_blocks:
            return NOT_HEALED
        if not self.found.different_blocks:
            return CLEAN
        return HEALED if self.is_healing else DIFFERENT

    @property
    def is_over(self) -> bool:
        """Nothing more happens."""
        return self.state != RUNNING

    def position(self) -> Position:
        """From where everything has to be compared yet."""
        spans = list(self.todo)
        if self.round is not None:
            spans += [ask.span for ask in self.round.asks.values()]
            spans += [self.round.reading] if self.round.reading is not None else []
        places = [(span.volume, span.first) for span in spans if not self.is_rechecking]
        places += self.to_heal
        self.found.volume, self.found.block = min([self.cursor, *places])
        return self.found

    # Choosing what comes next.

    def next_span(self, sizes: Mapping[int, int]) -> Span | None:
        """The next range to be compared, None at the end.

        :param sizes: bytes of the volumes at the epoch.
        """
        while self.todo:
            span = self.todo.popleft()
            count = min(span.blocks, _blocks(sizes, span.volume) - span.first)
            if count > 0:
                return Span(span.volume, span.first, min(count, ASK_BLOCKS_MAX))
        if self.is_rechecking:
            return None
        volume, block = self.cursor
        for index in sorted(sizes):
            first = block if index == volume else 0
            count = _blocks(sizes, index) - first
            if index >= volume and count > 0:
                self.cursor = (index, first)
                return Span(index, first, min(count, ASK_BLOCKS_MAX))
        return None

    def taken(self, span: Span, count: int) -> Span:
        """Of a span that was chosen, `count` blocks were read; the rest comes next."""
        rest = Span(span.volume, span.first + count, span.blocks - count)
        if (span.volume, span.first) == self.cursor and not self.is_rechecking:
            self.cursor = (rest.volume, rest.first)
        elif rest.blocks:
            self.todo.appendleft(rest)
        return Span(span.volume, span.first, count)

    def give_back(self, spans: Iterable[Span]) -> None:
        """These could not be compared."""
        for span in spans:
            if (span.volume, span.first) != self.cursor or self.is_rechecking:
                self.todo.append(span)

    def end_round(self) -> Round | None:
        """Compare no more at this epoch; what is not answered is asked again."""
        ended, self.round = self.round, None
        if ended is None:
            return None
        spans = [ask.span for ask in ended.asks.values()]
        self.give_back([*spans, *([ended.reading] if ended.reading is not None else [])])
        ended.asks.clear()
        ended.is_over = True
        return ended

    # What was found.

    def compared(self, ask: Ask, answer: VerifyAnswer) -> list[Span]:
        """Take an answer; returns the runs of blocks that differ, ascending.

        :raises RemoteProtocolError: it does not fit what was asked.
        """
        differing: list[int] = []
        step = self.limits.verify_region_blocks
        pairs = np.frombuffer(digest_pairs(ask.low, ask.high), "<u8").reshape(-1, 2)
        span, count = ask.span, answer.compared_blocks
        if not 0 < count <= span.blocks or (count < span.blocks and count % step):
            raise RemoteProtocolError(f'"{self.peer}" compared {count} of {span.blocks} blocks')
        regions = -(-count // step)
        previous = -1
        for region, digests in answer.different:
            at = region * step
            own = pairs[at : at + step]
            is_next = previous < region < regions
            if not is_next or len(digests) != len(own) * DIGEST_BYTES:
                raise RemoteProtocolError(f'"{self.peer}" answers about region {region}')
            theirs = np.frombuffer(digests, "<u8").reshape(-1, 2)
            blocks = np.flatnonzero((own != theirs).any(axis=1))
            if not len(blocks):
                raise RemoteProtocolError(f'"{self.peer}" finds a difference where there is none')
            differing += (blocks + at + span.first).tolist()
            previous = region
        if count < span.blocks:
            self.todo.appendleft(Span(span.volume, span.first + count, span.blocks - count))
        if not self.is_rechecking:
            self.found.compared_blocks += count
        return self._note(Span(span.volume, span.first, count), differing)

    def _note(self, span: Span, blocks: list[int]) -> list[Span]:
        runs = _runs(span.volume, blocks)
        if not blocks:
            return runs
        if self.is_rechecking:
            self.unhealed_blocks += len(blocks)
            return runs
        self.found.different_blocks += len(blocks)
        room = self.limits.verify_runs_kept - len(self.found.runs)
        new = [run for run in runs if run not in self.found.runs]
        self.found.runs += new[: max(0, room)]
        if self.is_healing:
            self.to_heal += [(span.volume, block) for block in blocks]
            if len(self.rechecks) < SPANS_KEPT:
                self.rechecks.append(span)
        return runs


def _blocks(sizes: Mapping[int, int], volume: int) -> int:
    return -(-sizes.get(volume, 0) // BLOCK_BYTES)


def total_blocks(sizes: Mapping[int, int]) -> int:
    """Blocks of all volumes."""
    return sum(_blocks(sizes, volume) for volume in sizes)


def _runs(volume: int, blocks: list[int]) -> list[Span]:
    runs: list[Span] = []
    for block in blocks:
        if runs and runs[-1].first + runs[-1].blocks == block:
            runs[-1] = Span(volume, runs[-1].first, runs[-1].blocks + 1)
        else:
            runs.append(Span(volume, block, 1))
    return runs
