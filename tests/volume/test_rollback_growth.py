"""A tail in which volumes grew, or were added: going back makes them smaller, or takes them away.

What they held is in the branch, and nothing of it shows through when they grow again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from geomirror.errors import RefusedError
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, Stop, make_engine, open_engine
from tests.volume.rollback_rig import CHANGES, WALL_NS
from tests.volume.test_engine_growth import (
    checkpoint,
    destage,
    everything,
    grow,
    seal,
    write,
)

State = dict[int, bytes]


@dataclass
class Story:
    """An engine, and what its volumes held at each epoch."""

    seed: int
    states: dict[int, State] = field(default_factory=dict)
    thins: bool = True

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.store = SimStore(self.seed)
        self.engine = make_engine(self.store)
        self.states[0] = everything(self.engine)
        self.opened = 0

    def some_writes(self) -> None:
        if not self.engine.has_room(64 * BLOCK):
            return
        for _ in range(self.random.randrange(1, 5)):
            volume = self.random.choice(sorted(self.engine.sizes.now))
            size = self.engine.sizes.now[volume]
            offset = self.random.randrange(size)
            if self.random.random() < 0.6:
                offset -= offset % BLOCK
            length = min(self.random.choice([100, BLOCK, 3 * BLOCK + 512]), size - offset)
            write(self.engine, volume, offset, self.random.randbytes(length))

    def some_growth(self) -> None:
        engine = self.engine
        if not engine.has_room(64 * BLOCK):
            return
        volume = self.random.randrange(0, len(engine.sizes.now) + 1)
        if volume > 3:
            return
        size = engine.sizes.now.get(volume, 0) + 512 * self.random.randrange(1, 40)
        grow(engine, volume, size)

    def go_on(self, epochs: int, *, growth: float = 0.3) -> None:
        for _ in range(epochs):
            self.some_writes()
            if self.random.random() < growth:
                self.some_growth()
                if self.random.random() < 0.7:
                    self.some_writes()
            if self.engine.open_epoch_since_wall_ns is not None:
                self.states[seal(self.engine)] = everything(self.engine)
            if self.random.random() < 0.4 or not self.engine.has_room(64 * BLOCK):
                self.apply()
            if self.thins and self.random.random() < 0.15:
                passes = self.engine.undo.passes()[:2]
                if len(passes) == 2 and passes[0].to_epoch == passes[1].from_epoch:
                    engine = self.engine
                    ThinJob(engine.store, engine.undo, engine.limits, []).merge(passes)
        checkpoint(self.engine)

    def apply(self) -> None:
        if self.engine.applied_epoch < self.engine.sealed_epoch:
            destage(self.engine)
        trim = self.engine.journal.trim_job()
        if trim is not None:
            trim.run()
            self.engine.journal.complete_trim(trim)

    def roll_back(self, target: int, name: str) -> None:
        self.engine.roll_back(target, name, wall_ns=WALL_NS, may_shrink=True)

    def forget_after(self, target: int) -> None:
        for number in [each for each in self.states if each > target]:
            del self.states[number]

    def points(self) -> list[int]:
        return self.engine.rollback_points(may_shrink=True)

    def reopen(self, *, lose_nothing: bool = False) -> None:
        self.store.on_operation = None
        self.store.crash(lose_nothing=lose_nothing)
        self.opened += 1
        self.engine = open_engine(self.store, self.seed * 1000 + self.opened)

    def stop_after(self, count: int) -> None:
        left = count

        def look(operation: str, _name: str) -> None:
            nonlocal left
            left -= any(part in operation for part in CHANGES)
            if left < 0:
                raise Stop

        self.store.on_operation = look

    def check_at(self, epoch: int) -> None:
        engine, expected = self.engine, self.states[epoch]
        assert engine.sealed_epoch == engine.applied_epoch == epoch
        assert everything(engine) == expected
        sizes = {index: image.size_bytes for index, image in engine.images.items()}
        assert sizes == {index: len(data) for index, data in expected.items()}
        assert {v.index: v.size_bytes for v in engine.superblock.volumes} == sizes

    def check_history(self) -> None:
        """Every state that undo leads to, with the volumes that there were."""
        engine = self.engine
        kept = engine.undo.history.kept(engine.applied_epoch)
        for epoch in [each.from_epoch for each in kept] + [engine.applied_epoch]:
            view = View(
                epoch, engine.images, lambda: engine.undo.history, engine.store.open, 1 << 20
            )
            sizes = {index: view.size_of(index) for index in engine.images}
            expected = self.states[epoch]
            assert {i: s for i, s in sizes.items() if s} == {i: len(d) for i, d in expected.items()}
            for volume, data in expected.items():
                assert view.read(volume, 0, len(data)) == data, (epoch, volume)

    def check_branch(self, name: str, tip: State) -> None:
        view = self.engine.view_branch(name)
        try:
            for volume, data in tip.items():
                assert view.size_of(volume) == len(data)
                assert view.read(volume, 0, len(data)) == data
                middle = len(data) // 2
                assert view.read(volume, middle, len(data) - middle) == data[middle:]
        finally:
            view.close()


@pytest.mark.parametrize("seed", range(40))
def test_volumes_are_what_they_were_and_the_branch_has_what_they_became(seed: int) -> None:
    story = Story(9900 + seed)
    for turn in range(3):
        story.go_on(10)
        tip = story.engine.sealed_epoch
        target = story.random.choice(story.points())
        at_tip = story.states[tip]
        story.roll_back(target, f"tail-{turn}")
        story.check_at(target)
        story.check_history()
        story.forget_after(target)
        if target != tip:
            story.check_branch(f"tail-{turn}", at_tip)
        story.reopen(lose_nothing=seed % 2 == 0)
        story.check_at(target)
        if target != tip:
            story.check_branch(f"tail-{turn}", at_tip)
    story.go_on(6, growth=0.6)
    story.apply()
    story.check_at(story.engine.sealed_epoch)
    story.reopen()
    story.check_at(story.engine.sealed_epoch)
    story.check_history()


@pytest.mark.parametrize("seed", range(5))
def test_a_crash_at_every_change_of_the_disk_is_finished_after_it(seed: int) -> None:
    story = Story(9950 + seed, thins=False)
    story.go_on(6, growth=0.5)
    grow(story.engine, 1, story.engine.sizes.now[1] + 5 * BLOCK + 512)
    grow(story.engine, len(story.engine.sizes.now), 6 * BLOCK)
    story.some_writes()
    tip = seal(story.engine)
    story.states[tip] = everything(story.engine)
    if seed % 2:
        destage(story.engine)
    checkpoint(story.engine)
    target = story.random.choice(story.points()[:-1])
    story.engine.close()
    snapshot = story.store.snapshot()
    for count in range(1000):
        story.store.restore(snapshot)
        story.reopen()
        story.stop_after(count)
        try:
            story.roll_back(target, "tail")
        except Stop:
            pass
        else:
            break
        story.reopen(lose_nothing=story.random.random() < 0.2)
        if story.engine.sealed_epoch == tip:
            story.roll_back(target, "tail")
        story.check_at(target)
        story.check_history()
        story.check_branch("tail", story.states[tip])
    assert count > 10


def test_by_choice_nothing_shrinks() -> None:
    story = Story(9990)
    story.go_on(3, growth=0)
    grow(story.engine, 1, story.engine.sizes.now[1] + 4 * BLOCK)
    story.states[seal(story.engine)] = everything(story.engine)
    destage(story.engine)
    for epoch in (1, 3):
        with pytest.raises(RefusedError, match="has grown or was added"):
            story.engine.roll_back(epoch, "tail", wall_ns=WALL_NS)
    story.check_at(4)
    assert story.engine.branches.records() == []
