"""The engine on a secondary: spool, commit, durable, apply, and crashes in between."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from geomirror.errors import RefusedError
from geomirror.volume.digest import digest_of
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_table import KIND_ZERO, Epoch, chain_hash, empty_table
from geomirror.volume.superblock import GenerationRecord
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, GENERATION, SIZES, Stop, make_engine, open_engine

BLOCKS = 40


@dataclass
class Sent:
    """An epoch as the primary has it."""

    blocks: dict[int, bytes]
    zeros: tuple[int, int]
    chain_hash: bytes
    content: bytes


class Primary:
    """Makes epochs of volume 0 out of thin air."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sent = [Sent({}, (0, 0), bytes(32), bytes(SIZES[0]))]

    def epoch(self, number: int) -> Sent:
        while len(self.sent) <= number:
            content = bytearray(self.sent[-1].content)
            first = self.random.randrange(30)
            zeros = (first, self.random.randrange(1, 5))
            content[first * BLOCK : sum(zeros) * BLOCK] = bytes(zeros[1] * BLOCK)
            chosen = [b for b in range(BLOCKS) if not first <= b < sum(zeros)]
            blocks = {
                b: self.random.randbytes(BLOCK)
                for b in self.random.sample(chosen, self.random.randrange(8))
            }
            for block, data in blocks.items():
                content[block * BLOCK : (block + 1) * BLOCK] = data
            sent = Sent(blocks, zeros, b"", bytes(content))
            sent.chain_hash = self.assemble(len(self.sent), sent, {}).chain_hash
            self.sent.append(sent)
        return self.sent[number]

    def assemble(self, number: int, sent: Sent, addresses: dict[int, int]) -> Epoch:
        table = empty_table(len(sent.blocks) + 1)
        for row, (block, data) in enumerate(sent.blocks.items()):
            low, high = digest_of(data)
            table[row] = (0, 0, 0, 1, block, addresses.get(block, 8), low, high)
        table[-1] = (0, KIND_ZERO, 1, sent.zeros[1], sent.zeros[0], 0, 0, 0)
        table = table[np.argsort(table["block"])]
        previous = self.sent[number - 1].chain_hash
        lsns = (number * 1000, number * 1000 + 1000)
        chain = chain_hash(previous, GENERATION, number, *lsns, table)
        return Epoch(number, number, GENERATION, *lsns, number, chain, table)


