"""The command's side of quiescing an application: starts the keeper and talks to it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomirror.errors import GeomirrorError, RefusedError, UsageError

STEP_S_MORE = 10.0
"""What a step of the keeper may take beyond its timeout: starting, ending what does not end."""


@dataclass(frozen=True)
class Plan:
    """What quiesces the application: commands, and mount points to freeze."""

    pre: Sequence[str]
    post: Sequence[str]
    freeze: Sequence[str]
    timeout_s: float
    """Of each command, and how long the application stays quiet at most."""
    environment: Mapping[str, str] = field(default_factory=dict)
    is_crash_allowed: bool = False
    """The mark is tried also when the application cannot be quiesced."""

    @property
    def is_empty(self) -> bool:
        """Nothing is asked for: the mark is crash-consistent."""
        return not (self.pre or self.post or self.freeze)

    def check(self, data_dir: Path) -> None:
        """Refuse what would freeze the node here, or is no mount point.

        :raises UsageError, RefusedError: nothing was started.
        """
        for path in self.freeze:
            if not os.path.ismount(path):
                raise UsageError(f"--fsfreeze {path}: not a mount point")
            if os.stat(path).st_dev == os.stat(data_dir).st_dev:
                raise RefusedError(
                    f"--fsfreeze {path}: the node's own data directory {data_dir} lies there",
                    hint="a frozen journal takes no mark; freeze what lies on the volume only",
                )


class Quiescence:
    """An application that is quiet from `begin` to `end`, or until the keeper's time is over.

    As a context manager: whatever happens inside, the keeper is told to let the application go on.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._text = b""
        self._has_ended = False
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "geomirror.cli.quiesce_keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    def __enter__(self) -> Quiescence:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._has_ended:
            self.end("unknown", None)

    def begin(self) -> list[str]:
        """Quiesce; returns what failed, nothing if the application is quiet now.

        After a failure the keeper has begun to undo what it did; `end` waits for that.
        """
        plan = self._plan
        self._send(
            {
                "pre": plan.pre,
                "post": plan.post,
                "freeze": plan.freeze,
                "timeout_s": plan.timeout_s,
                "environment": plan.environment,
                # With a mark that is tried all the same, nobody knows yet what comes of it.
                "result_of_failure": "unknown" if plan.is_crash_allowed else "failed",
            }
        )
        answer = self._receive((len(plan.pre) + 1) * (plan.timeout_s + STEP_S_MORE))
        return [] if answer.get("state") == "ready" else _failures(answer)

    def end(self, result: str, epoch: int | None) -> tuple[bool, list[str]]:
        """Let the application go on; whether it was quiet until now, and what failed afterwards.

        :param result: `made`, `failed` or `unknown`, for the post commands.
        """
        self._has_ended = True
        plan = self._plan
        self._send({"result": result, "epoch": "" if epoch is None else epoch})
        answer = self._receive((len(plan.post) + 1) * (plan.timeout_s + STEP_S_MORE))
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(STEP_S_MORE)
        if answer.get("state") != "released":
            return False, _failures(answer)
        return bool(answer["is_held"]), list(answer["failures"])

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._keeper.stdin is not None
        try:
            text = memoryview(json.dumps(message).encode() + b"\n")
            while text:
                text = text[self._keeper.stdin.write(text) :]
        except OSError:
            return  # It is gone, which the next answer tells.

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        """One line of the keeper; empty when it is gone or silent."""
        assert self._keeper.stdout is not None
        descriptor, deadline = self._keeper.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._text:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                return {}
            part = os.read(descriptor, 65536)
            if not part:
                return {}
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        found = json.loads(line)
        return found if isinstance(found, dict) else {}


def _failures(answer: Mapping[str, Any]) -> list[str]:
    found = [str(each) for each in answer.get("failures", [])]
    return found or ["the process that keeps the application quiet was killed or hangs"]


def not_made(name: str, failures: Sequence[str]) -> GeomirrorError:
    """The application could not be quiesced, so there is no mark."""
    return RefusedError(
        f'mark "{name}" was not made: {"; ".join(failures)}',
        hint="--allow-crash-consistent makes it all the same, as a crash would leave the volume",
    )
