"""Why undo does not lead back across a stretch of epochs, and how a file's header says it.

```
 (28,30]  ✗(30,36]   (36,40]  ✗(40,44]   (44,45]  image at 45
           damaged file         no file          └ points: 44 and 45, and nothing before
```
Deliberately not here: files (`undo`), what is still kept (`undo_history`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

TOO_LARGE, NO_SPACE, DAMAGED, MISSING = "too_large", "no_space", "damaged", "missing"
WORDS = {
    TOO_LARGE: "too much changed at once to be kept",
    NO_SPACE: "the disk was full, and going on is worth more than going back",
    DAMAGED: "is damaged",
    MISSING: "its undo file is missing",
}

FLAG_GAP = 1
FLAG_DAMAGED = 2
FLAG_NO_SPACE = 4
FLAG_RESYNC = 8
_GAPS = {TOO_LARGE: FLAG_GAP, NO_SPACE: FLAG_GAP | FLAG_NO_SPACE, DAMAGED: FLAG_GAP | FLAG_DAMAGED}


def flags_of(fault: str, *, is_resync: bool) -> int:
    """Of a header: why the pass is a gap ("" for one that is none), whether it is a resync's."""
    return _GAPS.get(fault, 0) | (FLAG_RESYNC if is_resync else 0)


def fault_of(flags: int) -> str:
    """Why a pass is a gap, "" for one that is none."""
    if not flags & FLAG_GAP:
        return ""
    if flags & FLAG_DAMAGED:
        return DAMAGED
    return NO_SPACE if flags & FLAG_NO_SPACE else TOO_LARGE


class _Pass(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def from_epoch(self) -> int: ...
    @property
    def to_epoch(self) -> int: ...
    @property
    def wall_ns(self) -> int: ...
    @property
    def fault(self) -> str: ...


@dataclass(frozen=True)
class Stretch:
    """Epochs (from, to] that undo does not lead back across: no point before `to` can be had."""

    from_epoch: int | None
    """None: not known, nothing older is kept."""
    to_epoch: int
    fault: str
    file: str = ""
    """The damaged one."""
    from_wall_ns: int = 0
    to_wall_ns: int = 0
    """When the ends were cut, 0 when that is not known."""

    @property
    def reason(self) -> str:
        """In words."""
        return f"undo file {self.file} {WORDS[DAMAGED]}" if self.file else WORDS[self.fault]


def unusable(
    passes: Sequence[_Pass],
    damaged: Sequence[str],
    state_epoch: int,
    state_wall_ns: int,
    places: Iterable[int] | None = None,
) -> list[Stretch]:
    """Every such stretch before the state that a copy has now, oldest first.

    :param passes: oldest first, none of them open.
    :param damaged: files whose header does not tell what they are of.
    :param places: the first pass, gaps, and those that begin behind the end of the one before; None
        when that is not known.
    """
    found: list[Stretch] = []
    end = bisect_right(passes, state_epoch, key=lambda each: each.to_epoch)
    for at in range(end) if places is None else places:
        if at >= end:
            break
        each = passes[at]
        last = passes[at - 1] if at else None
        before, wall_ns = (last.to_epoch, last.wall_ns) if last is not None else (None, 0)
        if before is None or each.from_epoch > before:
            name = "" if last is None else last.name
            found += _hole(before, each.from_epoch, wall_ns, 0, _between(damaged, name, each.name))
        if each.fault:
            file = each.name if each.fault == DAMAGED else ""
            ends = (each.from_epoch, each.to_epoch)
            found.append(Stretch(*ends, each.fault, file, wall_ns, each.wall_ns))
    newest = passes[end - 1] if end else None
    if newest is None:
        return found + _hole(None, state_epoch, 0, state_wall_ns, _between(damaged, "", "~"))
    if newest.to_epoch != state_epoch:
        rest = _between(damaged, newest.name, "~")
        found += _hole(newest.to_epoch, state_epoch, newest.wall_ns, state_wall_ns, rest)
    return found


def _hole(
    before: int | None, after: int, from_wall_ns: int, to_wall_ns: int, damaged: Sequence[str]
) -> list[Stretch]:
    if damaged:
        return [Stretch(before, after, DAMAGED, damaged[-1], from_wall_ns, to_wall_ns)]
    if before is None:
        return []  # Where history begins.
    return [Stretch(before, after, MISSING, "", from_wall_ns, to_wall_ns)]


def _between(names: Sequence[str], low: str, high: str) -> list[str]:
    return sorted(name for name in names if low < name < high)
