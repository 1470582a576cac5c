"""The control socket: HTTP over a Unix socket that only this user can open.

`POST /v1/call/METHOD` with JSON parameters; `GET /v1/events?follow=1&count=N` streams NDJSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from typing import Any

from aiohttp import web

from geomirror.errors import GeomirrorError, StorageError, UsageError
from geomirror.limits import MIB
from geomirror.node.audit import local_user
from geomirror.node.calls import Caller, MethodRegistry
from geomirror.node.error_json import error_object
from geomirror.node.events import EVENTS_MAX, Event, EventRing

REQUEST_BYTES_MAX = 1 * MIB
"""Largest body of a call."""


class ControlServer:
    """Serves the methods and events of one node to this machine's operator."""

    def __init__(self, methods: MethodRegistry, events: EventRing) -> None:
        self._methods = methods
        self._events = events
        self._runner: web.AppRunner | None = None
        self._stopping = asyncio.Event()

    async def start(self, path: str) -> None:
        """Listen on `path`; a socket that a killed daemon left is replaced (the lock is ours).

        :raises StorageError: the socket cannot be made.
        """
        application = web.Application(client_max_size=REQUEST_BYTES_MAX)
        application.router.add_post("/v1/call/{method}", self._call)
        application.router.add_get("/v1/events", self._stream)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            # The daemon's umask is 077: the socket is born closed to everybody else.
            await web.UnixSite(self._runner, path).start()
            os.chmod(path, 0o600)
        except OSError as error:
            raise StorageError.from_os(error, operation="listen on", path=path) from error

    async def stop(self) -> None:
        """End streams and close the socket."""
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _call(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        try:
            parameters = await _parameters(request)
            caller = Caller(user=_user_of(request))
            result = await self._methods.dispatch(caller, method, parameters)
        except GeomirrorError as error:
            return web.json_response({"error": error_object(error)}, status=_http_status(error))
        return web.json_response({"result": result})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        try:
            count = min(max(int(request.query.get("count", "100")), 0), EVENTS_MAX)
        except ValueError:
            raise web.HTTPBadRequest(text="count is not a number") from None
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        queue = self._events.subscribe() if request.query.get("follow") == "1" else None
        try:
            await response.prepare(request)
            for event in self._events.recent(count):
                await response.write(_line(event))
            if queue is not None:
                await self._follow(queue, response)
        except ConnectionError:
            pass  # the reader went away
        finally:
            if queue is not None:
                self._events.unsubscribe(queue)
        return response

    async def _follow(self, queue: asyncio.Queue[Event], response: web.StreamResponse) -> None:
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                following = asyncio.ensure_future(queue.get())
                await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    return
                await response.write(_line(following.result()))
        finally:
            stopping.cancel()


def _user_of(request: web.Request) -> str:
    """Who is at the other end of the socket, by the kernel; "" when it is gone."""
    assert request.transport is not None
    found = request.transport.get_extra_info("socket")
    try:
        # A copy: the loop's own object may be one that cannot be asked.
        with socket.socket(fileno=os.dup(found.fileno())) as sock:
            size = struct.calcsize("3i")
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return ""
    return local_user(struct.unpack("3i", data)[1])


async def _parameters(request: web.Request) -> dict[str, Any]:
    body = await request.read()
    try:
        found = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError("body is not a JSON object")
    return found


def _line(event: Event) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _http_status(error: GeomirrorError) -> int:
    by_exit_code = {2: 400, 3: 503, 4: 404, 5: 409, 6: 504, 10: 403}
    return by_exit_code.get(error.exit_code, 500)
