"""Stories of a primary that was promoted in the middle of a resync: it goes back behind writers."""

from __future__ import annotations

import pytest

from geomirror.environment import MS, SECOND
from geomirror.errors import JournalFullError
from geomirror.limits import SIMULATION
from geomirror.volume import before_images, engine_return, undo_group
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import Emit, RunJob
from geomirror.wan_protocol.primary import Primary
from tests.wan_protocol.core_support import BLOCK, PEER, noise, write_of
from tests.wan_protocol.test_resync_held import held_stage

WALL_NS = 1_700_000_000_000_000_000


class Alone:
    """A primary core without peers; its jobs run when the story says so."""

    def __init__(self, engine: Engine, content: bytes) -> None:
        self.engine = engine
        self.content = bytearray(content)
        self.now_ns = SECOND
        self.jobs: list[str] = []
        self.events: list[str] = []
        self.core = Primary(
            engine, SIMULATION, incarnation=b"i" * 16, peers=[], now_ns=SECOND, wall_ns=WALL_NS
        )

    def step(self) -> bool:
        """One decision; False when there is none."""
        decision = self.core.next_decision()
        if isinstance(decision, RunJob):
            self.jobs.append(decision.kind)
            decision.job.run()
            self.core.job_done(decision, None, self.now_ns)
        elif isinstance(decision, Emit):
            self.events.append(decision.kind)
        return decision is not None

    def write(self, block: int, count: int, seed: int) -> None:
        data = noise(seed, count * BLOCK)
        try:
            self.core.write([write_of(block * BLOCK, data)], self.now_ns, WALL_NS + self.now_ns)
        except JournalFullError:
            return
        self.content[block * BLOCK : (block + count) * BLOCK] = data

    def pass_time(self, milliseconds: int) -> None:
        self.now_ns += milliseconds * MS
        self.core.handle_timer(self.now_ns)

    def check(self) -> None:
        assert self.engine.read(0, 0, len(self.content)) == self.content


def promoted() -> Alone:
    stage = held_stage(blocks=16)
    for _ in range(3):
        stage.unpark(1)
    stage.crash(PEER, is_kill=True)
    stage.start(PEER, is_connected=False)
    engine = stage.secondary.engine
    engine.take_held()
    job = engine.promote(engine.next_generation(b"g" * 16, "forced", "west", WALL_NS), [])
    job.run()
    engine.complete_checkpoint(job)
    return Alone(engine, stage.at_epoch[2][0])


def test_writers_and_passes_go_on_while_the_images_go_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(before_images, "_READ_BLOCKS_MAX", 1)
    monkeypatch.setattr(undo_group, "GROUP_BYTES_MAX", BLOCK)
    monkeypatch.setattr(engine_return, "RETURN_STEP_BYTES", 1)
    alone = promoted()
    alone.check()
    alone.core.handle_timer(alone.now_ns)
    # Enough for a pass to be due as soon as it is sealed.
    for block in range(0, 48, 4):
        alone.write(block, 4, block)
    number = 0
    while alone.engine.is_returning or number < 400:
        number += 1
        assert number < 5000, alone.jobs[-20:]
        if number % 3 == 0:
            alone.write(number * 7 % 24, 1 + number % 3, number)
            alone.check()
        alone.pass_time(100)
        alone.step()
    while alone.step():
        pass
    assert alone.events.count("returned") == 1
    assert alone.engine.undo.kept_after is None
    back, first_pass = alone.jobs.count("return"), alone.jobs.index("apply")
    assert back > 1
    assert first_pass < len(alone.jobs) - 1 - alone.jobs[::-1].index("return"), "they take turns"
    alone.check()
    assert not alone.engine.has_layer


def test_an_idle_primary_goes_back_by_itself() -> None:
    alone = promoted()
    alone.core.handle_timer(alone.now_ns)
    while alone.step():
        pass
    assert not alone.engine.is_returning
    assert alone.engine.undo.kept_after is None
    alone.check()
