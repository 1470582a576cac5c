"""Any order of passes, merging, marks, views, clocks, full disks and restarts: what is shown is
what was, and nothing is given up without need or without a word."""

from __future__ import annotations

import errno
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, KIB
from geomirror.volume.epoch_table import Epoch
from geomirror.volume.image import Image
from geomirror.volume.marks import Mark, MarkTable
from geomirror.volume.points import points_of
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_levels import ages_of
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View
from tests.sim.disk import SimStore
from tests.volume.apply_support import GENERATION, LIMITS, World

BLOCKS = 12
HOUR = 3600 * SECOND
SMALL = replace(
    LIMITS,
    undo_bytes_max=24 * KIB,
    undo_passes_max=24,
    undo_levels=(
        (5 * SECOND, 60 * SECOND),
        (20 * SECOND, 300 * SECOND),
        (60 * SECOND, 540 * SECOND),
    ),
    undo_settled_ns=2 * SECOND,
)


class HistoryMachine(RuleBasedStateMachine):
    """A copy's undo beside the content of every epoch that it ever had."""

    @initialize(is_small=st.booleans())
    def begin(self, is_small: bool) -> None:
        self.limits = SMALL if is_small else replace(SMALL, undo_bytes_max=1 << 30)
        self.is_small = is_small
        self.world = World([BLOCKS * BLOCK_BYTES], lambda volume: bytes(BLOCKS * BLOCK_BYTES))
        self.store = SimStore()
        self.world.create_images(self.store)
        self.images: dict[int, Image] = self.world.images(self.store)
        self.undo = UndoStore(self.store, self.limits)
        self.wall_ns = 1_700_000_000 * SECOND
        self.applied = 0
        self.marks = MarkTable()
        self.views: dict[str, int] = {}
        self.told = 0
        self.is_disturbed = False
        """Room was short, or a file was damaged: points may be gone."""

    # What happens.

    @rule(
        blocks=st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, 255)), max_size=4),
        seconds=st.sampled_from([0.1, 0.3, 1, 4, 30]),
        is_marked=st.booleans(),
    )
    def apply(self, blocks: list[tuple[int, int]], seconds: float, is_marked: bool) -> None:
        """One pass of one epoch."""
        self.wall_ns += int(seconds * SECOND)
        content = {block: bytes([tag or 1]) * 64 + bytes(BLOCK_BYTES - 64) for block, tag in blocks}
        self.world.epoch([(0, block, data, 0) for block, data in content.items()])
        epoch = self.world.epochs[-1]
        fields = {name: getattr(epoch, name) for name in epoch.__dataclass_fields__}
        self.world.epochs[-1] = Epoch(**{**fields, "wall_ns": self.wall_ns})
        job = self.world.job(self.images, self.undo, self.applied, self.applied + 1)
        job._limits = self.limits
        job.run()
        self.applied += 1
        if is_marked and len(self.marks) < 4:
            name = f"m{self.applied}"
            self.marks.put(Mark(name, GENERATION, self.applied, self.wall_ns))
            self.marks.add_boundary(self.applied)
        self._hear()

    @rule(seconds=st.sampled_from([-31 * 24 * 3600, -3600, -1, 3600, 24 * 3600, 31 * 24 * 3600]))
    def set_clock(self, seconds: int) -> None:
        self.wall_ns += seconds * SECOND

    @rule(scrub=st.booleans())
    def thin(self, scrub: bool) -> None:
        marked = self.marks.marked_epochs()
        if marked:
            self.undo.pin("marks", marked[0])
        else:
            self.undo.unpin("marks")
        before = self._points()
        pinned = {*marked, *self.views.values()}
        job = ThinJob(self.store, self.undo, self.limits, marked, scrub_bytes=scrub * 64 * KIB)
        job.run()
        after = self._points()
        assert set(after) <= set(before)
        # A view's epoch may be where the oldest pass begins: it is kept, but its time is not.
        oldest = self.undo.history.horizon(self.applied)
        assert pinned & set(before) <= {*after, oldest}, "what is marked or looked at stays"
        assert not {*marked} & {*before} - {*after}, "of a mark the time is known"
        assert max(before, default=0) == max(after, default=0)

    @rule()
    def thin_to_the_end(self) -> None:
        for _ in range(60):
            self.thin(scrub=False)

    @rule()
    def unmark(self) -> None:
        for mark in self.marks.marks()[:1]:
            self.marks.remove(mark.name)

    @rule(which=st.integers(0, 100))
    def look(self, which: int) -> None:
        points = self._points()
        if points and len(self.views) < 3:
            epoch = points[which % len(points)]
            self.undo.pin(f"view {which}", epoch)
            self.views[f"view {which}"] = epoch

    @rule()
    def stop_looking(self) -> None:
        for owner in list(self.views)[:1]:
            del self.views[owner]
            self.undo.unpin(owner)

    @rule(is_crash=st.booleans())
    def restart(self, is_crash: bool) -> None:
        if is_crash:
            self.store.crash()
        before = self._points()
        self.undo = UndoStore(self.store, self.limits)
        self.undo.found(self.applied, 1 << 40)
        self.images = self.world.images(self.store)
        for owner, epoch in self.views.items():
            self.undo.pin(owner, epoch)
        assert self._points() == before, "what was kept is durable"

    @rule()
    def fill_the_disk_for_a_moment(self) -> None:
        self.is_disturbed = True
        self.store.fail("pwritev", "undo/*", error=errno.ENOSPC)
        self.apply(blocks=[(1, 7), (2, 9)], seconds=1, is_marked=False)
        self.store.faults.clear()

    @rule(which=st.integers(0, 100), bit=st.integers(0, 1 << 20))
    def damage(self, which: int, bit: int) -> None:
        files = [each.name for each in self.undo.passes()]
        if files:
            self.is_disturbed = True
            name = files[which % len(files)]
            self.store.flip_bit(name, bit % (8 * len(self.store.content(name))))
            # As after a start, or as a reader that met it would.
            self.undo = UndoStore(self.store, self.limits)
            self.undo.found(self.applied, 1 << 40)
            for owner, epoch in self.views.items():
                self.undo.pin(owner, epoch)
            for each in self.undo.passes():
                self.undo.suspect(each.name)
            ThinJob(self.store, self.undo, self.limits, self.marks.marked_epochs()).run()

    # What holds.

    def _points(self) -> list[int]:
        wall_ns = self.world.epochs[-1].wall_ns if self.world.epochs else 0
        history = self.undo.history
        return [p.epoch for p in points_of(history, self.applied, wall_ns, self.marks)]

    def _hear(self) -> None:
        for loss in self.undo.take_losses():
            assert loss.from_epoch < loss.to_epoch
            self.told = max(self.told, loss.to_epoch)

    @invariant()
    def every_point_shows_what_was(self) -> None:
        if not hasattr(self, "world"):
            return
        for epoch in self._points():
            view = View(epoch, self.images, lambda: self.undo.history, self.store.open, 1 << 16)
            assert view.read(0, 0, BLOCKS * BLOCK_BYTES) == self.world.states[epoch][0], epoch

    @invariant()
    def the_newest_state_is_a_point(self) -> None:
        if hasattr(self, "world") and self.applied:
            assert self._points()[-1] == self.applied

    @invariant()
    def nothing_is_lost_without_need_or_word(self) -> None:
        if not hasattr(self, "world") or self.is_disturbed:
            return
        horizon = self.undo.history.horizon(self.applied)
        ages = ages_of([epoch.wall_ns for epoch in self.world.epochs])
        old = [n + 1 for n, age in enumerate(ages) if age >= self.limits.undo_levels[-1][1]]
        assert horizon <= max(self.told, old[-1] if old else 0), "given up without a word"
        for mark in self.marks.marks():
            if mark.epoch > max(self.told, horizon):
                assert mark.epoch in self._points(), f"{mark.name} is gone"


HistoryMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=False
)
TestHistory = HistoryMachine.TestCase
