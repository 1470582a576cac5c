"""A fresh primary whose images are not where readers are: epochs not applied, a resync undone."""

from __future__ import annotations

import contextlib
import random

import pytest

from geomirror.errors import FencedError, JournalFullError
from geomirror.volume import before_images, engine_return, undo_group
from geomirror.volume.apply import ApplyJob
from geomirror.volume.engine import Engine
from geomirror.volume.record import RecordType
from geomirror.volume.view import View
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, SIZES, Stop, open_engine
from tests.volume.test_engine_secondary import Secondary
from tests.wan_protocol.core_support import PEER
from tests.wan_protocol.test_resync_held import held_stage


class Fresh:
    """A primary from the moment of its promotion, beside plain byte arrays."""

    def __init__(self, seed: int, store: SimStore, engine: Engine, content: dict[int, bytes]):
        self.random = random.Random(seed)
        self.store = store
        self.engine = engine
        self.content = {index: bytearray(data) for index, data in content.items()}
        self.promoted = {index: bytes(data) for index, data in content.items()}
        self.opened = 0

    def write(self) -> None:
        volume = self.random.choice(sorted(self.content))
        size = len(self.content[volume])
        kind = self.random.choice([1, 1, 1, 2, 3])
        length = self.random.choice([512, BLOCK, BLOCK, 3 * BLOCK, 3 * BLOCK + 100, 9 * BLOCK])
        offset = self.random.randrange(size)
        offset -= self.random.choice([0, offset % BLOCK])
        length = min(length, size - offset)
        data = self.random.randbytes(length) if kind == RecordType.WRITE else bytes(length)
        payload = memoryview(data) if kind == RecordType.WRITE else None
        try:
            self.engine.write([(kind, volume, offset, length, payload)], 1)
        except JournalFullError:
            self.seal()
            self.go_on()
            return
        self.content[volume][offset : offset + length] = data

    def read(self) -> None:
        volume = self.random.choice(sorted(self.content))
        offset = self.random.randrange(len(self.content[volume]))
        length = min(self.random.randrange(1, 8 * BLOCK), len(self.content[volume]) - offset)
        expected = bytes(self.content[volume][offset : offset + length])
        job = self.engine.read_job(volume, offset, length)
        job.run()
        job.release()
        assert b"".join(job.buffers) == expected
        assert self.engine.read(volume, offset, length) == expected

    def check(self) -> None:
        for volume, data in self.content.items():
            assert self.engine.read(volume, 0, len(data)) == data

    def seal(self) -> None:
        self.engine.seal_all(2)

    def checkpoint(self) -> None:
        job = self.engine.checkpoint_job()
        if job is not None:
            job.run()
            self.engine.complete_checkpoint(job)

    def go_on(self) -> None:
        """What the core does behind the writers."""
        engine = self.engine
        self.checkpoint()
        if (
            engine.is_returning
            and engine.half_applied_through is None
            and self.random.random() < 0.5
        ):
            step = engine.return_step_job()
            step.run()
            engine.complete_return_step(step)
        else:
            target = engine.half_applied_through or engine.pass_end(engine.sealed_epoch)
            if target > engine.applied_epoch:
                job = engine.apply_job(target)
                self.perhaps_stopped(job)
                if not job.is_stopped:
                    engine.complete_apply(job)
        self.checkpoint()
        trim = engine.journal.trim_job()
        if trim is not None:
            trim.run()
            engine.journal.complete_trim(trim)

    def perhaps_stopped(self, job: ApplyJob) -> None:
        left = self.random.randrange(40)

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                job.stop()

        if self.store.on_operation is None:
            self.store.on_operation = count
            job.run()
            self.store.on_operation = None
        else:
            job.run()

    def crash(self) -> None:
        """The power goes, perhaps in the middle of something; what was synced is all there."""
        self.seal()
        left = self.random.randrange(30)

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop

        self.store.on_operation = count
        with contextlib.suppress(Stop):
            self.go_on()
        self.store.on_operation = None
        self.store.crash()
        self.reopen()

    def reopen(self) -> None:
        self.opened += 1
        self.engine = open_engine(self.store, self.random.randrange(1 << 30))
        self.check()

    def look_back(self, epoch: int, content: dict[int, bytes]) -> None:
        engine = self.engine
        undo = engine.undo
        images = engine.physical_images
        view = View(epoch, images, lambda: undo.history, self.store.open, 1 << 20)
        for volume, data in content.items():
            assert view.read(volume, 0, len(data)) == data

    def live(self, turns: int) -> None:
        """Random turns, then everything comes to rest."""
        for _ in range(turns):
            actions = [self.write, self.read, self.seal, self.go_on, self.crash]
            self.random.choices(actions, [10, 6, 2, 2, 1])[0]()
        self.seal()
        for _ in range(200):
            self.go_on()
        assert not self.engine.has_layer
        assert not self.engine.is_returning
        assert self.engine.applied_epoch == self.engine.sealed_epoch
        self.check()
        for volume, data in self.content.items():
            assert self.engine.physical_images[volume].read(0, len(data)) == data
        self.reopen()


def promote(engine: Engine) -> None:
    generation = engine.next_generation(b"promoted" * 2, "forced", "west", 3)
    job = engine.promote(generation, [])
    job.run()
    engine.complete_checkpoint(job)


