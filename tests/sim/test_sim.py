"""The simulator in the test suite: fixed seeds, fresh ones, and that a seed repeats exactly."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.sim.mutations import mutated
from tests.sim.options import NEVER
from tests.sim.oracle import OracleError
from tests.sim.simulation import Simulation, kind_of
from tests.sim.succession import successions
from tests.sim.world import SECOND

FIXED, FIXED_SECONDS = range(1, 11), 250
SUCCESSIONS = [range(first, first + 3) for first in (1, 4, 7, 10)]
FOUND_SECONDS = 600
FOUND = [
    # A copy was consistent before the name of its epoch was durable.
    (2045808049, lambda seed: {}),
    # A rollback ended at epochs that had changed nothing.
    (1341961056, kind_of),
]
"""Seeds that found a fault, and what draws their options."""
FRESH, FRESH_SECONDS = 4, 300
FRESH_FIRST = int(os.environ.get("GEOMIRROR_SIM_SEED", "0")) or secrets.randbelow(1 << 31)
REPLAY = f"replay with python -m tests.sim --length {FRESH_SECONDS}"
REPEATED, REPEATED_SECONDS = 8, 120
TELL = """
from tests.sim.simulation import Simulation, kind_of
print(Simulation({seed}, {seconds}).run().fingerprint)
"""


@pytest.mark.parametrize("seed", FIXED)
def test_a_fixed_seed_keeps_all_promises(seed: int) -> None:
    Simulation(seed, FIXED_SECONDS).run()


@pytest.mark.parametrize(("seed", "draw"), FOUND)
def test_a_seed_that_found_a_fault_finds_none_now(
    seed: int, draw: Callable[[int], dict[str, Any]]
) -> None:
    Simulation(seed, FOUND_SECONDS, **draw(seed)).run()


@pytest.mark.parametrize("seeds", SUCCESSIONS, ids=str)
def test_fixed_seeds_with_changes_of_the_primary_keep_all_promises(seeds: range) -> None:
    outcomes = [Simulation(seed, FIXED_SECONDS, **successions(seed)).run() for seed in seeds]
    # Chance may leave one seed without any.
    assert sum(outcome.promotions for outcome in outcomes) >= len(seeds)


@pytest.mark.parametrize("number", range(FRESH))
def test_a_fresh_seed_with_changes_of_the_primary_keeps_all_promises(number: int) -> None:
    seed = FRESH_FIRST + number
    print(f"seed={seed}: {REPLAY} --seed {seed} --kind succession")
    Simulation(seed, FRESH_SECONDS, **successions(seed)).run()


@pytest.mark.parametrize("number", range(FRESH))
def test_a_fresh_seed_keeps_all_promises(number: int) -> None:
    seed = FRESH_FIRST + number
    print(f"seed={seed}: {REPLAY} --seed {seed} --kind single")
    Simulation(seed, FRESH_SECONDS).run()


@pytest.mark.timeout(600)
def test_rewinds_and_their_returns_are_among_what_happens() -> None:
    done: Counter[str] = Counter()
    for seed in range(1, 5):
        often = {"rewind_mean_ns": SECOND, "put_back_mean_ns": NEVER}
        options = {**successions(seed), **often}
        simulation = Simulation(seed, FIXED_SECONDS, **options)
        assert simulation.run().rewinds
        done.update(simulation.rewinds.counts)
    assert done["rewind"] >= 4, done
    assert done["return"] + done["commit"] >= 2, done


def test_a_seed_repeats_exactly() -> None:
    first, second = (Simulation(REPEATED, REPEATED_SECONDS).run() for _ in range(2))
    assert first.epochs > 20
    assert first.crashes > 0
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != Simulation(REPEATED + 1, REPEATED_SECONDS).run().fingerprint


def test_a_seed_does_not_depend_on_the_order_of_sets() -> None:
    code = TELL.format(seed=REPEATED, seconds=REPEATED_SECONDS)
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert found == {Simulation(REPEATED, REPEATED_SECONDS).run().fingerprint + "\n"}


def test_a_failure_tells_its_seed_and_its_story() -> None:
    told = rf"seed={REPEATED}: AssertionError: .*\n +1\.\d+ "
    with mutated("trim_early"), pytest.raises(OracleError, match=told):
        Simulation(REPEATED).run()
