"""An engine under test, beside a model that is too simple to be wrong.

The model is a log of steps (one per record) and plain byte arrays. Epochs are ranges of steps;
their tables and hashes are made anew from the bytes, with nothing of the engine but the digest.
"""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import dataclass

import xxhash

from geomirror.environment import SeededEntropy
from geomirror.errors import JournalFullError
from geomirror.limits import SIMULATION, Limits
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.record import RecordType
from geomirror.volume.superblock import GenerationRecord, PeerRecord
from tests.sim.disk import SimStore

BLOCK = 4096
SIZES = {0: 40 * BLOCK, 1: 17 * BLOCK + 1536}
GENERATION = bytes(range(16))
JOURNAL_BYTES = SIMULATION.journal_bytes_min * 2


class Stop(BaseException):
    """The machine stops in the middle of a call to the store."""


@dataclass
class Step:
    """One record."""

    kind: int
    volume: int
    offset: int
    length: int
    data: bytes


@dataclass
class Expected:
    """An epoch as the model has it: steps up to `step`, and what it must look like."""

    step: int
    first_lsn: int
    end_lsn: int
    previous: bytes
    chain_hash: bytes
    content: dict[int, bytes]


def make_engine(store: SimStore, limits: Limits = SIMULATION, *, role: str = "primary") -> Engine:
    chain = [GenerationRecord(GENERATION.hex(), token=1, reason="created")]
    return Engine.create(
        store,
        limits,
        SeededEntropy("rig"),
        name="orders",
        resource_id=bytes(16),
        volumes=[VolumeSpec(i, f"v{i}", size) for i, size in SIZES.items()],
        journal_bytes=JOURNAL_BYTES,
        role=role,
        chain=chain if role == "primary" else [],
        wall_ns=0,
    )


def open_engine(store: SimStore, seed: int = 0, limits: Limits = SIMULATION) -> Engine:
    return Engine.open(store, limits, SeededEntropy(f"open {seed}"), lambda _: None)


def apply_step(content: dict[int, bytearray], step: Step) -> None:
    end = step.offset + step.length
    content[step.volume][step.offset : end] = step.data or bytes(step.length)


def expected_rows(
    steps: list[Step], content: dict[int, bytes]
) -> list[tuple[int, int, int, bytes]]:
    """(volume, block, count, digest) of an epoch of these steps that ends with this content."""
    punch: dict[tuple[int, int], int | None] = {}
    for step in steps:
        first, last = step.offset // BLOCK, (step.offset + step.length - 1) // BLOCK
        for block in range(first, last + 1):
            end = min((block + 1) * BLOCK, SIZES[step.volume])
            is_whole = step.offset <= block * BLOCK and step.offset + step.length >= end
            is_zero = is_whole and step.kind != RecordType.WRITE
            punch[step.volume, block] = int(step.kind == RecordType.TRIM) if is_zero else None
    rows: list[tuple[int, int, int, bytes]] = []
    flags = 0
    for volume, block in sorted(punch):
        data = content[volume][block * BLOCK : (block + 1) * BLOCK]
        if any(data):
            digest = xxhash.xxh3_128_intdigest(data).to_bytes(16, "little")
            rows.append((volume, block, 1, digest))
            continue
        own = punch[volume, block] or 0
        if rows and rows[-1][3] == bytes(16) and flags == own:
            before, first, count, _ = rows[-1]
            if (before, first + count) == (volume, block):
                rows[-1] = (volume, first, count + 1, bytes(16))
                continue
        rows.append((volume, block, 1, bytes(16)))
        flags = own
    return rows


def expected_hash(
    previous: bytes,
    number: int,
    lsns: tuple[int, int],
    rows: list[tuple[int, int, int, bytes]],
) -> bytes:
    text = previous + GENERATION + struct.pack("<QQQI", number, *lsns, len(rows))
    for volume, block, count, digest in rows:
        text += struct.pack("<HHIQ", volume, 0, count, block) + digest
    return hashlib.sha256(text).digest()


