"""The content of a sealed epoch is the same to read at any time, on both sides."""

from __future__ import annotations

import pytest

from geomirror.errors import NotFoundError, RefusedError
from geomirror.volume.epoch_content import EpochContent, RangeDigests, region_digests
from tests.wan_protocol.core_support import BLOCK, PEER, PRIMARY, Stage, different_blocks, noise
from tests.wan_protocol.test_verify import written_stage


def read_all(content: EpochContent) -> dict[int, bytes]:
    return {
        volume: b"".join(content.read(volume, list(range(content.block_count(volume)))))
        for volume in content.sizes
    }


@pytest.mark.parametrize("node", [PRIMARY, PEER])
def test_a_sealed_epoch_reads_the_same_however_much_is_applied_after_it(node: str) -> None:
    stage = written_stage()
    kept: list[EpochContent] = []
    for at in range(6):
        for step in range(4):
            stage.write_blocks((at * 53 + step * 5) % 490, 7, seed=at * 10 + step)
            stage.write(at * 700 + step * 90_000, noise(at, 3000))
        stage.trim((at * 41 % 480) * BLOCK, 9 * BLOCK + 100)
        stage.seal()
        stage.pass_time(0 if at % 2 else 300)
        engine = stage.nodes[node].engine
        kept.append(EpochContent(engine, engine.sealed_epoch, f"verify {at}"))
    stage.pass_time(5000)
    assert stage.nodes[node].engine.applied_epoch == stage.primary.engine.sealed_epoch
    for content in kept:
        found = read_all(content)
        for volume, data in stage.at_epoch[content.epoch].items():
            assert not different_blocks(found[volume], data), (content.epoch, volume)
            blocks = content.block_count(volume)
            occupied = content.occupied(volume, 0, blocks).tolist()
            used = [any(data[at * BLOCK : (at + 1) * BLOCK]) for at in range(blocks)]
            assert all(o or not u for o, u in zip(occupied, used, strict=True))
        content.release()


def test_an_epoch_that_went_by_is_no_state_of_a_copy() -> None:
    stage = written_stage()
    engine = stage.secondary.engine
    for epoch in (engine.applied_epoch - 1, engine.applied_epoch + 1):
        with pytest.raises(NotFoundError):
            EpochContent(engine, epoch, "verify 1")


def test_a_copy_without_a_consistent_state_has_no_content() -> None:
    stage = Stage(first_sync=True, is_connected=False)
    with pytest.raises(RefusedError):
        EpochContent(stage.secondary.engine, 0, "verify 1")


def test_digests_are_those_of_the_contents_and_holes_are_not_read() -> None:
    stage = written_stage()
    job = digests_of(stage, PRIMARY)
    assert job.count == 513
    assert job.read_bytes == 8 * 12 * BLOCK + 1536
    other = digests_of(stage, PEER)
    assert (job.low == other.low).all()
    assert (job.high == other.high).all()
    zeros = [at for at in range(513) if not any(stage.content[0][at * BLOCK : (at + 1) * BLOCK])]
    assert [at for at in range(513) if not job.low[at] and not job.high[at]] == zeros
    assert len(region_digests(job.low, job.high, 8)) == 16 * 65


def test_a_step_ends_after_a_region() -> None:
    stage = written_stage()
    job = digests_of(stage, PRIMARY, bytes_max=BLOCK)
    assert job.count == 8
    assert job.read_bytes == 8 * BLOCK


def digests_of(stage: Stage, node: str, bytes_max: int = 1 << 30) -> RangeDigests:
    engine = stage.nodes[node].engine
    content = EpochContent(engine, engine.sealed_epoch, "verify 1")
    job = RangeDigests(content, 0, 0, content.block_count(0), region_blocks=8, bytes_max=bytes_max)
    job.run()
    content.release()
    return job
