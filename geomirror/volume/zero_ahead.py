"""Zeros written ahead of the log's end in a segment whose blocks are not written yet.

```
 records │ end ▶ zeros, up to 1 MiB │ never written: a sync here waits for the file system's journal
```
A bulk load leaves the log in a sparse segment. When its writer begins to flush every few records, a
sync of unwritten blocks takes longer than one of written blocks (`bench costs`); zeroing a MiB
costs about as much as a sync and serves a few hundred of them.
"""

from __future__ import annotations

from geomirror.errors import StorageError
from geomirror.volume.segment import Segment

ZERO_BYTES = 1 << 20
SYNC_BYTES_MAX = 128 * 1024
"""Syncs that cover more gain nothing worth writing their blocks twice."""


class ZeroAhead:
    """Keeps the next blocks of a sparse segment written while small batches are synced."""

    def __init__(self, segment_bytes: int, sparse: int) -> None:
        self.sparse = sparse
        """Number of the newest segment that was sparse when the log went on in it."""
        self._segment_bytes = segment_bytes
        self._zeroed_lsn = 0
        self._synced_lsn = 0

    def before_sync(self, current: Segment, end_lsn: int) -> None:
        """A sync through `end_lsn` is about to begin: write zeros behind it if that will pay.

        On the thread that appends, so nothing else writes there. Nothing depends on the zeros: the
        log ends at the first invalid record, whether it is a hole or zeros. Never raises.
        """
        covered, self._synced_lsn = end_lsn - self._synced_lsn, end_lsn
        if current.number != self.sparse or end_lsn < self._zeroed_lsn or covered > SYNC_BYTES_MAX:
            return
        limit_lsn = (current.number + 1) * self._segment_bytes
        size = min(ZERO_BYTES, limit_lsn - end_lsn)
        if size <= 0:
            return
        try:
            current.file.pwritev([bytes(size)], end_lsn % self._segment_bytes)
        except StorageError:
            # A full or failing disk is found by the records, who have somebody to tell.
            self.sparse = -1
            return
        self._zeroed_lsn = end_lsn + size
