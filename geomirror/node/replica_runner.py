"""Executes the decisions of one replica core: jobs on worker threads, messages on links, one timer.

It decides nothing. After every call into the core, `drive` drains what the core wants done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import structlog

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError
from geomirror.node.context import NodeContext
from geomirror.node.job_pace import SyncPace, is_small_sync, run_job
from geomirror.node.replica_trace import ReplicaTrace
from geomirror.node.sync_thread import JobBug, SyncThread
from geomirror.wan_protocol.decisions import (
    Decision,
    Emit,
    FlushDone,
    Job,
    RoomAvailable,
    RunJob,
    SendFrame,
    SendMessage,
)
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary

if TYPE_CHECKING:
    from geomirror.wan_protocol.streams_io import PeerLinks

_log = structlog.get_logger(component="replica")


class ReleasedJob(Job, Protocol):
    """A job that holds something back from the journal while it exists."""

    def release(self) -> None:
        """It has run."""


_Reading = TypeVar("_Reading", bound=ReleasedJob)

REPEATING = frozenset({"bad_frame", "spool_full", "storage_full", "volume_waits"})
"""Events that a lasting trouble causes again and again: they must not push others out."""
REPEAT_NS = 60 * SECOND


class ReplicaRunner:
    """One core on one event loop.

    :param on_room: called when writers that were held back may try again.
    :param on_flush: called with the token and the error of each answered flush.
    :param on_progress: called after each drain, for those who wait for a position.
    """

    def __init__(
        self,
        core: Primary | Secondary,
        name: str,
        context: NodeContext,
        *,
        on_room: Callable[[], None],
        on_flush: Callable[[object, GeomirrorError | None], None],
        on_progress: Callable[[], None],
    ) -> None:
        self.core = core
        self.name = name
        self.clock = context.clock
        self.now_ns = context.clock.now_ns
        """Monotonic time of the node's clock."""
        self._context = context
        self._links: PeerLinks = context.links
        self._on_room = on_room
        self._on_flush = on_flush
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self.trace = ReplicaTrace(name, context.clock)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._jobs = 0
        self._is_draining = False
        self._is_stopped = False
        self._silent_until_ns: dict[str, int] = {}
        self._pace = SyncPace(context.clock)
        self._sync_thread = SyncThread(name, self._loop)
        self._flushes: list[object] = []
        self._idle = asyncio.Event()
        self._idle.set()

    def drive(self) -> None:
        """Execute everything the core has decided, then arm its timer."""
        if self._is_draining or self._is_stopped:
            return
        self._is_draining = True
        decisions = self.core.decisions
        is_flushing = self._timer is not None and bool(decisions)
        try:
            while decisions:
                is_flushing &= self._execute(decisions.popleft())
        finally:
            self._is_draining = False
        if not is_flushing:
            self._arm()
            self._on_progress()

    def wrote(self) -> None:
        """After a write: mostly nothing is decided, and the timer is armed already."""
        if self.core.decisions or self._timer is None:
            self.drive()

    def flush(self, token: object, *, is_alone: bool) -> None:
        """Flush for one client; unless it is alone, together with whoever else asks in this turn
        of the loop. What was completed before the call is covered."""
        if isinstance(self.core, Primary) and self.core.policy.is_synchronous:
            # Flushes that come while an epoch is on its way share the next one.
            self.core.flush(token, self.now_ns())
            self.drive()
            return
        if is_alone:
            self.core.flush(token, self.now_ns())
            return
        if not self._flushes:
            self._loop.call_soon(self._flush_all)
        self._flushes.append(token)

    def _flush_all(self) -> None:
        tokens, self._flushes = self._flushes, []
        now_ns = self.now_ns()
        for token in tokens:
            self.core.flush(token, now_ns)
        self.drive()

    @property
    def is_stopped(self) -> bool:
        """Nothing new is to be started."""
        return self._is_stopped

    def run_read(
        self, job: _Reading, answer: Callable[[_Reading, GeomirrorError | None], None]
    ) -> None:
        """Run a read on a worker thread, then `answer` on the loop."""
        self._began()
        future = self._loop.run_in_executor(self._context.executor, run_job, job)

        def done(future: asyncio.Future[GeomirrorError | None]) -> None:
            self._ended()
            job.release()
            answer(job, future.result())

        future.add_done_callback(done)

    def _began(self) -> None:
        self._jobs += 1
        self._idle.clear()

    def _ended(self) -> None:
        self._jobs -= 1
        if self._jobs == 0:
            self._idle.set()

    def _execute(self, decision: Decision) -> bool:
        """Whether it was of a flush only: no deadline and nobody's position has changed by it."""
        # The two that a flush is made of come first.
        if isinstance(decision, RunJob):
            return self._start_sync(decision) if decision.kind == "sync" else self._start(decision)
        if isinstance(decision, FlushDone):
            self._on_flush(decision.token, decision.error)
            return True
        match decision:
            case SendFrame(peer, session, epoch, sequence, body, is_resync):
                self._links.send_frame(peer, session, epoch, sequence, body, is_resync=is_resync)
            case SendMessage(peer, session, message):
                self._links.send_message(peer, session, message)
                self.trace.told(peer, message, is_sent=True)
            case RoomAvailable():
                self._on_room()
            case Emit(kind, fields):
                self.tell(kind, fields)
        return False

    def tell(self, kind: str, fields: Mapping[str, object]) -> None:
        """Publish an event of this resource; one that repeats itself only once in a while."""
        if kind in REPEATING:
            now_ns = self.now_ns()
            if now_ns < self._silent_until_ns.get(kind, 0):
                return
            self._silent_until_ns[kind] = now_ns + REPEAT_NS
        self._context.emit(kind, {"resource": self.name, **fields})

    def _start(self, run: RunJob) -> bool:
        """Run a job; see `_execute`."""
        self._began()
        self.trace.began(run.kind)
        future = self._context.executor.submit(run_job, run.job)
        # Straight to the loop: `run_in_executor` takes another turn of it.
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._job_done, run, done)
        )
        return False

    def _start_sync(self, run: RunJob) -> bool:
        execute, engine = run_job, self.core.engine
        if is_small_sync(run.job, engine.journal.durable_lsn):
            execute = self._pace.run
            if self._pace.is_fast:
                sealed_epoch = engine.sealed_epoch
                self.core.job_done(run, execute(run.job), self.now_ns())
                return engine.sealed_epoch == sealed_epoch
        self._began()
        self._sync_thread.run(execute, run.job, partial(self._ended_with, run))
        return False

    def _job_done(self, run: RunJob, future: Future[GeomirrorError | None]) -> None:
        bug = future.exception()
        error = JobBug(bug) if bug is not None else future.result()
        self._ended_with(run, error)
        self.trace.ended(run.kind, error, self.core.engine.applied_epoch)

    def _ended_with(self, run: RunJob, error: GeomirrorError | None) -> None:
        self._ended()
        if self._is_stopped:
            return
        if isinstance(error, JobBug):
            # A programmer's error: nothing more is answered as done; recovery is the tested path.
            _log.critical("job_crashed", resource=self.name, job=run.kind, exc_info=error.bug)
            error = GeomirrorError(f"internal error in {run.kind}: {error.bug!r}")
        self.core.job_done(run, error, self.now_ns())
        self.drive()

    def _arm(self) -> None:
        at_ns = self.core.get_timer()
        if self._timer is not None:
            if at_ns is not None and self._timer_ns <= at_ns:
                return  # It fires early, finds nothing due and is armed again: cheaper than both.
            self._timer.cancel()
            self._timer = None
        if at_ns is None:
            return
        delay_s = max(0.0, (at_ns - self.now_ns()) / SECOND)
        self._timer_ns = at_ns
        self._timer = self._loop.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self.core.handle_timer(self.now_ns())
        self.drive()

    async def idle(self) -> None:
        """Until no job runs."""
        while self._jobs:
            self._idle.clear()
            await self._idle.wait()

    async def stop(self) -> None:
        """Execute nothing more; running jobs are waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_stopped = True
        await self.idle()
        self._sync_thread.stop()
