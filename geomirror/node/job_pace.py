"""Where a job runs: on a worker thread, or, for a small sync of a fast disk, on the loop itself.

A flush of one client is a write, a sync and two replies, one after the other. Handing the sync to a
thread and back costs as much as the sync itself on a fast disk (`bench costs`), so there it is done
at once. A slow disk never holds up the loop: its first sync is a thread's, and is timed.
One that was fast and stalls holds it up for that one sync.
"""

from __future__ import annotations

from geomirror.environment import US, Clock
from geomirror.errors import GeomirrorError
from geomirror.limits import KIB
from geomirror.volume.journal_jobs import SyncJob
from geomirror.wan_protocol.decisions import Job

SYNC_AT_ONCE_NS_MAX = 500 * US
"""A sync expected to take less is done on the loop."""
SYNC_AT_ONCE_BYTES_MAX = 128 * KIB
"""A sync of more is always a thread's: how long it takes cannot be told from small ones."""
_WEIGHT = 1 / 5
"""Of the latest sync in the mean."""
_COUNTED_NS_MAX = 4 * SYNC_AT_ONCE_NS_MAX
"""A single stall sends only the next few to threads; a disk that stalls often, most of them."""


def run_job(job: Job) -> GeomirrorError | None:
    """Run on any thread; an operating error is a result, a programmer's error is not."""
    try:
        job.run()
    except GeomirrorError as error:
        return error
    return None


def is_small_sync(job: Job, durable_lsn: int) -> bool:
    """Whether a sync job covers one segment and little of it."""
    assert isinstance(job, SyncJob)
    is_little = job.lsn - durable_lsn <= SYNC_AT_ONCE_BYTES_MAX
    return is_little and len(job.files) == 1 and not job.directory


class SyncPace:
    """How long small syncs take here, as a moving average."""

    def __init__(self, clock: Clock) -> None:
        self.is_fast = False
        """A small sync may be done on the loop; False until one was timed."""
        self._now_ns = clock.now_ns
        self._mean_ns: float | None = None

    def run(self, job: Job) -> GeomirrorError | None:
        """`run_job`, timed; on any thread, one at a time."""
        began_ns = self._now_ns()
        error = None
        try:
            job.run()
        except GeomirrorError as failure:
            error = failure
        elapsed_ns = min(self._now_ns() - began_ns, _COUNTED_NS_MAX)
        mean_ns = elapsed_ns if self._mean_ns is None else self._mean_ns
        self._mean_ns = mean_ns = mean_ns + (elapsed_ns - mean_ns) * _WEIGHT
        self.is_fast = mean_ns <= SYNC_AT_ONCE_NS_MAX
        return error
