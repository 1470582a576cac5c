"""Marks at a secondary: what the primary says, brought into the journal here.

A mark whose epoch is still to come is written with that epoch, so both are durable together; one
whose epoch went by (this copy was away, or made anew past it) is only known by name. What the
primary does not name any more is removed.
"""

from __future__ import annotations

from geomirror.errors import RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.marks import NAME_PATTERN, Mark
from geomirror.wan_protocol.messages import MarkEntry, Marks

GENERATION_BYTES = 16


def marks_message(engine: Engine, session: int) -> Marks:
    """All marks of a primary that are durable there."""
    entries = [MarkEntry(*mark) for mark in engine.marks.table.marks()]
    return Marks(session, entries)


def check_marks(message: Marks, limits: Limits) -> list[Mark]:
    """The marks of a message. :raises RemoteProtocolError: they are not what a primary sends."""
    marks = [Mark(e.name, e.generation, e.epoch, e.wall_ns, e.is_quiesced) for e in message.marks]
    is_sane = len(marks) <= limits.marks_max and len({mark.name for mark in marks}) == len(marks)
    for mark in marks:
        is_sane &= bool(NAME_PATTERN.fullmatch(mark.name)) and 0 < mark.epoch < 1 << 63
        is_sane &= len(mark.generation) == GENERATION_BYTES and 0 <= mark.wall_ns < 1 << 63
    if not is_sane:
        raise RemoteProtocolError(f"{len(marks)} marks that cannot be")
    return marks


class MarkIntake:
    """What a secondary was told of marks in this session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._told: dict[str, Mark] | None = None
        self._seen_epoch = -1
        """Everything told about epochs up to here is in the journal."""

    def forget(self) -> None:
        """Another session begins."""
        self._told = None

    def take(self, marks: list[Mark]) -> None:
        """All marks that the primary has."""
        self._told = {mark.name: mark for mark in marks}
        self._seen_epoch = -1

    def mark_of(self, number: int) -> Mark | None:
        """The name of an epoch that is about to be committed."""
        told = (self._told or {}).values()
        return next((mark for mark in told if mark.epoch == number), None)

    def write_down(self) -> bool:
        """Append what is not in the journal yet; whether there was anything.

        :raises JournalFullError, NoSpaceError: call it again later.
        """
        engine = self._engine
        committed = engine.committed_epoch
        if self._told is None or self._seen_epoch == committed:
            return False
        known, is_changed = engine.marks.latest(), False
        for name, mark in known.items():
            told = self._told.get(name)
            if told is None or told[:3] != mark[:3]:
                engine.marks.remove(mark)
                is_changed = True
        for name, mark in self._told.items():
            if mark.epoch <= committed and known.get(name) != mark:
                engine.marks.put(mark)
                is_changed = True
        engine.marks.table.drop_unnamed(committed, {m.epoch for m in self._told.values()})
        self._seen_epoch = committed
        return is_changed
