"""Two images, one dirty set: whatever differs is copied, nothing else is, answers cut anywhere."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.errors import LimitExceededError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, KIB, PRODUCTION, REGION_BYTES, SIMULATION, Limits
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.dirty_index import IMAGE, Piece
from geomirror.volume.image import Image
from geomirror.volume.sealed_content import SealedContent
from geomirror.volume.tree_digest import DIGEST_BYTES, REGION_BLOCKS
from geomirror.wan_protocol.epoch_decode import decode_frame
from geomirror.wan_protocol.messages import ResyncAsk, ResyncDigests
from geomirror.wan_protocol.resync_answer import (
    ASKS_MAX,
    NODE_BLOCKS_MAX,
    UNITS_MAX,
    DigestAnswers,
)
from geomirror.wan_protocol.resync_job import CompareJob, Item, ResyncReadJob
from geomirror.wan_protocol.resync_plan import Part, ResyncPlan
from tests.sim.disk import SimStore

KEY = 0xFEED
SIZES = {0: 37 * REGION_BYTES + 5 * BLOCK_BYTES + 1536, 3: 2 * REGION_BYTES}
Images = dict[int, Image]


def images(name: str) -> Images:
    store = SimStore(name)
    return {v: Image(v, str(v), size, store.create(str(v), size)) for v, size in SIZES.items()}


def write(image: Image, block: int, data: bytes) -> None:
    image.file.pwritev([data[: image.block_bytes(block)]], block * BLOCK_BYTES)


class Pair:
    """We and the peer, without engines; the peer's answers come in parts."""

    def __init__(self, limits: Limits = SIMULATION, *, has_digests: bool = True) -> None:
        self.ours, self.theirs = images("ours"), images("theirs")
        self.bitmap = DirtyBitmap.create(
            SimStore("bits"), "west", SIZES, generation=bytes(16), epoch=0, chain_hash=bytes(32)
        )
        self.limits = limits
        self.plan = ResyncPlan(self.bitmap, SIZES, limits, has_digests=has_digests, key=KEY)
        self.answers = DigestAnswers(limits, KEY, SIZES)
        self.unsealed: set[tuple[int, int]] = set()
        self.copied: dict[tuple[int, int], int] = {}
        self.asked = self.digests = self.rounds = 0

    def item(self, part: Part, blocks: int) -> Item:
        blocks = min(blocks, part.blocks)
        offset = part.first * BLOCK_BYTES
        stop = min(offset + blocks * BLOCK_BYTES, SIZES[part.volume])
        pieces = [Piece(offset, stop - offset, IMAGE)]
        content = SealedContent(self.ours[part.volume], cast(Any, None), pieces)
        unsealed = frozenset(
            b for v, b in self.unsealed if v == part.volume and 0 <= b - part.first < blocks
        )
        return Item(part, blocks, content, stop, unsealed)

    def run(self, cut: random.Random | None = None) -> None:
        """Until the plan is done."""
        idle = 0
        for _ in range(10_000):
            self.rounds += 1
            self.ask()
            self.answer(cut)
            idle = 0 if self.step() or self.answers._waiting else idle + 1
            if self.plan.is_done:
                return
            assert idle < 3, "nothing goes on"
        raise AssertionError("never done")

    def ask(self) -> None:
        for request, units, runs in self.plan.next_asks():
            self.answers.add(ResyncAsk(1, 1, request, units, runs))
            self.asked += sum(count for _, _, count in runs)

    def answer(self, cut: random.Random | None) -> None:
        while (job := self.answers.next_job(self.theirs)) is not None:
            job.run()
            found = self.answers.done(job)
            self.digests += len(found.digests) // DIGEST_BYTES
            at = 0
            while at < len(found.digests):
                step = cut.randrange(1, 40) * DIGEST_BYTES if cut else len(found.digests)
                body = found.digests[at : at + step]
                first = found.first + at // DIGEST_BYTES
                self.plan.answer(ResyncDigests(1, 1, found.request, first, body))
                at += step
            if cut is not None and cut.random() < 0.5:
                return  # The others take their time.

    def step(self) -> bool:
        key, bytes_max = self.plan.key, self.limits.resync_read_bytes_max
        parts = self.plan.next_copies(64)
        if parts:
            read = ResyncReadJob([self.item(p, 64) for p in parts], key, bytes_max, 1)
            read.run()
            for part, done in zip(reversed(parts), reversed(read.done), strict=True):
                self.plan.copied(part, done)
            self.take(read.frames)
            return True
        nodes = self.plan.next_nodes()
        if nodes is None:
            return False
        job = CompareJob(self.item(nodes, nodes.blocks), key, bytes_max)
        job.run()
        self.plan.compared(nodes, job.done, job.zeros, job.differing)
        return True

    def take(self, frames: list[bytes]) -> None:
        for body in frames:
            frame = decode_frame(body, PRODUCTION, SIZES)
            for row in frame.table:
                volume, block, count = (int(row[n]) for n in ("volume", "block", "count"))
                at = int(row["address"])
                for each in range(block, block + count):
                    self.copied[volume, each] = self.copied.get((volume, each), 0) + 1
                    length = self.theirs[volume].block_bytes(each)
                    is_data = int(row["kind"]) == 0 and at + length <= len(frame.data)
                    content = frame.data[at : at + length] if is_data else bytes(length)
                    write(self.theirs[volume], each, content)

    def differing(self) -> set[tuple[int, int]]:
        found = set()
        for volume, image in self.ours.items():
            for block in range(image.block_count):
                if image.read_block(block) != self.theirs[volume].read_block(block):
                    found.add((volume, block))
        return found


