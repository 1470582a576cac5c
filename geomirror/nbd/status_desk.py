"""The BLOCK_STATUS requests of one connection: answered one after the other, in order.

```
 take ─▶ queue ─▶ export's contexts (now or later) ─▶ base:allocation (now) ─▶ one reply
```
One at a time, since an answer may take a job on a worker thread and half a MiB of memory; a client
that asks for many waits, and its replies are made only as it takes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from geomirror.errors import GeomirrorError
from geomirror.nbd.constants import ALLOCATION_CONTEXT, CMD_FLAG_REQ_ONE, EXTENTS_MAX
from geomirror.nbd.contexts import ContextSource
from geomirror.nbd.protocol import Export, Request
from geomirror.nbd.structured import (
    block_status_chunk,
    encode_extents,
    error_chunk,
    fit_extents,
)


class StatusDesk:
    """Answers for the contexts of one connection.

    :param contexts: name → id, as negotiated.
    :param may_answer: whether there is room for another reply now; call `pump` when there is again.
    :param send: takes each complete reply, once for every request taken.
    """

    def __init__(
        self,
        export: Export,
        contexts: Mapping[str, int],
        may_answer: Callable[[], bool],
        send: Callable[[bytes], None],
    ) -> None:
        self._export = export
        self._contexts = contexts
        self._others = [name for name in contexts if name != ALLOCATION_CONTEXT]
        # Room for one extent each is there, however many contexts a client sets.
        self._extents_max = max(1, EXTENTS_MAX // max(1, len(contexts)))
        self._may_answer = may_answer
        self._send = send
        self._queue: deque[Request] = deque()
        self._is_busy = False
        self._is_pumping = False

    def take(self, request: Request) -> None:
        """Queue a validated BLOCK_STATUS; `pump` answers it."""
        self._queue.append(request)

    def pump(self) -> None:
        """Go on until an answer has to be waited for, or there is no room for it."""
        if self._is_pumping:
            return
        self._is_pumping = True
        while self._queue and not self._is_busy and self._may_answer():
            self._begin(self._queue.popleft())
        self._is_pumping = False

    def close(self) -> None:
        """The client is gone: nothing more is asked for."""
        self._queue.clear()

    def _begin(self, request: Request) -> None:
        self._is_busy = True
        count_max = 1 if request.flags & CMD_FLAG_REQ_ONE else self._extents_max

        def answer(extents: Sequence[bytes], error: GeomirrorError | None) -> None:
            self._is_busy = False
            self._finish(request, count_max, extents, error)
            self.pump()

        if self._others:
            assert isinstance(self._export, ContextSource)
            self._export.describe(self._others, request.offset, request.length, count_max, answer)
        else:
            self._is_busy = False
            self._finish(request, count_max, [], None)

    def _finish(
        self,
        request: Request,
        count_max: int,
        extents: Sequence[bytes],
        error: GeomirrorError | None,
    ) -> None:
        cookie, found = request.cookie, dict(zip(self._others, extents, strict=error is None))
        try:
            if error is None and ALLOCATION_CONTEXT in self._contexts:
                states = self._export.block_status(request.offset, request.length)
                states = fit_extents(states, request.length, count_max)
                found[ALLOCATION_CONTEXT] = encode_extents(states)
        except GeomirrorError as failure:
            error = failure
        if error is not None:
            self._send(error_chunk(cookie, error.nbd_errno, str(error)))
            return
        last = len(self._contexts) - 1
        chunks = [
            block_status_chunk(cookie, number, found[name], is_last=at == last)
            for at, (name, number) in enumerate(self._contexts.items())
        ]
        self._send(b"".join(chunks))
