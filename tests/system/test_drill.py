"""`geomirror drill`: real file systems tried on real copies, and nothing left whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.lab.ports_io import free_port
from tests.system.private_mounts import MountSite, require_attach
from tests.system.support import (
    Site,
    count_links,
    create,
    is_running,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
FSCK = 'e2fsck -f -y "$GEOMIRROR_FILE"; test $? -le 1'
"""1: it was repaired, by a replay of its journal."""


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MountSite, MountSite]]:
    """Two linked nodes, for all stories of `pair`."""
    require_attach()
    root = tmp_path_factory.mktemp("pair")
    a, b = MountSite(root, "a"), MountSite(root, "b")
    try:
        a.data_dir.mkdir(mode=0o700)
        # A primary has points of what is destaged: half a minute later, by default.
        (a.data_dir / "geomirror.toml").write_text("[storage]\ndestage_age_s = 1\n")
        make_network(a, b)
        yield a, b
        assert a.crashes() == b.crashes() == []
    finally:
        a.end()
        b.end()


@pytest.fixture
def pair(
    daemons: tuple[MountSite, MountSite], tmp_path: Path
) -> Iterator[tuple[MountSite, MountSite]]:
    """A primary that has a new "pg" mounted and a secondary; at the end no drill has left a thing.

    A resource of that name from before has taken its drills with it.
    """
    a, b = daemons
    create(a, "pg")
    a.inside("mkfs.ext4", "-q", a.run("attach", "pg", "--device").strip())
    a.run("detach", "pg")
    (tmp_path / "m").mkdir()
    a.run("attach", "pg", str(tmp_path / "m"))
    yield a, b
    a.run("detach", "pg")
    for site in (a, b):
        assert traces(site) == []
        assert site.call("view.list", name="pg")["views"] == []
    assert a.leftovers() == []
    a.run("resource", "delete", "pg", "--yes")
    until(lambda: not b.call("status")["resources"], what="it is deleted there, too")


def runs(word: str) -> bool:
    """Whether a process has this argument: numbers are other ones in a namespace of its own."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def traces(site: Site) -> list[str]:
    """Processes and loop devices of a drill."""
    found = []
    mark = str(site.data_dir).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if mark in words and (b"geomirror.cli.drill_inside" in words or b"nbdfuse" in words):
                found.append(f"{path}: {words!r}")
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if "/geomirror-drill/" in path.read_text():
                found.append(f"{path}: {path.read_text()}")
    return found


def last(site: Site) -> Any:
    return site.status()["last_drill"]


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def test_a_copy_is_mounted_checked_and_remembered(
    pair: tuple[MountSite, MountSite], tmp_path: Path
) -> None:
    a, b = pair
    assert last(b) is None
    write_durably(a.seen(tmp_path / "m") / "precious", b"here")
    wait_applied(a)
    seen = tmp_path / "seen"
    check = f'env >{seen}; grep -q here "$GEOMIRROR_MOUNT/precious" && echo fine'
    done = b.json("drill", "pg", "--check", check)["drill"]
    assert (done["result"], done["exit_code"], done["file_system"]) == ("passed", 0, "ext4")
    assert done["output"] == "fine\n"
    assert 0 < done["rto_seconds"] < done["mount_seconds"]
    environment = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    assert environment["GEOMIRROR_EPOCH"] == str(done["epoch"])
    assert environment["GEOMIRROR_TIME"] == done["time"]
    assert environment["GEOMIRROR_RESOURCE"] == "pg"
    assert environment["GEOMIRROR_URI"].startswith("nbd+unix:///pg@v1/0?socket=")
    assert last(b)["result"] == "passed"
    assert last(b)["last_passed_at"] == done["started_at"]
    assert last(a) is None, "it was not this node's copy that was tried"
    assert "drill passed" in b.run("status", "pg")
    elsewhere = until(lambda: a.status()["drills_elsewhere"], what="the primary heard of it")
    assert [(d["node"], d["last_passed_at"]) for d in elsewhere] == [("west-1", done["started_at"])]
    assert "drill at west-1 passed" in a.run("status", "pg")

    # At the primary, on whose machine the volume is mounted and in use; and with a real fsck.
    until(lambda: a.call("resource.timeline", name="pg")["points"], 60, "points at the primary")
    for site in (a, b):
        done = site.json("drill", "pg", "--no-mount", "--check", FSCK)["drill"]
        assert (done["result"], done["file_system"]) == ("passed", None), done["output"]
        assert "precious" not in done["output"]
        assert "Pass 5" in done["output"]

    # What a check writes is gone with it.
    b.json("drill", "pg", "--check", 'rm "$GEOMIRROR_MOUNT/precious"; sync')
    b.json("drill", "pg", "--check", 'test -s "$GEOMIRROR_MOUNT/precious"')