def secondary_with_epochs(seed: int, *, is_behind: bool = False) -> Secondary:
    """Some epochs applied, later ones durable and not applied; of those perhaps none.

    :param is_behind: at least one.
    """
    rig = Secondary(seed)
    for _ in range(rig.random.randrange(10, 80)):
        rig.random.choice([rig.spool, rig.spool, rig.spool, rig.commit, rig.sync, rig.apply])()
    applied = rig.engine.applied_epoch
    for _ in range(60):
        rig.random.choice([rig.spool, rig.commit, rig.sync])()
    while is_behind and rig.engine.committed_epoch == applied:
        rig.random.choice([rig.spool, rig.commit])()
    job = rig.engine.sync_job()
    job.run()
    rig.engine.complete_sync(job)
    return rig


@pytest.mark.parametrize("seed", range(30))
def test_epochs_that_no_image_holds_are_served_and_applied_behind(seed: int) -> None:
    rig = secondary_with_epochs(seed)
    engine = rig.engine
    before, durable = engine.applied_epoch, engine.sealed_epoch
    content = {0: rig.primary.epoch(durable).content, 1: bytes(SIZES[1])}
    promote(engine)
    assert engine.applied_epoch == before
    assert (engine.unapplied_promotion is not None) == (before < durable)
    fresh = Fresh(seed, rig.store, engine, content)
    fresh.check()
    fresh.look_back(before, {0: rig.primary.epoch(before).content})
    if seed % 2:
        fresh.reopen()
    fresh.live(60)
    assert fresh.engine.sealed_epoch > durable


@pytest.mark.parametrize("seed", range(10))
def test_a_pass_that_runs_at_the_promotion_is_stopped_and_repeated(seed: int) -> None:
    rig = secondary_with_epochs(100 + seed, is_behind=True)
    engine = rig.engine
    durable = engine.sealed_epoch
    assert engine.applied_epoch < durable
    rig.checkpoint()
    job = engine.apply_job(engine.pass_end(durable))
    fresh = Fresh(seed, rig.store, engine, {0: rig.primary.epoch(durable).content})
    fresh.content[1] = bytearray(SIZES[1])
    fresh.perhaps_stopped(job)
    if not job.is_stopped:
        engine.complete_apply(job)
    promote(engine)
    fresh.check()
    fresh.live(40)


def held_engine(seed: int) -> tuple[SimStore, Engine, dict[int, bytes]]:
    stage = held_stage(blocks=16)
    for _ in range(3):
        stage.unpark(1)
    stage.crash(PEER, is_kill=bool(seed % 2))
    stage.start(PEER, is_connected=False)
    engine = stage.secondary.engine
    assert engine.held is not None
    return stage.west.store, engine, stage.at_epoch[2]


@pytest.mark.parametrize("seed", range(20))
def test_the_state_from_before_a_resync_is_served_and_restored_behind(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before_images, "_READ_BLOCKS_MAX", 1)
    monkeypatch.setattr(undo_group, "GROUP_BYTES_MAX", BLOCK)
    monkeypatch.setattr(engine_return, "RETURN_STEP_BYTES", 1)
    store, engine, content = held_engine(seed)
    physical = {i: image.read(0, image.size_bytes) for i, image in engine.images.items()}
    assert physical != content
    engine.take_held()
    promote(engine)
    assert engine.is_returning
    assert engine.held is None
    assert engine.state_epoch == engine.sealed_epoch == 2
    fresh = Fresh(seed, store, engine, content)
    fresh.check()
    fresh.look_back(2, content)
    fresh.live(60)
    assert not fresh.engine.is_returning
    assert not [name for name in store.names() if name.endswith(".open")]


def test_damaged_undo_of_what_must_not_go_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_images, "_READ_BLOCKS_MAX", 1)
    monkeypatch.setattr(undo_group, "GROUP_BYTES_MAX", BLOCK)
    monkeypatch.setattr(engine_return, "RETURN_STEP_BYTES", 1)
    store, engine, content = held_engine(3)
    before = set(store.names())
    engine.take_held()
    promote(engine)
    fresh = Fresh(3, store, engine, content)
    for _ in range(2):
        fresh.write()
        fresh.seal()
        job = engine.apply_job(engine.sealed_epoch)
        job.run()
        engine.complete_apply(job)
        fresh.checkpoint()
    fresh.reopen()
    undo = sorted(name for name in set(store.names()) - before if name.endswith(".und"))
    assert len(undo) == 2
    store.flip_bit(undo[0], 8 * 20)
    store.crash()
    with pytest.raises(FencedError, match="must not go back to epoch 2"):
        open_engine(store)


def test_a_crash_before_the_superblock_says_primary_leaves_a_held_secondary() -> None:
    store, engine, content = held_engine(1)
    engine.take_held()
    job = engine.promote(engine.next_generation(b"promoted" * 2, "forced", "west", 3), [])
    assert job is not None  # It never runs.
    store.crash()
    opened = open_engine(store)
    assert opened.superblock.role == "secondary"
    assert opened.held is not None
    assert opened.state_epoch == 2
    opened.take_held()
    promote(opened)
    Fresh(1, store, opened, content).check()


def test_blocks_are_told_from_their_neighbours_in_ranges_of_data() -> None:
    _, engine, _ = held_engine(0)
    engine.take_held()
    promote(engine)
    image = engine.images[0]
    found = image.data_ranges(0, image.size_bytes)
    data = image.read(0, image.size_bytes)
    covered = bytearray(len(data))
    for offset, length in found:
        covered[offset : offset + length] = b"1" * length
    assert not any(byte and not mark for byte, mark in zip(data, covered, strict=True))
    with pytest.raises(AssertionError):
        image.write_runs([])
    assert image.physical is engine.physical_images[0]
