"""`python -m tests.soak --seconds 36000`: rounds of random faults; started again, it goes on.

Each round is a process; its line is appended to DIRECTORY/rounds.jsonl. A failed round keeps its
directory and says how it is replayed; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tests.soak.kinds import KINDS, LAB_S, ROOT, ROUND_S_MAX, SCHEDULE, Outcome, run_round, to_json
from tests.soak.state import FAILED, PASSED, SKIPPED, Round, State

STOP_S_MAX = 30
"""For an interrupted round to take its daemons, mounts and namespaces away."""


def main() -> int:
    """Exit code 1 when a round of any run in this directory has failed."""
    arguments = _parser().parse_args()
    if arguments.round is not None:
        return _one_round(arguments)
    directory: Path = arguments.directory.absolute()
    state = State.load(directory, secrets.randbelow(1 << 31))
    console = Console(stderr=True)
    if state.next_round:
        console.print(f"goes on with round {state.next_round}, seed {state.seed}")
    kinds = arguments.kind or None
    until = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    last = None if arguments.rounds is None else state.next_round + arguments.rounds
    try:
        while (until is None or time.monotonic() < until) and state.next_round != last:
            one = _next_round(state, arguments, kinds, console)
            state.end(one)
            _tell(one, arguments, console)
            if one.verdict == FAILED and arguments.stop:
                break
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
    console.print(_table(state, ""))
    return int(state.failures > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, help="begin no round after so long")
    parser.add_argument("--rounds", type=int, help="so many rounds; without both: for ever")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these, in turn")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "soak")
    parser.add_argument("--stop", action="store_true", help="end at the first failure")
    parser.add_argument("--round", choices=KINDS, help="run one round, as a replay says it")
    parser.add_argument("--seed", type=int, default=1, help="of that round")
    parser.add_argument("--lab-seconds", type=float, default=LAB_S, help=f"faults a lab ({LAB_S})")
    parser.add_argument("--broken", action="store_true", help="break the product: has to be found")
    return parser


def _one_round(arguments: argparse.Namespace) -> int:
    """In this process; its outcome is the last line of the output."""
    directory: Path = arguments.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    outcome = run_round(
        arguments.round,
        arguments.seed,
        directory,
        seconds=arguments.lab_seconds,
        is_broken=arguments.broken,
    )
    print(to_json(outcome))
    return int(outcome.verdict == FAILED)


def _next_round(
    state: State, arguments: argparse.Namespace, kinds: list[str] | None, console: Console
) -> Round:
    number = state.next_round
    kind = (kinds or SCHEDULE)[number % len(kinds or SCHEDULE)]
    seed = (state.seed + number * 1000) % (1 << 31)
    directory = state.directory / f"round-{number:05d}-{kind}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    state.begin(kind, seed)
    began = time.monotonic()
    outcome = _apart(state, kind, seed, directory, arguments, console)
    seconds = round(time.monotonic() - began, 1)
    one = Round(number, kind, seed, outcome.verdict, seconds, outcome.faults, outcome.figures)
    one.why = outcome.why
    if one.verdict == FAILED:
        one.directory = str(directory)
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return one


def _command(kind: str, seed: int, directory: Path, arguments: argparse.Namespace) -> list[str]:
    command = ["-m", "tests.soak", "--round", kind, "--seed", str(seed)]
    command += ["--lab-seconds", f"{arguments.lab_seconds:g}", "--directory", str(directory)]
    return command + (["--broken"] if arguments.broken else [])


def _apart(
    state: State,
    kind: str,
    seed: int,
    directory: Path,
    arguments: argparse.Namespace,
    console: Console,
) -> Outcome:
    """Run a round in a process group of its own, show that it lives, and bound its time."""
    began = time.monotonic()
    with (directory / "round.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *_command(kind, seed, directory, arguments)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            with Live(console=console, refresh_per_second=1, transient=True) as live:
                while process.poll() is None and time.monotonic() - began < ROUND_S_MAX:
                    passed = time.monotonic() - began
                    live.update(_table(state, f"round {state.next_round}: {kind}, {passed:.0f} s"))
                    time.sleep(0.2)
        finally:
            is_late = process.poll() is None
            if is_late:
                _end(process)
    if is_late:
        return Outcome(FAILED, f"no end after {ROUND_S_MAX} s")
    lines = (directory / "round.log").read_text(errors="replace").strip().splitlines()
    try:
        return Outcome(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return Outcome(FAILED, f"the round ended with {process.returncode}: {lines[-1:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a round clean up after itself, then end what is left of its group."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S_MAX)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _tell(one: Round, arguments: argparse.Namespace, console: Console) -> None:
    colour = {PASSED: "green", FAILED: "red", SKIPPED: "yellow"}[one.verdict]
    figures = ", ".join(f"{value} {key}" for key, value in one.figures.items())
    text = f"[{colour}]{one.verdict}[/] {one.number} {one.kind} {one.seed}: {one.seconds:g} s"
    console.print(f"{text}, {len(one.faults)} faults{', ' if figures else ''}{figures}")
    if one.why:
        console.print(one.why, markup=False)
    if one.verdict == FAILED:
        replay = _command(one.kind, one.seed, Path(one.directory + "-again"), arguments)
        console.print(f"kept: {one.directory}", f"replay: python {' '.join(replay)}", sep="\n")


def _table(state: State, title: str) -> Table:
    hours = state.seconds / 3600
    table = Table(title=title or f"{state.next_round} rounds, {hours:.2f} h, seed {state.seed}")
    for name in ("kind", PASSED, FAILED, SKIPPED):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, counts in sorted(state.verdicts.items()):
        table.add_row(kind, *(str(counts.get(name, 0)) for name in (PASSED, FAILED, SKIPPED)))
    return table


if __name__ == "__main__":
    sys.exit(main())