class Secondary:
    """Drives an engine as the secondary's core does, with checks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.primary = Primary(seed)
        self.store = SimStore(seed)
        self.engine = make_engine(self.store, role="secondary")
        assert self.engine.generation == bytes(16)
        self.engine.superblock.chain = [GenerationRecord(GENERATION.hex())]
        self.engine.superblock.data_state = "consistent"
        self.checkpoint()
        self.spooled: dict[int, dict[int, int]] = {}
        self.opened = 0

    def spool(self) -> None:
        """Some blocks of the next epochs, in any order."""
        engine = self.engine
        number = engine.committed_epoch + self.random.choice([1, 1, 1, 2])
        have = self.spooled.setdefault(number, {})
        missing = [b for b in self.primary.epoch(number).blocks if b not in have]
        batch = missing[: self.random.randrange(1, 5)]
        if not batch or not engine.has_room(len(batch) * BLOCK + BLOCK):
            return
        address = engine.spool([self.primary.epoch(number).blocks[b] for b in batch], 0)
        for at, block in enumerate(batch):
            have[block] = address + at * BLOCK

    def commit(self) -> None:
        engine = self.engine
        number = engine.committed_epoch + 1
        have = self.spooled.get(number, {})
        sent = self.primary.epoch(number)
        if set(have) != set(sent.blocks) or not engine.has_room(BLOCK):
            return
        engine.commit(self.primary.assemble(number, sent, have), 0)
        self.spooled.pop(number, None)
        lowest = [a for each in self.spooled.values() for a in each.values()]
        engine.keep_spooled(min(lowest, default=0))

    def sync(self) -> None:
        job = self.engine.sync_job()
        if self.random.random() < 0.3:
            self.spool()
        job.run()
        self.engine.complete_sync(job)

    def apply(self) -> None:
        engine = self.engine
        if engine.sealed_epoch > engine.applied_epoch:
            self.checkpoint()
            target = self.random.randint(engine.applied_epoch + 1, engine.sealed_epoch)
            job = engine.apply_job(target)
            job.run()
            engine.complete_apply(job)
            self.check()
        self.checkpoint()
        trim = engine.journal.trim_job()
        if trim is not None:
            trim.run()
            engine.journal.complete_trim(trim)

    def checkpoint(self) -> None:
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)

    def check(self) -> None:
        engine = self.engine
        sent = self.primary.epoch(engine.applied_epoch)
        assert engine.applied_hash == sent.chain_hash
        assert engine.images[0].read(0, SIZES[0]) == sent.content
        assert engine.dirty_entries == 0

    def forget(self) -> None:
        """The session is gone, and with it what was spooled."""
        self.spooled.clear()
        self.engine.keep_spooled(0)

    def random_action(self) -> None:
        actions = [self.spool, self.commit, self.sync, self.apply, self.forget]
        self.random.choices(actions, [10, 6, 3, 2, 0.2])[0]()

    def recover(self, *, lose_nothing: bool) -> None:
        durable = self.engine.sealed_epoch
        self.store.crash(lose_nothing=lose_nothing)
        self.opened += 1
        self.engine = open_engine(self.store, self.opened)
        assert self.engine.sealed_epoch >= durable
        assert self.engine.sealed_hash == self.primary.epoch(self.engine.sealed_epoch).chain_hash
        self.forget()
        self.check()


@pytest.mark.parametrize("seed", range(15))
def test_a_secondary_is_at_exactly_one_epoch_through_any_crash(seed: int) -> None:
    node = Secondary(seed)
    for _ in range(6):
        left = node.random.randrange(5, 120)

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop(f"{operation} {name}")

        node.store.on_operation = count
        with pytest.raises(Stop):
            while True:
                node.random_action()
        node.store.on_operation = None
        node.recover(lose_nothing=node.random.random() < 0.3)
    for _ in range(200):
        node.random_action()
    assert node.engine.applied_epoch > 5


def test_a_secondary_never_runs_out_of_journal_while_it_applies() -> None:
    node = Secondary(99)
    for _ in range(1500):
        node.random_action()
    assert node.engine.applied_epoch > 100
    node.forget()
    node.sync()
    while node.engine.applied_epoch < node.engine.sealed_epoch:
        node.apply()
    node.apply()
    assert node.engine.journal.bytes_used < 3 * node.engine.limits.segment_bytes


def test_what_is_spooled_for_later_epochs_survives_trimming() -> None:
    node = Secondary(5)
    engine = node.engine
    far = node.primary.epoch(40)
    data = b"far" + bytes(BLOCK - 3)
    address = engine.spool([data], 0)
    assert far.blocks is not None
    engine.keep_spooled(address)
    for number in range(1, 30):
        sent = node.primary.epoch(number)
        have = {b: engine.spool([content], 0) for b, content in sent.blocks.items()}
        engine.commit(node.primary.assemble(number, sent, have), 0)
        engine.keep_spooled(address)
        node.sync()
        node.apply()
    assert engine.journal.read(address, BLOCK) == data
    assert engine.scan_lsn <= address
    engine.keep_spooled(0)
    node.checkpoint()
    assert engine.scan_lsn > address


def test_a_position_from_elsewhere_replaces_epochs_and_undo() -> None:
    node = Secondary(6)
    while node.engine.applied_epoch < 5:
        node.random_action()
    node.forget()
    assert node.engine.undo.passes() != []
    with pytest.raises(RefusedError, match="follows another history"):
        node.engine.reset_position(b"o" * 16, 70, b"h" * 32, data_state="inconsistent")
    node.engine.reset_position(GENERATION, 70, b"h" * 32, data_state="inconsistent")
    assert (node.engine.applied_epoch, node.engine.sealed_epoch) == (70, 70)
    assert node.engine.epoch_numbers() == []
    node.checkpoint()
    assert node.engine.undo.passes() == []
    node.engine.close()
    engine = open_engine(node.store, 1)
    assert (engine.applied_epoch, engine.committed_hash) == (70, b"h" * 32)
    assert engine.superblock.data_state == "inconsistent"
    follow_on(engine)


def follow_on(engine: Engine) -> None:
    """The next epoch is 71, and is applied without undo."""
    table = empty_table(1)
    content = b"n" * BLOCK
    low, high = digest_of(content)
    table[0] = (0, 0, 0, 1, 3, engine.spool([content], 0), low, high)
    chain = chain_hash(b"h" * 32, GENERATION, 71, 0, 9, table)
    engine.commit(Epoch(71, 71, GENERATION, 0, 9, 0, chain, table), 0)
    sync = engine.sync_job()
    sync.run()
    engine.complete_sync(sync)
    job = engine.apply_job(71)
    assert not job.with_undo
    job.run()
    engine.complete_apply(job)
    assert engine.images[0].read_block(3) == content
    assert engine.undo.passes() == []


def test_a_fold_covers_its_numbers() -> None:
    node = Secondary(7)
    engine = node.engine
    sent = node.primary.epoch(1)
    have = {b: engine.spool([content], 0) for b, content in sent.blocks.items()}
    table = node.primary.assemble(1, sent, have).table
    engine.commit(Epoch(4, 1, GENERATION, 0, 9, 0, b"f" * 32, table, is_asserted=True), 0)
    node.sync()
    assert engine.sealed_epoch == 4
    assert engine.epoch_numbers() == [4]
    assert engine.epoch_info(2).number == 4
    engine.close()
    engine = open_engine(node.store, 1)
    assert (engine.sealed_epoch, engine.sealed_hash) == (4, b"f" * 32)
    job = engine.apply_job(4)
    job.run()
    engine.complete_apply(job)
    assert engine.images[0].read(0, SIZES[0]) == sent.content
