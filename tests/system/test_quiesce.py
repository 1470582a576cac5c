"""Quiescing an application: hooks in order, and file systems that never stay frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.cli.freeze import FrozenMounts
from geomirror.cli.quiesce import Plan, Quiescence
from geomirror.errors import RefusedError, UsageError
from tests.system.support import is_root, until

pytestmark = pytest.mark.system
ENVIRONMENT = {"GEOMIRROR_RESOURCE": "pg", "GEOMIRROR_MARK": "nightly"}
HOLDER = """
import sys, time
from geomirror.cli.quiesce import Plan, Quiescence
pre, post, mounts, timeout_s = eval(sys.argv[1])
quiescence = Quiescence(Plan(pre, post, mounts, timeout_s, {"GEOMIRROR_MARK": "m"}))
print(quiescence.begin(), quiescence._keeper.pid, flush=True)
time.sleep(60)
"""
"""What the command does up to the mark, and then it hangs."""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own."""
    if not is_root():
        pytest.skip("freezing a file system needs root")
    image, place = tmp_path / "image", tmp_path / "mount"
    image.write_bytes(bytes(16 << 20))
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(place)], capture_output=True, check=False)
        # A thawer may have a moment left: it holds the mount point open until it ends.
        until(lambda: is_unmounted(place), 10, f"{place} unmounted")


def is_unmounted(place: Path) -> bool:
    return subprocess.run(["umount", str(place)], check=False).returncode == 0


def say(log: Path, word: str) -> str:
    return f"echo {word} >> {log}"


