"""Child processes that never outlive the lab."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomirror.errors import GeomirrorError, WaitTimeoutError
from geomirror.node.process_identity import death_signal

LOG_TAIL_BYTES = 2000
"""Part of a child's log that goes into an error message."""


def tail(path: Path) -> str:
    """The last lines of a log, for a message."""
    try:
        return path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return ""


@dataclass
class Output:
    """What a finished command printed."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(command: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Output:
    """Run a command to its end, killing it with us and after `timeout_s`.

    :raises WaitTimeoutError: it did not end in time; it is dead now.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=death_signal(),
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(stdin), timeout_s)
    except TimeoutError:
        raise WaitTimeoutError(f"{' '.join(command)}: no end after {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return Output(process.returncode, stdout, stderr)


class Child:
    """A long-running child with its output in a log file. It can be started again."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Pid while it runs."""
        return self._process.pid if self.is_running and self._process is not None else None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it; its output is appended to the log."""
        assert not self.is_running
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=self._environment,
                # A group of its own: Ctrl-C at the terminal reaches the lab, which stops its
                # children in order.
                start_new_session=True,
                preexec_fn=death_signal(),
            )
        finally:
            os.close(descriptor)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._signal(signal.SIGKILL)

    async def stop(self, timeout_s: float = 10.0) -> bool:
        """SIGTERM, then SIGKILL after `timeout_s`; whether the first was enough."""
        try:
            await asyncio.wait_for(self._signal(signal.SIGTERM), timeout_s)
        except TimeoutError:
            await self.kill()
            return False
        return True

    async def wait_until(
        self, is_ready: Callable[[], bool], *, what: str, timeout_s: float
    ) -> None:
        """Poll `is_ready` while the child lives.

        :raises GeomirrorError: it ended first; the message has the end of its log.
        :raises WaitTimeoutError: it is not ready in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not is_ready():
            if not self.is_running:
                raise GeomirrorError(f"{self.name} ended before {what}:\n{tail(self.log)}")
            if loop.time() > deadline:
                raise WaitTimeoutError(f"{self.name}: not {what} after {timeout_s:g} s")
            await asyncio.sleep(0.02)

    async def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            await self._process.wait()
