"""Marks: named epochs, and which of them are states that this copy can have again.

```
 names        "before-upgrade" ─▶ epoch 812     what the primary says; equal on all members in time
 boundaries   { 812 }                           marked epochs that this copy has or had as a state
```
A mark is *held* here when its epoch is among the boundaries: the epoch came as the end of an epoch
or fold, and every apply pass ends at it, so that the image was (or will be) exactly that state. A
copy that was made anew past a mark knows its name and does not hold it.
Invariant: the table has only what is durable, in the journal or in the file; retention may rely on
`marked_epochs`. Deliberately not here: making marks (`engine_marks`), how long undo is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from geomirror.errors import NotFoundError, UsageError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""Safe in a path, in a URI and on a command line; ASCII, so characters are bytes."""
_TIME_PATTERN = re.compile(
    r"[0-9_.-]+"  # numbers, dates, durations without a unit
    r"|[0-9]+(\.[0-9]+)?(ms|[smhdwy])"  # 10m
    r"|[0-9]{4}-[0-9]{2}-[0-9]{2}.*"  # RFC 3339 and what begins like it
    r"|[0-9]{8}T.*"
    r"|now|today|yesterday|latest|newest|oldest|head|epoch",
    re.IGNORECASE,
)
"""What stands, or may one day stand, for a point in time where a mark's name may stand, too."""


class Mark(NamedTuple):
    """A named epoch of a resource."""

    name: str
    generation: bytes
    """Identity, 16 bytes, of the history that the epoch belongs to."""
    epoch: int
    wall_ns: int
    """Wall clock of the primary when the epoch was cut."""
    is_quiesced: bool = False
    """The application was quiet at that instant; else the state is as a crash would leave it."""


def check_mark_name(name: str) -> None:
    """Refuse a name that is unsafe, or that reads as a point in time.

    :raises UsageError: it is not allowed.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"mark name {name!r} is not allowed",
            hint="use 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
        )
    if _TIME_PATTERN.fullmatch(name):
        raise UsageError(
            f"mark name {name!r} reads as a point in time",
            hint=f'a name like "before-{name.lower()}" does not',
        )


class MarkTable:
    """The marks of one resource as one member knows them. For the event loop only."""

    def __init__(self, marks: Iterable[Mark] = (), boundaries: Iterable[int] = ()) -> None:
        self._marks = {mark.name: mark for mark in marks}
        self._boundaries = set(boundaries)
        self._former: set[int] = set()
        """Boundaries of the copy before, until it is durable that this one is made anew."""
        self.version = 0
        """Grows with every change."""

    def __len__(self) -> int:
        return len(self._marks)

    def find(self, name: str) -> Mark | None:
        """The mark of this name."""
        return self._marks.get(name)

    def get(self, name: str) -> Mark:
        """The mark of this name. :raises NotFoundError: there is none."""
        mark = self._marks.get(name)
        if mark is None:
            raise NotFoundError(f'no mark "{name}"', hint='see "geomirror mark RES --list"')
        return mark

    def marks(self) -> list[Mark]:
        """All marks, ascending by epoch."""
        return sorted(self._marks.values(), key=lambda mark: (mark.epoch, mark.name))

    def is_held(self, mark: Mark) -> bool:
        """Whether the mark's epoch is (or will be, once it is applied) a state of this copy.

        Whether undo still reaches back to it is another question.
        """
        return mark.epoch in self._boundaries

    def marked_epochs(self) -> tuple[int, ...]:
        """Epochs that a mark names and this copy holds, ascending: retention keeps them."""
        return tuple(sorted({mark.epoch for mark in self._marks.values()} & self._boundaries))

    def boundaries(self) -> tuple[int, ...]:
        """Marked epochs that are states of this copy, ascending, also those without a name yet."""
        return tuple(sorted(self._boundaries))

    def saved_boundaries(self) -> tuple[int, ...]:
        """What the file says: also those of the copy that is there again after a crash now."""
        return tuple(sorted(self._boundaries | self._former))

    def put(self, mark: Mark) -> None:
        """Add a mark, or replace the one of its name."""
        if self._marks.get(mark.name) != mark:
            old = self._marks.get(mark.name)
            self._marks[mark.name] = mark
            self.version += 1
            if old is not None and old.epoch != mark.epoch:
                self._drop_boundary(old.epoch)

    def remove(self, name: str) -> None:
        """Forget a mark, if it is there; nothing keeps its epoch any more."""
        mark = self._marks.pop(name, None)
        if mark is not None:
            self.version += 1
            self._drop_boundary(mark.epoch)

    def add_boundary(self, epoch: int) -> None:
        """The state at a marked epoch is one of this copy; its name may come later."""
        if epoch not in self._boundaries:
            self._boundaries.add(epoch)
            self.version += 1

    def drop_unnamed(self, through_epoch: int, named: set[int]) -> None:
        """Up to `through_epoch` marks are at these epochs only: others were deleted."""
        named = named | {mark.epoch for mark in self._marks.values()}
        self.keep_boundaries(lambda epoch: epoch in named or epoch > through_epoch)

    def keep_boundaries(self, is_kept: Callable[[int], bool]) -> None:
        """Forget the marked epochs that are no states of this copy (any more)."""
        kept = {epoch for epoch in self._boundaries if is_kept(epoch)}
        if kept != self._boundaries:
            self._boundaries = kept
            self.version += 1

    def drop_boundaries(self) -> None:
        """The copy is made anew: it holds none of the marks; their names stay known.

        The file says so only after `forget_former`: a crash before that is durable leaves the copy
        as it was, with all that it held.
        """
        self._former |= self._boundaries
        self._boundaries.clear()

    def forget_former(self) -> None:
        """It is durable that the copy is made anew."""
        if self._former:
            self._former.clear()
            self.version += 1

    def _drop_boundary(self, epoch: int) -> None:
        if all(mark.epoch != epoch for mark in self._marks.values()):
            self._boundaries.discard(epoch)
            self._former.discard(epoch)