def lines(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.exists() else []


class Writer:
    """Writes one file, in a process that a frozen file system holds up."""

    def __init__(self, mount: Path) -> None:
        code = f"open({str(mount / 'file')!r}, 'w').write('x')"
        self.process = subprocess.Popen([sys.executable, "-c", code])

    def is_held_up(self) -> bool:
        time.sleep(0.5)
        return self.process.poll() is None

    def ends_within(self, seconds: float) -> bool:
        try:
            return self.process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False


def hold(
    pre: list[str], post: list[str], mounts: list[str], timeout_s: float
) -> tuple[subprocess.Popen[str], int]:
    """A command that has quiesced and hangs then, and the id of its keeper."""
    command = [sys.executable, "-c", HOLDER, repr((pre, post, mounts, timeout_s))]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        said = holder.stdout.readline()
    assert said.startswith("[] "), said
    return holder, int(said.split()[1])


def test_hooks_run_in_order_and_in_reverse(log: Path) -> None:
    pre = [say(log, f"pre{n}-$GEOMIRROR_RESOURCE-$GEOMIRROR_MARK") for n in (1, 2)]
    post = [say(log, f"post{n}-$GEOMIRROR_MARK_RESULT-$GEOMIRROR_EPOCH") for n in (1, 2, 3)]
    with Quiescence(Plan(pre, post, [], 5, ENVIRONMENT)) as quiescence:
        assert quiescence.begin() == []
        assert lines(log) == ["pre1-pg-nightly", "pre2-pg-nightly"]
        assert quiescence.end("made", 812) == (True, [])
    assert lines(log)[2:] == ["post3-made-812", "post2-made-812", "post1-made-812"]


def test_a_failed_command_stops_the_rest_and_what_was_started_is_undone(log: Path) -> None:
    pre = [say(log, "pre1"), "echo no luck; exit 3", say(log, "pre3")]
    post = [say(log, f"post{n}-$GEOMIRROR_MARK_RESULT") for n in (1, 2, 3)]
    with Quiescence(Plan(pre, post, [], 5, ENVIRONMENT)) as quiescence:
        failures = quiescence.begin()
        assert failures == ["pre command 2 (echo no luck; exit 3): exit code 3: no luck"]
        assert quiescence.end("failed", None)[1] == []
    assert lines(log) == ["pre1", "post2-failed", "post1-failed"]


def test_a_command_that_takes_too_long_is_ended_with_its_children(log: Path) -> None:
    pre = [f"(sleep 3; {say(log, 'late')}) & sleep 30"]
    began = time.monotonic()
    with Quiescence(Plan(pre, [say(log, "post")], [], 0.5, ENVIRONMENT)) as quiescence:
        assert "took longer than 0.5 s" in quiescence.begin()[0]
        quiescence.end("failed", None)
    assert time.monotonic() - began < 8
    assert lines(log) == ["post"]
    time.sleep(3)
    assert lines(log) == ["post"]


def test_a_failed_post_command_is_told_and_the_others_run(log: Path) -> None:
    post = [say(log, "post1"), "exit 1"]
    with Quiescence(Plan(["true", "true"], post, [], 5, ENVIRONMENT)) as quiescence:
        assert quiescence.begin() == []
        assert quiescence.end("made", 1) == (True, ["post command 2 (exit 1): exit code 1"])
    assert lines(log) == ["post1"]


def test_an_error_in_between_lets_the_application_go_on(log: Path) -> None:
    post = [say(log, "post-$GEOMIRROR_MARK_RESULT")]
    with (
        pytest.raises(RefusedError),
        Quiescence(Plan(["true"], post, [], 5, ENVIRONMENT)) as quiescence,
    ):
        quiescence.begin()
        raise RefusedError("the primary is away")
    assert lines(log) == ["post-unknown"]


def test_post_commands_run_when_the_command_is_killed(log: Path) -> None:
    holder, _ = hold([say(log, "pre")], [say(log, "post-$GEOMIRROR_MARK_RESULT")], [], 20)
    holder.kill()
    holder.wait()
    until(lambda: lines(log) == ["pre", "post-unknown"], 10, "post after SIGKILL")


def test_the_application_is_let_go_when_the_time_is_over(log: Path) -> None:
    holder, _ = hold(["true"], [say(log, "post")], [], 1)
    until(lambda: lines(log) == ["post"], 10, "post after the timeout")
    assert holder.poll() is None
    holder.kill()
    holder.wait()


def test_a_late_release_says_that_the_application_was_not_held(log: Path) -> None:
    with Quiescence(Plan(["true"], [say(log, "post")], [], 0.5, ENVIRONMENT)) as quiescence:
        assert quiescence.begin() == []
        until(lambda: lines(log) == ["post"], 10)
        assert quiescence.end("made", 3) == (False, [])


def test_a_frozen_file_system_takes_writes_again_at_the_end(mount: Path) -> None:
    with Quiescence(Plan([], [], [str(mount)], 20, ENVIRONMENT)) as quiescence:
        assert quiescence.begin() == []
        writer = Writer(mount)
        assert writer.is_held_up()
        assert quiescence.end("made", 3) == (True, [])
        assert writer.ends_within(5)


def test_it_is_thawed_when_the_command_is_killed(mount: Path, log: Path) -> None:
    holder, _ = hold(["true"], [say(log, "post")], [str(mount)], 30)
    writer = Writer(mount)
    assert writer.is_held_up()
    holder.kill()
    holder.wait()
    assert writer.ends_within(5)
    until(lambda: lines(log) == ["post"], 10)


def test_it_is_thawed_when_its_keeper_is_killed(mount: Path) -> None:
    holder, keeper = hold([], [], [str(mount)], 30)
    writer = Writer(mount)
    assert writer.is_held_up()
    os.kill(keeper, signal.SIGKILL)
    assert writer.ends_within(5)
    holder.kill()
    holder.wait()


def test_it_is_thawed_when_command_and_keeper_hang(mount: Path) -> None:
    holder, keeper = hold([], [], [str(mount)], 2)
    for process in (holder.pid, keeper):
        os.kill(process, signal.SIGSTOP)
    writer = Writer(mount)
    assert writer.is_held_up()
    assert writer.ends_within(8)
    for process in (keeper, holder.pid):
        os.kill(process, signal.SIGKILL)
    holder.wait()


def test_a_freeze_that_was_undone_by_somebody_else_does_not_count(mount: Path) -> None:
    frozen = FrozenMounts([str(mount)], 20)
    frozen.freeze()
    subprocess.run(["fsfreeze", "--unfreeze", str(mount)], check=True)
    assert not frozen.thaw()


def test_what_cannot_be_frozen_is_told_and_what_was_is_thawed(mount: Path) -> None:
    with Quiescence(Plan([], [], [str(mount), "/proc"], 20, ENVIRONMENT)) as quiescence:
        assert "freeze of" in quiescence.begin()[0]
        quiescence.end("failed", None)
    assert Writer(mount).ends_within(5)


def test_no_freeze_may_hit_the_nodes_own_journal(mount: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="own data directory"):
        Plan([], [], [str(mount)], 5).check(mount / "lost+found")
    with pytest.raises(UsageError, match="not a mount point"):
        Plan([], [], [str(tmp_path)], 5).check(tmp_path)
    Plan([], [], [str(mount)], 5).check(tmp_path)
