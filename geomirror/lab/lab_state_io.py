"""The state file of a running lab, so that other commands find it: `DIR/lab.json`."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from geomirror.errors import RefusedError, UnreachableError, WaitTimeoutError
from geomirror.lab.lab_io import Lab
from geomirror.lab.process_io import tail
from geomirror.node.process_identity import start_time

STATE_FILE = "lab.json"
LOG_FILE = "lab.log"
"""Output of a lab in the background."""


def write_state(lab: Lab) -> None:
    """Say that this process runs the lab, with the pids of its daemons."""
    document = {
        "schema_version": 1,
        "pid": os.getpid(),
        "start_time": start_time(os.getpid()),
        "emulator_socket": str(lab.emulator_socket),
        "nodes": [node.to_json() for node in lab.nodes],
        "links": [list(pair) for pair in lab.link_names],
    }
    path = lab.directory / STATE_FILE
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
    temporary.chmod(0o600)
    temporary.replace(path)


def is_lab_running(state: dict[str, Any]) -> bool:
    """Whether the process that wrote the state still runs; a pid used again does not count."""
    began = start_time(int(state["pid"]))
    return bool(began) and began == state["start_time"]


def read_state(directory: Path) -> dict[str, Any]:
    """The state of a running lab.

    :raises UnreachableError: no lab runs in the directory.
    """
    try:
        state: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {}
    if not state or not is_lab_running(state):
        raise UnreachableError(
            f"no lab runs in {directory}", hint='start one with "geomirror lab up --dir DIR"'
        )
    return state


def refuse_second(directory: Path) -> None:
    """RefusedError when a lab runs in the directory already."""
    try:
        state = read_state(directory)
    except UnreachableError:
        return
    raise RefusedError(
        f"a lab runs in {directory} already, as process {state['pid']}",
        hint=f'stop it with "geomirror lab down --dir {directory}"',
    )


def remove_state(directory: Path) -> None:
    """Forget the lab."""
    (directory / STATE_FILE).unlink(missing_ok=True)


def wait_until_up(directory: Path, pid: int, timeout_s: float) -> dict[str, Any]:
    """Wait for a lab that was started in the background as process `pid`.

    :raises UnreachableError: it ended; the message has the end of its log.
    :raises WaitTimeoutError: it is not up in time; it was told to stop.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            state = read_state(directory)
        except UnreachableError:
            if not start_time(pid):
                text = f"the lab ended while starting:\n{tail(directory / LOG_FILE)}"
                raise UnreachableError(text) from None
        else:
            if state["pid"] == pid:
                return state
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    raise WaitTimeoutError(f"the lab in {directory} is not up after {timeout_s:g} s")


def stop_lab(directory: Path, timeout_s: float) -> None:
    """Ask the lab to stop and wait until it has.

    :raises UnreachableError: no lab runs there.
    :raises WaitTimeoutError: it still runs.
    """
    state = read_state(directory)
    os.kill(int(state["pid"]), signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while is_lab_running(state):
        if time.monotonic() > deadline:
            raise WaitTimeoutError(f"lab process {state['pid']} still runs after {timeout_s:g} s")
        time.sleep(0.05)
