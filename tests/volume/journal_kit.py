"""A journal on a simulated disk, with the log that it should hold, for the tests of the journal."""

from __future__ import annotations

import random
from typing import NamedTuple

from geomirror.environment import SeededEntropy
from geomirror.limits import SIMULATION
from geomirror.volume.journal import Journal, Write
from geomirror.volume.record import RecordType
from geomirror.volume.recovery import Recovered, recover_journal
from tests.sim.disk import SimStore

RESOURCE = bytes(range(16))
SEGMENT = SIMULATION.segment_bytes
JOURNAL_BYTES = 16 * SEGMENT


class Entry(NamedTuple):
    """What a record says, wherever it lies."""

    kind: int
    volume: int
    offset: int
    length: int
    payload: bytes


def write(payload: bytes, offset: int = 0, volume: int = 0) -> Write:
    return (RecordType.WRITE, volume, offset, len(payload), memoryview(payload))


def entry(one: Write) -> Entry:
    kind, volume, offset, length, payload = one
    return Entry(int(kind), volume, offset, length, b"" if payload is None else bytes(payload))


class Disk:
    """One simulated disk with one journal, and what the superblock would know of it."""

    def __init__(self, seed: int | str = 0, journal_bytes: int = JOURNAL_BYTES) -> None:
        self.store = SimStore(seed)
        self.entropy = SeededEntropy(seed)
        self.journal_bytes = journal_bytes
        self.journal = Journal.create(
            self.store,
            SIMULATION,
            self.entropy,
            resource_id=RESOURCE,
            journal_bytes=journal_bytes,
        )
        self.scan_lsn = self.journal.end_lsn
        self.known_durable_lsn = self.journal.end_lsn
        self.log: list[Entry] = []
        self.lsns: list[int] = []
        self.durable_count = 0

    def append(self, *writes: Write) -> list[int]:
        lsns = self.journal.append(writes, 7)
        self.log += [entry(one) for one in writes]
        self.lsns += lsns
        return lsns

    def append_blocks(self, *payloads: bytes) -> list[int]:
        return self.append(*(write(one, 4096 * i) for i, one in enumerate(payloads)))

    def sync(self) -> None:
        job = self.journal.begin_sync()
        count = len(self.log)
        job.run()
        self.journal.complete_sync(job)
        self.durable_count = count

    def note_durable(self) -> None:
        """What a checkpoint does to the superblock."""
        self.known_durable_lsn = self.journal.durable_lsn

    def recover(self, **changes: int) -> Recovered:
        arguments = {"scan_lsn": self.scan_lsn, "known_durable_lsn": self.known_durable_lsn}
        arguments.update(changes)
        return recover_journal(
            self.store,
            SIMULATION,
            self.entropy,
            resource_id=RESOURCE,
            journal_bytes=self.journal_bytes,
            **arguments,
        )

    def crash_and_recover(self, *, lose_nothing: bool = False) -> Recovered:
        """Crash, recover, check the promises, and go on with what was recovered."""
        self.store.crash(lose_nothing=lose_nothing)
        return self.adopt(self.recover())

    def adopt(self, recovered: Recovered) -> Recovered:
        self.journal = recovered.journal
        found = entries(recovered)
        assert len(found) >= self.durable_count, "a durable record is missing"
        assert found == self.log[: len(found)], "not a prefix of what was appended"
        self.log = found
        self.lsns = [record.lsn for record in recovered.records]
        self.durable_count = len(found)
        assert self.journal.durable_lsn == self.journal.end_lsn
        return recovered


def entries(recovered: Recovered) -> list[Entry]:
    """The recovered records with their payloads as they are read now."""
    read = recovered.journal.read
    return [
        Entry(
            int(one.kind),
            one.volume,
            one.offset,
            one.length,
            read(one.address, one.payload_length) if one.payload_length else b"",
        )
        for one in recovered.records
    ]


def random_writes(source: random.Random, count: int) -> list[Write]:
    writes: list[Write] = []
    for _ in range(count):
        kind = source.choice((1, 1, 1, 1, 2, 3))
        offset, volume = source.randrange(1 << 20), source.randrange(3)
        if kind == RecordType.WRITE:
            size = source.choice((1, 7, 512, 4096, 4096, source.randint(1, 20_000)))
            writes.append(write(source.randbytes(size), offset, volume))
        else:
            writes.append((kind, volume, offset, source.randint(1, 1 << 30), None))
    return writes
