"""Every pair of histories has one right answer, whichever side asks."""

from __future__ import annotations

import itertools

import pytest

from geomirror.cluster.history import (
    ANCESTOR,
    DESCENDANT,
    DIVERGED,
    EQUAL,
    STARTS_MAX,
    UNRELATED,
    Generation,
    History,
    StartPoint,
    compare,
    outranks,
)


def h(generation: str, epoch: int) -> bytes:
    """The true chain hash of an epoch of a generation."""
    return f"{generation}{epoch}".encode()


A = Generation(b"A", 1)
B = Generation(b"B", 2, b"A", 100, h("A", 100))
C = Generation(b"C", 2, b"A", 90, h("A", 90))
D = Generation(b"D", 3, b"B", 110, h("B", 110))
E = Generation(b"E", 3, b"B", 110, h("B", 110))
K = Generation(b"K", 3, b"A", 105, h("A", 105))
"""An operator wanted A to go on although B had the higher token."""
R = Generation(b"R", 2, b"A", 50, h("A", 50))
"""A rewind."""
X = Generation(b"X", 1)

HISTORIES = {
    "blank": History((), 0, bytes(32)),
    "A90": History((A,), 90, h("A", 90)),
    "A90 put back": History((A,), 90, b"another 90"),
    "A100": History((A,), 100, h("A", 100)),
    "A100 put back": History((A,), 100, b"another 100"),
    "A100+": History((A,), 100, h("A", 100), has_unsealed=True),
    "A105": History((A,), 105, h("A", 105)),
    "AB at 95": History((A, B), 95, h("A", 95)),
    "AB100": History((A, B), 100, h("A", 100)),
    "AB110": History((A, B), 110, h("B", 110)),
    "AB110+": History((A, B), 110, h("B", 110), has_unsealed=True),
    "AC95": History((A, C), 95, h("C", 95)),
    "ABD": History((A, B, D), 112, h("D", 112)),
    "ABE": History((A, B, E), 110, h("B", 110)),
    "AK107": History((A, K), 107, h("K", 107)),
    "AR60": History((A, R), 60, h("R", 60)),
    "X": History((X,), 100, h("X", 100)),
}
"""Blank, one history and its branches; "+" has changes that no epoch holds."""

