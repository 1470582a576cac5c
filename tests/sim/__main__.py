"""`python -m tests.sim --seeds 100`: fresh seeds; `--seed N` replays one and tells its story."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import traceback
from dataclasses import dataclass

from tests.sim.mutations import MUTATIONS, mutated
from tests.sim.oracle import OracleError
from tests.sim.simulation import SECONDS, Outcome, Simulation

REPLAY = "replay: python -m tests.sim --seed {} --length {}"


@dataclass
class Totals:
    """Sums over all runs."""

    seeds: int = 0
    simulated: float = 0.0
    spent: float = 0.0
    epochs: int = 0
    operations: int = 0
    crashes: int = 0
    resyncs: int = 0
    checks: int = 0
    lost: int = 0
    detected: int = 0
    growths: int = 0

    def add(self, outcome: Outcome) -> None:
        """One more run."""
        self.seeds += 1
        self.simulated += outcome.simulated_seconds
        self.spent += outcome.cpu_seconds
        self.epochs += outcome.epochs
        self.operations += outcome.operations
        self.crashes += outcome.crashes
        self.resyncs += outcome.resyncs
        self.checks += outcome.checks
        self.lost += outcome.lost
        self.detected += outcome.is_detected
        self.growths += outcome.growths

    def __str__(self) -> str:
        speed = self.simulated / self.spent if self.spent else 0.0
        return (
            f"{self.seeds} seeds, {self.simulated:.0f} simulated s, {speed:.0f} times real time: "
            f"{self.operations} writes in {self.epochs} epochs, {self.crashes} crashes, "
            f"{self.growths} growths, {self.resyncs} resyncs, {self.checks} images compared, "
            f"{self.detected} times planted damage was noticed"
        )


def main() -> int:
    """Run seeds; the last lines printed by a failure are its story and how to replay it."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, help="just this one, with its story")
    parser.add_argument("--first", type=int, help="first seed; by chance if not given")
    parser.add_argument(
        "--length", type=int, default=SECONDS, help=f"simulated seconds with faults ({SECONDS})"
    )
    parser.add_argument("--seconds", type=float, help="go on for so long instead of --seeds")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="break the product like this")
    arguments = parser.parse_args()
    first = arguments.first if arguments.first is not None else secrets.randbelow(1 << 31)
    if arguments.seed is not None:
        first, arguments.seeds, arguments.seconds = arguments.seed, 1, None
    totals, began = Totals(), time.monotonic()
    while totals.seeds < arguments.seeds or arguments.seconds is not None:
        if arguments.seconds is not None and time.monotonic() - began >= arguments.seconds:
            break
        seed = first + totals.seeds
        with mutated(arguments.mutation):
            if not _run(seed, arguments.length, totals, is_told=arguments.seed is not None):
                extra = f" --mutation {arguments.mutation}" if arguments.mutation else ""
                print(f"{REPLAY.format(seed, arguments.length)}{extra}")
                return 1
    print(totals)
    return 0


def _run(seed: int, length: int, totals: Totals, *, is_told: bool) -> bool:
    simulation = Simulation(seed, length)
    try:
        totals.add(simulation.run())
    except OracleError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(error)
        return False
    except BaseException:
        print("\n".join(simulation.world.trace[-40:]))
        print(f"seed={seed}: {REPLAY.format(seed, length)}")
        raise
    if is_told:
        print("\n".join(simulation.world.trace))
    return True


if __name__ == "__main__":
    sys.exit(main())
