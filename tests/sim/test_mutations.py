"""What the searches for mutations rely on: the product as it is passes, and is itself afterwards.

The searches are in `test_mutations_of_*`: several files, so that several workers share them.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.sim.mutation_runs import FOCUS, OF_COPIES, OF_MEMBERS, OF_STORAGE
from tests.sim.mutations import MUTATIONS, mutated
from tests.sim.simulation import Simulation

CONTROL_SECONDS = 200


def test_every_mutation_is_looked_for_once() -> None:
    assert sorted([*OF_COPIES, *OF_MEMBERS, *OF_STORAGE]) == sorted(MUTATIONS)
    assert set(FOCUS) <= set(MUTATIONS)


LEANINGS = list({str(leaning): leaning for _, leaning in sorted(FOCUS.items())}.values())
"""Each once: several mutations are looked for in runs that lean the same way."""


@pytest.mark.parametrize("leaning", LEANINGS, ids=range(len(LEANINGS)))
def test_the_product_as_it_is_passes_the_same_runs(leaning: dict[str, Any]) -> None:
    Simulation(1, CONTROL_SECONDS, **leaning).run()


def test_a_mutation_is_undone_at_its_end() -> None:
    before = [(target, name, getattr(target, name)) for target, name, _ in _patches()]
    for mutation in MUTATIONS:
        with mutated(mutation):
            pass
    assert [(target, name, getattr(target, name)) for target, name, _ in before] == before


def _patches() -> list[tuple[Any, str, Any]]:
    return [patch for make in MUTATIONS.values() for patch in make()]
