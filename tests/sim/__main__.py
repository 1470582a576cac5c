"""`python -m tests.sim --seeds 100`: fresh seeds; `--seed N` replays one."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import traceback

from tests.sim.oracle import OracleError
from tests.sim.simulation import SECONDS, Simulation


def main() -> int:
    """Run seeds; the last lines printed by a failure are its story and how to replay it."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, help="just this one, with its story")
    parser.add_argument("--first", type=int, help="first seed; by chance if not given")
    parser.add_argument("--length", type=int, default=SECONDS, help="simulated seconds with faults")
    parser.add_argument("--seconds", type=float, help="go on for so long instead of --seeds")
    arguments = parser.parse_args()
    first = arguments.first if arguments.first is not None else secrets.randbelow(1 << 31)
    seeds = [arguments.seed] if arguments.seed is not None else range(first, 1 << 62)
    simulated = spent = 0.0
    totals = {"checks": 0, "crashes": 0, "resyncs": 0, "operations": 0, "detected": 0}
    began, count = time.monotonic(), 0
    for seed in seeds:
        is_over = time.monotonic() - began >= (arguments.seconds or 1e12)
        if is_over or (arguments.seconds is None and count >= arguments.seeds):
            break
        simulation = Simulation(seed, arguments.length)
        try:
            outcome = simulation.run()
        except OracleError as error:
            if error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            print(error)
            print(f"replay: python -m tests.sim --seed {seed} --length {arguments.length}")
            return 1
        count += 1
        simulated += outcome.simulated_seconds
        spent += outcome.cpu_seconds
        totals["checks"] += outcome.checks
        totals["crashes"] += outcome.crashes
        totals["resyncs"] += outcome.resyncs
        totals["operations"] += outcome.operations
        totals["detected"] += outcome.is_detected
        if arguments.seed is not None:
            print("\n".join(simulation.world.trace))
    speed = simulated / spent if spent else 0.0
    print(f"{count} seeds, {simulated:.0f} simulated s, {speed:.0f} times real time, {totals}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
