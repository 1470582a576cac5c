"""What a member of a resource is, and the ways from one role to another: one table.

```
 Secondary ──promote──▶ Promoting ──committed──▶ Primary ──drain──▶ Draining ──demoted──▶ Secondary
     ▲                     └─failed─▶ Secondary     │  ◀──cancelled──┘
     │                                              │ higher_token
     └──── rejoined ◀── Rejoining ◀──rejoin── Superseded
```
Invariants: writes are accepted as Primary alone (while Draining they wait); Superseded accepts
nothing for ever: only giving up its own tail, kept as a branch, leads out of it; what is written
to the superblock before each state is entered is in `DURABLE_ROLE`, so a crash in between ends in
one of its neighbours. Deliberately not here: how each step is done (the node).
"""

from __future__ import annotations

from typing import Final

SECONDARY: Final = "Secondary"
PROMOTING: Final = "Promoting"
PRIMARY: Final = "Primary"
DRAINING: Final = "Draining"
SUPERSEDED: Final = "Superseded"
REJOINING: Final = "Rejoining"
STATES = (SECONDARY, PROMOTING, PRIMARY, DRAINING, SUPERSEDED, REJOINING)

TABLE: Final[dict[tuple[str, str], str]] = {
    (SECONDARY, "promote"): PROMOTING,
    (SECONDARY, "rejoin"): REJOINING,
    (PROMOTING, "committed"): PRIMARY,
    (PROMOTING, "failed"): SECONDARY,
    (PRIMARY, "drain"): DRAINING,
    (PRIMARY, "higher_token"): SUPERSEDED,
    (DRAINING, "cancelled"): PRIMARY,
    (DRAINING, "demoted"): SECONDARY,
    (DRAINING, "higher_token"): SUPERSEDED,
    (SUPERSEDED, "rejoin"): REJOINING,
    (SUPERSEDED, "higher_token"): SUPERSEDED,
    (REJOINING, "rejoined"): SECONDARY,
    (REJOINING, "failed"): SUPERSEDED,
}
"""(state, event) → state; what is not here must not happen."""

DURABLE_ROLE: Final[dict[str, tuple[str, bool]]] = {
    SECONDARY: ("secondary", False),
    PROMOTING: ("secondary", False),
    PRIMARY: ("primary", False),
    DRAINING: ("primary", False),
    SUPERSEDED: ("primary", True),
    REJOINING: ("primary", True),
}
"""State → role in the superblock, and whether it says that a higher token was seen."""


def next_state(state: str, event: str) -> str:
    """The state after an event. A pair that is not in the table is a programmer's error."""
    assert (state, event) in TABLE, f"{event} while {state}"
    return TABLE[state, event]


def is_legal(state: str, event: str) -> bool:
    """Whether the event may happen now."""
    return (state, event) in TABLE


def accepts_writes(state: str) -> bool:
    """Whether new writes are journalled now; while Draining they wait for its end."""
    return state == PRIMARY


def after_crash(state: str) -> str:
    """What a member is after a crash in this state: its superblock alone decides."""
    durable = DURABLE_ROLE[state]
    if durable == ("secondary", False):
        return SECONDARY
    return SUPERSEDED if durable[1] else PRIMARY
