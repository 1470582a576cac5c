"""The table of roles: no way to two writers, no way out of being superseded but by giving up."""

from __future__ import annotations

import pytest

from geomirror.cluster.promotion import (
    DRAINING,
    DURABLE_ROLE,
    PRIMARY,
    PROMOTING,
    REJOINING,
    SECONDARY,
    STATES,
    SUPERSEDED,
    TABLE,
    accepts_writes,
    after_crash,
    is_legal,
    next_state,
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


def test_who_was_superseded_accepts_writes_only_after_it_has_rejoined_and_was_promoted() -> None:
    reached, waiting = {SUPERSEDED}, [SUPERSEDED]
    while waiting:
        state = waiting.pop()
        for (before, event), after in TABLE.items():
            if before == state and event != "rejoined" and after not in reached:
                reached.add(after)
                waiting.append(after)
    assert reached == {SUPERSEDED, REJOINING}


def test_a_switchover_hands_over_or_goes_on() -> None:
    assert next_state(PRIMARY, "drain") == DRAINING
    assert next_state(DRAINING, "cancelled") == PRIMARY
    assert next_state(DRAINING, "demoted") == SECONDARY


def test_a_crash_never_makes_a_writer_of_somebody_who_was_none() -> None:
    assert [after_crash(state) for state in STATES] == [
        *(SECONDARY, SECONDARY, PRIMARY, PRIMARY, SUPERSEDED, SUPERSEDED)
    ]


def test_what_is_not_in_the_table_is_a_programmers_error() -> None:
    assert not is_legal(SUPERSEDED, "promote")
    with pytest.raises(AssertionError, match="promote while Superseded"):
        next_state(SUPERSEDED, "promote")