TABLE = {
    # mine: theirs → relation and the epoch of the branch point; the other side is its mirror.
    ("A90", "A100"): (ANCESTOR, 90),
    ("A90", "A100+"): (ANCESTOR, 90),
    ("A90", "A105"): (ANCESTOR, 90),
    ("A90", "AB at 95"): (ANCESTOR, 90),
    ("A90", "AB100"): (ANCESTOR, 90),
    ("A90", "AB110"): (ANCESTOR, 90),
    ("A90", "AB110+"): (ANCESTOR, 90),
    ("A90", "AC95"): (ANCESTOR, 90),
    ("A90", "ABD"): (ANCESTOR, 90),
    ("A90", "ABE"): (ANCESTOR, 90),
    ("A100", "A100+"): (ANCESTOR, 100),
    ("A100", "A105"): (ANCESTOR, 100),
    ("A100", "AB100"): (ANCESTOR, 100),
    ("A100", "AB110"): (ANCESTOR, 100),
    ("A100", "AB110+"): (ANCESTOR, 100),
    ("A100", "AC95"): (DIVERGED, 90),
    ("A100", "ABD"): (ANCESTOR, 100),
    ("A100", "ABE"): (ANCESTOR, 100),
    ("A100+", "A105"): (DIVERGED, 100),
    ("A100+", "AB100"): (DIVERGED, 100),
    ("A100+", "AB110"): (DIVERGED, 100),
    ("A100+", "AB110+"): (DIVERGED, 100),
    ("A100+", "AC95"): (DIVERGED, 90),
    ("A100+", "ABD"): (DIVERGED, 100),
    ("A100+", "ABE"): (DIVERGED, 100),
    ("A105", "AB100"): (DIVERGED, 100),
    ("A105", "AB110"): (DIVERGED, 100),
    ("A105", "AB110+"): (DIVERGED, 100),
    ("A105", "AC95"): (DIVERGED, 90),
    ("A105", "ABD"): (DIVERGED, 100),
    ("A105", "ABE"): (DIVERGED, 100),
    ("AB at 95", "A100"): (ANCESTOR, 95),
    ("AB at 95", "A100+"): (ANCESTOR, 95),
    ("AB at 95", "A105"): (ANCESTOR, 95),
    ("AB at 95", "AB100"): (ANCESTOR, 95),
    ("AB at 95", "AB110"): (ANCESTOR, 95),
    ("AB at 95", "AB110+"): (ANCESTOR, 95),
    ("AB at 95", "AC95"): (DIVERGED, 90),
    ("AB at 95", "ABD"): (ANCESTOR, 95),
    ("AB at 95", "ABE"): (ANCESTOR, 95),
    ("AB100", "AB110"): (ANCESTOR, 100),
    ("AB100", "AB110+"): (ANCESTOR, 100),
    ("AB100", "AC95"): (DIVERGED, 90),
    ("AB100", "ABD"): (ANCESTOR, 100),
    ("AB100", "ABE"): (ANCESTOR, 100),
    ("AB110", "AB110+"): (ANCESTOR, 110),
    ("AB110", "AC95"): (DIVERGED, 90),
    ("AB110", "ABD"): (ANCESTOR, 110),
    ("AB110", "ABE"): (ANCESTOR, 110),
    ("AB110+", "AC95"): (DIVERGED, 90),
    ("AB110+", "ABD"): (DIVERGED, 110),
    ("AB110+", "ABE"): (DIVERGED, 110),
    ("AC95", "ABD"): (DIVERGED, 90),
    ("AC95", "ABE"): (DIVERGED, 90),
    ("ABD", "ABE"): (DIVERGED, 110),
    ("A90", "AK107"): (ANCESTOR, 90),
    ("A100", "AK107"): (ANCESTOR, 100),
    ("A100+", "AK107"): (DIVERGED, 100),
    ("A105", "AK107"): (ANCESTOR, 105),
    ("AB at 95", "AK107"): (ANCESTOR, 95),
    ("AB100", "AK107"): (DIVERGED, 100),
    ("AB110", "AK107"): (DIVERGED, 100),
    ("AB110+", "AK107"): (DIVERGED, 100),
    ("AC95", "AK107"): (DIVERGED, 90),
    ("ABD", "AK107"): (DIVERGED, 100),
    ("ABE", "AK107"): (DIVERGED, 100),
    ("A90", "AR60"): (DIVERGED, 50),
    ("A100", "AR60"): (DIVERGED, 50),
    ("A100+", "AR60"): (DIVERGED, 50),
    ("A105", "AR60"): (DIVERGED, 50),
    ("AB at 95", "AR60"): (DIVERGED, 50),
    ("AB100", "AR60"): (DIVERGED, 50),
    ("AB110", "AR60"): (DIVERGED, 50),
    ("AB110+", "AR60"): (DIVERGED, 50),
    ("AC95", "AR60"): (DIVERGED, 50),
    ("ABD", "AR60"): (DIVERGED, 50),
    ("ABE", "AR60"): (DIVERGED, 50),
    ("AK107", "AR60"): (DIVERGED, 50),
}
MIRROR = {EQUAL: EQUAL, ANCESTOR: DESCENDANT, DESCENDANT: ANCESTOR}
TRUE = [name for name in HISTORIES if name not in ("blank", "X") and "put back" not in name]


def test_the_table_has_every_pair() -> None:
    pairs = {frozenset(pair) for pair in TABLE}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(TRUE, 2)}
    assert len(pairs) == len(TABLE)


@pytest.mark.parametrize("pair", TABLE, ids=" - ".join)
def test_a_pair(pair: tuple[str, str]) -> None:
    mine, theirs = (HISTORIES[name] for name in pair)
    relation, epoch = TABLE[pair]
    for found, wanted in (
        (compare(mine, theirs), relation),
        (compare(theirs, mine), MIRROR.get(relation, relation)),
    ):
        assert found.relation == wanted
        assert found.branch is not None
        assert found.branch.epoch == epoch
        assert found.may_follow == (wanted in (EQUAL, ANCESTOR))


def test_a_history_equals_itself_unless_both_have_changes_of_their_own() -> None:
    for name in TRUE:
        wanted = DIVERGED if name.endswith("+") else EQUAL
        assert compare(HISTORIES[name], HISTORIES[name]).relation == wanted


def test_a_blank_copy_may_follow_everybody_and_nobody_it() -> None:
    blank = HISTORIES["blank"]
    assert compare(blank, blank).relation == EQUAL
    for name in [*TRUE, "X"]:
        assert compare(blank, HISTORIES[name]).relation == ANCESTOR
        assert compare(HISTORIES[name], blank).relation == DESCENDANT


def test_histories_without_a_common_generation_are_unrelated() -> None:
    for name in TRUE:
        assert compare(HISTORIES[name], HISTORIES["X"]).relation == UNRELATED
        assert compare(HISTORIES["X"], HISTORIES[name]).relation == UNRELATED


