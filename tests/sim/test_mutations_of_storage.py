"""The simulator bites: journal, undo, images and the stream broken in many ways.

Each is found within 100 seeds (`mutation_runs`).
"""

from __future__ import annotations

import pytest

from tests.sim.mutation_runs import OF_STORAGE, find


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OF_STORAGE)
def test_a_mutation_is_found(name: str) -> None:
    find(name)
