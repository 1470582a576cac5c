"""The simulator in the test suite: fixed seeds, fresh ones, and that a seed repeats exactly."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections import Counter

import pytest

from tests.sim.mutations import mutated
from tests.sim.options import NEVER
from tests.sim.oracle import OracleError
from tests.sim.simulation import Simulation
from tests.sim.succession import successions
from tests.sim.world import SECOND

FIXED, FIXED_SECONDS = range(1, 21), 300
SUCCESSIONS = range(1, 21)
FRESH = 5
FRESH_FIRST = int(os.environ.get("GEOMIRROR_SIM_SEED", "0")) or secrets.randbelow(1 << 31)
REPEATED, REPEATED_SECONDS = 8, 200
TELL = """
from tests.sim.simulation import Simulation
print(Simulation({seed}, {seconds}).run().fingerprint)
"""


@pytest.mark.parametrize("seed", FIXED)
def test_a_fixed_seed_keeps_all_promises(seed: int) -> None:
    Simulation(seed, FIXED_SECONDS).run()


@pytest.mark.parametrize("seed", SUCCESSIONS)
def test_a_fixed_seed_with_changes_of_the_primary_keeps_all_promises(seed: int) -> None:
    outcome = Simulation(seed, FIXED_SECONDS, **successions(seed)).run()
    assert outcome.promotions


@pytest.mark.parametrize("number", range(FRESH))
def test_a_fresh_seed_with_changes_of_the_primary_keeps_all_promises(number: int) -> None:
    seed = FRESH_FIRST + number
    print(f"seed={seed}: replay with python -m tests.sim --seed {seed} --kind succession")
    Simulation(seed, **successions(seed)).run()


@pytest.mark.parametrize("number", range(FRESH))
def test_a_fresh_seed_keeps_all_promises(number: int) -> None:
    seed = FRESH_FIRST + number
    print(f"seed={seed}: replay with python -m tests.sim --seed {seed} --kind single")
    Simulation(seed).run()


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
