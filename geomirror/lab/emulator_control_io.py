"""The emulator as a process of its own, and the client that steers it.

`python -m geomirror.lab.emulator_control_io SOCKET SEED` serves JSON lines on a Unix socket:
`{"method": M, "parameters": {...}}` → `{"result": ...}` or `{"error": {"code": C, "message": T}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geomirror.errors import GeomirrorError, UnreachableError, UsageError, from_wire
from geomirror.lab.emulator_io import Emulator, Link
from geomirror.lab.scenario import LinkSettings, parse_settings

LINE_BYTES_MAX = 1 << 20
"""One control request or answer."""


class EmulatorServer:
    """Answers control requests for one emulator."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._methods: dict[str, Callable[..., Any]] = {
            "add_link": self._add_link,
            "open_port": self._open_port,
            "set": self._set,
            "down": self._down,
            "up": lambda link: self._link(link).up(),
            "reset": lambda link: self._link(link).reset(),
            "flap": self._flap,
            "partition": lambda node, is_up: self._emulator.partition(node, is_up=is_up),
            "status": self._emulator.to_json,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One control connection."""
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # the client went away, or sent a line over the limit
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            method = self._methods.get(request["method"])
            if method is None:
                raise UsageError(f"the emulator has no method {request['method']!r}")
            result = method(**request["parameters"])
            if asyncio.iscoroutine(result):
                result = await result
        except GeomirrorError as error:
            return {"error": {"code": error.wire_code, "message": str(error)}}
        except (ValueError, KeyError, TypeError) as error:
            message = f"bad request to the emulator: {error}"
            return {"error": {"code": UsageError.wire_code, "message": message}}
        return {"result": result}

    def _link(self, link: list[str]) -> Link:
        return self._emulator.link(link[0], link[1])

    def _add_link(self, link: list[str], settings: dict[str, Any]) -> None:
        self._emulator.add_link(link[0], link[1], LinkSettings(**settings))

    async def _open_port(self, source: str, target: str, host: str, port: int) -> int:
        return await self._emulator.open_port(source, target, (host, port))

    def _set(self, link: list[str], settings: str, source: str | None = None) -> None:
        found = self._link(link)
        for (origin, _), direction in found.directions.items():
            if source in (None, origin):
                found.change(parse_settings(settings, direction.model.settings), origin)

    def _down(self, link: list[str], source: str | None = None) -> None:
        self._link(link).down(source)

    def _flap(self, link: list[str], down_s: float, period_s: float, count: int) -> None:
        found = self._link(link)
        if count <= 0:
            self._emulator.stop_flap(found)
        elif not 0 < down_s < period_s:
            raise UsageError("a flap's down time is positive and shorter than its period")
        else:
            self._emulator.flap(found, down_s=down_s, period_s=period_s, count=count)


class EmulatorClient:
    """Steers an emulator process; one connection per call."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def call(self, method: str, **parameters: Any) -> Any:
        """The method's result.

        :raises UnreachableError: no emulator answers at the socket.
        :raises GeomirrorError: the emulator's own error, with its class.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(
                str(self._path), limit=LINE_BYTES_MAX
            )
        except OSError as error:
            raise UnreachableError(
                f"no link emulator answers at {self._path}: {error.strerror}",
                hint='is the lab running? See "geomirror lab status"',
            ) from error
        try:
            request = {"method": method, "parameters": parameters}
            writer.write(json.dumps(request).encode() + b"\n")
            line = await reader.readline()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if not line:
            raise UnreachableError("the link emulator closed its control connection")
        answer = json.loads(line)
        if "error" in answer:
            raise from_wire(answer["error"]["code"], answer["error"]["message"])
        return answer["result"]


async def serve(path: Path, seed: int) -> None:
    """Run an emulator until SIGTERM or SIGINT."""
    emulator = Emulator(seed)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    control = EmulatorServer(emulator)
    # The socket is made by bind, with whatever the mask leaves: it is ours alone from the start.
    os.umask(0o077)
    server = await asyncio.start_unix_server(control.serve, str(path), limit=LINE_BYTES_MAX)
    try:
        await stop.wait()
    finally:
        server.close()
        await emulator.close()


def main() -> None:
    """Entry of the emulator process; uvloop where it is installed halves its CPU."""
    path, seed = Path(sys.argv[1]), int(sys.argv[2])
    path.unlink(missing_ok=True)
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(path, seed))
    else:
        uvloop.run(serve(path, seed))


if __name__ == "__main__":
    main()
