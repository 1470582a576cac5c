"""The simulator bites: members that say, hear or forget what is not so.

Each is found within 100 seeds (`mutation_runs`).
"""

from __future__ import annotations

import pytest

from tests.sim.mutation_runs import OF_MEMBERS, find


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OF_MEMBERS)
def test_a_mutation_is_found(name: str) -> None:
    find(name)