class Rig:
    """Engine, store and model; every method checks what it can."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.store = SimStore(seed)
        self.seed = seed
        self.opened = 0
        self.engine = make_engine(self.store)
        self.steps: list[Step] = []
        self.batches: list[tuple[int, int]] = []
        """Counts of steps before and after each batch; its wall clock is the index."""
        self.content = {i: bytearray(size) for i, size in SIZES.items()}
        self.durable_step = 0
        self.epochs: dict[int, Expected] = {0: self._origin()}
        self.peer_epoch = 0
        self.engine.superblock.peers["peer"] = PeerRecord()
        self.engine.retain("peer", 0)
        self.persist()

    def _origin(self) -> Expected:
        content = {i: bytes(size) for i, size in SIZES.items()}
        lsn = self.engine.journal.end_lsn
        return Expected(0, lsn, lsn, b"", bytes(32), content)

    # What a client does.

    def random_step(self) -> Step:
        volume = self.random.choice([0, 0, 1])
        size = SIZES[volume]
        kind = self.random.choice([1, 1, 1, 1, 2, 3])
        length = self.random.choice([512, BLOCK, BLOCK, 2 * BLOCK, 3 * BLOCK + 512, 100])
        if kind != 1 and self.random.random() < 0.4:
            length = self.random.randrange(4, 20) * BLOCK
        offset = self.random.randrange(0, size)
        if self.random.random() < 0.6:
            offset -= offset % BLOCK
        length = min(length, size - offset)
        data = b""
        if kind == 1:
            fill = self.random.random()
            data = bytes(length) if fill < 0.1 else self.random.randbytes(length)
        return Step(kind, volume, offset, length, data)

    def write(self, count: int = 1) -> None:
        steps = [self.random_step() for _ in range(count)]
        if count > 1:
            # Within a batch every step must show in the content, see `_recovered_steps`.
            for step in steps:
                step.kind, step.length = 1, min(step.length, 3 * BLOCK)
                step.data = self.random.randbytes(step.length)
        batch = [
            (s.kind, s.volume, s.offset, s.length, memoryview(s.data) if s.kind == 1 else None)
            for s in steps
        ]
        try:
            self._write(batch, steps)
        except JournalFullError:
            self.make_room()
            self._write(batch, steps)

    def _write(self, batch: list, steps: list[Step]) -> None:
        # Before the call: a crash in it may leave any part of the batch.
        self.steps.extend(steps)
        self.batches.append((len(self.steps) - len(steps), len(self.steps)))
        try:
            self.engine.write(batch, len(self.batches) - 1)
        except JournalFullError:
            del self.steps[len(self.steps) - len(steps) :]
            raise
        for step in steps:
            apply_step(self.content, step)

    def read(self) -> None:
        volume = self.random.choice([0, 1])
        offset = self.random.randrange(SIZES[volume])
        length = self.random.randrange(min(6 * BLOCK, SIZES[volume] - offset) + 1)
        expected = bytes(self.content[volume][offset : offset + length])
        assert self.engine.read(volume, offset, length) == expected
        job = self.engine.read_job(volume, offset, length)
        job.run()
        job.release()
        assert b"".join(job.buffers) == expected

    # What the core does.

    def sync(self) -> None:
        job = self.engine.sync_job()
        step = len(self.steps)
        if self.random.random() < 0.3 and self.engine.has_room(16 * BLOCK):
            self.write()
        job.run()
        self.engine.complete_sync(job)
        self.durable_step = max(self.durable_step, step)

    def seal(self, *, is_disturbed: bool = True) -> None:
        engine = self.engine
        end_lsn = engine.journal.end_lsn
        step = len(self.steps)
        last = max(self.epochs)
        draft = engine.cut(step)
        if draft is None:
            assert step == self.epochs[last].step
            return
        previous = self.epochs[last]
        assert (draft.number, draft.first_lsn) == (last + 1, previous.end_lsn)
        assert draft.end_lsn == end_lsn
        self.epochs[last + 1] = self._expect(last + 1, step, end_lsn)
        job = engine.seal_job(draft)
        if is_disturbed and self.random.random() < 0.5:
            # More writes, and an apply of what is sealed, beside the running job.
            for action in self.random.choices([self.write, self.read, self.apply, self.sync], k=3):
                if action == self.write and not engine.has_room(16 * BLOCK):
                    continue
                action()
        job.run()
        if is_disturbed and engine.has_room(16 * BLOCK):
            self.write()
        engine.complete_seal(job)
        assert engine.committed_hash == self.epochs[last + 1].chain_hash

    def _expect(self, number: int, step: int, end_lsn: int) -> Expected:
        previous = self.epochs[number - 1]
        content = {i: bytearray(data) for i, data in previous.content.items()}
        steps = self.steps[previous.step : step]
        for each in steps:
            apply_step(content, each)
        frozen = {i: bytes(data) for i, data in content.items()}
        rows = expected_rows(steps, frozen)
        lsns = (previous.end_lsn, end_lsn)
        chain = expected_hash(previous.chain_hash, number, lsns, rows)
        return Expected(step, *lsns, previous.chain_hash, chain, frozen)

    def apply(self) -> None:
        engine = self.engine
        if engine.sealed_epoch <= engine.applied_epoch:
            return
        self.persist()
        target = self.random.randint(engine.applied_epoch + 1, engine.sealed_epoch)
        job = engine.apply_job(target)
        job.run()
        engine.complete_apply(job)
        self.check_images()
        if self.random.random() < 0.8:
            self.persist()

    def check_images(self) -> None:
        expected = self.epochs[self.engine.applied_epoch]
        assert self.engine.applied_hash == expected.chain_hash
        for volume, image in self.engine.images.items():
            assert image.read(0, image.size_bytes) == expected.content[volume]

    def persist(self) -> None:
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)
        for number in [
            n for n in self.epochs if n < min(self.peer_epoch, self.engine.applied_epoch)
        ]:
            if number != max(self.epochs):
                del self.epochs[number]

    def upkeep(self) -> None:
        journal = self.engine.journal
        trim = journal.trim_job()
        if trim is not None:
            trim.run()
            journal.complete_trim(trim)
        spare = journal.spare_job()
        if spare is not None:
            spare.run()
            journal.complete_spare(spare)

    def peer(self) -> None:
        """The peer has some more epochs durable; all later ones must be readable."""
        engine = self.engine
        self.peer_epoch = self.random.randint(self.peer_epoch, engine.sealed_epoch)
        engine.superblock.peers["peer"].durable_epoch = self.peer_epoch
        engine.retain("peer", self.peer_epoch)
        self.check_epochs()

    def check_epochs(self) -> None:
        """Everything that the peer needs is there, with the digests that it says."""
        engine = self.engine
        wanted = list(range(self.peer_epoch + 1, engine.committed_epoch + 1))
        assert [n for n in engine.epoch_numbers() if n > self.peer_epoch] == wanted
        for number in wanted:
            epoch = engine.load_epoch(number)
            expected = self.epochs[number]
            assert epoch.chain_hash == expected.chain_hash
            assert (epoch.first_lsn, epoch.end_lsn) == (expected.first_lsn, expected.end_lsn)
            for row in epoch.table[epoch.table["kind"] == 0]:
                volume, block = int(row["volume"]), int(row["block"])
                content = expected.content[volume][block * BLOCK : (block + 1) * BLOCK]
                assert engine.journal.read(int(row["address"]), len(content)) == content

    def make_room(self) -> None:
        """What a core does when writes are held back."""
        self.seal(is_disturbed=False)
        job = self.engine.sync_job()
        job.run()
        self.engine.complete_sync(job)
        self.durable_step = len(self.steps)
        while self.engine.applied_epoch < self.engine.sealed_epoch:
            self.apply()
        self.persist()
        self.peer_epoch = self.engine.sealed_epoch
        self.engine.superblock.peers["peer"].durable_epoch = self.peer_epoch
        self.engine.retain("peer", self.peer_epoch)
        self.upkeep()

    # What the world does.

    def recover(self, *, lose_nothing: bool = False) -> None:
        """Crash and open again: a prefix not below what was durable, epochs as they were."""
        sealed = self.engine.sealed_epoch
        self.store.crash(lose_nothing=lose_nothing)
        self.opened += 1
        try:
            self.engine = engine = open_engine(self.store, self.seed * 1000 + self.opened)
        except Stop:
            # Recovery itself was stopped: it has to work from there as well.
            self.store.on_operation = None
            self.store.crash()
            self.engine = engine = open_engine(self.store, self.seed * 1000 + self.opened + 500)
        self.store.on_operation = None
        assert engine.sealed_epoch >= sealed
        assert engine.sealed_epoch in self.epochs
        for number in [n for n in self.epochs if n > engine.sealed_epoch]:
            del self.epochs[number]
        assert engine.sealed_hash == self.epochs[engine.sealed_epoch].chain_hash
        engine.retain("peer", self.peer_epoch)
        self.check_epochs()
        self._find_prefix(lose_nothing=lose_nothing)
        self.check_images()

    def random_action(self) -> None:
        action = self.random.choices(
            [self.write, self.read, self.sync, self.seal, self.apply, self.peer, self.upkeep],
            [12, 4, 3, 3, 2, 1, 2],
        )[0]
        if action == self.write:
            self.write(self.random.choice([1, 1, 1, 4]))
        else:
            action()

    def _find_prefix(self, *, lose_nothing: bool) -> None:
        engine = self.engine
        found = {i: engine.read(i, 0, size) for i, size in SIZES.items()}
        start = self.epochs[engine.sealed_epoch]
        content = {i: bytearray(data) for i, data in start.content.items()}
        matches = []
        for step in range(start.step, len(self.steps) + 1):
            if step > start.step:
                apply_step(content, self.steps[step - 1])
            if all(found[i] == content[i] for i in SIZES):
                matches.append(step)
        matches = [step for step in matches if step >= self.durable_step]
        assert matches, "what was recovered is no prefix of what was written"
        self.content = {i: bytearray(data) for i, data in found.items()}
        del self.steps[self._recovered_steps(start.step, matches) :]
        self.durable_step = len(self.steps)

    def _recovered_steps(self, start: int, matches: list[int]) -> int:
        """Where the log ended: the wall clock of a record names its batch."""
        if self.engine.open_epoch_since_wall_ns is None:
            assert start in matches
            return start
        begin, end = self.batches[self.engine.last_wall_ns]
        matches = [step for step in matches if begin < step <= end]
        assert len(matches) == 1
        return matches[0]
