"""Freezing file systems, with a process that thaws them whatever becomes of whoever froze them.

```
 keeper ──fork──▶ thawer (own session, holds the mount points open)
   │ FIFREEZE          │ waits: "done" ─▶ ends
   │ …                 │        time is over, or the keeper is gone ─▶ FITHAW
   └ FITHAW ──"done"──▶┘        time is over and the keeper still there ─▶ FITHAW again and again
```
To leave a file system frozen, both would have to be killed at the same instant (a whole control
group is, by `systemctl kill` or an OOM killer told so), or the machine's kernel to hang. Only the
standard library is used here and in `quiesce_keeper`: they have to start quickly and need nothing
of a frozen file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
"""`_IOWR('X', 119 and 120, int)`, from linux/fs.h."""
AGAIN_S = 0.2
"""Between two thaws of a thawer whose time is over: a slow freeze may be done only then."""
_DONE = b"d"


def freeze(descriptor: int) -> None:
    """Flush a file system and hold all writes to it back. May block while it is flushed.

    :raises OSError: EPERM without CAP_SYS_ADMIN, EBUSY when it is frozen already, EOPNOTSUPP.
    """
    fcntl.ioctl(descriptor, FIFREEZE, 0)


def thaw(descriptor: int) -> bool:
    """Let writes go on; False when it was not frozen."""
    try:
        fcntl.ioctl(descriptor, FITHAW, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


class FrozenMounts:
    """File systems frozen by this process, never longer than `timeout_s`."""

    def __init__(self, paths: Sequence[str], timeout_s: float) -> None:
        """Start the thawer. :raises OSError: a mount point cannot be opened; nothing is frozen."""
        self._descriptors: list[int] = []
        for path in paths:
            self._descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self._frozen: list[int] = []
        self._deadline = time.monotonic() + timeout_s
        reader, self._pipe = os.pipe()
        self.thawer = os.fork()
        if self.thawer == 0:
            os.close(self._pipe)
            _keep_watch(reader, self._descriptors, timeout_s)
        os.close(reader)

    def freeze(self) -> None:
        """Freeze all, in order. :raises OSError: one cannot be; call `thaw`."""
        for descriptor in self._descriptors:
            self._frozen.append(descriptor)
            try:
                freeze(descriptor)
            except OSError:
                self._frozen.pop()  # Not ours to thaw.
                raise

    def thaw(self) -> bool:
        """Thaw all, the last one first; whether all of them were frozen until now, in time.

        :raises OSError: one could not be thawed; the others are, and the thawer tried as well.
        """
        is_held = time.monotonic() < self._deadline
        failure: OSError | None = None
        for descriptor in reversed(self._frozen):
            try:
                is_held &= thaw(descriptor)
            except OSError as error:
                failure = error
        self._frozen.clear()
        if failure is None:
            try:
                os.write(self._pipe, _DONE)
            except BrokenPipeError:
                is_held = False  # The thawer was killed.
        os.close(self._pipe)
        os.waitpid(self.thawer, 0)
        for descriptor in self._descriptors:
            os.close(descriptor)
        if failure is not None:
            raise failure
        return is_held


def _keep_watch(reader: int, descriptors: Sequence[int], timeout_s: float) -> None:
    """The thawer's life; never returns."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        _do_not_kill_first()
        is_told = bool(select.select([reader], [], [], timeout_s)[0])
        while not is_told:
            _thaw_all(descriptors)
            is_told = bool(select.select([reader], [], [], AGAIN_S)[0])
        if os.read(reader, 1) != _DONE:
            _thaw_all(descriptors)
    finally:
        os._exit(0)


def _do_not_kill_first() -> None:
    """When memory is short, this process must be the last one to go."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")


def _thaw_all(descriptors: Sequence[int]) -> None:
    for descriptor in reversed(descriptors):
        try:
            thaw(descriptor)
        except OSError:
            continue  # The others have to be thawed all the same.
