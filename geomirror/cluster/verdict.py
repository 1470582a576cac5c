"""What a promotion would lose: the verdict on a copy, from what the members that answer know.

```
 answers of members ─▶ latest standing ─▶ may this copy be promoted at all?
   (position, standing)                   └▶ confirmed writes: complete … unknown
                                          └▶ loss: epochs, seconds, bytes; who has more
```
The promise (I15): `complete` is said only if every write that a flush has answered is in the copy;
`complete_until` only if every one that was answered before that moment is. So whoever has not heard
says less, never more: a copy that was left out cannot have been told, but it knows until when it
was not, and another member may know better.

- `complete` comes from `block` rules alone: nothing is confirmed without this copy (`copies` all),
  or n − k + 1 of the n waited for answer and this one has the most.
- `complete_until` comes from the confirmed epoch of a standing that any member heard.
Deliberately not here: asking the members, and the promotion itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geomirror.cluster.standing import BLOCK_NS, LeftOut, Standing

COMPLETE = "complete"
COMPLETE_UNTIL = "complete_until"
MAY_BE_MISSING = "may_be_missing"
ASYNCHRONOUS = "asynchronous"
UNKNOWN = "unknown"
VERDICTS = (COMPLETE, COMPLETE_UNTIL, MAY_BE_MISSING, ASYNCHRONOUS, UNKNOWN)

INCONSISTENT = "Inconsistent"


@dataclass(frozen=True)
class MemberAnswer:
    """What one member says; with `error` it did not answer, and nothing else counts."""

    node: str
    error: str = ""
    is_primary: bool = False
    generation: str = ""
    token: int = 0
    """The highest fencing token that it has seen."""
    epoch: int = 0
    """Durable; of a primary: sealed."""
    epoch_wall_ns: int | None = None
    """When that epoch was sealed."""
    end_lsn: int | None = None
    """Its end in the primary's journal."""
    disk_state: str = "Unknown"
    standing: Standing | None = None
    """The latest one it heard; a primary's own is of this moment."""
    is_standing_heard: bool = False
    """It was heard since the start of its daemon: nothing received since then is forgotten."""
    is_settled: bool = True
    """All that was received whole is durable by now."""
    refused_primary: str = ""
    """The primary that it refuses, because an older state of its disk was put back; or none."""

    @property
    def is_usable(self) -> bool:
        """It answered and its image could be served."""
        return not self.error and self.disk_state not in (INCONSISTENT, "Unknown")


@dataclass(frozen=True)
class Confirmed:
    """Whether confirmed writes are in the copy."""

    verdict: str
    reason: str
    """A word of the table in `docs/cli.md`."""
    until_wall_ns: int | None = None
    """Everything confirmed before this moment of the primary's clock is there."""
    left_out: LeftOut | None = None
    """Since when flushes were answered without the copy."""
    needed: int = 0
    """With `too_few_answers`: so many of the peers that are waited for have to answer."""


@dataclass(frozen=True)
class Loss:
    """What is known to be lost; None: not known. What was written after `known_wall_ns` is not
    counted, unless the primary itself answered."""

    first_epoch: int | None = None
    last_epoch: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    is_exact: bool = False
    known_wall_ns: int | None = None


@dataclass(frozen=True)
class Verdict:
    """All of it. `refusal` is "" when the copy may be promoted."""

    refusal: str
    confirmed: Confirmed
    loss: Loss
    latest: Standing | None
    more_advanced: tuple[str, ...]
    """Other usable copies with a later epoch, the latest first."""
    best: str | None
    """The usable copy to promote instead, None when there is none or this is it."""


def assess(node: str, answers: Sequence[MemberAnswer]) -> Verdict:
    """The verdict on promoting `node`, by all members' answers (also of those that gave none)."""
    found = {answer.node: answer for answer in answers}
    candidate = found[node]
    said = [a.standing for a in answers if not a.error and a.standing is not None]
    token = max((a.token for a in answers if not a.error), default=0)
    # What was said before the last promotion is about another history.
    said = [standing for standing in said if standing.token >= token]
    latest = max(said, key=lambda standing: standing.order, default=None)
    others = sorted(
        (a for a in answers if a.node != node and a.is_usable and not a.is_primary),
        key=lambda a: (not _is_current(a, latest), -a.epoch, not _is_in_sync(a, latest), a.node),
    )
    others = [a for a in others if _is_current(a, latest) and a.token == token]
    more = [a.node for a in others if a.epoch > candidate.epoch]
    refusal = _refusal(candidate, latest, token)
    is_other_better = bool(others) and (bool(refusal) or bool(more))
    if candidate.error:
        return Verdict(refusal, Confirmed(UNKNOWN, "no_answer"), Loss(), latest, (), _first(others))
    return Verdict(
        refusal,
        _confirmed(candidate, answers, said, latest),
        _loss(candidate, answers, latest),
        latest,
        tuple(more),
        _first(others) if is_other_better else None,
    )


