"""The simulator bites: copies that are made, compared, grown or marked wrongly.

Each is found within 100 seeds (`mutation_runs`).
"""

from __future__ import annotations

import pytest

from tests.sim.mutation_runs import OF_COPIES, find


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OF_COPIES)
def test_a_mutation_is_found(name: str) -> None:
    find(name)
