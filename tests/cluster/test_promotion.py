"""The table of roles: no way to two writers, no way out of being superseded but by giving up."""

from __future__ import annotations

import pytest

from geomirror.cluster.promotion import (
    DIVERGED,
    DRAINING,
    DURABLE_ROLE,
    INSISTING,
    PRIMARY,
    PROMOTING,
    REJOINING,
    RETREATING,
    SECONDARY,
    STATES,
    SUPERSEDED,
    TABLE,
    accepts_writes,
    is_legal,
    next_state,
    state_of,
)


def test_every_state_is_reached_and_left() -> None:
    assert {state for state, _ in TABLE} == set(STATES)
    assert set(TABLE.values()) == set(STATES)
    assert set(DURABLE_ROLE) == set(STATES)


def test_writes_are_accepted_by_a_primary_alone() -> None:
    assert [state for state in STATES if accepts_writes(state)] == [PRIMARY]


def test_a_promotion_that_fails_leaves_a_secondary() -> None:
    assert next_state(SECONDARY, "promote") == PROMOTING
    assert next_state(PROMOTING, "failed") == SECONDARY
    assert next_state(PROMOTING, "committed") == PRIMARY


def reached_from(state: str, without: tuple[str, ...]) -> set[str]:
    reached, waiting = {state}, [state]
    while waiting:
        state = waiting.pop()
        for (before, event), after in TABLE.items():
            if before == state and event not in without and after not in reached:
                reached.add(after)
                waiting.append(after)
    return reached


def test_who_was_superseded_serves_again_only_after_giving_up_its_tail_or_by_an_operator() -> None:
    assert reached_from(SUPERSEDED, ("rejoined", "committed")) == {SUPERSEDED, REJOINING, INSISTING}
    assert PRIMARY not in reached_from(SUPERSEDED, ("promote",))


def test_who_has_diverged_follows_again_after_giving_up_its_tail_or_a_history_that_has_it() -> None:
    out = ("rejoined", "follow", "promote")
    assert reached_from(DIVERGED, out) == {DIVERGED, RETREATING}
    assert next_state(DIVERGED, "follow") == SECONDARY
    assert next_state(RETREATING, "failed") == DIVERGED


def test_a_switchover_hands_over_or_goes_on() -> None:
    assert next_state(PRIMARY, "drain") == DRAINING
    assert next_state(DRAINING, "cancelled") == PRIMARY
    assert next_state(DRAINING, "demoted") == SECONDARY


def test_a_crash_never_makes_a_writer_of_somebody_who_was_none() -> None:
    durable = [DURABLE_ROLE[state] for state in STATES]
    assert [state_of(role, is_outranked=seen) for role, seen in durable] == [
        *(SECONDARY, SECONDARY, PRIMARY, PRIMARY, SUPERSEDED, SUPERSEDED),
        *(SUPERSEDED, DIVERGED, DIVERGED),
    ]


def test_what_is_not_in_the_table_is_a_programmers_error() -> None:
    assert not is_legal(SUPERSEDED, "drain")
    with pytest.raises(AssertionError, match="drain while Superseded"):
        next_state(SUPERSEDED, "drain")