def test_an_old_snapshot_that_was_put_back_never_looks_in_sync() -> None:
    """Same generation, same epoch, other hash: for everybody who knows the hash at that epoch."""
    for name in TRUE:
        theirs = HISTORIES[name]
        for old in ("A90 put back", "A100 put back"):
            mine = HISTORIES[old]
            known = h("A", mine.epoch)
            found = compare(mine, theirs, lambda _, known=known: known)  # type: ignore[misc]
            if mine.epoch > 95 and name in ("A90", "AB at 95"):
                # They have less: who has the hash of their end, the put back one, compares it.
                found = compare(mine, theirs, lambda _: b"as put back")
            if name == "AR60" or (name == "AC95" and mine.epoch == 100):
                continue  # Parted before: diverged with a branch point, see below.
            assert found.relation == DIVERGED, (old, name)
            assert found.branch is None
            assert not found.may_follow
    assert compare(HISTORIES["A100 put back"], HISTORIES["AC95"]).relation == DIVERGED


def test_without_the_hash_numbers_alone_decide_and_the_branch_has_the_one_to_be_checked() -> None:
    found = compare(HISTORIES["A90 put back"], HISTORIES["A105"])
    assert found.relation == ANCESTOR
    assert found.branch is not None
    assert found.branch.chain_hash == b"another 90"


def test_the_higher_token_outranks_and_of_equal_ones_both_sides_choose_the_same() -> None:
    assert outranks([A, B], [A])
    assert not outranks([A], [A, B])
    assert not outranks([A], [A])
    assert outranks([A, C], [A, B])
    assert not outranks([A, B], [A, C])
    assert outranks([A], [])
    assert not outranks([], [A])


def wrote(
    chain: tuple[Generation, ...], epoch: int, *starts: tuple[str, int], tag: str = "A"
) -> History:
    """A history with the starts of its primaries; another tag makes its last epoch another one."""
    points = tuple(StartPoint(name.encode(), each, h("A", each)) for name, each in starts)
    return History(chain, epoch, h(tag, epoch), starts=points)


P, Q, R2 = ("p", 0), ("q", 60), ("r", 100)
STARTED = {
    # mine, theirs → relation and branch; p wrote 1…100, then its disk was put back to 60.
    "an honest restart": (wrote((A,), 90, P), wrote((A,), 120, P, R2), ANCESTOR, 90),
    "nothing written since": (wrote((A,), 100, P), wrote((A,), 60, P, Q), DESCENDANT, 60),
    "a lower number": (wrote((A,), 100, P), wrote((A,), 80, P, Q, tag="q"), DIVERGED, 60),
    "the same number": (wrote((A,), 100, P), wrote((A,), 100, P, Q, tag="q"), DIVERGED, 60),
    "a higher number": (wrote((A,), 100, P), wrote((A,), 500, P, Q, tag="q"), DIVERGED, 60),
    "and more starts": (wrote((A,), 100, P), wrote((A,), 500, P, Q, R2, tag="q"), DIVERGED, 60),
    "a copy that was away": (wrote((A,), 60, P), wrote((A,), 80, P, Q, tag="q"), ANCESTOR, 60),
    "one that followed it": (
        wrote((A,), 80, P, Q, tag="q"),
        wrote((A, B), 120, P, R2),
        DIVERGED,
        60,
    ),
    "a promoted copy": (wrote((A,), 100, P), wrote((A, B), 120, P, R2), ANCESTOR, 100),
    "beyond a promotion": (wrote((A,), 105, P), wrote((A, B), 120, P, R2), DIVERGED, 100),
    "no start in common": (wrote((A,), 100, P), wrote((A,), 500, Q, tag="q"), DIVERGED, 0),
    "all before the first": (wrote((A,), 50, P), wrote((A,), 500, Q), ANCESTOR, 50),
    "one that does not tell": (wrote((A,), 100, P), wrote((A,), 500), ANCESTOR, 100),
    "who was never told": (wrote((A,), 100), wrote((A,), 500, P, Q), ANCESTOR, 100),
}


@pytest.mark.parametrize("story", STARTED)
def test_a_start_below_what_is_here_tells_of_a_disk_that_was_put_back(story: str) -> None:
    mine, theirs, relation, epoch = STARTED[story]
    found = compare(mine, theirs)
    assert (found.relation, found.branch and found.branch.epoch) == (relation, epoch)
    if relation != DESCENDANT:
        return
    assert compare(theirs, mine).relation == ANCESTOR, "the other side has nothing of its own"


def test_a_list_that_does_not_reach_back_tells_nothing() -> None:
    many = [(f"{number}", 200 + number) for number in range(STARTS_MAX)]
    assert compare(wrote((A,), 220, P), wrote((A,), 500, *many)).may_follow
    assert not compare(wrote((A,), 220, P), wrote((A,), 500, *many[1:])).may_follow


def test_the_point_where_starts_parted_has_its_generation_and_hash() -> None:
    mine, theirs = wrote((A, B), 140, P, R2, ("x", 120)), wrote((A, B), 150, P, R2, ("y", 130))
    branch = compare(mine, theirs).branch
    assert branch is not None
    assert (branch.generation, branch.epoch, branch.chain_hash) == (b"B", 120, h("A", 120))
