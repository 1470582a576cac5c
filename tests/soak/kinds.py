"""The kinds of rounds, each run in a process of its own, and how a kind is judged.

Nothing is tested here: a round is the simulator, the lab of this package, the fuzzers, or files of
`tests/system` with another seed where they take chances, and more repetitions.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.lab_round import play
from tests.soak.state import FAILED, PASSED, SKIPPED

SIM_SEEDS = 10
BROKEN_SIM = "drop_last_write"
"""A mutation of `tests/sim/mutations.py` that every few seeds find."""
LAB_S = 40.0
ROOT = Path(__file__).parents[2]
TESTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "power": (("test_power_cut.py",), {"GEOMIRROR_POWER_CUTS": "4"}),
    "kills": (("test_under_load.py",), {"GEOMIRROR_KILLS": "4"}),
    "packets": (("test_packet_wan.py",), {}),
    "postgres": (("test_postgres.py", "test_postgres_failover.py"), {}),
    "full-disk": (("test_full_disk.py", "test_read_only_disk.py"), {}),
    "damage": (("test_damaged_storage.py",), {}),
    "hostile": (("test_hostile_peer.py",), {}),
    "failover": (("test_failover.py",), {}),
    "reconcile": (("test_reconcile.py",), {}),
    "resync-cuts": (("test_resync_cuts.py",), {"GEOMIRROR_RESYNC_CUTS": "4"}),
    "growth": (("test_growing_volumes.py", "test_attach_growth.py"), {}),
    "attach": (("test_attach.py",), {}),
    "views": (("test_views.py",), {}),
}
KINDS = ("sim", "lab", "fuzz", *TESTS)
SCHEDULE = (
    *(
        "lab",
        "sim",
        "power",
        "lab",
        "packets",
        "sim",
        "lab",
        "kills",
        "failover",
        "lab",
        "postgres",
    ),
    *("lab", "sim", "full-disk", "reconcile", "lab", "damage", "resync-cuts", "lab", "hostile"),
    *("fuzz", "sim", "growth", "lab", "attach", "sim", "views"),
)
"""In turn; what a machine cannot do is skipped at no cost."""
FUZZ_S = 15
"""For each target."""
ROUND_S_MAX = 1500


@dataclass
class Outcome:
    """What a round found."""

    verdict: str
    why: str = ""
    faults: list[str] = field(default_factory=list)
    figures: dict[str, int | float] = field(default_factory=dict)


def run_round(
    kind: str, seed: int, directory: Path, *, seconds: float = LAB_S, is_broken: bool = False
) -> Outcome:
    """Run one round in this process.

    :param directory: for logs and disks; new.
    :param seconds: of faults in a lab round.
    :param is_broken: break the product, to see that it is noticed: `sim` and `lab` only.
    """
    if kind == "lab":
        found = asyncio.run(play(directory, seed, seconds, is_broken=is_broken))
        return Outcome(FAILED if found["why"] else PASSED, **found)
    if kind == "sim":
        return _simulate(seed, directory, is_broken=is_broken)
    if kind == "fuzz":
        return _fuzz(seed, directory)
    return _pytest(kind, seed, directory)


def _simulate(seed: int, directory: Path, *, is_broken: bool) -> Outcome:
    command = [sys.executable, "-m", "tests.sim", "--first", str(seed), "--seeds", str(SIM_SEEDS)]
    if is_broken:
        command += ["--mutation", BROKEN_SIM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    (directory / "sim.log").write_text(done.stderr + done.stdout)
    # The oracle's words and how to replay them are the last that it prints.
    said = "; ".join(done.stdout.strip().splitlines()[-2:]) or done.stderr[-300:]
    figures: dict[str, int | float] = {"seeds": SIM_SEEDS}
    if done.returncode == 0:
        return Outcome(PASSED, figures=figures)
    return Outcome(FAILED, said[-600:], figures=figures)


def _fuzz(seed: int, directory: Path) -> Outcome:
    command = [sys.executable, "-m", "tests.fuzz", "all", "--seconds", str(FUZZ_S)]
    command += ["--seed", str(1 + seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    (directory / "fuzz.log").write_text(done.stdout + done.stderr)
    figures: dict[str, int | float] = {"targets": done.stdout.count("== ")}
    if done.returncode == 0:
        return Outcome(PASSED, figures=figures)
    replays = [line for line in done.stdout.splitlines() if line.startswith("replay:")]
    return Outcome(FAILED, "; ".join(replays) or done.stderr[-600:], figures=figures)


def _pytest(kind: str, seed: int, directory: Path) -> Outcome:
    names, environment = TESTS[kind]
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"--basetemp={directory / 'tests'}", f"--junitxml={report}"]
    environment = {**os.environ, **environment, "GEOMIRROR_SEED": str(seed)}
    # In CI a missing tool is a failure; a soak takes a machine as it is.
    environment.pop("CI", None)
    done = subprocess.run(
        [*command, *(f"tests/system/{name}" for name in names)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    (directory / "pytest.log").write_text(done.stdout + done.stderr)
    if not report.exists():
        return Outcome(FAILED, f"pytest ended with {done.returncode} and no report")
    return judge_report(report)


def judge_report(report: Path) -> Outcome:
    """The outcome that a JUnit report tells; all tests skipped is a skipped round."""
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    figures: dict[str, int | float] = {"tests": len(cases)}
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            why = f"{case.get('name')}: {problem.get('message', '')[:300]}"
            return Outcome(FAILED, why, figures=figures)
    skipped = [skip.get("message", "") for case in cases for skip in case.findall("skipped")]
    if not cases or len(skipped) == len(cases):
        return Outcome(SKIPPED, skipped[0] if skipped else "no tests", figures=figures)
    return Outcome(PASSED, figures=figures)


def to_json(outcome: Outcome) -> str:
    """As a round's process says it."""
    return json.dumps(vars(outcome))