def test_failures_are_remembered_over_a_restart(
    pair: tuple[MountSite, MountSite], tmp_path: Path
) -> None:
    a, b = pair
    wait_applied(a)
    b.json("drill", "pg", "--check", "true")
    passed_at = last(b)["last_passed_at"]
    done = b.json("drill", "pg", "--check", "echo bad luck; exit 3", expected=1)["drill"]
    assert (done["result"], done["reason"], done["output"]) == (
        "failed",
        "exit code 3",
        "bad luck\n",
    )
    # It leaves something running, in a session of its own and with files open.
    stays = f"100.{b.port}"
    check = f'cd "$GEOMIRROR_MOUNT"; setsid sleep {stays} & sleep 60'
    begun = subprocess.Popen(
        b.command("drill", "pg", "--check", check, "--timeout", "4s", "--json"),
        stdout=subprocess.PIPE,
    )
    until(lambda: runs(stays), 30, "what it leaves")
    answer = begun.communicate(timeout=60)[0]
    assert begun.returncode == 6
    assert json.loads(answer)["drill"]["result"] == "timeout"
    assert traces(b) == []
    assert not runs(stays)
    b.error("drill", "pg", "--check", "true", "--at", "nosuch", expected=4, code="not_found")
    b.kill()
    b.restart()
    b.uri()
    found = b.json("drill", "pg", "--history")["drills"]
    assert [each["result"] for each in found] == ["passed", "failed", "timeout", "error"]
    assert [each["number"] for each in found] == [1, 2, 3, 4]
    assert (last(b)["result"], last(b)["last_passed_at"]) == ("error", passed_at)
    assert "last passed" in b.run("status", "pg")
    assert b.call("view.list", name="pg")["views"] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_drill_whose_command_is_killed(
    pair: tuple[MountSite, MountSite], tmp_path: Path, number: signal.Signals
) -> None:
    a, b = pair
    wait_applied(a)
    begun = tmp_path / "begun"
    check = f'cd "$GEOMIRROR_MOUNT"; echo x >x; touch {begun}; sleep 100 & wait'
    command = b.command("drill", "pg", "--check", check)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(begun.exists, 60, "the check")
    assert traces(b)
    said = b.error_inside("drill", "pg", "--check", "true", expected=5, code="in_use")
    assert "already" in said
    running.send_signal(number)
    code = running.wait(30)
    assert code == (-9 if number == signal.SIGKILL else 130)
    until(lambda: not traces(b), 20, "nothing to be left")
    if number == signal.SIGKILL:
        # Nobody could say so: its view waits for its end, or for the next drill.
        assert b.call("drill.list", name="pg")["drills"][0]["result"] == "running"
        assert len(b.call("view.list", name="pg")["views"]) == 1
        b.json("drill", "pg", "--check", 'test ! -e "$GEOMIRROR_MOUNT/x"')
    found = b.call("drill.list", name="pg")["drills"]
    assert found[0]["result"] == "interrupted"
    assert b.call("view.list", name="pg")["views"] == []


def test_a_detach_does_not_wait_for_a_drill(
    pair: tuple[MountSite, MountSite], tmp_path: Path
) -> None:
    a, _ = pair
    until(lambda: a.call("resource.timeline", name="pg")["points"], 60, "points at the primary")
    begun = tmp_path / "begun"
    running = subprocess.Popen(
        a.command("drill", "pg", "--check", f"touch {begun}; sleep 3"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(begun.exists, 60, "the check")
    assert a.json("detach", "pg")["is_clean"] is True
    assert running.wait(60) == 0
    a.run("attach", "pg", str(tmp_path / "m"))


def test_without_root_the_check_has_the_uri_and_is_told_why_there_is_no_mount(
    tmp_path: Path,
) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg")
        asyncio.run(a.write(0, b"x"))
        wait_applied(a)
        check = 'test -z "$GEOMIRROR_MOUNT$GEOMIRROR_FILE" && nbdinfo --size "$GEOMIRROR_URI"'
        program = (
            "import sys; import geomirror.cli.drill_run as run; "
            "run.namespaces_lacking = lambda: 'mounting needs root'; "
            "from geomirror.cli.main import run; sys.exit(run(sys.argv[1:]))"
        )
        words = ["--data-dir", str(b.data_dir), "drill", "pg", "--json", "--check"]
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run([*command, check], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["drill"]
        assert (found["result"], found["mount_reason"]) == ("passed", "mounting needs root")
        assert found["output"] == f"{64 << 20}\n"

        # A view of another member: no NBD by TCP there, so it says where to go, and remembers it.
        said = a.error(
            "drill", "pg", "--node", "west-1", "--check", "true", expected=5, code="refused"
        )
        assert "run the drill on west-1" in said
        assert last(b)["result"] == "error"

        port = free_port()
        (b.data_dir / "geomirror.toml").write_text(f'[nbd]\ntcp_listen = "127.0.0.1:{port}"\n')
        b.kill()
        b.restart()
        b.uri()
        until(lambda: count_links(a) == 1, what="the link")
        size = 'nbdinfo --size "$GEOMIRROR_URI"'
        found = a.json("drill", "pg", "--node", "west-1", "--no-mount", "--check", size)["drill"]
        assert (found["node"], found["runs_on"]) == ("west-1", "east-1")
        assert found["output"] == f"{64 << 20}\n"
        assert last(b)["result"] == "passed"

        # A daemon that is away when a drill ends is waited for.
        begun, pid_file = tmp_path / "started", tmp_path / "check.pid"
        go_on = tmp_path / "go-on"
        check = f"echo $$ >{pid_file}; touch {begun}; while ! test -e {go_on}; do sleep 0.1; done"
        running = subprocess.Popen([*command, check], stdout=subprocess.PIPE)
        until(begun.exists, 60, "the check")
        b.kill()
        go_on.touch()
        pid = int(pid_file.read_text())
        until(lambda: not is_running(pid), 10, "the end of the check")
        b.restart()
        assert json.loads(running.communicate(timeout=90)[0])["drill"]["result"] == "passed"
        assert b.call("drill.list", name="pg")["drills"][-1]["result"] == "passed"
        until(lambda: b.uri() and not b.call("view.list", name="pg")["views"], what="no view")

        begun = tmp_path / "begun"
        slow = shlex.join(["sh", "-c", f"echo $$ >{begun}; exec sleep 100"])
        running = subprocess.Popen(
            [*command, f"exec {slow}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(lambda: begun.exists() and begun.read_text().strip(), 60, "the check")
        pid = int(begun.read_text())
        running.kill()
        running.wait()
        until(lambda: not is_running(pid), 10, "the check to be killed too")
        assert not a.crashes() + b.crashes()
