"""What the demo wrote, in which order, and what a flush confirmed: the judge of every mirror.

    slot (one 4 KiB data block of a file in the image)
      magic 16 | slot u32 | sequence u64 | half noise, half text ... | SHA-256 of all before

Every write has a sequence number, a moment of issue and a moment of completion on one counter. An
image is a legal cut of this history if every slot holds one of its writes, whole, and no write is
missing that was completed before one that is present was issued. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from geomirror.environment import Entropy
from geomirror.limits import BLOCK_BYTES

MAGIC = b"geomirror-ledger"
_HEADER = struct.Struct("<16sIQ")
_HASH_BYTES = 32
_NOISE_BYTES = 1 << 20
BRANCH_SEQUENCES = 1_000_000
"""Numbers left free for the history that is left behind, which may go on for a while."""


class BlockMaker:
    """Makes blocks that compress to about a half, as a database's pages do."""

    def __init__(self, entropy: Entropy) -> None:
        self._noise = entropy.token_bytes(_NOISE_BYTES)

    def block(self, slot: int, sequence: int) -> bytes:
        """The whole content of a slot after write `sequence`; 0 is the image as built."""
        start = (sequence * 2654435761 + slot * 40503) % (_NOISE_BYTES - BLOCK_BYTES)
        noise = self._noise[start : start + BLOCK_BYTES // 2]
        text = f"slot {slot:6d} write {sequence:9d} ".encode()
        body = _HEADER.pack(MAGIC, slot, sequence) + noise
        room = BLOCK_BYTES - _HASH_BYTES - len(body)
        body += (text * (room // len(text) + 1))[:room]
        return body + hashlib.sha256(body).digest()


def read_block(block: bytes) -> tuple[int, int] | None:
    """(slot, sequence) of a whole, unbroken block; None for anything else."""
    if len(block) != BLOCK_BYTES or not block.startswith(MAGIC):
        return None
    if hashlib.sha256(block[:-_HASH_BYTES]).digest() != block[-_HASH_BYTES:]:
        return None
    _, slot, sequence = _HEADER.unpack_from(block)
    return slot, sequence


@dataclass(slots=True)
class Write:
    """One write of the demo."""

    sequence: int
    slot: int
    issued: int
    """Moment of the first issue; a write whose fate was unknown is issued again, unchanged."""
    completed: int | None = None


@dataclass
class Verdict:
    """What is wrong with an image. Empty lists and zeros: nothing."""

    broken_slots: list[int] = field(default_factory=list)
    """Slots without a whole block of their own."""
    unknown_sequences: list[int] = field(default_factory=list)
    """Sequences that were never written to that slot."""
    missing_before: list[int] = field(default_factory=list)
    """Writes missing although a write issued after their completion is there."""
    missing_confirmed: list[int] = field(default_factory=list)
    """Writes missing although a flush had confirmed them."""
    missing_completed: list[int] = field(default_factory=list)
    """Writes missing although they were completed."""
    sequence_max: int = 0
    """Newest write that is there."""

    @property
    def is_legal_cut(self) -> bool:
        """Whether the image is the history cut at one moment."""
        return not (self.broken_slots or self.unknown_sequences or self.missing_before)


class Ledger:
    """History of all writes to the slots of one image."""

    def __init__(self, offsets: Sequence[int], maker: BlockMaker, entropy: Entropy) -> None:
        """`offsets[slot]` is the slot's position in the image, in bytes."""
        self.offsets = list(offsets)
        self.flushes = 0
        self._maker = maker
        self._entropy = entropy
        self._moment = 0
        self._sequence = 0
        self._writes: list[Write] = []
        self._of_slot: list[list[Write]] = [[] for _ in offsets]
        self._confirmed_before = 0

    @property
    def moment(self) -> int:
        """Where the counter of issues and completions is now."""
        return self._moment

    @property
    def write_count(self) -> int:
        """Writes issued."""
        return len(self._writes)

    @property
    def completed_count(self) -> int:
        """Writes completed."""
        return sum(write.completed is not None for write in self._writes)

    @property
    def confirmed_count(self) -> int:
        """Writes that a flush confirmed."""
        return sum(self._is_confirmed(write) for write in self._writes)

    def completed_before(self, moment: int) -> set[int]:
        """Sequences of the writes that were completed before a moment."""
        writes = (write for write in self._writes if write.completed is not None)
        return {write.sequence for write in writes if (write.completed or 0) < moment}

    def branch_off(self, read: Callable[[int], bytes]) -> Ledger:
        """The history that goes on from an image: what a promoted copy has, and what comes next.

        What is in the image counts as confirmed. New writes get numbers that this history will not
        use, so that no block means two things.
        """
        other = Ledger(self.offsets, self._maker, self._entropy)
        other._moment, other._confirmed_before = self._moment + 1, self._moment + 1
        for slot, history in enumerate(self._of_slot):
            parsed = read_block(bytes(read(slot)))
            newest = parsed[1] if parsed is not None and parsed[0] == slot else 0
            kept = [write for write in history if write.sequence <= newest]
            other._of_slot[slot] = [replace(w, completed=w.completed or self._moment) for w in kept]
        other._writes = sorted(
            (write for history in other._of_slot for write in history), key=lambda w: w.sequence
        )
        other._sequence = self._sequence + BRANCH_SEQUENCES
        return other

    def content(self, write: Write) -> bytes:
        """The block that a write puts into its slot."""
        return self._maker.block(write.slot, write.sequence)

    def issue(self, count: int) -> list[Write]:
        """Begin `count` writes to different slots; all earlier ones have to be completed."""
        size = len(self.offsets)
        # Half of the writes go to a tenth of the slots, as real files are hot and cold.
        chosen: dict[int, None] = {}
        while len(chosen) < min(count, size):
            span = size if self._entropy.uniform(0, 1) < 0.5 else max(1, size // 10)
            chosen[min(int(self._entropy.uniform(0, span)), size - 1)] = None
            if len(chosen) == max(1, size // 10):
                break
        begun = []
        for slot in chosen:
            self._moment += 1
            self._sequence += 1
            write = Write(self._sequence, slot, self._moment)
            self._writes.append(write)
            self._of_slot[slot].append(write)
            begun.append(write)
        return begun

    def complete(self, write: Write) -> None:
        """The client got the reply to a write."""
        self._moment += 1
        write.completed = self._moment

    def begin_flush(self) -> int:
        """A flush is about to be issued; give the value to `confirm` when its reply is there."""
        self._moment += 1
        return self._moment

    def confirm(self, moment: int) -> None:
        """The flush begun at `moment` was answered: what was completed before it is safe."""
        self.flushes += 1
        self._confirmed_before = max(self._confirmed_before, moment)

    def judge(self, read: Callable[[int], bytes]) -> Verdict:
        """Check an image; `read(slot)` gives the slot's 4096 bytes."""
        verdict = Verdict()
        found: list[int] = []
        newest_issue = 0
        for slot, history in enumerate(self._of_slot):
            parsed = read_block(bytes(read(slot)))
            if parsed is None or parsed[0] != slot:
                verdict.broken_slots.append(slot)
                found.append(-1)
                continue
            sequence = parsed[1]
            found.append(sequence)
            write = next((w for w in history if w.sequence == sequence), None)
            if write is not None:
                newest_issue = max(newest_issue, write.issued)
            elif sequence:
                verdict.unknown_sequences.append(sequence)
            verdict.sequence_max = max(verdict.sequence_max, sequence)
        for slot, history in enumerate(self._of_slot):
            self._judge_slot(found[slot], history, newest_issue, verdict)
        return verdict

    def judge_image(self, image: memoryview) -> Verdict:
        """Check a whole image in memory."""
        return self.judge(
            lambda slot: bytes(image[self.offsets[slot] : self.offsets[slot] + BLOCK_BYTES])
        )

    def _judge_slot(
        self, sequence: int, history: Iterable[Write], newest_issue: int, verdict: Verdict
    ) -> None:
        for write in history:
            if write.sequence <= sequence or write.completed is None:
                continue
            verdict.missing_completed.append(write.sequence)
            if write.completed < newest_issue:
                verdict.missing_before.append(write.sequence)
            if self._is_confirmed(write):
                verdict.missing_confirmed.append(write.sequence)

    def _is_confirmed(self, write: Write) -> bool:
        return write.completed is not None and write.completed < self._confirmed_before
