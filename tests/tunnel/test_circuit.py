"""A circuit without sockets: what goes where, ends, resets, and what a peer may not say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import LimitExceededError, RemoteProtocolError
from geomirror.tunnel.circuit import (
    Circuit,
    Decision,
    EndApplication,
    Finish,
    Reset,
    ToApplication,
    ToPeer,
)
from geomirror.tunnel.circuit_pieces import (
    DATA,
    DONE,
    END,
    PIECE_BYTES_MAX,
    PieceReader,
    pack,
)


class Side:
    """A circuit and what became of its decisions."""

    def __init__(self) -> None:
        self.circuit = Circuit()
        self.wire = b""
        self.application = b""
        self.ends: list[Decision] = []

    def run(self) -> None:
        while (decision := self.circuit.next_decision()) is not None:
            assert not any(isinstance(each, Finish | Reset) for each in self.ends)
            if isinstance(decision, ToPeer):
                self.wire += decision.data
            elif isinstance(decision, ToApplication):
                self.application += bytes(decision.data)
            else:
                self.ends.append(decision)

    def says(self, data: bytes) -> None:
        self.circuit.application_sent(memoryview(data))
        self.run()

    def ends_sending(self) -> None:
        self.circuit.application_ended()
        self.run()

    def flushed(self) -> None:
        self.circuit.application_flushed()
        self.run()

    def hears(self, data: bytes) -> None:
        self.circuit.peer_sent(memoryview(data))
        self.run()

    def take_wire(self) -> bytes:
        found, self.wire = self.wire, b""
        return found


def exchange(a: Side, b: Side) -> None:
    """Until nobody has anything to say."""
    while a.wire or b.wire:
        b.hears(a.take_wire())
        a.hears(b.take_wire())


def test_a_question_an_answer_and_a_good_end() -> None:
    here, there = Side(), Side()
    here.says(b"question")
    here.ends_sending()
    exchange(here, there)
    assert (there.application, there.ends) == (b"question", [EndApplication()])
    there.flushed()
    exchange(here, there)
    there.says(b"answer")
    there.ends_sending()
    exchange(here, there)
    assert (here.application, here.ends) == (b"answer", [EndApplication()])
    assert not there.circuit.is_over, "the answer is not handed over yet"
    here.flushed()
    exchange(here, there)
    assert here.ends[-1] == there.ends[-1] == Finish()
    assert (here.circuit.bytes_sent, here.circuit.bytes_received) == (8, 6)


def test_whatever_ends_it_before_both_sides_are_done_is_a_reset() -> None:
    for lost_after in range(4):
        here, there = Side(), Side()
        steps = [here.ends_sending, there.flushed, there.ends_sending]
        for step in steps[:lost_after]:
            step()
            exchange(here, there)
        there.circuit.peer_lost("gone")
        there.run()
        assert there.ends[-1] == Reset("gone")
        there.says(b"late")
        there.ends_sending()
        there.flushed()
        assert there.wire == b"", "nothing comes after a reset"


def test_the_last_byte_of_news_may_get_lost_and_is_a_reset_for_the_other() -> None:
    here, there = Side(), Side()
    for side, other in ((here, there), (there, here)):
        side.ends_sending()
        exchange(here, there)
        other.flushed()
        if side is here:
            exchange(here, there)
    # `here` has sent its DONE and got one: it is over. `there` has not read the last one.
    assert here.ends[-1] == Finish()
    there.circuit.peer_lost("gone")
    there.run()
    assert there.ends[-1] == Reset("gone")


@pytest.mark.parametrize(
    ("wire", "word"),
    [
        (b"\x00\x00\x00\x00", "unknown kind 0"),
        (b"\x00\x00\x00\x09", "unknown kind 9"),
        (b"\x00\x00\x00\x01", "with 0 bytes"),
        (b"\x01\x00\x00\x02", "with 1 bytes"),
        (b"\xff\xff\xff\x01", "at most 65536"),
        (pack(DONE), "DONE without an END"),
        (pack(END) + pack(DATA, b"x"), "more after the END"),
        (pack(END) + pack(END), "more after the END"),
    ],
)
def test_what_a_peer_may_not_say_resets_the_circuit(wire: bytes, word: str) -> None:
    for parts in ([wire], [wire[i : i + 1] for i in range(len(wire))]):
        side = Side()
        for part in parts:
            side.hears(part)
        (end,) = (each for each in side.ends if isinstance(each, Reset))
        assert word in end.reason


def test_a_second_done_resets_it() -> None:
    side = Side()
    side.ends_sending()
    side.hears(pack(DONE) + pack(DONE))
    assert isinstance(side.ends[-1], Reset)


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_pieces_come_whole_however_they_are_cut(pieces: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(pack(DATA, piece) for piece in pieces) + pack(END) + pack(DONE)
    reader = PieceReader()
    found, kinds, at = b"", [], 0
    while at < len(wire):
        size = cuts[at % len(cuts)]
        for kind, data in reader.feed(memoryview(wire)[at : at + size]):
            found += bytes(data)
            kinds.append(kind)
        at += size
    assert found == b"".join(pieces)
    assert kinds[-2:] == [END, DONE]
    assert set(kinds[:-2]) <= {DATA}


def test_a_piece_has_the_bytes_of_the_document() -> None:
    assert pack(DATA, b"abc") == bytes.fromhex("03000001") + b"abc"
    assert pack(END) == bytes.fromhex("00000002")
    assert pack(DONE) == bytes.fromhex("00000003")
    assert pack(DATA, bytes(PIECE_BYTES_MAX))[:4] == bytes.fromhex("00000101")


@given(st.binary(max_size=64))
def test_any_bytes_are_pieces_or_a_typed_error(wire: bytes) -> None:
    try:
        total = sum(len(data) for _, data in PieceReader().feed(memoryview(wire)))
    except (RemoteProtocolError, LimitExceededError):
        return
    assert total <= len(wire)
