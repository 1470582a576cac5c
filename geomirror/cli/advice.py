"""The closing sentences of `status`: what the state is, what it means, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geomirror.cli.check import overdue
from geomirror.cli.units import format_bytes, format_seconds, format_tail

LATE_S = 10.0
"""A copy that streams may be late by this much before it is worth a word."""

PUT_BACK = "was put back to an older state"
"""In the reason of a copy that refuses its primary for it; the next commands follow there."""


@dataclass(frozen=True)
class Advice:
    """One finding about a resource, in plain sentences."""

    state: str
    meaning: str
    action: str


def advise(resource: dict[str, Any], node: str) -> list[Advice]:
    """Findings about one resource of `status --json`, the gravest first; never empty."""
    name = resource["name"]
    if resource["error"]:
        return [_not_served(resource)]
    if resource["state"] == "storage_full":
        meaning = "A disk is full: writers wait, or get an error; nothing is lost."
        return [Advice("storage_full", meaning, "Free space below the data directory.")]
    if resource.get("superseded"):
        return [_outranked(resource)]
    if resource["state"] == "opening":
        return [Advice("opening", "The journal is being recovered.", "Wait a moment.")]
    found = [finding for peer in resource["peers"] for finding in _about_peer(resource, peer, node)]
    found += [finding for peer in resource["peers"] for finding in _about_verify(name, peer)]
    found += _about_settings(resource) + _about_behind(resource)
    if found:
        return found
    if resource["role"] == "secondary":
        meaning = "This is a copy: its volumes are read-only here, at the epoch shown."
        return [Advice("healthy", meaning, "Nothing to do.")]
    if not resource["peers"]:
        meaning = f'There is no other copy: losing {node} loses "{name}".'
        return [Advice("alone", meaning, "Create resources with --secondary NODE.")]
    behind = max((peer.get("rpo_seconds") or 0.0) for peer in resource["peers"])
    meaning = f"Every peer has a usable copy, at most {format_seconds(behind)} old."
    return [Advice("healthy", meaning, "Nothing to do.")]


def _about_verify(name: str, peer: dict[str, Any]) -> list[Advice]:
    """Blocks that differed at the last comparison that came to its end."""
    verify = peer.get("verify")
    last = verify["last"] if verify else None
    if not last or not last["different_blocks"]:
        if not verify or not verify.get("is_overdue"):
            return []
        meaning = f"{peer['node']}: {overdue(verify)}. It is compared only while it streams."
        action = f"geomirror verify {name} --peer {peer['node']}, or another verify_every or _rate."
        return [Advice("not compared", meaning, action)]
    node, count = peer["node"], last["different_blocks"]
    blocks = f"{count} block{'' if count == 1 else 's'} of 4 KiB"
    meaning = f"{blocks} of the copy at {node} were not what the primary has: a disk, memory or "
    if last["result"] == "healed":
        meaning += "cable lies at one of the two nodes. They were written again and are the same."
        action = f"Look for the cause, then: geomirror verify {name} --peer {node}"
        return [Advice("was different", meaning, action)]
    meaning += "cable lies at one of the two nodes. They are not the same yet."
    action = f"If the primary is right: geomirror verify {name} --peer {node} --wait"
    return [Advice("different", meaning, action)]


def _outranked(resource: dict[str, Any]) -> Advice:
    tail = resource["superseded"]
    own, other, first = tail["own"], tail["other"], tail["branch_epoch"]
    point = "an unknown point" if first is None else f"epoch {first}"
    more = " and writes that no epoch holds" if own["has_unsealed"] else ""
    meaning = (
        f"{other['node']} was promoted (token {other['token']}, {own['token']} here). Both "
        f"histories part at {point}; here is a tail up to epoch {own['epoch']}{more} "
        f"({format_tail(own)}), there {format_tail(other)}. "
    )
    if resource["role"] == "secondary":
        meaning += "This copy stays at its epoch; nothing was dropped."
    else:
        meaning += "Nothing is served here, nothing was dropped."
    if tail["is_automatic"] and not tail["refusal"]:
        action = f"Nothing: the tail becomes a branch, then {other['node']} is followed."
        return Advice(resource["state"], meaning, action)
    if tail["refusal"]:
        meaning += f" It has not come back yet: {tail['refusal']}."
    keep = f"geomirror resolve {resource['name']} --keep {own['node']}"
    action = (
        f"To keep the tail as a branch and follow {other['node']}: {tail['next']}. To let this "
        f"history go on instead: {keep}"
    )
    return Advice(resource["state"], meaning, action)


def _not_served(resource: dict[str, Any]) -> Advice:
    error = resource["error"]
    meaning = f"The resource is not served: {error['message']}."
    return Advice("failed", meaning, error["hint"] or "See the daemon's log.")


def _about_settings(resource: dict[str, Any]) -> list[Advice]:
    pending = (resource.get("sync") or {}).get("pending")
    if not pending:
        return []
    nodes = ", ".join(pending["waits_for"])
    meaning = (
        f"{nodes} relies on degrade_after=block and is not told yet that it ends; until then "
        "flushes wait for it."
    )
    action = (
        f"Bring {nodes} back; if it is lost for good: "
        f"geomirror resource remove-secondary {resource['name']} {nodes}"
    )
    return [Advice("pending settings", meaning, action)]


def _progress(peer: dict[str, Any]) -> str:
    """How far a resync or a first sync is, and what is left of it."""
    resync, text = peer.get("resync") or {}, ""
    if resync.get("compared_bytes") is not None:
        compared, total = (format_bytes(resync[k]) for k in ("compared_bytes", "total_bytes"))
        text = f" {compared} of {total} are compared, {format_bytes(resync['sent_bytes'])} sent."
    return text + _pace(peer)


def _pace(peer: dict[str, Any]) -> str:
    """What comes in and goes out, and when that ends."""
    outgoing, text = peer.get("out_bytes_per_second"), ""
    if outgoing:
        incoming = format_bytes(peer["in_bytes_per_second"])
        verb = "are compared" if peer.get("resync") else "reach it"
        text = f" {incoming}/s are written, {format_bytes(outgoing)}/s {verb}"
        text += ": not converging." if peer["is_converging"] is False else "."
    if peer.get("eta_seconds"):
        text += f" About {format_seconds(peer['eta_seconds'])} left."
    return text


def _about_behind(resource: dict[str, Any]) -> list[Advice]:
    behind = resource.get("behind")
    if not behind:
        return []
    left, epoch = format_bytes(behind["bytes_left"]), behind["epoch"]
    if behind["kind"] == "apply":
        meaning = f"Epochs up to {epoch} are being brought into the volumes; {left} are left."
        return [Advice("applying", f"{meaning} Readers see them already.", "Nothing to do.")]
    meaning = (
        f"The volumes go back to epoch {epoch}, from before a resync; {left} are left. Readers see "
        "it already, and what is written since; switchover has to wait."
    )
    return [Advice("going back", meaning, "Nothing to do.")]


def _about_peer(resource: dict[str, Any], peer: dict[str, Any], here: str) -> list[Advice]:
    node, state, disk = peer["node"], peer["state"], peer.get("disk_state")
    if peer.get("is_member") is False:
        return [_no_member(resource, node, here)]
    found = []
    if state == "Pending":
        reason = f" ({peer['pending']})" if peer.get("pending") else ""
        meaning = f"{node} does not know of this resource yet{reason}; there is no copy there."
        action = f'Start its daemon, or see "geomirror link list" for the way to {node}.'
        return [Advice("pending", meaning, action)]
    if disk == "Inconsistent":
        meaning = f"{node} is being filled; until it is done its copy cannot be used."
        meaning += _progress(peer)
        found.append(Advice("inconsistent", meaning, "Wait; do not lose this side now."))
    held = (peer.get("resync") or {}).get("held_epoch")
    if held is not None and disk != "Inconsistent":
        holder = here if resource["role"] == "secondary" else node
        meaning = (
            f"A resync of {holder} is in progress; its copy stays usable as of epoch {held} until "
            "the end."
        )
        meaning += _progress(peer)
        found.append(Advice("resync", meaning, "Nothing; a promotion now would go back to then."))
    if state == "Disconnected":
        found.append(_disconnected(resource, peer, here))
    elif state == "Paused":
        meaning = f"Replication to {node} is held back by an operator; writes go on."
        action = f"geomirror resume {resource['name']} --peer {node}"
        found.append(Advice("paused", meaning, action))
    elif state == "Refused" and PUT_BACK in str(peer.get("reason")):
        meaning, _, action = str(peer["reason"]).partition("; ")
        found.append(Advice("put back", f"{_begun(meaning)}.", f"{_begun(action)}."))
    elif state == "Refused":
        meaning = f"{node} refuses this resource: {peer.get('reason')}; its copy stays as it is."
        found.append(Advice("refused", meaning, f'Look at "geomirror status" on {node}.'))
    if peer.get("in_sync") is False:
        meaning = (
            f"{node} is out of sync: flushes are answered without it. If this side is lost now, "
            "confirmed writes may be missing there."
        )
        action = "Wait until it has caught up; flushes wait for it again then."
        found.append(Advice("out of sync", meaning, action))
    return found + _about_pace(peer)


def _begun(text: str) -> str:
    """As the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _no_member(resource: dict[str, Any], node: str, here: str) -> Advice:
    """Revoked, or it has left: it never comes back under its key."""
    name, gone = resource["name"], "is not in the network any more (revoked, or it has left)"
    if resource["role"] == "secondary":
        meaning = f"{node}, the primary, {gone}; this copy stays as old as it is."
        return Advice("primary gone", meaning, f"geomirror failover {name} --to {here}")
    meaning = f"{node} {gone}: its copy gets nothing, and the journal keeps epochs for it."
    action = f"geomirror resource remove-secondary {name} {node}"
    return Advice("secondary gone", meaning, action)


