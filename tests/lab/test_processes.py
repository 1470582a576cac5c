"""Children of a lab: they end with it, whatever happens."""

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from geomirror.errors import GeomirrorError, UnreachableError, WaitTimeoutError
from geomirror.lab.control_io import is_listening
from geomirror.lab.lab_state_io import read_state
from geomirror.lab.ports_io import free_ports
from geomirror.lab.process_io import Child, run
from geomirror.node.process_identity import start_time

pytestmark = pytest.mark.system

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
PARENT = """
import asyncio, os, sys
from pathlib import Path
from geomirror.lab.process_io import Child
async def main():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = Child("child", command, Path(sys.argv[1]), os.environ)
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def gone(pid: int) -> bool:
    for _ in range(200):
        if not start_time(pid):
            return True
        await asyncio.sleep(0.02)
    return False


async def test_a_child_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, str(tmp_path / "log")), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert start_time(pid)
    parent.kill()
    await parent.wait()
    assert await gone(pid)


async def test_a_child_is_stopped_killed_and_started_again(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, tmp_path / "log", os.environ)
    await child.start()
    assert child.is_running
    assert await child.stop()
    assert child.pid is None
    await child.start()
    pid = child.pid
    assert pid is not None
    await child.kill()
    assert await gone(pid)


async def test_a_child_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('ready', flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    child = Child("stubborn", [sys.executable, "-c", code], log, os.environ)
    await child.start()
    await child.wait_until(lambda: "ready" in log.read_text(), what="ready", timeout_s=10)
    assert not await child.stop(timeout_s=0.2)
    assert not child.is_running


async def test_a_child_that_ends_early_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such device')"]
    child = Child("daemon", command, tmp_path / "log", os.environ)
    await child.start()
    with pytest.raises(GeomirrorError, match="no such device"):
        await child.wait_until(lambda: False, what="listening", timeout_s=10)


async def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(WaitTimeoutError):
        await run(SLEEP, timeout_s=0.2)
    output = await run([sys.executable, "-c", "print(input())"], timeout_s=10, stdin=b"hello\n")
    assert output.stdout == b"hello\n"


def test_a_state_file_of_a_dead_lab_counts_as_none(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError):
        read_state(tmp_path)
    state = f'{{"pid": {os.getpid()}, "start_time": "another process with our pid"}}'
    (tmp_path / "lab.json").write_text(state)
    with pytest.raises(UnreachableError):
        read_state(tmp_path)


def test_ports_differ() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8


def test_a_control_socket_counts_when_somebody_listens_not_when_its_file_appears(
    tmp_path: Path,
) -> None:
    path = tmp_path / "control.sock"
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert not is_listening(path)
        server.listen()
        assert is_listening(path)
    assert not is_listening(path)
