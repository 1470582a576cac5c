"""The document of `failover --dry-run`: a verdict with its sentences. Keys: `docs/cli.md`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geomirror.cluster.verdict import Loss, MemberAnswer, Verdict
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.sync_status import standing_object


def report(
    definition: ResourceDefinition, to: str, answers: Sequence[MemberAnswer], verdict: Verdict
) -> dict[str, Any]:
    """Everything that is known before a promotion of `to`."""
    candidate = next(answer for answer in answers if answer.node == to)
    primary = next((a for a in answers if a.node == definition.primary), None)
    latest = verdict.latest
    is_there = primary is not None and not primary.error
    return {
        "name": definition.name,
        "to": to,
        "is_dry_run": True,
        "is_possible": not verdict.refusal,
        "refusal": _refusal(definition, candidate, verdict),
        "disk_state": None if candidate.error else candidate.disk_state,
        "position": None
        if candidate.error
        else {
            "generation": candidate.generation,
            "epoch": candidate.epoch,
            "sealed_at": _time(candidate.epoch_wall_ns),
        },
        "confirmed_writes": _confirmed(definition.primary, to, verdict),
        "loss": _loss(verdict.loss),
        "primary": {
            "node": definition.primary,
            "is_reachable": is_there,
            "is_put_back": candidate.refused_primary == definition.primary,
            "last_heard": None if latest is None else rfc3339(latest.wall_ns),
            "epoch": None if latest is None else latest.epoch,
        },
        "sync": None if latest is None else standing_object(latest),
        "best": verdict.best,
        "more_advanced": list(verdict.more_advanced),
        "members": [_member(answer) for answer in answers],
    }


def _confirmed(primary: str, node: str, verdict: Verdict) -> dict[str, Any]:
    confirmed = verdict.confirmed
    left_out: dict[str, Any] | None = None
    if confirmed.left_out is not None:
        since = rfc3339(confirmed.left_out.wall_ns)
        left_out = {"epoch": confirmed.left_out.epoch, "since": since}
    return {
        "verdict": confirmed.verdict,
        "reason": confirmed.reason,
        "until": _time(confirmed.until_wall_ns),
        "left_out": left_out,
        "text": confirmed_text(primary, node, verdict),
    }


def _loss(loss: Loss) -> dict[str, Any]:
    return {
        "first_epoch": loss.first_epoch,
        "last_epoch": loss.last_epoch,
        "epochs": loss.epochs,
        "seconds": loss.seconds,
        "bytes": loss.bytes,
        "is_exact": loss.is_exact,
        "known_until": _time(loss.known_wall_ns),
    }


def _time(wall_ns: int | None) -> str | None:
    return None if wall_ns is None else rfc3339(wall_ns)


def _member(answer: MemberAnswer) -> dict[str, Any]:
    heard = answer.standing
    return {
        "node": answer.node,
        "role": "primary" if answer.is_primary else "secondary",
        "is_reachable": not answer.error,
        "reason": answer.error,
        "epoch": None if answer.error else answer.epoch,
        "disk_state": "Unknown" if answer.error else answer.disk_state,
        "heard_primary_at": None if heard is None else rfc3339(heard.wall_ns),
    }


def _refusal(
    definition: ResourceDefinition, candidate: MemberAnswer, verdict: Verdict
) -> dict[str, str] | None:
    node, name = candidate.node, definition.name
    texts = {
        "no_answer": f"{node} does not answer ({candidate.error})",
        "is_primary": f'{node} is the primary of "{name}" and answers',
        "inconsistent": f"the copy at {node} is {candidate.disk_state}: it is being filled, and is "
        "no image of any moment",
        "other_history": f"{node} holds another history than the others",
    }
    if not verdict.refusal:
        return None
    hint = "no other copy that answers can be promoted"
    if verdict.refusal == "is_primary":
        hint = "nothing has to be promoted"
    elif verdict.refusal == "other_history":
        hint = f"to let its history go on instead: geomirror resolve {name} --keep {node}"
    elif verdict.best is not None:
        hint = f"geomirror failover {name} --to {verdict.best} --dry-run"
    return {"reason": verdict.refusal, "message": texts[verdict.refusal], "hint": hint}


def confirmed_text(primary: str, node: str, verdict: Verdict) -> str:
    """One or two sentences on what a FLUSH has answered."""
    confirmed, latest = verdict.confirmed, verdict.latest
    until = _time(confirmed.until_wall_ns)
    has_all = f"Every write confirmed before {until} is there" if until else ""
    text = _TEXTS[confirmed.reason].format(
        node=node,
        primary=primary,
        until=until,
        epoch=confirmed.left_out.epoch if confirmed.left_out else 0,
        since=_time(confirmed.left_out.wall_ns) if confirmed.left_out else "",
        confirmed=latest.confirmed_epoch if latest else 0,
        said=_time(latest.wall_ns) if latest else "",
        needed=confirmed.needed,
        count=len(latest.acks) if latest else 0,
        best=verdict.best,
    )
    if confirmed.reason in ("block", "in_sync", "caught_up") or not has_all:
        return text
    return f"{text} {has_all}."


_TEXTS = {
    "block": "{node} has every confirmed write: {primary} confirms nothing without enough copies "
    "(degrade_after=block).",
    "in_sync": "{node} has every write confirmed before {until}, and later ones too, unless "
    "{primary} stopped waiting for it after that; nobody who answers would know.",
    "caught_up": "{node} has every write confirmed before {until}. Ones confirmed later may be "
    "missing.",
    "left_out": "Confirmed writes may be missing: {primary} stopped waiting for {node} at epoch "
    "{epoch}, {since}.",
    "joining": "Confirmed writes may be missing: {primary} was not waiting for {node} yet when it "
    "was last heard, {said}.",
    "behind": "Confirmed writes may be missing: {primary} may have confirmed epoch {confirmed} by "
    "{said}, which {node} does not have.",
    "in_memory_only": "Confirmed writes may be missing: {node} had them in memory only "
    "(ack=received), and its daemon was started since.",
    "too_few_answers": "Confirmed writes may be missing: {needed} of the {count} copies that "
    "{primary} waits for have to answer, with a usable image, to know.",
    "other_has_more": "Confirmed writes may be missing: {best} has more.",
    "not_waited_for": "Asynchronous: flushes do not wait for {node}; what was written right before "
    "the loss of {primary} is missing.",
    "never_heard": "Not known: no member that answers has heard what {primary} confirmed.",
    "no_copy": "Not known for this copy.",
    "no_answer": "Not known: {node} does not answer.",
}
