"""Seeds that once found something.

What a seed does changes with the product and the simulator, so these prove little by themselves:
each finding has a story of its own in the tests of its package. They are kept because runs that
once went to a corner tend to be long, crowded and unlucky.
"""

from __future__ import annotations

import pytest

from tests.sim.options import NEVER
from tests.sim.simulation import Simulation
from tests.sim.succession import successions

SEEDS = [
    (4, 300, "frames of a resync that was given up stayed counted as sent: no window was left"),
    (7, 300, "a resync waited for a write after the epoch that was being sealed"),
    (10, 300, "the superblock's older copy named an epoch that undo had passed already"),
    (27, 600, "after 128 cuts, records behind a recycled epoch record were taken for applied"),
    (34, 600, "the same, with a flushed write"),
    (56, 30, "writers were held back by a peer that was away: the journal was too small for 90 %"),
    (70, 30, "the same, until the end"),
    (139, 30, "a secondary with a tiny journal gave up the epoch that was next, again and again"),
    (180, 300, "epochs that were durable and not applied were forgotten when a resync began"),
    (181, 300, "the same, with readers that held the image"),
    (4, 600, "a copy put back to a snapshot was judged by what the disk before it held"),
    (2786, 600, "a copy that a power cut gave back did not say that it holds its marks"),
]


SUCCESSIONS = [
    (38, 400, "a fold of epochs of two generations"),
    (3007, 400, "a promoted copy kept the names of marks whose epochs it never had"),
    (253, 400, "a session opened while an epoch that adds a volume was durable and not applied"),
    (215, 400, "a mark from between two resyncs of a copy that readers held counted as held"),
]


@pytest.mark.parametrize(("seed", "seconds", "found"), SUCCESSIONS)
def test_what_a_change_of_the_primary_once_found_stays_mended(
    seed: int, seconds: int, found: str
) -> None:
    assert found
    Simulation(seed, seconds, **{**successions(seed), "put_back_mean_ns": NEVER}).run()


@pytest.mark.parametrize(("seed", "seconds", "found"), SEEDS)
def test_what_a_seed_once_found_stays_mended(seed: int, seconds: int, found: str) -> None:
    assert found
    Simulation(seed, seconds).run()
