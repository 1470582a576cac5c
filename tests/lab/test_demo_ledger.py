"""The demo's judge has to see every kind of damage; else its verdict is worth nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import SeededEntropy
from geomirror.lab.demo_ledger import BlockMaker, Ledger, Verdict, Write, read_block
from geomirror.limits import BLOCK_BYTES

SLOTS = 40
MAKER = BlockMaker(SeededEntropy(1))


class Disk:
    """An image that takes the ledger's writes."""

    def __init__(self) -> None:
        self.ledger = Ledger(range(0, SLOTS * BLOCK_BYTES, BLOCK_BYTES), MAKER, SeededEntropy(2))
        self.image = bytearray(b"".join(MAKER.block(slot, 0) for slot in range(SLOTS)))

    def put(self, write: Write) -> None:
        at = self.ledger.offsets[write.slot]
        self.image[at : at + BLOCK_BYTES] = self.ledger.content(write)

    def write(self, count: int) -> list[Write]:
        """Issue, take and complete `count` writes one after the other."""
        made = []
        while len(made) < count:
            for write in self.ledger.issue(1):
                self.put(write)
                self.ledger.complete(write)
                made.append(write)
        return made

    def flush(self) -> None:
        self.ledger.confirm(self.ledger.begin_flush())

    def judge(self) -> Verdict:
        return self.ledger.judge_image(memoryview(self.image))


def test_a_block_is_recognised_only_whole() -> None:
    block = MAKER.block(7, 9)
    assert len(block) == BLOCK_BYTES
    assert read_block(block) == (7, 9)
    assert read_block(block[:-1]) is None
    assert read_block(bytes(BLOCK_BYTES)) is None
    for at in range(0, BLOCK_BYTES, 97):
        assert read_block(block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]) is None
    assert read_block(MAKER.block(7, 8)[:2048] + block[2048:]) is None  # torn


def test_an_image_with_every_write_is_a_legal_cut() -> None:
    disk = Disk()
    disk.write(200)
    disk.flush()
    verdict = disk.judge()
    assert verdict.is_legal_cut
    assert verdict.sequence_max == disk.ledger.write_count == 200
    assert not verdict.missing_completed
    assert disk.ledger.confirmed_count == disk.ledger.completed_count == 200


def test_an_older_moment_is_legal_but_has_lost_what_came_later() -> None:
    disk = Disk()
    disk.write(50)
    disk.flush()
    older = bytes(disk.image)
    later = disk.write(5)
    verdict = disk.ledger.judge_image(memoryview(older))
    assert verdict.is_legal_cut
    assert verdict.missing_completed
    assert set(verdict.missing_completed) <= {write.sequence for write in later}
    assert not verdict.missing_confirmed
    disk.flush()
    assert disk.ledger.judge_image(memoryview(older)).missing_confirmed


def test_a_lost_write_behind_a_kept_later_one_is_no_legal_cut() -> None:
    disk = Disk()
    disk.write(10)
    lost, kept = disk.ledger.issue(1)[0], None
    disk.ledger.complete(lost)
    while kept is None or kept.slot == lost.slot:
        kept = disk.ledger.issue(1)[0]
        disk.put(kept)
        disk.ledger.complete(kept)
        if kept.slot == lost.slot:
            lost = disk.ledger.issue(1)[0]
            disk.ledger.complete(lost)
    verdict = disk.judge()
    assert not verdict.is_legal_cut
    assert lost.sequence in verdict.missing_before


def test_writes_under_way_together_may_survive_in_any_combination() -> None:
    disk = Disk()
    batch = disk.ledger.issue(4)
    disk.put(batch[3])
    verdict = disk.judge()
    assert verdict.is_legal_cut
    assert not verdict.missing_completed


@pytest.mark.parametrize("damage", ["torn", "zero", "moved", "future"])
def test_damage_is_seen(damage: str) -> None:
    disk = Disk()
    last = disk.write(30)[-1]
    at = disk.ledger.offsets[last.slot]
    other = disk.ledger.offsets[(last.slot + 1) % SLOTS]
    content = {
        "torn": MAKER.block(last.slot, 0)[:512] + bytes(disk.image[at + 512 : at + BLOCK_BYTES]),
        "zero": bytes(BLOCK_BYTES),
        "moved": bytes(disk.image[other : other + BLOCK_BYTES]),
        "future": MAKER.block(last.slot, 10_000),
    }[damage]
    disk.image[at : at + BLOCK_BYTES] = content
    assert not disk.judge().is_legal_cut


@given(st.lists(st.integers(1, 6), max_size=30), st.data())
def test_every_prefix_of_the_history_is_legal(batches: list[int], data: st.DataObject) -> None:
    disk = Disk()
    images = [bytes(disk.image)]
    for count in batches:
        disk.write(count)
        images.append(bytes(disk.image))
    chosen = data.draw(st.sampled_from(images))
    assert disk.ledger.judge_image(memoryview(chosen)).is_legal_cut


def test_one_batch_never_writes_a_slot_twice() -> None:
    ledger = Disk().ledger
    for _ in range(200):
        slots = [write.slot for write in ledger.issue(16)]
        assert len(slots) == len(set(slots))
        assert slots


def test_a_history_branches_off_at_what_a_promoted_copy_has() -> None:
    disk = Disk()
    disk.write(60)
    disk.flush()
    promoted = bytes(disk.image)
    before = disk.ledger.moment
    safe = disk.ledger.completed_before(before)
    tail = disk.write(8)

    def read(slot: int) -> bytes:
        return promoted[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES]

    other = disk.ledger.branch_off(read)
    lost = disk.ledger.judge(read).missing_completed
    assert lost
    assert set(lost) <= {write.sequence for write in tail}
    assert not set(lost) & safe
    assert other.write_count == other.confirmed_count == 60
    verdict = other.judge(read)
    assert verdict.is_legal_cut
    assert not verdict.missing_completed

    # What either side writes from now on is unknown to the other.
    image = bytearray(promoted)
    [new] = other.issue(1)
    at = other.offsets[new.slot]
    image[at : at + BLOCK_BYTES] = other.content(new)
    other.complete(new)
    assert new.sequence not in {write.sequence for write in disk.write(20)}
    assert other.judge_image(memoryview(image)).is_legal_cut
    assert other.judge_image(memoryview(promoted)).missing_completed == [new.sequence]
    assert disk.ledger.judge_image(memoryview(image)).unknown_sequences == [new.sequence]
    assert other.judge_image(memoryview(disk.image)).unknown_sequences


def test_what_was_under_way_and_is_in_the_promoted_copy_is_part_of_its_history() -> None:
    disk = Disk()
    [write] = disk.ledger.issue(1)
    disk.put(write)
    image = bytes(disk.image)
    other = disk.ledger.branch_off(lambda slot: image[slot * BLOCK_BYTES :][:BLOCK_BYTES])
    assert other.confirmed_count == 1
    assert write.completed is None
    empty = b"".join(MAKER.block(slot, 0) for slot in range(SLOTS))
    assert other.judge_image(memoryview(empty)).missing_confirmed == [write.sequence]
