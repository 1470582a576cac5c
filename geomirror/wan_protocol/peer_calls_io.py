"""Calls between two nodes over their control connection: numbered requests, bounded both ways."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from geomirror.errors import (
    GeomirrorError,
    LimitExceededError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
    from_wire,
)
from geomirror.limits import KIB, Limits
from geomirror.wan_protocol.messages import Call, Message, Reply

CALLS_MAX = 64
"""Calls of one peer under way at once, in each direction."""
_ENVELOPE_BYTES = 4 * KIB
"""Room for everything of a `Call` or `Reply` but its JSON."""

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""(method, parameters) → result; raises `GeomirrorError`."""

_log = structlog.get_logger(component="links")


class PeerCalls:
    """Calls to and from one peer.

    :param send: sends a message now, or drops it when the link is down.
    """

    def __init__(
        self, peer: str, limits: Limits, send: Callable[[Message], None], handler: Handler
    ) -> None:
        self._peer = peer
        self._json_bytes_max = limits.message_bytes_max - _ENVELOPE_BYTES
        self._send = send
        self._handler = handler
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def call(
        self, method: str, parameters: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Call a method of the peer and wait for its result.

        :raises UnreachableError: no answer in time, or the link was lost; the peer may have acted.
        :raises GeomirrorError: whatever the peer raised.
        """
        body = self._encode(parameters, method)
        if len(self._waiting) >= CALLS_MAX:
            raise UnreachableError(f'node "{self._peer}": {CALLS_MAX} calls are waiting already')
        self._number += 1
        number = self._number
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._send(Call(number, method, body))
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            raise UnreachableError(
                f'node "{self._peer}" did not answer {method} within {timeout_s:g} s'
            ) from None
        finally:
            del self._waiting[number]
        if reply.error_code != 0:
            error = from_wire(reply.error_code, reply.error_text)
            error.hint = reply.hint
            raise error
        return self._decode(reply.result)

    def received(self, message: Call | Reply) -> None:
        """A call to serve, or the answer to one of ours; late answers are ignored.

        :raises RemoteProtocolError: parameters that are not a JSON object.
        """
        if isinstance(message, Reply):
            future = self._waiting.get(message.number)
            if future is not None and not future.done():
                future.set_result(message)
            return
        if len(self._serving) >= CALLS_MAX:
            busy = RefusedError(f"{CALLS_MAX} calls of this node are being served already")
            self._reply_error(message.number, busy)
            return
        parameters = self._decode(message.parameters)
        task = asyncio.get_running_loop().create_task(self._serve(message, parameters))
        self._serving.add(task)
        task.add_done_callback(lambda done: self._served(message.number, done))

    def link_lost(self, reason: str) -> None:
        """Fail the calls that wait for an answer."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(
                    UnreachableError(f'the link to node "{self._peer}" was lost: {reason}')
                )

    async def stop(self) -> None:
        """Fail waiting calls and cancel what is being served."""
        self.link_lost("this node stops")
        tasks = list(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, message: Call, parameters: dict[str, Any]) -> None:
        try:
            result = self._encode(await self._handler(message.method, parameters), message.method)
        except GeomirrorError as error:
            self._reply_error(message.number, error)
        else:
            self._send(Reply(message.number, 0, "", result))

    def _served(self, number: int, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if task.cancelled():
            return
        failure = task.exception()
        if failure is not None:
            # A programmer's error: the caller gets an answer, the loop's handler the traceback.
            self._reply_error(number, GeomirrorError(f"internal error: {failure!r}"))
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a call of a peer failed", "exception": failure, "task": task}
            )

    def _reply_error(self, number: int, error: GeomirrorError) -> None:
        self._send(Reply(number, error.wire_code, error.message[:1000], b"", error.hint[:1000]))

    def _encode(self, value: dict[str, Any], method: str) -> bytes:
        body = msgspec.json.encode(value)
        if len(body) > self._json_bytes_max:
            raise LimitExceededError(
                f"{method}: {len(body)} bytes of JSON, at most {self._json_bytes_max} are allowed"
            )
        return body

    def _decode(self, body: bytes) -> dict[str, Any]:
        try:
            value = msgspec.json.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"call of {self._peer}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RemoteProtocolError(f"call of {self._peer}: not a JSON object")
        return value
