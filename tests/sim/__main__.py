"""`python -m tests.sim --seeds 100`: fresh seeds; `--seed N` replays one and tells its story."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.sim.mutations import MUTATIONS, mutated
from tests.sim.oracle import OracleError
from tests.sim.proof import StumbleError
from tests.sim.simulation import SECONDS, Outcome, Simulation, kind_of
from tests.sim.succession import successions

REPLAY = "replay: python -m tests.sim --seed {} --length {} --kind {}"
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "mixed": kind_of,
    "single": lambda seed: {},
    "succession": successions,
}
"""One primary for ever, or one after the other."""


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
    promotions: int = 0
    tails: int = 0
    rewinds: int = 0
    verifies: int = 0
    rotten: int = 0
    put_backs: int = 0

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
        self.promotions += outcome.promotions
        self.tails += outcome.tails
        self.rewinds += outcome.rewinds
        self.verifies += outcome.verifies
        self.rotten += outcome.rotten
        self.put_backs += outcome.put_backs

    def __str__(self) -> str:
        speed = self.simulated / self.spent if self.spent else 0.0
        return (
            f"{self.seeds} seeds, {self.simulated:.0f} simulated s, {speed:.0f} times real time: "
            f"{self.operations} writes in {self.epochs} epochs, {self.crashes} crashes, "
            f"{self.growths} growths, {self.resyncs} resyncs, {self.promotions} promotions, "
            f"{self.tails} tails, {self.rewinds} rewinds and {self.checks} images compared, "
            f"{self.verifies} verifies, {self.rotten} blocks rotted, "
            f"{self.put_backs} older disks of primaries put back, "
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
    parser.add_argument("--kind", choices=sorted(KINDS), default="mixed", help="of the runs")
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
            is_told = arguments.seed is not None
            if not _run(seed, arguments.length, arguments.kind, totals, is_told=is_told):
                extra = f" --mutation {arguments.mutation}" if arguments.mutation else ""
                print(f"{REPLAY.format(seed, arguments.length, arguments.kind)}{extra}")
                return 1
    print(totals)
    return 0


def _run(seed: int, length: int, kind: str, totals: Totals, *, is_told: bool) -> bool:
    simulation = Simulation(seed, length, **KINDS[kind](seed))
    try:
        totals.add(simulation.run())
    except (OracleError, StumbleError) as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(error)
        return False
    except BaseException:
        print("\n".join(simulation.world.trace[-40:]))
        print(f"seed={seed}: {REPLAY.format(seed, length, kind)}")
        raise
    if is_told:
        print("\n".join(simulation.world.trace))
    return True


if __name__ == "__main__":
    sys.exit(main())
