"""The job that encodes the next unit, from a journal that received folds."""

from __future__ import annotations

import pytest

from geomirror.limits import MIB
from geomirror.volume.epoch_table import Epoch
from geomirror.wan_protocol.encode_unit import EncodeUnitJob
from tests.volume.test_engine_secondary import GENERATION, SIZES, Secondary


@pytest.mark.parametrize(("count", "last"), [(1, 4), (4, 4), (5, 5), (9, 7), (7, 7)])
def test_a_received_fold_is_taken_once_for_all_its_numbers(count: int, last: int) -> None:
    """As at a primary that was a secondary: its peer is behind and folds again."""
    node = Secondary(7)
    engine = node.engine
    blocks: set[int] = set()
    for first, number in ((1, 4), (5, 5), (6, 7)):
        sent = node.primary.epoch(number)
        have = {block: engine.spool([content], 0) for block, content in sent.blocks.items()}
        table = node.primary.assemble(number, sent, have).table
        engine.commit(
            Epoch(number, first, GENERATION, 0, 9, 0, sent.chain_hash, table, is_asserted=True), 0
        )
        if number <= last:
            blocks |= set(sent.blocks)
    node.sync()
    numbers = list(range(1, min(count, 7) + 1))
    job = EncodeUnitJob(engine, numbers, 32 * MIB, level=1, base_sizes={0: SIZES[0]})
    job.run()
    assert job.encoded is not None
    assert (job.encoded.first_number, job.encoded.number) == (1, last)
    assert job.encoded.chain_hash == node.primary.epoch(last).chain_hash
    assert job.encoded.entries >= len(blocks)
