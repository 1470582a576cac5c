"""Which blocks the epochs in the journal change: kept in memory by ranges of epochs.

```
 journal    … e38 e39 e40 │ e41 … e60 │ e61 │ open
 spans           [38…40]     [41…60]   [61]            each: blocks changed by these epochs
                ▲ base                     ▲ through
```
Whoever holds everything through epoch K lacks at most the blocks of the spans that end after K.
Invariants: spans are adjacent and cover exactly (base, through]; a span's blocks are at least those
that its epochs change. They are more only when K lies inside a span, or when there were too many
runs: then they are widened to groups of blocks. So memory is bounded whatever was written.
Read from tables, at most once an epoch in the ordinary case, by a job (`load`), one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from geomirror.volume.block_runs import BlockRuns, runs_of_table, united
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.epoch_table import Table

SPANS_MAX = 128
"""Spans kept; beyond it the older ones are joined in pairs."""
RUNS_MAX = 1 << 20
"""Runs kept of all spans (16 bytes each); beyond it they are widened."""
RUNS_GATHERED_MAX = 1 << 18
"""Entries of tables that wait to be united, 4 MiB."""
WIDEN_SHIFT = 4
"""Blocks are widened to groups of 16 (64 KiB), then of 256, and so on."""

Load = Callable[[EpochInfo], Table]


@dataclass(frozen=True)
class Span:
    """The blocks that epochs first…last change, by volume."""

    first: int
    last: int
    runs: dict[int, BlockRuns]

    @property
    def run_count(self) -> int:
        """Runs of all volumes."""
        return sum(map(len, self.runs.values()))


class EpochChanges:
    """The spans of one resource."""

    def __init__(self) -> None:
        self.base = 0
        self.spans: list[Span] = []
        self._shift = 0

    @property
    def through(self) -> int:
        """The newest epoch in a span, `base` without spans."""
        return self.spans[-1].last if self.spans else self.base

    def follow(self, position: int) -> None:
        """From now on nobody asks for epochs up to `position`; an earlier one begins anew."""
        if position < self.base or position >= self.through:
            self.base, self.spans, self._shift = position, [], 0
            return
        while self.spans[0].last <= position:
            self.base = self.spans.pop(0).last

    def inside(self, position: int) -> Span | None:
        """The span that a position divides: some of its epochs are older, some newer."""
        for span in self.spans:
            if span.first <= position < span.last:
                return span
        return None

    def load(self, infos: Sequence[EpochInfo], ends: Sequence[int], load: Load) -> None:
        """Read epochs' tables into spans. Blocking, on any thread, with `EpochChanges` left alone.

        :param infos: the epochs right after `through`; or the last ones of a span, to divide it.
        :param ends: epochs after which a span ends, those where somebody stands.
        :raises StorageError, IntegrityError: a table cannot be read; nothing changed.
        """
        made: list[Span] = []
        gathered = _Gathered()
        for at, info in enumerate(infos):
            gathered.add(info, load(info))
            if info.number in ends or at == len(infos) - 1:
                made.append(gathered.span())
                gathered = _Gathered()
        if not made:
            return
        first = made[0].first
        if first <= self.through:
            at = next(i for i, span in enumerate(self.spans) if span.last >= first)
            old = self.spans[at]
            assert old.last == made[-1].last
            older = [Span(old.first, first - 1, old.runs)] if old.first < first else []
            self.spans[at : at + 1] = [*older, *made]
        else:
            assert first == self.through + 1
            self.spans += made
        self._bound()

    def after(self, position: int, volume: int, first: int, end: int) -> list[BlockRuns]:
        """Blocks of [first, end) that spans change which end after `position`: to be united."""
        assert position >= self.base
        later = [span.runs.get(volume) for span in self.spans if span.last > position]
        return [runs.within(first, end) for runs in later if runs is not None]

    def _bound(self) -> None:
        """Fewer spans, then fewer runs."""
        if len(self.spans) > SPANS_MAX:
            half = len(self.spans) // 4 * 2
            pairs = zip(self.spans[0:half:2], self.spans[1:half:2], strict=True)
            self.spans[:half] = [_joined(one, other) for one, other in pairs]
        while sum(span.run_count for span in self.spans) > RUNS_MAX:
            self._shift += WIDEN_SHIFT
            self.spans = [
                Span(s.first, s.last, {v: r.widened(self._shift) for v, r in s.runs.items()})
                for s in self.spans
            ]


class _Gathered:
    """Some epochs on their way into a span."""

    def __init__(self) -> None:
        self._first = self._last = 0
        self._waiting: dict[int, list[BlockRuns]] = {}
        self._count = 0

    def add(self, info: EpochInfo, table: Table) -> None:
        self._first = self._first or info.first_number
        self._last = info.number
        for volume, runs in runs_of_table(table).items():
            self._waiting.setdefault(volume, []).append(runs)
            self._count += len(runs)
        if self._count > RUNS_GATHERED_MAX:
            runs_of = self.span().runs
            if sum(map(len, runs_of.values())) > RUNS_MAX:
                runs_of = {volume: runs.widened(WIDEN_SHIFT) for volume, runs in runs_of.items()}
            self._waiting = {volume: [runs] for volume, runs in runs_of.items()}
            # What is united already is not counted again, or each epoch would unite everything.
            self._count = 0

    def span(self) -> Span:
        runs = {volume: united(sets) for volume, sets in self._waiting.items()}
        return Span(self._first, self._last, runs)


def _joined(one: Span, other: Span) -> Span:
    volumes = one.runs.keys() | other.runs.keys()
    runs = {
        volume: united([span.runs[volume] for span in (one, other) if volume in span.runs])
        for volume in sorted(volumes)
    }
    return Span(one.first, other.last, runs)
