"""The soak itself: a small round passes, a broken product is caught, a stop is survived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.soak.kinds import KINDS, SCHEDULE, TESTS, judge_report
from tests.soak.state import FAILED, PASSED, SKIPPED, Round, State

ROOT = Path(__file__).parents[2]


def soak(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.soak", "--directory", str(directory), *arguments]


def run(directory: Path, *arguments: str, expected: int) -> tuple[list[Round], str]:
    """All rounds that the directory tells of, and what was printed."""
    command = soak(directory, *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    return rounds(directory), done.stderr


def rounds(directory: Path) -> list[Round]:
    path = directory / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Round(**json.loads(line)) for line in lines]


@pytest.mark.system
@pytest.mark.timeout(400)
def test_a_lab_under_faults_passes_and_leaves_one_line(tmp_path: Path) -> None:
    (one,), _ = run(
        *(tmp_path / "soak", "--rounds", "1", "--kind", "lab", "--lab-seconds", "6"), expected=0
    )
    assert (one.number, one.kind, one.verdict, one.why) == (0, "lab", PASSED, "")
    assert one.faults[-1].endswith("healed")
    assert one.figures["writes"] > 100
    assert not list((tmp_path / "soak").glob("round-*"))


@pytest.mark.system
@pytest.mark.timeout(400)
def test_a_mirror_that_somebody_changed_is_found_and_kept(tmp_path: Path) -> None:
    arguments = ("--rounds", "1", "--kind", "lab", "--lab-seconds", "1", "--broken")
    (one,), text = run(tmp_path / "soak", *arguments, expected=1)
    assert one.verdict == FAILED
    assert "O1: copies at one epoch differ" in one.why
    assert f"--round lab --seed {one.seed}" in text.replace("\n", "")
    assert (Path(one.directory) / "east-1.log").exists()


@pytest.mark.timeout(300)
def test_a_broken_simulation_is_found(tmp_path: Path) -> None:
    (one,), _ = run(*(tmp_path / "soak", "--rounds", "1", "--kind", "sim", "--broken"), expected=1)
    assert one.verdict == FAILED
    assert "replay: python -m tests.sim --seed" in one.why
    assert "--mutation" in one.why


@pytest.mark.system
@pytest.mark.timeout(400)
def test_an_interrupted_soak_goes_on_with_the_same_round(tmp_path: Path) -> None:
    directory = tmp_path / "soak"
    began = State(directory, seed=40)
    began.begin("sim", 40)
    began.end(Round(0, "sim", 40, PASSED))
    process = subprocess.Popen(soak(directory, "--kind", "lab"), cwd=ROOT, stderr=subprocess.PIPE)
    state, give_up = directory / "state.json", time.monotonic() + 120
    while not (directory / "round-00001-lab" / "east-1.log").exists():
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert json.loads(state.read_text())["under_way"] == "1 lab 1040"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert not _alive(directory), "daemons of an interrupted round go on"
    found, text = run(
        *(directory, "--rounds", "1", "--kind", "lab", "--lab-seconds", "1"), expected=0
    )
    assert "goes on with round 1, seed 40" in text
    assert [(one.number, one.kind, one.seed) for one in found] == [(0, "sim", 40), (1, "lab", 1040)]


def _alive(directory: Path) -> list[str]:
    """Processes that have the directory in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in line:
            found.append(line.decode(errors="replace"))
    return found


def test_totals_are_counted_once_by_kind_and_verdict(tmp_path: Path) -> None:
    state = State.load(tmp_path / "x", seed=7)
    for number, verdict in enumerate((PASSED, FAILED, SKIPPED, PASSED)):
        state.begin("sim", number)
        state.end(Round(number, "sim", number, verdict, seconds=1.5))
    again = State.load(tmp_path / "x", seed=99)
    assert (again.seed, again.next_round, again.seconds, again.failures) == (7, 4, 6.0, 1)
    assert again.verdicts == {"sim": {PASSED: 2, FAILED: 1, SKIPPED: 1}}
    assert again.under_way == ""
    assert set(SCHEDULE) == set(KINDS)


def test_every_file_of_a_round_is_there_and_draws_from_its_seed_unless_said() -> None:
    system = ROOT / "tests" / "system"
    helpers = {
        "test_packet_wan.py": "far_sites.py",
        "test_postgres.py": "pgbench.py",
    }
    without = set()
    for kind, (names, _) in TESTS.items():
        texts = [(system / name).read_text() for name in names]
        texts += [(system / helpers[name]).read_text() for name in names if name in helpers]
        if not any("SEED" in text for text in texts):
            without.add(kind)
    assert without == {"damage", "hostile", "failover", "reconcile"}, "CONTRIBUTING names them"


@pytest.mark.parametrize(
    ("inside", "verdict", "why"),
    [
        ("", PASSED, ""),
        ('<skipped message="no root"/>', SKIPPED, "no root"),
        ('<failure message="lost"/>', FAILED, "t: lost"),
        ('<error message="no mount"/>', FAILED, "t: no mount"),
    ],
)
def test_a_test_report_is_judged(tmp_path: Path, inside: str, verdict: str, why: str) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        f'<testsuites><testsuite><testcase name="t">{inside}</testcase></testsuite></testsuites>'
    )
    outcome = judge_report(path)
    assert (outcome.verdict, outcome.why) == (verdict, why)
