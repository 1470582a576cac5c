"""A disk that outlives its server: an export that forwards to one, and to the next one.

    users ──requests──> ReplayQueue ──> one client connection ──> server
                            ^                    │ lost
                            └── unanswered ──────┘ then `connect` again, until it comes back

All users share one connection, so a FLUSH of any of them covers the answered writes of all. What
is sent again, and why that is right, is in `replay`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from geomirror.environment import Clock
from geomirror.errors import ChangedError, GeomirrorError
from geomirror.limits import Limits
from geomirror.nbd import constants as c
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.protocol import ReplySink, Request
from geomirror.nbd.replay import ReplayQueue, Unanswered
from geomirror.nbd.reply_parser import Pending

_DEFAULT_MESSAGE = "the server is away for too long"


class ResumingExport:
    """Implements `protocol.Export` over servers that come and go; `run` keeps a connection.

    :param connect: gives an attached client of the same disk, once its server answers. Its
        `ChangedError` says that there will be none; every other error that there is none yet.
    :param timeout_ns: how long a server may be away before requests fail with EIO; None: for ever.
    :param on_error: told of each answer that is an error: command and errno.
    """

    description = "attached"
    is_multi_conn = True

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[NbdClient]],
        *,
        clock: Clock,
        limits: Limits,
        timeout_ns: int | None,
        on_error: Callable[[int, int], None],
    ) -> None:
        self.name = name
        self.size_bytes = 0
        self.is_read_only = False
        self.minimum_block = 1
        self.preferred_block = 4096
        self.maximum_payload = 32 << 20
        self.reason: GeomirrorError | None = None
        """Why there is no server now; None while there is one."""
        self.is_over = False
        """There will be no server any more: everything fails."""
        self._connect = connect
        self._clock = clock
        self._limits = limits
        self._on_error = on_error
        self._queue = ReplayQueue(timeout_ns, clock.now_ns())
        self._client: NbdClient | None = None
        self._paused: list[ReplySink] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def away_since_ns(self) -> int | None:
        """When the server went away; None while it is there."""
        return self._queue.away_since_ns

    @property
    def unanswered(self) -> int:
        """Requests that wait for the server."""
        return len(self._queue)

    @property
    def replayed(self) -> int:
        """Requests that were sent again to a server that came back."""
        return self._queue.replayed

    # ---- the server's side

    async def start(self) -> None:
        """Connect for the first time; size and mode are that server's from now on.

        :raises GeomirrorError: as `connect`.
        """
        client = await self._connect()
        told = client.export
        self.size_bytes, self.is_read_only = told.size_bytes, told.is_read_only
        self.minimum_block, self.preferred_block = told.minimum_block, told.preferred_block
        self.maximum_payload = told.maximum_payload
        self._begin(client)

    async def run(self) -> None:
        """Forward until cancelled, or until the disk `is_over`; then close the connection."""
        try:
            while (client := self._client) is not None:
                await client.wait_closed()
                self._client = None
                self._queue.disconnected(self._clock.now_ns())
                self._set_timer()
                await self._reconnect()
        finally:
            client, self._client = self._client, None
            if client is not None:
                await client.close()
            if self._timer is not None:
                self._timer.cancel()

    async def _reconnect(self) -> None:
        wait_ns = self._limits.attach_retry_ns
        while not self.is_over:
            try:
                client = await self._connect()
            except ChangedError as error:
                self.reason = error
                self.give_up()
            except GeomirrorError as error:
                self.reason = error
                await asyncio.sleep(wait_ns / 1e9)
                wait_ns = min(2 * wait_ns, self._limits.attach_retry_ns_max)
            else:
                if self.is_over:
                    client.abort()
                    return
                self._begin(client)
                return

    def _begin(self, client: NbdClient) -> None:
        self._client, self.reason = client, None
        self._queue.connected()
        self._set_timer()
        self._send()

    def give_up(self) -> None:
        """Fail whatever waits and whatever comes, for good. What was sent may take effect."""
        self.is_over = True
        client, self._client = self._client, None
        if client is not None:
            client.abort()
        self._queue.disconnected(self._clock.now_ns())
        self._fail(self._queue.take_all())

    # ---- the users' side (protocol.Export)

    def open(self, sink: ReplySink) -> object:
        """A user attaches."""
        return _User(sink)

    def close(self, handle: object) -> None:
        """A user is gone."""
        self._queue.disown(handle)

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        """Take a batch: it goes to the server now, or when there is one."""
        add = self._queue.add
        for request in requests:
            payload = None if request.payload is None else bytes(request.payload)
            command, flags = request.command, request.flags & ~c.CMD_FLAG_DF
            add(handle, request.cookie, command, flags, request.offset, request.length, payload)
        if self.is_over:
            self._fail(self._queue.take_all())
            return
        self._send()
        self._fail(self._queue.take_overdue(self._clock.now_ns()))
        self._set_timer()
        if self._queue.payload_bytes > self._limits.nbd_queued_bytes_max:
            sink.pause_reading()
            self._paused.append(sink)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Everything counts as data: those whom this serves do not ask."""
        return [(length, 0)]

    # ---- between them

    def _send(self) -> None:
        client = self._client
        while client is not None and (request := self._queue.next_to_send()) is not None:
            target = None
            if request.command == c.CMD_READ:
                target = memoryview(bytearray(request.length))
            try:
                future = client.start(
                    request.command,
                    request.offset,
                    request.length,
                    request.flags,
                    payload=request.payload,
                    target=target,
                )
            except GeomirrorError:
                # Lost a moment ago: `run` finds out, and this request is among the unanswered.
                return
            future.add_done_callback(partial(self._answered, request, client))

    def _answered(
        self, request: Unanswered, client: NbdClient, future: asyncio.Future[Pending]
    ) -> None:
        if client is not self._client or future.cancelled():
            return
        error = future.exception()
        number, message = 0, ""
        if error is not None:
            if not isinstance(error.__cause__, OSError):
                return  # The connection was lost, which is no answer.
            number = error.__cause__.errno or errno.EIO
            message = str(error)
            self._on_error(request.command, number)
        self._queue.answered(request)
        sink = self._sink(request)
        if number:
            sink.reply(request.cookie, number, message)
        elif request.command == c.CMD_READ:
            target = future.result().target
            assert target is not None
            sink.reply_read(request.cookie, request.offset, [target])
        else:
            sink.reply(request.cookie)
        self._send()
        self._resume_users()

    def _fail(self, requests: list[Unanswered]) -> None:
        message = str(self.reason) if self.reason is not None else _DEFAULT_MESSAGE
        for request in requests:
            self._on_error(request.command, errno.EIO)
            self._sink(request).reply(request.cookie, errno.EIO, message)
        self._resume_users()

    def _resume_users(self) -> None:
        if self._paused and self._queue.payload_bytes <= self._limits.nbd_queued_bytes_max // 2:
            paused, self._paused = self._paused, []
            for sink in paused:
                sink.resume_reading()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timer = self._queue.get_timer()
        if timer is not None and not self.is_over:
            wait_s = max(0, timer - self._clock.now_ns()) / 1e9
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._overdue)

    def _overdue(self) -> None:
        self._timer = None
        self._fail(self._queue.take_overdue(self._clock.now_ns()))
        self._set_timer()

    @staticmethod
    def _sink(request: Unanswered) -> ReplySink:
        assert isinstance(request.owner, _User)
        return request.owner.sink


@dataclass(slots=True, eq=False)
class _User:
    """One connection."""

    sink: ReplySink
