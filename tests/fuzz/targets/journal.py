"""A journal that was written, synced, perhaps cut by a crash, then damaged: what is recovered.

It must give a prefix of what was appended that holds everything proven durable, or refuse with the
typed error. Proof, as the target knows it without reading the files: what a checkpoint noted, and
what an undamaged header of an undamaged segment says.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field

from geomirror.errors import FencedError, IntegrityError, StorageError
from geomirror.limits import SIMULATION
from geomirror.volume.record import HEADER_BYTES, RecordType, record_bytes
from geomirror.volume.segment import segment_name
from tests.fuzz.source import Source
from tests.sim.disk import STYLES
from tests.volume.journal_kit import SEGMENT, Disk, entries, write

INPUT_BYTES_MAX = 512
APPENDS_MAX = 40
BYTES_MAX = 3 * SEGMENT
"""Of payload in one story; two segment borders are enough."""
(_APPEND, _BIG, _ZERO, _SYNC, _NOTE, _DAMAGE) = range(6)


def seeds() -> list[bytes]:
    """Stories: appends and syncs, then damage of each kind at some places."""
    written = bytes([0, 9, 20, 0, 100, 200, 3, 0, 50, 60, 2, 7, 1, 3, 1, 3, 4, 0, 1, 2, 3, 0, 9, 9])
    found = [b"", written]
    places = [(kind, place) for kind in range(6) for place in (0, 40, 130, 250)]
    found += [written + bytes([5, kind, place, 17, 3]) for kind, place in places]
    return [*found, bytes([1, 3, 4] * 12 + [5, 0, 1, 2, 3]), bytes([128, 1, 0, 9, 9, 3, 1, 1, 1])]


@dataclass
class _Story:
    """A disk, and what is durable on it as far as the story knows."""

    disk: Disk = field(default_factory=Disk)
    proofs: dict[int, int] = field(default_factory=dict)
    """LSN of a record → what its header says was durable."""
    damaged: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of LSNs that were changed behind the journal's back."""
    lost: set[int] = field(default_factory=set)
    """Segments of which both headers, or the file, may be gone."""
    payload_bytes: int = 0

    def append(self, size: int, kind: int = RecordType.WRITE) -> None:
        """One record."""
        if self.payload_bytes + size > BYTES_MAX or len(self.disk.log) >= APPENDS_MAX:
            return
        self.payload_bytes += size
        durable = self.disk.journal.durable_lsn
        chance = random.Random(len(self.disk.log))
        one = write(chance.randbytes(size), size % 99 * 512)
        if kind != RecordType.WRITE:
            one = (kind, 1, size * 512, 4096, None)
        (lsn,) = self.disk.append(one)
        self.proofs[lsn] = durable

    def damage(self, source: Source) -> None:
        """Change some bytes of the files; the place is told by segment and eighths of a block."""
        kind = source.below(6)
        numbers = sorted(self.disk.journal._segments)
        number = numbers[source.below(len(numbers))]
        lsns = [lsn for lsn in self.disk.lsns if lsn // SEGMENT == number]
        base = lsns[source.below(len(lsns))] % SEGMENT if lsns and source.flag() else 0
        at = min(base + source.number() * 8, SEGMENT - 512)
        name, store = segment_name(number), self.disk.store
        if kind == 5 and number != numbers[0]:
            store.unlink(name)
            self._touch(number, 0, SEGMENT)
            return
        file = store.open(name)
        length = (1, 8, 512, 512, 64, 1)[kind]
        old = file.pread(length, at)
        other = file.pread(length, source.number() * 512)
        new = (
            bytes([old[0] ^ (source.number() or 1)]),
            source.take(8),
            bytes(512),
            other,
            old[::-1],
            bytes([old[0] ^ 1]),
        )[kind]
        file.pwritev([new], at)
        file.fdatasync()
        if new != old:
            self._touch(number, at, at + length)

    def _touch(self, number: int, start: int, end: int) -> None:
        self.damaged.append((number * SEGMENT + start, number * SEGMENT + end))
        if start < 4096:
            self.lost.add(number)

    def _is_whole(self, start: int, end: int) -> bool:
        return all(end <= first or last <= start for first, last in self.damaged)

    def proven_lsn(self) -> int:
        """The highest LSN that something undamaged says was durable."""
        proofs = [self.disk.known_durable_lsn]
        for lsn, durable in self.proofs.items():
            if lsn // SEGMENT not in self.lost and self._is_whole(lsn, lsn + HEADER_BYTES):
                proofs.append(durable)
        return max(proofs)


def run(data: bytes) -> None:
    """Tell the story, crash, recover, judge; then once more, for recovery must be repeatable."""
    source = Source(data)
    first = source.number()
    crash = STYLES[first % len(STYLES)] if first & 128 else None
    story = _Story()
    disk = story.disk
    while not source.is_empty:
        step = source.below(6)
        if step == _APPEND:
            story.append(source.number() * 8 + source.number())
        elif step == _BIG:
            story.append(40_000 + source.number() * 90)
        elif step == _ZERO:
            story.append(source.number(), RecordType.TRIM)
        elif step == _SYNC:
            disk.sync()
        elif step == _NOTE:
            disk.sync()
            disk.note_durable()
        else:
            break
    durable_count = disk.durable_count
    known = dict(zip(disk.lsns, disk.log, strict=True))
    disk.store.crash(lose_nothing=crash is None, style=crash)
    if crash is not None:
        # What lay in the cache may be gone: only what was synced can prove anything.
        story.proofs = dict(list(story.proofs.items())[:durable_count])
    while not source.is_empty:
        _damage_what_is_there(story, source)
    try:
        recovered = disk.recover()
    except (FencedError, IntegrityError, StorageError):
        assert story.damaged, "refused without any damage"
        return
    found = entries(recovered)
    assert found == disk.log[: len(found)], "not a prefix of what was appended"
    if not story.damaged:
        assert len(found) >= durable_count, "a durable record is missing"
    proven = story.proven_lsn()
    ends = [lsn + record_bytes(len(one.payload)) for lsn, one in known.items()]
    must = sum(end <= proven for end in ends)
    assert len(found) >= must, f"{len(found)} records recovered, {must} were proven durable"
    assert recovered.journal.durable_lsn == recovered.journal.end_lsn
    assert recovered.journal.bytes_used <= disk.journal_bytes + 2 * SIMULATION.segment_bytes
    recovered.journal.close()
    disk.store.crash(style=STYLES[0])
    again = disk.recover()
    assert entries(again) == found, "recovered a second time it is something else"


def _damage_what_is_there(story: _Story, source: Source) -> None:
    # A file may have gone with its directory entry in the crash, or with an earlier damage.
    with contextlib.suppress(StorageError):
        story.damage(source)
