"""The thread of one resource that runs its syncs, when they are not done on the loop.

Flushes wait for it, so it is not one of the node's worker threads: those may all be busy with
passes and epochs that take a second. A queue and a callback are all that is between it and the
loop: handing a job to an executor and back costs more of both CPU and time (`bench costs`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

from geomirror.errors import GeomirrorError
from geomirror.wan_protocol.decisions import Job

Execute = Callable[[Job], GeomirrorError | None]
Done = Callable[[GeomirrorError | None], None]


class JobBug(GeomirrorError):
    """A job ended with anything but an operating error."""

    def __init__(self, bug: BaseException) -> None:
        super().__init__(repr(bug))
        self.bug = bug


class SyncThread:
    """Runs jobs one after the other; the thread begins with the first of them."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._name = f"geomirror-sync-{name}"
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Execute, Job, Done] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, execute: Execute, job: Job, done: Done) -> None:
        """Have `execute(job)` run there, then `done` called on the loop with its result."""
        if self._thread is None:
            # A thread that hangs in a dead disk must not keep the process from ending.
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put((execute, job, done))

    def stop(self) -> None:
        """End the thread; no job may be under way."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        call = self._loop.call_soon_threadsafe
        while (item := self._queue.get()) is not None:
            execute, job, done = item
            try:
                error = execute(job)
            except BaseException as bug:
                call(done, JobBug(bug))
                raise  # It ends the thread, and what it served: there is no next job.
            call(done, error)
            # What a job holds is not kept until the next one comes.
            del item, execute, job, done, error
