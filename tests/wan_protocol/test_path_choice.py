"""Which path an attempt takes: head starts, fallback, and looking at better paths again."""

from __future__ import annotations

import itertools

from geomirror.environment import SECOND, SeededEntropy
from geomirror.tunnel.link_path import expand_paths, rank_of
from geomirror.wan_protocol.path_choice import FALLBACK_NS, PROBE_NS, PROBE_NS_MAX, PathChoice

PATHS = expand_paths(["b:1", "c:1", "wss://b/x"], "p:1")
QUARTER = FALLBACK_NS // 4


def choice(paths: list[str] = PATHS) -> PathChoice:
    return PathChoice(rank_of, SeededEntropy(1), paths, 0)


def test_direct_paths_have_a_head_start_and_then_all_come_in_turn() -> None:
    found = choice()
    chosen = [found.choose(at * QUARTER) for at in range(13)]
    assert chosen[:4] == ["b:1", "c:1", "b:1", "c:1"]
    assert chosen[4:6] == ["b:1 via p:1", "c:1 via p:1"]
    assert chosen[8] == "wss://b/x"
    assert chosen[12] == "wss://b/x via p:1"
    rest = {found.choose(13 * QUARTER) for _ in range(len(PATHS))}
    assert rest == set(PATHS)


def test_what_is_refused_has_no_head_start() -> None:
    found = choice()
    for path in ("b:1", "c:1"):
        assert found.choose(0) == path
        found.failed(path, f"{path}: connection refused")
    assert found.choose(1) == "b:1 via p:1"
    found.failed("b:1 via p:1", "403")
    found.failed("c:1 via p:1", "403")
    assert found.choose(2) == "wss://b/x"


def test_one_direct_path_is_tried_for_ever() -> None:
    found = choice(["b:1"])
    for at in range(50):
        assert found.choose(at * SECOND) == "b:1"
        found.failed("b:1", "refused")
    found.used(0, 50 * SECOND)
    assert found.probe_due_ns() is None
    assert found.reason() == ""


def test_the_next_outage_begins_with_the_ranks_that_were_needed() -> None:
    found = choice()
    for at in range(9):
        path = found.choose(at * QUARTER)
    assert path == "wss://b/x"
    found.answered(path)
    found.used(2, 3 * SECOND)
    found.lost(3600 * SECOND)
    assert found.choose(3600 * SECOND) == "wss://b/x"
    found.used(0, 3700 * SECOND)
    found.lost(7200 * SECOND)
    now_ns = 7200 * SECOND
    assert {rank_of(found.choose(now_ns + i)) for i in range(10)} == {0}
    assert rank_of(found.choose(now_ns + FALLBACK_NS)) == 1


def test_better_paths_are_looked_at_with_growing_pauses() -> None:
    found = choice(expand_paths(["b:1"], "p:1"))
    found.choose(0)
    assert found.choose(FALLBACK_NS) == "b:1 via p:1"
    found.used(1, 2 * SECOND)
    assert found.reason() == "b:1: no answer within 800 ms"
    now_ns, pauses = 2 * SECOND, []
    for _ in range(12):
        due_ns = found.probe_due_ns()
        assert due_ns is not None
        pauses.append(due_ns - now_ns)
        now_ns = due_ns
        assert found.choose_probe(now_ns) == "b:1"
        found.failed("b:1", "b:1: connection refused")
    assert 0.8 * PROBE_NS <= pauses[0] <= 1.2 * PROBE_NS
    for earlier, later in itertools.pairwise(pauses):
        assert later >= min(1.2 * earlier, 0.8 * PROBE_NS_MAX)
    assert pauses[-1] <= 1.2 * PROBE_NS_MAX
    assert found.reason() == "b:1: connection refused"


def test_a_move_that_did_not_last_keeps_its_pause_and_the_old_path() -> None:
    found = choice(expand_paths(["b:1"], "p:1"))
    found.choose(FALLBACK_NS)
    now_ns = 2 * SECOND
    found.used(1, now_ns)
    moves = []
    while now_ns < 1800 * SECOND:
        now_ns = max(now_ns, found.probe_due_ns() or 0)
        moves.append(now_ns)
        found.choose_probe(now_ns)
        found.answered("b:1")
        found.lost(now_ns)
        found.used(0, now_ns)
        now_ns += 5 * SECOND
        found.lost(now_ns)
        assert {found.choose(now_ns), found.choose(now_ns)} == {"b:1", "b:1 via p:1"}
        found.used(1, now_ns)
    assert len(moves) <= 26  # 5, 10, 20, … 120 s: not 180 times
    # It lasts: the next time is a new one.
    found.lost(now_ns)
    found.used(0, now_ns)
    found.lost(now_ns + 3600 * SECOND)
    found.used(1, now_ns + 3600 * SECOND)
    due_ns = found.probe_due_ns()
    assert due_ns is not None and due_ns - now_ns - 3600 * SECOND <= 1.2 * PROBE_NS


def test_other_paths_are_taken_over() -> None:
    found = choice(["b:1"])
    assert not found.set_paths(["b:1"], 0)
    assert found.set_paths(["wss://b/x", "d:1"], SECOND)
    assert found.paths == ["d:1", "wss://b/x"]
    assert found.choose(SECOND) == "d:1"
    found.used(2, SECOND)
    assert found.set_paths([], SECOND)
    assert found.probe_due_ns() is None
