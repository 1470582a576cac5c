"""Unanswered requests while a server comes and goes: what is sent, held, repeated, failed."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.environment import SECOND
from geomirror.nbd import constants as c
from geomirror.nbd.replay import ReplayQueue, Unanswered

ANN, BOB = object(), object()


def queue(timeout_s: float | None = 10) -> ReplayQueue:
    return ReplayQueue(None if timeout_s is None else int(timeout_s * SECOND), 0)


def write(found: ReplayQueue, cookie: int, offset: int, data: bytes, owner: object = ANN) -> None:
    found.add(owner, cookie, c.CMD_WRITE, 0, offset, len(data), data)


def flush(found: ReplayQueue, cookie: int) -> None:
    found.add(ANN, cookie, c.CMD_FLUSH, 0, 0, 0, None)


def sent(found: ReplayQueue) -> list[Unanswered]:
    requests = []
    while (request := found.next_to_send()) is not None:
        requests.append(request)
    return requests


def cookies(requests: list[Unanswered]) -> list[int]:
    return [request.cookie for request in requests]


def test_what_the_dead_server_left_unanswered_goes_to_the_next_one_in_order() -> None:
    found = queue()
    found.connected()
    for cookie in range(4):
        write(found, cookie, cookie * 4096, b"x" * 4096)
    flush(found, 4)
    first = sent(found)
    assert cookies(first) == [0, 1, 2, 3, 4]
    found.answered(first[1])
    found.disconnected(1 * SECOND)
    write(found, 5, 0, b"y" * 10)
    assert sent(found) == []
    assert found.payload_bytes == 3 * 4096 + 10
    found.connected()
    # 5 overlaps 0, which is under way again.
    assert cookies(sent(found)) == [0, 2, 3, 4]
    assert found.replayed == 4


def test_of_two_changes_that_overlap_the_later_one_waits_for_the_answer() -> None:
    found = queue()
    found.connected()
    write(found, 1, 0, b"a" * 100)
    write(found, 2, 99, b"b" * 100)
    found.add(ANN, 3, c.CMD_TRIM, 0, 150, 10, None)
    found.add(ANN, 4, c.CMD_READ, 0, 0, 100, None)
    write(found, 5, 300, b"c")
    first = sent(found)
    # The trim overlaps what is only held: both are unanswered, so it may be the first.
    assert cookies(first) == [1, 3, 4, 5]
    found.answered(first[0])
    assert sent(found) == []
    found.answered(first[1])
    assert cookies(sent(found)) == [2]


def test_what_may_be_in_effect_goes_ahead_of_what_was_held() -> None:
    """Else somebody who read 3 would read 2, and then 3 again."""
    found = queue()
    found.connected()
    write(found, 1, 0, b"a" * 10)
    write(found, 2, 5, b"b" * 10)
    write(found, 3, 12, b"c" * 10)
    assert cookies(sent(found)) == [1, 3]
    found.disconnected(0)
    found.connected()
    assert cookies(sent(found)) == [1, 3]


def test_neighbours_do_not_overlap() -> None:
    found = queue()
    found.connected()
    write(found, 1, 100, b"a" * 100)
    write(found, 2, 0, b"b" * 100)
    write(found, 3, 200, b"c" * 100)
    assert cookies(sent(found)) == [1, 2, 3]
    for inside in (99, 100, 150, 199):
        write(found, inside, inside, b"dd")
    assert sent(found) == []


def test_a_server_that_stays_away_fails_what_waits_and_what_comes_until_it_is_back() -> None:
    found = queue(10)
    assert found.get_timer() is None
    write(found, 1, 0, b"a")
    assert found.get_timer() == 10 * SECOND
    assert found.take_overdue(10 * SECOND - 1) == []
    assert cookies(found.take_overdue(10 * SECOND)) == [1]
    write(found, 2, 0, b"b")
    assert cookies(found.take_overdue(11 * SECOND)) == [2]
    found.connected()
    write(found, 3, 0, b"c")
    assert found.take_overdue(99 * SECOND) == []
    assert cookies(sent(found)) == [3]
    assert found.payload_bytes == 1
    # The time counts from the loss, however long the server had been there before.
    found.disconnected(100 * SECOND)
    assert found.get_timer() == 110 * SECOND


def test_without_a_timeout_it_is_waited_for_ever() -> None:
    found = queue(None)
    write(found, 1, 0, b"a")
    assert found.get_timer() is None
    assert found.take_overdue(10**18) == []
    assert cookies(found.take_all()) == [1]
    assert (len(found), found.payload_bytes) == (0, 0)


def test_of_a_user_that_is_gone_nothing_is_repeated() -> None:
    found = queue()
    found.connected()
    write(found, 1, 0, b"a", BOB)
    write(found, 2, 0, b"b", BOB)
    write(found, 3, 0, b"c", ANN)
    (first,) = sent(found)
    found.disown(BOB)
    # It is under way: Ann's write of the same bytes has to come after it.
    assert sent(found) == []
    found.answered(first)
    assert cookies(sent(found)) == [3]
    write(found, 4, 10, b"d", BOB)
    assert cookies(sent(found)) == [4]
    found.disown(BOB)
    found.disconnected(1)
    found.connected()
    assert cookies(sent(found)) == [3]
    assert found.payload_bytes == 1


class Server:
    """A disk that a crash does not harm, and that answers, or dies, whenever it likes."""

    def __init__(self) -> None:
        self.disk = bytearray(64)

    def apply(self, request: Unanswered) -> None:
        if request.payload is not None:
            self.disk[request.offset : request.offset + request.length] = request.payload


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_dies_when_the_disk_is_what_the_answers_say(seed: int) -> None:
    """Every byte always holds what some order of the answered changes explains.

    The judge keeps, for each byte, what it may hold: its last answered value, and the values of
    unanswered writes. Once a reader saw a value, older ones must never come back.
    """
    chance = random.Random(seed)
    found, server = queue(None), Server()
    possible: list[list[int]] = [[0] for _ in range(64)]
    under_way: list[Unanswered] = []
    found.connected()
    value = 0
    for _ in range(chance.randrange(5, 60)):
        step = chance.randrange(10)
        if step < 5:
            offset = chance.randrange(60)
            length = chance.randrange(1, min(16, 64 - offset) + 1)
            value += 1
            write(found, value, offset, bytes([value]) * length)
        elif step < 8 and under_way:
            request = under_way.pop(chance.randrange(len(under_way)))
            server.apply(request)
            found.answered(request)
            for at in range(request.offset, request.offset + request.length):
                possible[at] = [request.cookie]
        elif step == 8 and under_way:
            # In effect, its answer lost: a reader may see it before it is repeated.
            server.apply(chance.choice(under_way))
        elif step == 9:
            under_way.clear()
            found.disconnected(0)
            found.connected()
        under_way += sent(found)
        for at, byte in enumerate(server.disk):
            candidates = [r for r in under_way if r.offset <= at < r.offset + r.length]
            assert len(candidates) <= 1
            assert byte in (*possible[at], *(r.cookie for r in candidates)), (seed, at)
