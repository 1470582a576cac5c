"""The history of a copy, as its core looks after it: made coarser, read through, and spoken of.

```
 every 10 s ─▶ thin: expire, merge ─▶ nothing to do, and a day is over: read some of it through
 after every pass and thinning     ─▶ given up for want of room? ─▶ event, with the marks it cost
```
A primary keeps the last hour, and what leads back to what each peer has: whichever is promoted, it
can go back there by its own undo. Up to twice the budget; beyond that it is given up, and said.
Invariant: no point is given up without a word, and none of a mark without one of its own.
Deliberately not here: what is due (`volume.undo_levels`), the budget (`volume.undo_kept`).
"""

from __future__ import annotations

from collections.abc import Callable

from geomirror.environment import SECOND
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.marks import Mark
from geomirror.volume.undo_columns import WALL
from geomirror.volume.undo_faults import WORDS
from geomirror.volume.undo_history import History
from geomirror.volume.undo_kept import BUDGET, Loss
from geomirror.volume.undo_levels import ages_in
from geomirror.volume.undo_merge import ThinJob

THIN_INTERVAL_NS = 10 * SECOND
"""Between looks at whether history is due to get coarser."""
FIRST_SCRUB_NS = 3_600 * SECOND
"""A start has other things to do than reading history through."""
TOLD_NS = 3_600 * SECOND
"""A full budget costs a point with every new one: it is told so often."""
STRETCHES_TOLD_MAX = 32
"""Of many that are unusable at once the newest are told; what is before them is out of reach."""

REACH_NS = 3_600 * SECOND
"""What a primary keeps, whatever its peers have."""
_PEERS, _HOUR = "peers", "hour"

Tell = Callable[[str, dict[str, object]], None]


class HistoryUpkeep:
    """Of one core. For the event loop only."""

    def __init__(self, engine: Engine, limits: Limits, tell: Tell) -> None:
        self._engine = engine
        self._limits = limits
        self._tell = tell
        self._not_before_ns = 0
        self._scrub_at_ns: int | None = None
        self._told_ns: int | None = None
        self._known: set[tuple[int, str]] | None = None
        for owner in (_PEERS, _HOUR):
            engine.undo.keep_since(owner, None)  # Of the role before.

    def due_job(self, now_ns: int) -> ThinJob | None:
        """The next job to run, when it is time for one."""
        engine = self._engine
        if self._scrub_at_ns is None:
            self._scrub_at_ns = now_ns + min(FIRST_SCRUB_NS, self._limits.undo_scrub_ns)
        # A primary whose images go back to a state from before needs all undo since then.
        is_returning = engine.undo.kept_after is not None
        has_suspects = engine.undo.has_suspects and not is_returning
        if now_ns < self._not_before_ns and not has_suspects:
            return None
        self._not_before_ns = now_ns + THIN_INTERVAL_NS
        if engine.superblock.data_state != "consistent" or engine.half_applied_through is not None:
            return None
        marked = engine.marks.table.marked_epochs()
        if marked:
            engine.undo.pin("marks", marked[0])
        else:
            engine.undo.unpin("marks")
        if engine.superblock.role == "primary":
            reach_ns = min(REACH_NS, self._limits.undo_levels[-1][1])
            floor = reach_floor(engine.undo.history, engine.applied_epoch, reach_ns)
            engine.undo.keep_since(_HOUR, floor)
        if is_returning:
            return None
        scrub_bytes = self._limits.undo_scrub_bytes if now_ns >= self._scrub_at_ns else 0
        return ThinJob(engine.store, engine.undo, self._limits, marked, scrub_bytes)

    def keep_for_peers(self, epoch: int | None) -> None:
        """At a primary: the oldest state that one of its peers may be promoted with."""
        self._engine.undo.keep_since(_PEERS, epoch)

    def thinned(self, job: ThinJob, now_ns: int) -> None:
        """A job of `due_job` has run."""
        if job.has_changed:
            self._not_before_ns = now_ns
        if job.is_scrubbed:
            self._scrub_at_ns = now_ns + self._limits.undo_scrub_ns
        self.look(now_ns)
        self._tell_faults()

    def look(self, now_ns: int) -> None:
        """After a pass: tell what was given up for it, and why."""
        for loss in self._engine.undo.take_losses():
            self._tell_loss(loss, now_ns)

    def _tell_loss(self, loss: Loss, now_ns: int) -> None:
        table = self._engine.marks.table
        marks = [
            mark.name
            for mark in table.marks()
            if table.is_held(mark) and loss.from_epoch <= mark.epoch < loss.to_epoch
        ]
        why = "its budget is used up" if loss.why == BUDGET else WORDS[loss.why]
        fields: dict[str, object] = {"reason": why, "oldest_epoch": loss.to_epoch}
        for name in marks:
            self._tell("mark_lost", {"mark": name, **fields})
        is_repeated = loss.why == BUDGET and self._told_ns is not None
        if is_repeated and self._told_ns is not None and now_ns < self._told_ns + TOLD_NS:
            return
        if loss.why == BUDGET:
            self._told_ns = now_ns
        self._tell("history_dropped", {**fields, "former_oldest_epoch": loss.from_epoch})

    def _tell_faults(self) -> None:
        engine = self._engine
        epoch = engine.state_epoch
        if epoch is None:
            return
        # Those that a pass itself made are losses, and told as such.
        found = {
            (each.to_epoch, each.reason): each
            for each in engine.undo.history.unusable(epoch)[-STRETCHES_TOLD_MAX:]
            if each.fault in ("damaged", "missing")
        }
        for key, each in found.items():
            if self._known is None or key not in self._known:
                fields: dict[str, object] = {"from_epoch": each.from_epoch}
                self._tell(
                    "history_damaged", {**fields, "to_epoch": each.to_epoch, "reason": each.reason}
                )
        self._known = set(found)


def reach_floor(history: History, applied_epoch: int, reach_ns: int) -> int:
    """The newest point that is so old; the oldest one when there is none."""
    start, end = history.kept_range(applied_epoch)
    if start == end:
        return applied_epoch
    count = int((ages_in(history.columns[WALL, start:end]) >= reach_ns).sum())
    oldest = history.whole[start]
    return history.whole[start + count - 1].to_epoch if count else oldest.from_epoch


def peers_out_of_reach(engine: Engine) -> list[tuple[str, int]]:
    """Peers of a primary, and what they have: were one of them promoted, undo does not lead back
    to that any more."""
    superblock = engine.superblock
    if superblock.role != "primary" or engine.is_returning:
        return []
    oldest = engine.undo.history.horizon(engine.applied_epoch)
    return [
        (name, record.durable_epoch)
        for name, record in sorted(superblock.peers.items())
        if not record.is_initial and record.durable_epoch < oldest
    ]


def loss_marks(engine: Engine) -> list[Mark]:
    """Marks that this copy held and cannot show any more: undo does not lead back to them."""
    epoch = engine.state_epoch
    if epoch is None:
        return []
    table, history = engine.marks.table, engine.undo.history
    return [
        mark
        for mark in table.marks()
        if table.is_held(mark) and mark.epoch < epoch and not history.reaches(mark.epoch, epoch)
    ]
