"""The verdict on a promotion: a case table of what survivors know, and what may be said then."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from geomirror.cluster.standing import (
    BLOCK_NS,
    LeftOut,
    Standing,
    decode_standing,
    encode_standing,
    is_sane,
)
from geomirror.cluster.verdict import VERDICTS, MemberAnswer, Verdict, assess

S = 1_000_000_000
NOON = 1_700_000_000 * S
HISTORY = "0f" * 16
OTHER = "f0" * 16
DURABLE = {"west": "durable", "colo": "durable"}


def standing(**changes: Any) -> Standing:
    """At noon, epoch 100 is sealed and confirmed; west and colo are waited for and in sync."""
    found = Standing(
        *(HISTORY, 1, 7, NOON, 100, 1_000_000, 0, 100, DURABLE, 0, 5 * S, False),
        ["colo", "west"],
    )
    return msgspec.structs.replace(found, **changes)


BLOCK: dict[str, Any] = {"degrade_after_ns": BLOCK_NS, "is_binding": True}
LEFT_OUT = LeftOut(101, NOON + 5 * S)
DEGRADED: dict[str, Any] = {
    "version": 8,
    "wall_ns": NOON + 9 * S,
    "epoch": 109,
    "end_lsn": 1_900_000,
    "confirmed_epoch": 109,
    "in_sync": ["colo"],
    "left_out": {"west": LEFT_OUT},
    "behind_ns": {"west": 8 * S},
}


def member(node: str, heard: Standing | None = None, **changes: Any) -> MemberAnswer:
    found: dict[str, Any] = {
        "generation": HISTORY,
        "epoch": 100,
        "epoch_wall_ns": NOON - S,
        "end_lsn": 1_000_000,
        "disk_state": "Consistent",
        "standing": heard,
        "is_standing_heard": True,
    }
    return MemberAnswer(node, **{**found, **changes})


GONE = MemberAnswer("east", error="no link")


def said(verdict: Verdict) -> tuple[str, str]:
    return verdict.confirmed.verdict, verdict.confirmed.reason


CASES: dict[str, tuple[list[MemberAnswer], tuple[str, str], int | None]] = {
    "in sync when last heard": (
        [GONE, member("west", standing())],
        ("complete_until", "in_sync"),
        NOON,
    ),
    "another member heard the primary later": (
        [GONE, member("west", standing()), member("colo", standing(wall_ns=NOON + 3 * S))],
        ("complete_until", "in_sync"),
        NOON + 3 * S,
    ),
    "left out, and it cannot know": (
        [GONE, member("west", standing())],
        ("complete_until", "in_sync"),
        NOON,
    ),
    "left out, and another member was told": (
        [GONE, member("west", standing()), member("colo", standing(**DEGRADED), epoch=109)],
        ("may_be_missing", "left_out"),
        NOON,
    ),
    "waited for, but it never was at zero lag": (
        [GONE, member("west", standing(in_sync=["colo"]))],
        ("may_be_missing", "joining"),
        NOON,
    ),
    "older than what the primary had confirmed": (
        [GONE, member("west", standing(), epoch=99)],
        ("may_be_missing", "behind"),
        None,
    ),
    "it does not have what was confirmed last, but what was before": (
        [GONE, member("west", standing()), member("colo", standing(wall_ns=NOON + S, epoch=103,
                                                                   confirmed_epoch=103))],
        ("may_be_missing", "behind"),
        NOON,
    ),
    "asynchronous": (
        [GONE, member("west", standing(acks={"colo": "durable"}, in_sync=["colo"]))],
        ("asynchronous", "not_waited_for"),
        NOON,
    ),
    "never heard": ([GONE, member("west")], ("unknown", "never_heard"), None),
    "block: nothing is confirmed without it": (
        [GONE, member("west", standing(**BLOCK))],
        ("complete", "block"),
        NOON,
    ),
    "block: it has more than it heard to be confirmed": (
        [GONE, member("west", standing(**BLOCK), epoch=140)],
        ("complete", "block"),
        NOON,
    ),
    "block is about to end: it is no promise any more": (
        [GONE, member("west", standing(**BLOCK | {"is_binding": False}))],
        ("complete_until", "in_sync"),
        NOON,
    ),
    "block ended, and another member was told": (
        [GONE, member("west", standing(**BLOCK)), member("colo", standing(**DEGRADED), epoch=109)],
        ("may_be_missing", "left_out"),
        NOON,
    ),
    "block and one copy of two: the other one may have it": (
        [GONE, member("west", standing(**BLOCK, copies=1)), MemberAnswer("colo", error="no link")],
        ("may_be_missing", "too_few_answers"),
        NOON,
    ),
    "block and one copy of two: both answer, this has the most": (
        [
            GONE,
            member("west", standing(**BLOCK, copies=1), epoch=103),
            member("colo", standing(**BLOCK, copies=1), epoch=102),
        ],
        ("complete", "block"),
        NOON,
    ),
    "block and one copy of two: the other one has more": (
        [
            GONE,
            member("west", standing(**BLOCK, copies=1)),
            member("colo", standing(**BLOCK, copies=1), epoch=102),
        ],
        ("may_be_missing", "other_has_more"),
        NOON,
    ),
    "block and one copy of two: a copy that is being filled is no answer": (
        [
            GONE,
            member("west", standing(**BLOCK, copies=1)),
            member("colo", standing(**BLOCK, copies=1), epoch=90, disk_state="Inconsistent"),
        ],
        ("may_be_missing", "too_few_answers"),
        NOON,
    ),
    "block, received in memory, and started since": (
        [GONE, member("west", standing(**BLOCK, acks={"west": "received"}, in_sync=["west"]),
                      is_standing_heard=False)],
        ("may_be_missing", "in_memory_only"),
        NOON,
    ),
    "block, received and not forgotten": (
        [GONE, member("west", standing(**BLOCK, acks={"west": "received"}, in_sync=["west"]))],
        ("complete", "block"),
        NOON,
    ),
    "some copies are enough: others are not promised anything later": (
        [GONE, member("west", standing(copies=1))],
        ("complete_until", "caught_up"),
        NOON,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_the_copy_at_west(name: str) -> None:
    answers, expected, until_ns = CASES[name]
    verdict = assess("west", answers)
    assert said(verdict) == expected
    assert verdict.confirmed.until_wall_ns == until_ns
    assert verdict.refusal == ""
    assert expected[0] in VERDICTS


def test_what_is_known_to_be_lost_is_counted_from_the_latest_word_of_the_primary() -> None:
    heard = standing(**DEGRADED, open_bytes=4096)
    verdict = assess("west", [GONE, member("west", standing()), member("colo", heard, epoch=109)])
    loss = verdict.loss
    assert (loss.first_epoch, loss.last_epoch, loss.epochs) == (101, 110, 10)
    assert loss.bytes == 900_000 + 4096
    # Not 10 s since the copy's epoch was sealed: the oldest write that it lacks is younger.
    assert loss.seconds == 8.0
    assert not loss.is_exact
    assert loss.known_wall_ns == NOON + 9 * S
    assert verdict.confirmed.left_out == LEFT_OUT
    assert (verdict.best, verdict.more_advanced) == ("colo", ("colo",))
    # Promoting the other one loses only what no epoch held yet.
    loss = assess("colo", [GONE, member("colo", heard, epoch=109, end_lsn=1_900_000)]).loss
    assert (loss.first_epoch, loss.last_epoch, loss.epochs, loss.bytes) == (110, 110, 1, 4096)


def test_a_copy_without_a_known_end_has_no_known_loss_in_bytes() -> None:
    verdict = assess("west", [GONE, member("west", standing(epoch=103), end_lsn=None)])
    assert (verdict.loss.epochs, verdict.loss.bytes) == (3, None)


def test_a_primary_that_answers_makes_the_loss_exact() -> None:
    east = member("east", standing(), is_primary=True)
    verdict = assess("west", [east, member("west", standing(wall_ns=NOON - S))])
    assert (verdict.loss.epochs, verdict.loss.is_exact) == (0, True)
    assert verdict.confirmed.until_wall_ns == NOON
    assert assess("east", [east, member("west")]).refusal == "is_primary"


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"disk_state": "Inconsistent"}, "inconsistent"),
        ({"disk_state": "Unknown"}, "inconsistent"),
        ({"generation": OTHER, "standing": None}, "other_history"),
        ({"error": "no link"}, "no_answer"),
    ],
)
def test_a_copy_that_cannot_be_promoted_names_the_best_other_one(
    changes: dict[str, Any], refusal: str
) -> None:
    answers = [
        GONE,
        member("west", **{"standing": standing(), **changes}),
        member("south", standing(), epoch=98),
        member("colo", standing(), epoch=99),
        member("north", standing(), epoch=99),
    ]
    verdict = assess("west", answers)
    assert verdict.refusal == refusal
    assert verdict.best == "colo", "as far as another, and in sync"
    assert verdict.confirmed.verdict == "unknown"
    assert verdict.loss.epochs is None


def test_a_later_generation_makes_what_was_said_before_void() -> None:
    newer = standing(generation=OTHER, token=2, version=1, epoch=90, confirmed_epoch=90)
    colo = member("colo", newer, generation=OTHER, epoch=90)
    verdict = assess("west", [GONE, member("west", standing(**BLOCK)), colo])
    assert verdict.refusal == "other_history"
    assert (verdict.best, verdict.confirmed.verdict) == ("colo", "unknown")


def test_a_standing_is_kept_and_read_back_and_a_newer_one_has_more_fields() -> None:
    found = standing(**DEGRADED)
    assert decode_standing(encode_standing(found)) == found
    longer = msgspec.json.decode(encode_standing(found))
    assert decode_standing(msgspec.json.encode([*longer, "of a newer version"])) == found
    assert decode_standing(b"[1, 2]") is None
    assert decode_standing(b"\xff") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"version": -1},
        {"confirmed_epoch": 1 << 63},
        {"generation": "0f"},
        {"degrade_after_ns": -2},
        {"acks": {"west": "completed"}},
        {"in_sync": ["x" * 65]},
        {"in_sync": [str(n) for n in range(65)]},
        {"left_out": {"west": LeftOut(-1, 0)}},
        {"behind_ns": {"west": -1}},
    ],
)
def test_a_standing_out_of_bounds_is_none(changes: dict[str, Any]) -> None:
    assert is_sane(standing())
    assert not is_sane(standing(**changes))
    assert decode_standing(encode_standing(standing(**changes))) is None
