"""Client of a node's control socket: HTTP over a Unix socket, standard library only.

Light, because every command starts with it.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from geomirror.errors import GeomirrorError, UnreachableError
from geomirror.node.error_json import error_from_object
from geomirror.node.paths import DataDir

START_WAIT_S = 10.0
"""How long a command waits for a daemon that holds its lock and does not listen yet."""
ANSWER_BYTES_MAX = 64 << 20
"""Largest answer that is read."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


class ControlClient:
    """Calls methods of the daemon that serves a data directory."""

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir

    def call(
        self, method: str, parameters: Mapping[str, Any] | None = None, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """Call a method and return its result.

        :raises UnreachableError: no daemon, or no answer within `timeout_s`.
        :raises GeomirrorError: whatever the daemon answers, as its own class.
        """
        body = json.dumps(dict(parameters or {})).encode()
        headers = {"Content-Type": "application/json"}
        connection = self._connect(timeout_s)
        try:
            connection.request("POST", f"/v1/call/{method}", body, headers)
            answer = json.loads(connection.getresponse().read(ANSWER_BYTES_MAX))
        except TimeoutError as error:
            text = f"the daemon in {self._data_dir.root} did not answer within {timeout_s:g} s"
            raise UnreachableError(text) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            text = f"the daemon in {self._data_dir.root} went away: {error}"
            raise UnreachableError(text) from error
        finally:
            connection.close()
        if "error" in answer:
            raise error_from_object(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def events(self, *, follow: bool, count: int) -> Iterator[dict[str, Any]]:
        """The last `count` events, then, with `follow`, new ones until the daemon stops.

        :raises UnreachableError: no daemon.
        """
        connection = self._connect(None)
        try:
            connection.request("GET", f"/v1/events?follow={int(follow)}&count={count}")
            response = connection.getresponse()
            while line := response.readline():
                yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError) as error:
            text = f"the daemon in {self._data_dir.root} went away: {error}"
            raise UnreachableError(text) from error
        finally:
            connection.close()

    def is_running(self) -> bool:
        """Whether some process holds the data directory."""
        try:
            descriptor = os.open(self._data_dir.lock, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _connect(self, timeout_s: float | None) -> _UnixConnection:
        give_up = time.monotonic() + START_WAIT_S
        while True:
            path = str(self._data_dir.socket_dir() / "control.sock")
            connection = _UnixConnection(path, timeout_s)
            try:
                connection.connect()
            except OSError as error:
                # A daemon takes its lock first; soon after it listens.
                if self.is_running() and time.monotonic() < give_up:
                    time.sleep(0.05)
                    continue
                raise self._unreachable(error) from error
            return connection

    def _unreachable(self, error: OSError) -> GeomirrorError:
        root = self._data_dir.root
        if isinstance(error, PermissionError):
            return UnreachableError(f"{root}: {error.strerror}", hint="run it as the daemon's user")
        if self._data_dir.root.exists():
            hint = f'start it with "geomirror --data-dir {root} node run"'
        else:
            hint = 'begin with "geomirror network create" or "geomirror join", or give --data-dir'
        return UnreachableError(f"no daemon answers in {root}", hint=hint)
