"""Quiesces an application for a mark, in a process of its own that outlives the command.

```
 command                                   keeper
   plan, one line of JSON ──────────────▶  pre 1, pre 2, …, freeze
   ◀──────────────  {"state": "ready"} or {"state": "failed"}
   (marks)
   {"result": "made", "epoch": 812} ────▶  thaw, post …, post 2, post 1
   ◀──────────────  {"state": "released", "is_held": true, "failures": []}
```
When the command dies (its end of the pipe is closed), or the time is over, the keeper thaws and
runs the post commands by itself. Post command N belongs to pre command N: it is run if that was
started, also if it failed; one without a partner always.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from geomirror.cli.freeze import FrozenMounts

OUTPUT_CHARACTERS_MAX = 300
"""Of what a failed command printed last."""
TERMINATE_S = 1.0
"""Between SIGTERM and SIGKILL of a command that takes too long."""
ALONE = "the command was ended"


def run_command(command: str, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run a shell command in a session of its own; why it failed, "" if it did not.

    Its output goes to a file: a grandchild that keeps it open must not keep us waiting.
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be started: {error}"
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"took longer than {timeout_s:g} s"
        if code == 0:
            return ""
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - OUTPUT_CHARACTERS_MAX))
        text = " ".join(output.read().decode(errors="replace").split())
        why = f"exit code {code}" if code > 0 else f"signal {-code}"
        return f"{why}: {text}" if text else why


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # Its children, if it went alone.


class Keeper:
    """One plan: `pre`, `post`, `freeze`, `timeout_s`, `environment`, `result_of_failure`."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._pre: Sequence[str] = plan["pre"]
        self._post: Sequence[str] = plan["post"]
        self._mounts: Sequence[str] = plan["freeze"]
        self._timeout_s: float = plan["timeout_s"]
        self._environment: dict[str, str] = {**os.environ, **plan["environment"]}
        self._started = 0
        self._frozen: FrozenMounts | None = None

    def quiesce(self) -> list[str]:
        """Pre commands, then the freeze; stops at the first failure and returns it."""
        for number, command in enumerate(self._pre, 1):
            if _is_alone():
                return [ALONE]
            self._started = number
            failure = run_command(command, self._environment, self._timeout_s)
            if failure:
                return [f"pre command {number} ({command}): {failure}"]
        if not self._mounts:
            return []
        if _is_alone():
            return [ALONE]
        try:
            self._frozen = FrozenMounts(self._mounts, self._timeout_s)
            self._frozen.freeze()
        except OSError as error:
            return [f"freeze of {', '.join(self._mounts)}: {error.strerror or error}"]
        return []

    def release(self, result: Mapping[str, Any]) -> tuple[bool, list[str]]:
        """Thaw, then the post commands; whether what was frozen was so until now, and failures."""
        is_held, failures = True, []
        if self._frozen is not None:
            try:
                is_held = self._frozen.thaw()
            except OSError as error:
                is_held = False
                failures.append(f"thaw of {', '.join(self._mounts)}: {error.strerror or error}")
        environment = {
            **self._environment,
            "GEOMIRROR_MARK_RESULT": str(result.get("result", "unknown")),
            "GEOMIRROR_EPOCH": str(result.get("epoch", "")),
        }
        for number, command in reversed(list(enumerate(self._post, 1))):
            if number <= len(self._pre) and number > self._started:
                continue
            failure = run_command(command, environment, self._timeout_s)
            if failure:
                failures.append(f"post command {number} ({command}): {failure}")
        return is_held, failures


def _is_alone() -> bool:
    """Whether the command is gone: it says nothing before it is answered, so this is the end."""
    return bool(select.select([0], [], [], 0)[0])


def _read_line(deadline: float | None) -> dict[str, Any]:
    """One line of the command; empty when it died or did not say anything in time."""
    text = b""
    while not text.endswith(b"\n"):
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([0], [], [], left)[0]:
            return {}
        part = os.read(0, 65536)
        if not part:
            return {}
        text += part
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def _say(state: str, **fields: object) -> None:
    # Nobody may be there to read it.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps({"state": state, **fields}).encode() + b"\n")


def main() -> int:
    """Run the plan that comes on standard input."""
    # Handlers instead of SIG_IGN, which the commands would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, lambda *_: None)
    plan = _read_line(None)
    if not plan:
        return 1
    keeper = Keeper(plan)
    began = time.monotonic()
    failures = keeper.quiesce()
    result: dict[str, Any] = {"result": plan["result_of_failure"]}
    is_in_time = True
    if failures:
        _say("failed", failures=failures)
    else:
        _say("ready", seconds=round(time.monotonic() - began, 3))
        deadline = time.monotonic() + plan["timeout_s"]
        result = _read_line(deadline)
        is_in_time = bool(result) and time.monotonic() < deadline
    is_held, more = keeper.release(result)
    _say("released", is_held=is_held and is_in_time, failures=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
