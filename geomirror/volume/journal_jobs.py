"""The journal's blocking work as objects: prepared on the loop, run on any thread, completed there.

A failed `fdatasync` ends the journal: the kernel may have dropped the dirty pages, so that neither
a second fdatasync nor a later record's "known durable" could be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from geomirror.errors import StorageError
from geomirror.limits import Limits
from geomirror.volume.segment import DIRECTORY, Segment, segment_name, spare_index, spare_name
from geomirror.volume.store import File, Store
from geomirror.volume.zero_ahead import ZeroAhead


class Health:
    """Whether the journal may still be used; shared by the journal and its jobs."""

    __slots__ = ("failure",)

    def __init__(self) -> None:
        self.failure = ""

    def require(self) -> None:
        """Refuse everything after a failed sync. :raises StorageError: always the same cause."""
        if self.failure:
            raise StorageError(self.failure, hint="restart the daemon: recovery decides")


class SyncJob:
    """Makes everything below `lsn` durable: data of the segments, then the directory entries."""

    def __init__(
        self, store: Store, health: Health, lsn: int, files: Sequence[File], *, directory: bool
    ) -> None:
        self.lsn = lsn
        self.files = tuple(files)
        self.directory = directory
        self.is_done = False
        self._store = store
        self._health = health

    def run(self) -> None:
        """Blocking, on any thread. :raises StorageError: the journal refuses all use."""
        if self._health.failure:
            self._health.require()
        try:
            for file in self.files:
                file.fdatasync()
            if self.directory:
                self._store.sync_directory(DIRECTORY)
        except StorageError as error:
            self._health.failure = f"journal stopped after a failed sync: {error.message}"
            raise
        self.is_done = True


@dataclass
class TrimJob:
    """Takes segments that nobody needs out of the log: (segment, new spare's name or "")."""

    store: Store
    items: list[tuple[Segment, str]]
    surplus: list[str] = field(default_factory=list)
    """Spares above the budget, to be unlinked."""
    done: list[tuple[Segment, str]] = field(default_factory=list)

    def run(self) -> None:
        """Blocking, on any thread. May fail half-way; `complete_trim` then takes what was done."""
        for segment, spare in self.items:
            name = segment_name(segment.number)
            if spare:
                self.store.rename(name, spare)
            else:
                self.store.unlink(name)
            self.done.append((segment, spare))
        for name in self.surplus:
            self.store.unlink(name)
        self.store.sync_directory(DIRECTORY)


@dataclass
class SpareJob:
    """Makes one spare segment, its blocks written as zeros: a flush is then half as expensive."""

    store: Store
    name: str
    segment_bytes: int
    is_done: bool = False

    def run(self) -> None:
        """Blocking, on any thread. :raises NoSpaceError: nothing is left behind."""
        try:
            file = self.store.create(self.name, self.segment_bytes, zeroed=True)
            try:
                file.fdatasync()
            finally:
                file.close()
        except StorageError:
            self.store.unlink(self.name)
            raise
        self.store.sync_directory(DIRECTORY)
        self.is_done = True


FLUSH_HEAVY_SYNCS = 256
"""Syncs within one segment from which on zeroed spares pay. A sync of written blocks is quicker
than one of unwritten blocks; zeroing a segment costs as much as some hundreds of these differences
(`bench costs`), and writes every byte twice, for nothing under a bulk load that never flushes."""


class SparePool:
    """Names of the spare segments that are ready; at most `limits.spare_segments_max` are kept.

    New ones are made while the journal is flush-heavy; recycled segments are always taken.
    """

    def __init__(self, store: Store, limits: Limits, names: Sequence[str], *, current: int) -> None:
        """:param current: segment that is written now; its blocks may be unwritten ones."""
        self.names = list(names)
        self._zero_ahead = ZeroAhead(limits.segment_bytes, current)
        self._store = store
        self._segment_bytes = limits.segment_bytes
        self._count_max = limits.spare_segments_max
        self._is_making = False
        self._syncs = 0
        self._is_flush_heavy = True
        indexes = [spare_index(name.removeprefix(f"{DIRECTORY}/")) or 0 for name in names]
        self._index = max(indexes, default=0)

    def new_name(self, count_planned: int) -> str:
        """A name for one spare more, "" when enough are ready or planned."""
        if len(self.names) + count_planned >= self._count_max:
            return ""
        self._index += 1
        return spare_name(self._index)

    def before_sync(self, current: Segment, end_lsn: int) -> None:
        """The segment that is written is about to be synced; on the thread that appends."""
        self._syncs += 1
        self._zero_ahead.before_sync(current, end_lsn)

    def open_segment(self, number: int) -> Segment:
        """A ready spare under its new name, or a new sparse file: never a wait for zeroing.

        :raises StorageError: nothing was changed.
        """
        name = segment_name(number)
        if self.names:
            self._store.rename(self.names[-1], name)
            self.names.pop()
            return Segment(number, self._store.open(name))
        self._zero_ahead.sparse = number
        return Segment(number, self._store.create(name, self._segment_bytes))

    def segment_opened(self) -> None:
        """Another segment is written from now on; the one before tells what to expect of it."""
        self._is_flush_heavy = self._syncs >= FLUSH_HEAVY_SYNCS
        self._syncs = 0

    def job(self, room: int) -> SpareJob | None:
        """A job that makes a spare, if one is wanted and `room` segments leave place for it."""
        if not self._is_flush_heavy or self._is_making or len(self.names) >= room:
            return None
        name = self.new_name(0)
        if name == "":
            return None
        self._is_making = True
        return SpareJob(self._store, name, self._segment_bytes)

    def complete(self, job: SpareJob) -> None:
        """Take over what the job made, if it did."""
        self._is_making = False
        if job.is_done:
            self.names.append(job.name)

    def take_surplus(self, excess: int) -> list[str]:
        """Names to unlink when segments and spares are `excess` over the journal's bound."""
        count = min(max(0, excess + len(self.names)), len(self.names))
        return [self.names.pop() for _ in range(count)]


class Pin:
    """Holds back trimming: nothing at or above `lsn` is recycled until `release`."""

    __slots__ = ("_pins", "lsn", "owner")

    def __init__(self, pins: dict[int, Pin], lsn: int, owner: str) -> None:
        self.lsn = lsn
        self.owner = owner
        self._pins = pins
        pins[id(self)] = self

    def move(self, lsn: int) -> None:
        """Let go of what lies below `lsn`."""
        assert id(self) in self._pins, f"pin of {self.owner} is released"
        assert lsn >= self.lsn, f"pin of {self.owner} cannot go back from {self.lsn} to {lsn}"
        self.lsn = lsn

    def release(self) -> None:
        """Hold nothing any more; may be called twice."""
        self._pins.pop(id(self), None)
