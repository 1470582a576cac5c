"""Simulated seconds per second of CPU, with disks: how much faster than life the proof runs."""

from __future__ import annotations

import re

from bench.machine import python_command
from bench.options import Options
from bench.report import Result
from geomirror.errors import GeomirrorError
from geomirror.lab.process_io import run as run_process

NAME = "simulator"
KIND = "mixed"
TITLE = "The simulator: one primary for ever or one after the other, two to five nodes with disks"
SPEED_MIN = 300.0
_SPEED = re.compile(r"([0-9]+(?:\.[0-9]+)?) times real time")


async def run(options: Options) -> Result:
    """Run the simulator for some seeds, the same ones in every run."""
    result = Result(NAME, TITLE)
    rounds, seeds = options.choose_rounds(5, 1), options.choose(20, 4)
    # Storms and the calms between them; a short run is little but one storm.
    length = options.choose(600, 150)
    result.settings = {"rounds": rounds, "seeds": seeds, "length_seconds": length}
    speeds = []
    for number in range(rounds):
        first = number * seeds
        arguments = ("--seeds", str(seeds), "--first", str(first), "--length", str(length))
        command = python_command("-m", "tests.sim", *arguments, "--kind", KIND)
        output = await run_process(command, timeout_s=1800)
        text = (output.stdout + output.stderr).decode(errors="replace")
        found = _SPEED.search(text)
        if output.returncode != 0 or found is None:
            raise GeomirrorError(f"the simulation failed: {text[-500:]}")
        speeds.append(float(found[1]))
        result.rounds.append({"round": number, "speed": speeds[-1], "line": text.strip()[-200:]})
    result.at_least("simulated seconds per CPU second", speeds, SPEED_MIN)
    return result
