"""How long writers wait for disk space before they are told.

A full disk holds writers back first: what is completed stays in the journal, and whoever frees
space within the time hides the trouble from them. Then they get ENOSPC, which file systems know how
to handle, and so does every write after it until there is space again.
"""

from __future__ import annotations

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError

QUIET_NS = 3 * SECOND
"""Without a cause for this long there is space again: each retry looks good for an instant."""


class FullDisk:
    """Decides for one resource; `look` is called about once a second."""

    def __init__(self, wait_ns: int) -> None:
        self._wait_ns = wait_ns
        self._since_ns: int | None = None
        self._seen_ns = 0

    def look(self, cause: GeomirrorError | None, now_ns: int) -> GeomirrorError | None:
        """What writers are to be told now, None for let them wait.

        :param cause: why something waits for space at this moment.
        """
        if cause is None:
            if now_ns - self._seen_ns >= QUIET_NS:
                self._since_ns = None
            # There may be space again: nobody is told so without a cause.
            return None
        self._seen_ns = now_ns
        if self._since_ns is None:
            self._since_ns = now_ns
        return cause if now_ns - self._since_ns >= self._wait_ns else None
