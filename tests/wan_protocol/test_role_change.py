"""Every change of a role, stopped at each change of the disk, and taken up again.

Whatever is left is a primary or a secondary that opens; the same change, asked for once more, ends
where it would have ended, with exactly the content of that epoch, and with the tail as a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from geomirror.environment import SeededEntropy
from geomirror.errors import RefusedError
from geomirror.limits import SIMULATION
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.member_answer import answer_of
from geomirror.wan_protocol.messages import GenerationEntry
from geomirror.wan_protocol.role_change import (
    Change,
    Steps,
    claim,
    demotion,
    following,
    promotion,
    settle,
)
from geomirror.wan_protocol.session import chain_entries
from tests.sim.disk import SimStore
from tests.volume.engine_rig import Stop
from tests.volume.rollback_rig import stop_after
from tests.wan_protocol.core_support import GENERATION, PEER, PRIMARY, Stage
from tests.wan_protocol.test_resync_held import held_stage, resynced

WALL_NS = 1_700_000_000_000_000_000
Content = dict[int, bytes]


@dataclass
class Story:
    """A disk, the change that is asked for, and what has to come of it."""

    store: SimStore
    change: Callable[[Engine], Steps[object]]
    role: str
    epoch: int
    content: Content
    is_done: Callable[[Engine], bool]
    tail: Content | None = None
    opened: int = 0
    names: set[str] = field(default_factory=set)

    def open(self, store: SimStore) -> Engine:
        self.opened += 1
        entropy = SeededEntropy(f"story {self.opened}")
        return Engine.open(store, SIMULATION, entropy, lambda _: store.open("none"))

    def take(self, engine: Engine) -> None:
        """All steps, or as far as the machine goes."""
        change = Change(self.change(engine))
        while (job := change.next_job()) is not None:
            self.names.add(type(job).__name__)
            job.run()

    def check(self, engine: Engine) -> None:
        """It came to its end."""
        assert engine.superblock.role == self.role
        assert engine.sealed_epoch == self.epoch
        assert read(engine) == self.content
        if self.role == "primary":
            run(settle(engine))
        images = {i: image.read(0, image.size_bytes) for i, image in engine.images.items()}
        assert images == self.content
        assert engine.superblock.data_state == "consistent"
        branches = engine.branches.records()
        assert len(branches) == (self.tail is not None)
        if self.tail is not None:
            view = engine.view_branch(branches[0].name)
            assert {i: view.read(i, 0, len(data)) for i, data in self.tail.items()} == self.tail
            view.close()
        engine.close()


def run(steps: Steps[object]) -> None:
    change = Change(steps)
    while (job := change.next_job()) is not None:
        job.run()


def read(engine: Engine) -> Content:
    if engine.superblock.role == "primary":
        return {i: engine.read(i, 0, size) for i, size in engine.sizes.now.items()}
    return {i: image.read(0, image.size_bytes) for i, image in engine.images.items()}


def above(engine: Engine, epoch: int, chain_hash: bytes) -> list[GenerationEntry]:
    """A history with a higher token that parts from the one here after an epoch."""
    made = GenerationEntry(
        *(b"n" * 16, 2, GENERATION, epoch, chain_hash), reason="forced", by="colo", wall_ns=WALL_NS
    )
    return [*chain_entries(engine.superblock), made]


def a_copy() -> tuple[Stage, Engine]:
    """Three epochs at the copy, of which two are not in its image."""
    stage = Stage()
    stage.write_epochs(1)
    stage.pass_time(2000)
    stage.secondary.set_hold(True, stage.now_ns)
    stage.write_epochs(2, seed=5)
    stage.pass_time(100)
    engine = stage.secondary.engine
    assert (engine.applied_epoch, engine.sealed_epoch) == (1, 3)
    return stage, engine


def promoted(stage: Stage, epoch: int) -> Story:
    """Its copy is promoted: it has to be at this epoch."""

    def change(engine: Engine) -> Steps[object]:
        return promotion(engine, b"p" * 16, "forced", PEER, WALL_NS, [PRIMARY])

    def is_done(engine: Engine) -> bool:
        return engine.superblock.role == "primary"

    store = stage.west.store
    return Story(store, change, "primary", epoch, stage.at_epoch[epoch], is_done)


def a_promotion() -> Story:
    stage, engine = a_copy()
    return promoted(stage, engine.sealed_epoch)


def a_promotion_in_a_resync() -> Story:
    stage = held_stage(blocks=8)
    stage.unpark(1)
    return promoted(stage, 2)


def a_promotion_after_a_resync() -> Story:
    """The copy has everything, durably: nothing of it may be lost for the state from before."""
    stage = resynced()
    return promoted(stage, stage.secondary.engine.sealed_epoch)


def a_demotion() -> Story:
    stage = Stage()
    stage.write_epochs(3)
    stage.pass_time(100)
    epoch = stage.primary.engine.sealed_epoch
    return Story(
        *(stage.east.store, lambda engine: demotion(engine, [PEER]), "secondary", epoch),
        *(stage.at_epoch[epoch], lambda engine: engine.superblock.role == "secondary"),
    )


def outranked(stage: Stage, at: int, tail: Content | None) -> Story:
    """The primary has heard of a history that parts from its own at an epoch."""
    hashes = {0: bytes(32)}
    engine = stage.primary.engine
    for number in range(1, engine.sealed_epoch + 1):
        hashes[number] = engine.epoch_info(number).chain_hash
    run(claim(engine, above(engine, at, hashes[at]), []))

    def change(engine: Engine) -> Steps[object]:
        return following(engine, [PEER, "colo"], WALL_NS, gives_up_tail=tail is not None)

    return Story(
        *(stage.east.store, change, "secondary", at, stage.at_epoch[at]),
        *(lambda engine: not engine.superblock.superseded_by, tail),
    )


def a_return_without_a_tail() -> Story:
    stage = Stage(is_connected=False)
    stage.write_epochs(3)
    return outranked(stage, 3, None)


def a_return_with_a_tail() -> Story:
    stage = Stage(is_connected=False)
    stage.write_epochs(4)
    stage.pass_time(5000)
    stage.write_epochs(1, seed=3)
    assert stage.primary.engine.applied_epoch == 4
    return outranked(stage, 2, stage.at_epoch[5])


def a_return_in_a_resync() -> Story:
    """The copy goes back to the state that it holds, and is a part of the other history."""
    stage = held_stage()
    engine = stage.secondary.engine
    assert engine.held is not None
    chain = above(engine, 2, bytes.fromhex(engine.held.chain_hash))
    stage.secondary.hear_chain("colo", chain)
    stage.settle()
    assert engine.superblock.superseded_by

    def change(engine: Engine) -> Steps[object]:
        return following(engine, [PRIMARY, "colo"], WALL_NS, gives_up_tail=False)

    return Story(
        *(stage.west.store, change, "secondary", 2, stage.at_epoch[2]),
        *(lambda engine: not engine.superblock.superseded_by,),
    )


def a_return_after_a_resync() -> Story:
    """All of the resync counts: what follows it is a tail, and kept."""
    stage = resynced()
    engine = stage.secondary.engine
    end = engine.sealed_epoch
    assert engine.superblock.consistent_from <= end - 1
    chain = above(engine, end - 1, engine.epoch_info(end - 1).chain_hash)
    stage.secondary.hear_chain("colo", chain)
    stage.settle()

    def change(engine: Engine) -> Steps[object]:
        return following(engine, [PRIMARY, "colo"], WALL_NS, gives_up_tail=True)

    return Story(
        *(stage.west.store, change, "secondary", end - 1, stage.at_epoch[end - 1]),
        *(lambda engine: not engine.superblock.superseded_by, stage.at_epoch[end]),
    )


STORIES = [
    a_promotion,
    a_promotion_in_a_resync,
    a_promotion_after_a_resync,
    a_demotion,
    a_return_without_a_tail,
    a_return_with_a_tail,
    a_return_in_a_resync,
    a_return_after_a_resync,
]


@pytest.mark.parametrize("make", STORIES, ids=lambda make: make.__name__)
def test_a_change_that_is_stopped_anywhere_is_taken_up_again(
    make: Callable[[], Story],
) -> None:
    story = make()
    story.store.crash(lose_nothing=True)
    stops = 0
    while True:
        store = story.store.clone(stops)
        engine = story.open(store)
        stop_after(store, stops)
        try:
            story.take(engine)
        except Stop:
            stops += 1
        else:
            store.on_operation = None
            story.check(engine)
            break
        store.on_operation = None
        store.crash(lose_nothing=stops % 3 == 0)
        engine = story.open(store)
        assert engine.superblock.role in ("primary", "secondary")
        if not story.is_done(engine):
            story.take(engine)
        story.check(engine)
    assert stops > 3


def test_all_of_a_resync_is_said_and_promoted_though_readers_hold_the_state_from_before() -> None:
    stage = resynced()
    engine = stage.secondary.engine
    answer = answer_of(PEER, stage.secondary)
    assert (answer.epoch, answer.is_usable) == (engine.sealed_epoch, True)
    run(promoted(stage, engine.sealed_epoch).change(engine))
    assert read(engine) == stage.at_epoch[engine.sealed_epoch]


def test_a_tail_that_may_not_be_given_up_changes_nothing() -> None:
    stage = Stage(is_connected=False)
    stage.write_epochs(3)
    outranked(stage, 2, None)
    engine = stage.primary.engine
    before = engine.superblock.superseded_by
    with pytest.raises(RefusedError, match="has a tail of its own"):
        run(following(engine, [PEER], WALL_NS, gives_up_tail=False))
    assert engine.superblock.superseded_by == before
    assert engine.sealed_epoch == 3