def _first(answers: Sequence[MemberAnswer]) -> str | None:
    return answers[0].node if answers else None


def _is_current(answer: MemberAnswer, latest: Standing | None) -> bool:
    return latest is None or answer.generation == latest.generation


def _is_in_sync(answer: MemberAnswer, latest: Standing | None) -> bool:
    return latest is not None and answer.node in latest.in_sync


def _refusal(candidate: MemberAnswer, latest: Standing | None, token: int) -> str:
    """Why the copy cannot be promoted, whatever it would lose."""
    if candidate.error:
        return "no_answer"
    if candidate.is_primary:
        return "is_primary"
    if not candidate.is_usable:
        return "inconsistent"
    is_current = _is_current(candidate, latest) and candidate.token == token
    return "" if is_current else "other_history"


def _confirmed(
    candidate: MemberAnswer,
    answers: Sequence[MemberAnswer],
    said: Sequence[Standing],
    latest: Standing | None,
) -> Confirmed:
    if latest is None:
        return Confirmed(UNKNOWN, "never_heard")
    if not _is_current(candidate, latest) or not candidate.is_usable:
        return Confirmed(UNKNOWN, "no_copy")
    held = [s for s in said if s.generation == latest.generation]
    held = [s for s in held if s.confirmed_epoch <= candidate.epoch]
    until = max(held, key=lambda standing: standing.order, default=None)
    until_ns = None if until is None else until.wall_ns
    level = latest.acks.get(candidate.node)
    if level is None:
        return Confirmed(ASYNCHRONOUS, "not_waited_for", until_ns)
    left_out = latest.left_out.get(candidate.node)
    if candidate.node not in latest.in_sync:
        return Confirmed(MAY_BE_MISSING, "left_out" if left_out else "joining", until_ns, left_out)
    if latest.confirmed_epoch > candidate.epoch:
        return Confirmed(MAY_BE_MISSING, "behind", until_ns)
    # What was received only, a start of this node's daemon has forgotten.
    is_forgetful = level == "received" and not _remembers(candidate)
    if latest.is_binding and latest.degrade_after_ns == BLOCK_NS:
        if is_forgetful:
            return Confirmed(MAY_BE_MISSING, "in_memory_only", until_ns)
        return _by_quorum(candidate, answers, latest, until_ns)
    is_each_waited_for = not latest.copies and not is_forgetful
    reason = "in_sync" if is_each_waited_for else "caught_up"
    return Confirmed(COMPLETE_UNTIL, reason, until_ns)


def _remembers(answer: MemberAnswer) -> bool:
    return answer.is_standing_heard and answer.is_settled


def _by_quorum(
    candidate: MemberAnswer,
    answers: Sequence[MemberAnswer],
    latest: Standing,
    until_ns: int | None,
) -> Confirmed:
    """`block`: every confirmed epoch is at k of the n peers that are waited for, for ever."""
    count = len(latest.acks)
    copies = min(latest.copies or count, count)
    needed = count - copies + 1
    counted = [
        a
        for a in answers
        if a.node in latest.acks
        and a.is_usable
        and a.standing is not None
        and a.generation == latest.generation
        and (latest.acks[a.node] != "received" or _remembers(a))
    ]
    if candidate not in counted or len(counted) < needed:
        return Confirmed(MAY_BE_MISSING, "too_few_answers", until_ns, needed=needed)
    if needed > 1 and any(a.epoch > candidate.epoch for a in counted):
        return Confirmed(MAY_BE_MISSING, "other_has_more", until_ns)
    return Confirmed(COMPLETE, "block", until_ns)


def _loss(
    candidate: MemberAnswer, answers: Sequence[MemberAnswer], latest: Standing | None
) -> Loss:
    if latest is None or not _is_current(candidate, latest) or not candidate.is_usable:
        return Loss()
    is_exact = any(a.is_primary and not a.error for a in answers)
    epochs = max(0, latest.epoch - candidate.epoch)
    is_behind = epochs > 0
    if not is_behind and not (latest.open_bytes and latest.epoch == candidate.epoch):
        return Loss(None, None, 0, 0.0, 0, is_exact, latest.wall_ns)
    size: int | None = latest.open_bytes
    if is_behind:
        size = None
        if candidate.end_lsn is not None:
            size = max(0, latest.end_lsn - candidate.end_lsn) + latest.open_bytes
    ages = [latest.behind_ns[candidate.node]] if latest.behind_ns.get(candidate.node) else []
    if candidate.epoch_wall_ns is not None:
        ages.append(max(0, latest.wall_ns - candidate.epoch_wall_ns))
    last = latest.epoch + (1 if latest.open_bytes else 0)
    return Loss(
        candidate.epoch + 1,
        last,
        last - candidate.epoch,
        round(min(ages) / 1e9, 3) if ages else None,
        size,
        is_exact,
        latest.wall_ns,
    )