def _about_pace(peer: dict[str, Any]) -> list[Advice]:
    """A copy that does not keep up with the writers."""
    node, state = peer["node"], peer["state"]
    if state == "Fold":
        meaning = f"{node} is slower than the writers; it skips intermediate versions."
        action = "Nothing, if the link is known to be slow."
        return [Advice("behind", meaning + _pace(peer), action)]
    is_late = (peer.get("rpo_seconds") or 0) >= LATE_S
    if state == "Stream" and is_late and peer.get("is_converging") is False:
        action = "Nothing, if writers slow down; else a faster link."
        return [Advice("behind", f"{node} falls behind." + _pace(peer), action)]
    return []


def _disconnected(resource: dict[str, Any], peer: dict[str, Any], here: str) -> Advice:
    node = peer["node"]
    if resource["role"] == "secondary":
        meaning = f"{node} cannot be reached; this copy stays as old as it is."
        action = (
            'See "geomirror link list"; what promoting this copy would lose: '
            f"geomirror failover {resource['name']} --to {here} --dry-run"
        )
        return Advice("disconnected", meaning, action)
    journal = resource.get("journal") or {}
    lag = peer.get("lag") or {}
    meaning = f"{node} cannot be reached; writes go on, the journal keeps them for it"
    if lag.get("bytes"):
        meaning += f" ({format_bytes(lag['bytes'])} so far)"
    if journal.get("covers_seconds"):
        meaning += f" and covers {format_seconds(journal['covers_seconds'])} more"
    return Advice("disconnected", meaning + ".", 'Nothing; if it lasts, see "geomirror link list".')