CONTENTS = [bytes([value]) * BLOCK_BYTES for value in (0, 1, 2)]
blocks = st.tuples(st.sampled_from([0, 0, 0, 3]), st.integers(0, 597), st.integers(0, 2))
runs = st.tuples(st.sampled_from([0, 3]), st.integers(0, 37), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(blocks, max_size=40),
    st.lists(blocks, max_size=40),
    st.one_of(st.none(), st.lists(runs, max_size=6)),
    st.lists(st.tuples(st.sampled_from([0, 3]), st.integers(0, 597)), max_size=4),
    st.integers(0, 1 << 30),
)
def test_what_differs_in_dirty_regions_is_copied_and_nothing_else(
    ours: list[tuple[int, int, int]],
    theirs: list[tuple[int, int, int]],
    dirty: list[tuple[int, int, int]] | None,
    unsealed: list[tuple[int, int]],
    seed: int,
) -> None:
    pair = Pair()
    for side, found in ((pair.ours, ours), (pair.theirs, theirs)):
        for volume, block, value in found:
            write(side[volume], block % side[volume].block_count, CONTENTS[value])
    if dirty is None:
        pair.bitmap.set_all()
    for volume, first, count in dirty or []:
        size = SIZES[volume]
        start = min(first * REGION_BYTES, size - 1)
        pair.bitmap.set_range(volume, start, min(count * REGION_BYTES, size - start))
    pair.unsealed = {(v, b % pair.ours[v].block_count) for v, b in unsealed}
    wanted = {
        (volume, block)
        for volume, block in pair.differing()
        if pair.bitmap.is_dirty(volume, block // REGION_BLOCKS)
        and (volume, block) not in pair.unsealed
    }
    left = pair.differing() - wanted
    pair.run(random.Random(seed))
    assert set(pair.copied) == wanted
    assert pair.differing() == left
    assert all(times == 1 for times in pair.copied.values())


def test_a_peer_without_digests_gets_everything_that_is_dirty() -> None:
    pair = Pair(has_digests=False)
    for image in (pair.ours[0], pair.theirs[0]):
        write(image, 17, CONTENTS[1])
    pair.bitmap.set_range(0, REGION_BYTES, 2 * REGION_BYTES)
    pair.run()
    assert pair.asked == 0
    assert set(pair.copied) == {(0, block) for block in range(16, 48)}


def test_volumes_that_are_equal_cost_a_digest_for_each_node() -> None:
    pair = Pair()
    for block in range(0, 590, 3):
        for image in (pair.ours[0], pair.theirs[0]):
            write(image, block, CONTENTS[1 + block % 2])
    pair.bitmap.set_all()
    pair.run()
    assert pair.copied == {}
    assert pair.digests == pair.asked == -(-38 // SIMULATION.resync_node_regions) + 1


def test_one_changed_block_costs_the_way_down_to_it() -> None:
    pair = Pair()
    for block in range(0, 590, 3):
        for image in (pair.ours[0], pair.theirs[0]):
            write(image, block, CONTENTS[1 + block % 2])
    write(pair.ours[0], 333, CONTENTS[0])
    pair.bitmap.set_all()
    pair.run()
    assert set(pair.copied) == {(0, 333)}
    assert pair.asked == 11 + SIMULATION.resync_node_regions + REGION_BLOCKS


def test_what_is_zeros_there_is_copied_without_asking_for_its_parts() -> None:
    pair = Pair()
    for block in range(0, 590, 3):
        write(pair.ours[0], block, CONTENTS[1])
    pair.bitmap.set_all()
    pair.run()
    assert pair.asked == 11
    assert not pair.differing()


def test_what_is_ahead_is_bounded() -> None:
    limits = PRODUCTION
    plan = Pair(limits).plan
    size = 1 << 46
    bitmap = DirtyBitmap.create(
        SimStore("big"), "west", {0: size}, generation=bytes(16), epoch=0, chain_hash=bytes(32)
    )
    bitmap.set_range(0, 0, 1 << 40)
    plan = ResyncPlan(bitmap, {0: size}, limits, has_digests=True, key=KEY)
    asks = list(plan.next_asks())
    assert sum(count for _, _, runs in asks for _, _, count in runs) == 4096
    assert not list(plan.next_asks())
    for region in range(0, 20_000, 2):
        bitmap.clear_range(0, region, 1)
    plan = ResyncPlan(bitmap, {0: size}, limits, has_digests=True, key=KEY)
    asks = list(plan.next_asks())
    assert sum(count for _, _, runs in asks for _, _, count in runs) == 1 << 16
    assert all(units == 1 and len(runs) <= 128 for _, units, runs in asks)


@pytest.mark.parametrize(
    ("first", "digests"),
    [(0, b""), (0, b"x" * 15), (0, b"x" * 17), (1, b"x" * 16), (-1, b"x" * 16), (0, b"x" * 16_000)],
)
def test_digests_that_were_not_asked_for_are_refused(first: int, digests: bytes) -> None:
    pair = Pair()
    pair.bitmap.set_all()
    list(pair.plan.next_asks())
    with pytest.raises(RemoteProtocolError, match=r"ask 1|digests too many"):
        pair.plan.answer(ResyncDigests(1, 1, 1, first, digests))
    with pytest.raises(RemoteProtocolError):
        pair.plan.answer(ResyncDigests(1, 1, 99, 0, b"x" * 16))


@pytest.mark.parametrize(
    ("units", "runs"),
    [
        (0, [(0, 0, 1)]),
        (2, [(0, 0, 1)]),
        (24, [(0, 0, 1)]),
        (-16, [(0, 0, 1)]),
        (2 * NODE_BLOCKS_MAX, [(0, 0, 1)]),
        (1, []),
        (1, [(0, 0, 1)] * 1025),
        (1, [(0, 0, UNITS_MAX + 1)]),
        (1, [(0, 0, 0)]),
        (1, [(0, 0, -1), (0, 0, 3)]),
        (1, [(0, -1, 1)]),
        (1, [(0, 598, 1)]),
        (1, [(0, 1 << 63, 1)]),
        (1, [(7, 0, 1)]),
        (16, [(0, 8, 1)]),
        (64, [(0, 8, 1)]),
        (64, [(0, 0, 11)]),
    ],
)
def test_asks_out_of_bounds_are_refused(units: int, runs: list[tuple[int, int, int]]) -> None:
    answers = DigestAnswers(PRODUCTION, KEY, SIZES)
    with pytest.raises(RemoteProtocolError):
        answers.add(ResyncAsk(1, 1, 1, units, runs))
    assert answers.next_job(images("x")) is None


def test_asks_that_wait_are_bounded_and_have_numbers_of_their_own() -> None:
    answers = DigestAnswers(PRODUCTION, KEY, SIZES)
    for request in range(ASKS_MAX):
        answers.add(ResyncAsk(1, 1, request, 1, [(0, 0, 1)]))
    with pytest.raises(LimitExceededError):
        answers.add(ResyncAsk(1, 1, ASKS_MAX, 1, [(0, 0, 1)]))
    other = DigestAnswers(PRODUCTION, KEY, SIZES)
    other.add(ResyncAsk(1, 1, 5, 1, [(0, 0, 1)]))
    with pytest.raises(LimitExceededError):
        other.add(ResyncAsk(1, 1, 5, 1, [(0, 16, 1)]))


def test_small_units_are_answered_first_and_a_job_reads_a_bounded_part() -> None:
    theirs = images("theirs")
    for block in range(theirs[0].block_count):
        write(theirs[0], block, CONTENTS[1])
    answers = DigestAnswers(SIMULATION, KEY, SIZES)
    answers.add(ResyncAsk(1, 1, 1, 64, [(0, 0, 10)]))
    answers.add(ResyncAsk(1, 1, 2, 1, [(0, 0, 4)]))
    order, reads = [], []
    while (job := answers.next_job(theirs)) is not None:
        before = job.key.read_bytes
        job.run()
        reads.append(job.key.read_bytes - before)
        order.append(answers.done(job).request)
    assert order[0] == 2
    assert set(order[1:]) == {1}
    assert len(order) > 3
    assert max(reads) <= 4 * SIMULATION.resync_read_bytes_max + 256 * KIB
