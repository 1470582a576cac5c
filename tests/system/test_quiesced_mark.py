"""`mark --fsfreeze` on a real ext4 on an attached volume: what it promises, also when killed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.node.paths import DataDir
from tests.system.private_mounts import MountSite, require_attach
from tests.system.support import create, make_network, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


class Ticker(threading.Thread):
    """Writes a line and makes it durable, again and again; knows its longest pause."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.is_stopping = False
        self.lines = 0
        self.longest_s = 0.0

    def run(self) -> None:
        with self._path.open("ab") as file:
            while not self.is_stopping:
                began = time.monotonic()
                file.write(f"{self.lines:08}\n".encode())
                file.flush()
                os.fsync(file.fileno())
                self.lines += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def goes_on(self) -> None:
        before = self.lines
        until(lambda: self.lines > before + 3, 20, "a writer that goes on")

    def stop(self) -> None:
        self.is_stopping = True
        self.join(30)
        assert not self.is_alive()


@contextlib.contextmanager
def no_mark_is_answered(site: MountSite) -> Iterator[threading.Event]:
    """The daemon as one that hangs once it is asked for a mark; the event says when."""
    asked, path = threading.Event(), DataDir(site.data_dir).socket_dir() / "control.sock"
    real = path.with_name("real.sock")
    path.rename(real)
    held: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller = listener.accept()[0]
                held.append(caller)
                request = caller.recv(65536)
                if b"/mark.create" in request:
                    asked.set()
                    continue
                with socket.socket(socket.AF_UNIX) as daemon, caller:
                    daemon.connect(str(real))
                    daemon.sendall(request)
                    if b"\r\n\r\n" in request and not request.split(b"\r\n\r\n", 1)[1]:
                        daemon.sendall(caller.recv(65536))
                    caller.sendall(daemon.recv(1 << 20))

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    try:
        yield asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for each in (listener, *held):
            each.close()
        real.rename(path)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[MountSite, MountSite]]:
    """A primary that has "pg" mounted at `m`, and a secondary."""
    require_attach()
    a, b = MountSite(tmp_path, "a"), MountSite(tmp_path, "b")
    try:
        make_network(a, b)
        create(a, "pg")
        a.inside("mkfs.ext4", "-q", a.run("attach", "pg", "--device").strip())
        a.run("detach", "pg")
        (tmp_path / "m").mkdir()
        a.run("attach", "pg", str(tmp_path / "m"))
        yield a, b
        a.inside("fsfreeze", "--unfreeze", tmp_path / "m", may_fail=True)
        a.run("detach", "pg")
        assert a.leftovers() == []
        assert a.crashes() == b.crashes() == []
    finally:
        a.end()
        b.end()


def consistencies(site: MountSite) -> dict[str, str]:
    marks = site.call("mark.list", name="pg")["marks"]
    return {each["name"]: each["consistency"] for each in marks}


def test_a_frozen_file_system_is_marked_clean_and_its_writer_waits_only_that_long(
    pair: tuple[MountSite, MountSite], tmp_path: Path
) -> None:
    a, b = pair
    mount, log = tmp_path / "m", tmp_path / "log"
    ticker = Ticker(a.seen(mount) / "lines")
    ticker.start()
    try:
        ticker.goes_on()
        made = a.json(
            *("mark", "pg", "quiet", "--fsfreeze", str(mount)),
            *("--pre", f"echo pre $GEOMIRROR_RESOURCE $GEOMIRROR_MARK >>{log}"),
            *("--post", f"echo post $GEOMIRROR_MARK_RESULT $GEOMIRROR_EPOCH >>{log}"),
        )
        assert (made["consistency"], made["problems"]) == ("application", [])
        assert log.read_text() == f"pre pg quiet\npost made {made['epoch']}\n"
        ticker.goes_on()
        assert ticker.longest_s < 15
        a.run("mark", "pg", "crash")
    finally:
        ticker.stop()
    until(lambda: set(consistencies(b)) == {"quiet", "crash"}, what="marks at the other site")
    assert consistencies(a) == {"quiet": "application", "crash": "crash"}
    wait_applied(a)
    assert consistencies(b)["quiet"] == "application"
    assert "application" in b.run("mark", "pg", "--list")
    # What was frozen needs no replay; e2fsck -n reads it as it is.
    view = b.json("view", "create", "pg", "--at", "quiet")
    image = tmp_path / "quiet.img"
    subprocess.run(["nbdcopy", view["nbd_uri"], image], check=True)
    done = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    features = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, check=True).stdout
    assert b"needs_recovery" not in features


def test_a_killed_command_leaves_nothing_frozen(
    pair: tuple[MountSite, MountSite], tmp_path: Path
) -> None:
    a, _ = pair
    mount, log = tmp_path / "m", tmp_path / "log"
    ticker = Ticker(a.seen(mount) / "lines")
    ticker.start()
    command = a.command(
        *("mark", "pg", "late", "--fsfreeze", str(mount), "--timeout", "40s"),
        *("--pre", "true", "--post", f"echo $GEOMIRROR_MARK_RESULT >>{log}"),
    )
    try:
        ticker.goes_on()
        with no_mark_is_answered(a) as asked:
            started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            try:
                asked.wait(30)
                time.sleep(0.5)
                frozen_at = ticker.lines
                time.sleep(1)
                assert ticker.lines == frozen_at
            finally:
                started.kill()
                started.wait()
            killed_at = time.monotonic()
            ticker.goes_on()
            assert time.monotonic() - killed_at < 10
        until(lambda: log.exists() and log.read_text() == "unknown\n", 10, "the post command")
        assert consistencies(a) == {}
    finally:
        ticker.stop()


def test_what_cannot_be_quiesced_is_not_marked(
    pair: tuple[MountSite, MountSite], tmp_path: Path
) -> None:
    a, b = pair
    mount, log = tmp_path / "m", tmp_path / "log"
    hooks = (
        *("--pre", f"echo pre1 >>{log}", "--pre", "echo no luck; exit 3"),
        *("--post", f"echo post1 >>{log}", "--post", f"echo post2 >>{log}"),
    )
    said = a.error_inside("mark", "pg", "no", *hooks, expected=5, code="refused")
    assert "pre command 2" in said
    assert "no luck" in said
    assert "--allow-crash-consistent" in said
    assert log.read_text() == "pre1\npost2\npost1\n"
    assert consistencies(a) == {}

    said = b.error_inside(*("mark", "pg", "no", "--fsfreeze", str(mount)), expected=2, code="usage")
    assert "not a mount point" in said
    b.inside("mount", "-t", "tmpfs", "tmpfs", mount)
    said = b.error_inside(
        *("mark", "pg", "no", "--fsfreeze", str(mount)), expected=5, code="refused"
    )
    b.inside("umount", mount)
    assert "written on east-1, not here" in said
    assert consistencies(a) == {}

    made = a.json("mark", "pg", "anyhow", *hooks, "--allow-crash-consistent")
    assert made["consistency"] == "crash"
    assert "pre command 2" in made["problems"][0]
    made = a.json("mark", "pg", "half", "--pre", "true", "--post", "exit 4", expected=1)
    assert made["consistency"] == "crash"
    assert "exit code 4" in made["problems"][0]
    assert consistencies(a) == {"anyhow": "crash", "half": "crash"}
    # The commands above froze nothing for good.
    (a.seen(mount) / "file").write_bytes(b"x")
