"""`python -m tests.sim.resync_cuts --cuts 1000`: cut a secondary off in the middle of its resyncs.

Runs ordinary seeds that overflow often, with many more cuts than they have (`promotable`).
"""

from __future__ import annotations

import argparse
import secrets
import sys

from geomirror.limits import KIB
from tests.sim.oracle import OracleError
from tests.sim.simulation import Simulation
from tests.sim.world import SECOND

OVERFLOWS = {
    "bytes_per_second": 60_000,
    "journal_bytes": 1024 * KIB,
    "burst": 20,
    "cut_mean_ns": 2 * SECOND,
    "first_sync": False,
}
PART = 0.5


def main() -> int:
    """Print how many cuts there were; the first that leaves no promotable copy ends it."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.resync_cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000, help="how many, at least")
    parser.add_argument("--first", type=int, default=secrets.randbelow(1 << 31), help="first seed")
    parser.add_argument("--length", type=int, default=120, help="simulated seconds of each seed")
    arguments = parser.parse_args()
    seed, cuts, returns, promotions, resyncs = arguments.first, 0, 0, 0, 0
    while cuts < arguments.cuts:
        simulation = Simulation(seed, arguments.length, **OVERFLOWS)
        simulation.cuts.part = PART
        try:
            resyncs += simulation.run().resyncs
        except OracleError as error:
            print(error)
            return 1
        cuts += simulation.cuts.cuts
        returns += simulation.cuts.returns
        promotions += simulation.cuts.promotions
        seed += 1
    print(
        f"{cuts} cuts in {resyncs} resyncs of {seed - arguments.first} seeds from "
        f"{arguments.first}: S(E0) every time, {returns} times by going back, {promotions} times "
        "at a primary before it had gone back"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
