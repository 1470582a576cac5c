"""What a member of a resource is, and the ways from one role to another: one table.

```
 Secondary ──promote──▶ Promoting ──committed──▶ Primary ──drain──▶ Draining ──demoted──▶ Secondary
   │  ▲                    └─failed─▶ Secondary     │  ◀──cancelled──┘
   │  │                                             │ higher_token
   │  ├── rejoined ◀── Rejoining ◀──rejoin─── Superseded ──promote─▶ Insisting ──▶ Primary
   │  └── rejoined ◀── Retreating ◀─rejoin─── Diverged ────promote─▶ Promoting ──▶ Primary
   └─ higher_token, and a tail ─────────────────▶┘ └─ follow ─▶ Secondary
```
Who hears of a higher token and has what that history has not is *Superseded* as a primary, and
*Diverged* as a secondary.
Invariants: exports that can be written are made as Primary alone (`accepts_writes`; while Draining
writes wait); a start takes up what the superblock says (`state_of`); Superseded and Diverged
accept nothing from anybody: giving up the own tail, kept as a branch, leads out of them, or an
operator who wants the own history to go on, with a token above all (`promote`); what is in the
superblock when a role is served is in `DURABLE_ROLE`, which is asserted then, so a crash ends in
that state, or in one of its neighbours. Deliberately not here: how each step is done (the node).
"""

from __future__ import annotations

from typing import Final

SECONDARY: Final = "Secondary"
PROMOTING: Final = "Promoting"
PRIMARY: Final = "Primary"
DRAINING: Final = "Draining"
SUPERSEDED: Final = "Superseded"
REJOINING: Final = "Rejoining"
INSISTING: Final = "Insisting"
DIVERGED: Final = "Diverged"
RETREATING: Final = "Retreating"
STATES = (
    *(SECONDARY, PROMOTING, PRIMARY, DRAINING, SUPERSEDED, REJOINING),
    *(INSISTING, DIVERGED, RETREATING),
)

TABLE: Final[dict[tuple[str, str], str]] = {
    (SECONDARY, "promote"): PROMOTING,
    (SECONDARY, "higher_token"): DIVERGED,
    (PROMOTING, "committed"): PRIMARY,
    (PROMOTING, "failed"): SECONDARY,
    (PRIMARY, "drain"): DRAINING,
    (PRIMARY, "higher_token"): SUPERSEDED,
    (DRAINING, "cancelled"): PRIMARY,
    (DRAINING, "demoted"): SECONDARY,
    (DRAINING, "higher_token"): SUPERSEDED,
    (SUPERSEDED, "rejoin"): REJOINING,
    (SUPERSEDED, "promote"): INSISTING,
    (SUPERSEDED, "higher_token"): SUPERSEDED,
    (REJOINING, "rejoined"): SECONDARY,
    (REJOINING, "failed"): SUPERSEDED,
    (INSISTING, "committed"): PRIMARY,
    (INSISTING, "failed"): SUPERSEDED,
    (DIVERGED, "promote"): PROMOTING,
    (DIVERGED, "rejoin"): RETREATING,
    (DIVERGED, "follow"): SECONDARY,
    (DIVERGED, "higher_token"): DIVERGED,
    (RETREATING, "rejoined"): SECONDARY,
    (RETREATING, "failed"): DIVERGED,
}
"""(state, event) → state; what is not here must not happen."""

DURABLE_ROLE: Final[dict[str, tuple[str, bool]]] = {
    SECONDARY: ("secondary", False),
    PROMOTING: ("secondary", False),
    PRIMARY: ("primary", False),
    DRAINING: ("primary", False),
    SUPERSEDED: ("primary", True),
    REJOINING: ("primary", True),
    INSISTING: ("primary", True),
    DIVERGED: ("secondary", True),
    RETREATING: ("secondary", True),
}
"""State → role in the superblock, and whether it says that a higher token was seen. Of Promoting
that was Diverged it still says so, and a promotion that fails ends there."""


def next_state(state: str, event: str) -> str:
    """The state after an event. A pair that is not in the table is a programmer's error."""
    assert (state, event) in TABLE, f"{event} while {state}"
    return TABLE[state, event]


def is_legal(state: str, event: str) -> bool:
    """Whether the event may happen now."""
    return (state, event) in TABLE


def accepts_writes(state: str) -> bool:
    """Whether exports are made that can be written; while Draining, writes wait for its end."""
    return state == PRIMARY


def state_of(role: str, *, is_outranked: bool) -> str:
    """What a member is at a start, by its superblock alone.

    :param is_outranked: it says that a higher token was seen.
    """
    if role == "secondary":
        return DIVERGED if is_outranked else SECONDARY
    return SUPERSEDED if is_outranked else PRIMARY
