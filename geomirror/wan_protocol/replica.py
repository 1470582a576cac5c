"""What primaries and secondaries share: the jobs that keep a resource's storage moving.

```
 append ─▶ sync ─▶ sealed ─▶ apply ─▶ checkpoint ─▶ trim
            │        │         │          │
         flushes   ship     image =    superblock: the next start
         answered          one epoch   begins here
```
One job of each kind runs at a time. The order is the invariant: an image is changed only from
sealed epochs (I3, I14), a checkpoint follows its apply, and only a completed checkpoint lets the
journal be trimmed (I7). A storage failure other than a full disk fences the replica: nothing is
answered as done any more, and what is on disk is left to recovery.
Deliberately not here: when to seal, apply or ship; the two subclasses decide that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from geomirror.environment import SECOND
from geomirror.errors import FencedError, GeomirrorError, NoSpaceError, StorageError
from geomirror.limits import Limits
from geomirror.volume.apply import ApplyJob
from geomirror.volume.engine import Engine
from geomirror.volume.undo_merge import ThinJob
from geomirror.wan_protocol.decisions import Decision, Emit, FlushDone, Job, RoomAvailable, RunJob
from geomirror.wan_protocol.history_upkeep import HistoryUpkeep

RETRY_NS = 1 * SECOND
"""A full disk is looked at again after this time."""
SPARE_RETRY_NS = 10 * SECOND
"""A spare segment that found no space is tried again after this time."""
_NO_PASS_BESIDE = frozenset(("apply", "checkpoint", "thin", "return"))
_NO_THINNING_BESIDE = frozenset(("apply", "checkpoint", "thin"))


class Replica:
    """Base of `Primary` and `Secondary`. Drain `next_decision` after every call."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.fenced: GeomirrorError | None = None
        self.is_frozen = False
        self._stalled: GeomirrorError | None = None
        self.now_ns = 0
        self.decisions: deque[Decision] = deque()
        """What the shell has to do, in this order."""
        self._running: dict[str, RunJob] = {}
        self._flushes: deque[tuple[object, int]] = deque()
        self._sync_wanted = False
        self._checkpoint_wanted = True
        self._applying_through = 0
        self._retry_at_ns: int | None = None
        self._room_wanted = False
        self._spare_not_before_ns = 0
        self._history = HistoryUpkeep(
            engine, limits, lambda kind, fields: self._decide(Emit(kind, fields))
        )

    def next_decision(self) -> Decision | None:
        """The next thing for the shell to do, or None."""
        return self.decisions.popleft() if self.decisions else None

    def job_done(self, run: RunJob, error: GeomirrorError | None, now_ns: int) -> None:
        """A job of this core has ended; `error` is what its `run` raised."""
        self.now_ns = max(self.now_ns, now_ns)
        assert self._running.get(run.kind) is run
        del self._running[run.kind]
        sealed_epoch = self.engine.sealed_epoch
        if error is not None:
            self._job_failed(run, error)
        elif self.fenced is None or self.is_frozen:
            try:
                run.done(run.job)
            except GeomirrorError as failure:
                self._job_failed(run, failure)
        is_flush = run.kind == "sync" and self.engine.sealed_epoch == sealed_epoch
        if is_flush and not self._waits_for_sync:
            # Flushes were answered and no epoch became sealed: nothing else can be due by that.
            if self._flushes or self._sync_wanted:
                self._flush_pump()
        else:
            self._pump()

    @property
    def stalled(self) -> GeomirrorError | None:
        """Why something waits for disk space, or for a backing, at this moment."""
        return self._stalled

    def flush(self, token: object, now_ns: int) -> None:
        """Answer `token` with `FlushDone` once everything completed before now is durable (I2)."""
        self.now_ns = max(self.now_ns, now_ns)
        if self.fenced is not None:
            self._decide(FlushDone(token, self.fenced))
            return
        end_lsn = self.engine.journal.end_lsn
        if self.engine.journal.durable_lsn >= end_lsn:
            self._decide(FlushDone(token))
            return
        self._flushes.append((token, end_lsn))
        self._flush_pump()

    @property
    def is_idle(self) -> bool:
        """No job runs and nothing is decided."""
        return not self._running and not self.decisions

    @property
    def served_sizes(self) -> dict[int, int]:
        """Sizes of the volumes at the epoch that a reader who comes now will see: a pass that runs
        is waited for."""
        engine = self.engine
        is_applying = self.is_running("apply")
        through = self._applying_through if is_applying else engine.half_applied_through
        return engine.sizes.at(engine.applied_epoch if through is None else through)

    @property
    def is_image_settled(self) -> bool:
        """The images hold exactly the applied epoch; a pass neither runs nor stopped half-way."""
        return not self.is_running("apply") and self.engine.half_applied_through is None

    def freeze(self) -> None:
        """Start nothing more, for good; what runs ends as usual. For a change of the role, which
        goes on with the same engine once nothing runs."""
        self.is_frozen = True

    def hurry(self) -> None:
        """Frozen: let what may take seconds end at once. What it leaves undone is repeated."""
        assert self.is_frozen
        for kind in ("apply", "thin"):
            if kind in self._running:
                job = self._running[kind].job
                assert isinstance(job, ApplyJob | ThinJob)
                job.stop()

    def is_running(self, kind: str) -> bool:
        """Whether a job of this kind runs."""
        return kind in self._running

    # What the subclasses decide.

    @property
    def _waits_for_sync(self) -> bool:
        """Something but flushes and epochs waits for the end of a sync."""
        return False

    def _apply_target(self) -> int | None:
        """Epoch through which to apply now, or None for not now."""
        raise NotImplementedError

    def _sealed_moved(self) -> None:
        """`engine.sealed_epoch` has grown."""

    def _applied_moved(self) -> None:
        """A checkpoint with the applied epoch is durable."""

    def _checkpoint_needless(self) -> None:
        """A checkpoint was wanted, and what it would say is durable already."""

    def _room_moved(self) -> None:
        """The journal has more room."""

    def _pump_role(self) -> None:
        """Start whatever the role wants started."""

    def _release_everything(self, error: GeomirrorError) -> None:
        """The replica was fenced: drop what waits."""

    def _pass_end(self) -> int:
        """The sealed epoch that the next apply pass reaches."""
        return self.engine.pass_end(self.engine.sealed_epoch)

    # The shared machinery.

    def _decide(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def _run(self, kind: str, job: Job, done: Callable[[Any], None]) -> None:
        assert kind not in self._running
        run = self._running[kind] = RunJob(kind, job, done)
        self.decisions.append(run)

    def _pump(self) -> None:
        if self.fenced is not None or self.is_frozen:
            return
        try:
            self._pump_all()
        except StorageError as error:
            self._fence(error)

    def _pump_all(self) -> None:
        if self._retry_at_ns is not None and self.now_ns < self._retry_at_ns:
            self._pump_sync()
            return
        self._retry_at_ns = None
        self._stalled = None
        self._pump_role()
        self._pump_sync()
        # First, since a pass waits for it: one that has nothing to write ends without a job, and
        # nobody would come back to start the pass.
        self._pump_checkpoint()
        self._pump_apply()
        self._pump_upkeep()
        if self._room_wanted and self.fenced is None and self._has_room():
            self._room_wanted = False
            self._decide(RoomAvailable())

    def _has_room(self) -> bool:
        return self.engine.has_room(self.limits.record_payload_bytes_max)

    def _flush_pump(self) -> None:
        """The part of `_pump` that a flush waits for, alone: thousands a second come this way."""
        try:
            self._pump_sync()
        except StorageError as error:
            self._fence(error)

    def _pump_sync(self) -> None:
        if self.fenced is not None or self.is_frozen or "sync" in self._running:
            return
        if self._flushes or self._sync_wanted:
            self._sync_wanted = False
            self._run("sync", self.engine.sync_job(), self._sync_done)

    def _sync_done(self, job: Any) -> None:
        before = self.engine.sealed_epoch
        self.engine.complete_sync(job)
        if job.directory:
            # Another segment is in use: should its file be lost, the superblock misses it.
            self._checkpoint_wanted = True
        durable_lsn = self.engine.journal.durable_lsn
        flushes = self._flushes
        while flushes and flushes[0][1] <= durable_lsn:
            self.decisions.append(FlushDone(flushes.popleft()[0]))
        if self.engine.sealed_epoch > before:
            self._sealed_moved()

    def _pump_apply(self) -> None:
        if self._checkpoint_wanted or not _NO_PASS_BESIDE.isdisjoint(self._running):
            return
        half_done = self.engine.half_applied_through
        # Repeated as it was (I6), held or not: until then the image is at no epoch at all.
        target = self._apply_target() if half_done is None else half_done
        if target is not None and target > self.engine.applied_epoch:
            grow = self.engine.grow_job(target)
            if grow is None:
                self._applying_through = target
                self._run("apply", self.engine.apply_job(target), self._apply_done)
            elif not self.is_running("grow"):
                self._run("grow", grow, self._grow_done)

    def _grow_done(self, job: Any) -> None:
        if self.engine.complete_grow(job):
            self._checkpoint_wanted = True

    def _apply_done(self, job: Any) -> None:
        if job.is_stopped:
            return
        self.engine.complete_apply(job)
        self._history.look(self.now_ns)
        self._checkpoint_wanted = True

    def _pump_checkpoint(self) -> None:
        if not self._checkpoint_wanted:
            return
        is_busy = self.is_running("checkpoint") or self.is_running("apply")
        is_busy |= self.engine.undo.is_void and self.is_running("thin")  # It drops the undo.
        if is_busy:
            return
        self._checkpoint_wanted = False
        job = self.engine.checkpoint_job()
        if job is not None:
            self._run("checkpoint", job, self._checkpoint_done)
        else:
            self._checkpoint_needless()

    def _checkpoint_done(self, job: Any) -> None:
        self.engine.complete_checkpoint(job)
        self._applied_moved()

    def _pump_upkeep(self) -> None:
        journal = self.engine.journal
        if not self.is_running("trim"):
            self.engine.yield_way_back()
            trim = journal.trim_job()
            if trim is not None:
                self._run("trim", trim, self._trim_done)
        if not self.is_running("spare") and self.now_ns >= self._spare_not_before_ns:
            spare = journal.spare_job()
            if spare is not None:
                self._run("spare", spare, journal.complete_spare)

        self._pump_thin()

    def _pump_thin(self) -> None:
        if not _NO_THINNING_BESIDE.isdisjoint(self._running):
            return
        job = self._history.due_job(self.now_ns)
        if job is not None:
            self._run("thin", job, self._thinned)

    def _thinned(self, job: Any) -> None:
        self._history.thinned(job, self.now_ns)

    def _trim_done(self, job: Any) -> None:
        self.engine.journal.complete_trim(job)
        self._room_moved()

    def _job_failed(self, run: RunJob, error: GeomirrorError) -> None:
        self._history.look(self.now_ns)
        if run.kind == "grow":
            # Nothing was changed: what is in the way can be mended.
            self._stall(run.kind, error)
            return
        if not isinstance(error, NoSpaceError) or run.kind == "sync":
            self._fence(error)
            return
        if run.kind in ("trim", "spare"):
            run.done(run.job)  # Takes what was done; another one may be asked for.
        if run.kind in ("spare", "thin"):
            # Segments are made without it, too, and history stays finer: nothing has to wait.
            self._spare_not_before_ns = self.now_ns + SPARE_RETRY_NS
            return
        self._retry_job(run)
        self._stall(run.kind, error)

    def _stall(self, kind: str, error: GeomirrorError) -> None:
        """Wait for disk space, or for a backing. Nothing is lost: until then the data stays in the
        journal."""
        self._stalled = error
        if self._retry_at_ns is None or self._retry_at_ns <= self.now_ns:
            # Never put off: trims and passes wait for it, too, and may be what makes room.
            self._retry_at_ns = self.now_ns + RETRY_NS
        what = "volume_waits" if kind == "grow" else "storage_full"
        self._decide(Emit(what, {"job": kind, "error": str(error)}))

    def _retry_job(self, run: RunJob) -> None:
        if run.kind == "checkpoint":
            self._checkpoint_wanted = True

    def _fence(self, error: GeomirrorError) -> None:
        """Stop for good: whatever was answered stands, nothing more is answered as done."""
        if self.fenced is not None:
            return
        name = self.engine.superblock.name
        self.fenced = FencedError(
            f'resource "{name}" stopped serving: {error}',
            hint=f'mend the cause, restart the node, then run "geomirror status {name}"',
        )
        for token, _ in self._flushes:
            self._decide(FlushDone(token, self.fenced))
        self._flushes.clear()
        self._release_everything(self.fenced)
        self._decide(Emit("fenced", {"error": str(error)}))
