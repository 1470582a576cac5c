"""`geomirror check`: a monitoring plug-in (Nagios, Icinga, Sensu, Checkmk)."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, print_json
from geomirror.cli.timeline import local
from geomirror.cli.units import format_seconds, parse_duration
from geomirror.errors import GeomirrorError

WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
OK, WARNING, CRITICAL, UNKNOWN = range(4)


@click.command()
@click.argument("name", metavar="RES")
@click.option(
    "--warn-rpo",
    type=parse_duration,
    default="60",
    show_default=True,
    metavar="SECONDS",
    help="A peer with a larger RPO is a WARNING.",
)
@click.option(
    "--crit-rpo",
    type=parse_duration,
    default="300",
    show_default=True,
    metavar="SECONDS",
    help="A peer with a larger one is CRITICAL.",
)
@json_option
@pass_app
def check(app: App, name: str, warn_rpo: float, crit_rpo: float) -> int:
    """Judge a resource as a Nagios plug-in: exit 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.

    The RPO is the age of the oldest write that a peer would lose if this site were gone now. A
    history that is damaged, lost a mark or is cut short by its budget, and branches with almost no
    room left, are a WARNING.
    """
    try:
        found = app.call("status", {"name": name}, timeout_s=10)["resources"]
        code, text = judge(found[0], warn_rpo, crit_rpo)
    except GeomirrorError as error:
        found, code, text = [], UNKNOWN, str(error)
    if app.is_json:
        print_json({"name": name, "code": code, "state": WORDS[code].lower(), "text": text})
    else:
        click.echo(f"{WORDS[code]} - {name}: {text}{performance(found)}")
    return code


def judge(resource: dict[str, Any], warn_rpo_s: float, crit_rpo_s: float) -> tuple[int, str]:
    """Code and reason for one resource of `status --json`; the worst peer counts."""
    if resource.get("error"):
        return CRITICAL, resource["error"]["message"]
    worst, reasons = OK, []
    for peer in resource["peers"]:
        judged = (_judge_peer(peer, warn_rpo_s, crit_rpo_s), _judge_verify(peer))
        worst = max(worst, *(code for code, _ in judged))
        reasons += [reason for code, reason in judged if code]
    for part in ("history", "branches"):
        alarm = (resource.get(part) or {}).get("alarm")
        if alarm:
            worst = max(worst, WARNING)
            reasons.append(f"{part} here: {alarm}")
    drill = resource.get("last_drill")
    if drill and drill["result"] != "passed":
        worst = max(worst, WARNING)
        reasons.append(f"the last drill here did not pass: {drill['reason'] or drill['result']}")
    if not resource["peers"]:
        reasons.append("there is no other copy")
        return max(worst, WARNING), "; ".join(reasons)
    return worst, "; ".join(reasons) or _all_within(len(resource["peers"]))


def _all_within(count: int) -> str:
    return f"{count} {'peer' if count == 1 else 'peers'} within the RPO"


def _judge_peer(peer: dict[str, Any], warn_rpo_s: float, crit_rpo_s: float) -> tuple[int, str]:
    rpo_s, node = peer.get("rpo_seconds"), peer["node"]
    if peer.get("state") == "Refused" and peer.get("reason"):
        return CRITICAL, f"{node}: {peer['reason']}"
    if peer.get("disk_state") not in ("UpToDate", "Consistent"):
        return CRITICAL, f"{node} has no usable copy ({peer.get('disk_state')})"
    if rpo_s is None:
        return WARNING, f"{node}: RPO is not known"
    text = f"{node} is {rpo_s:.1f} s behind"
    if rpo_s >= crit_rpo_s:
        return CRITICAL, text
    return (WARNING, text) if rpo_s >= warn_rpo_s else (OK, text)


def _judge_verify(peer: dict[str, Any]) -> tuple[int, str]:
    """What a comparison found lasts until a later one comes to its end and finds nothing."""
    verify = peer.get("verify")
    if not verify:
        return OK, ""
    tallies = [each for each in (verify["current"], verify["last"]) if each]
    found = [each for each in tallies if each["different_blocks"]]
    node = peer["node"]
    if not found:
        if verify.get("is_overdue"):
            return WARNING, f"{node}: {overdue(verify)}"
        return OK, ""
    tally = found[0]
    count = tally["different_blocks"]
    text = f"{node}: verify found {count} different block{'' if count == 1 else 's'}"
    if tally["heals"] and not tally["unhealed_blocks"] and tally["result"] in (None, "healed"):
        return WARNING, f"{text}, {tally['result'] or 'healing goes on'}"
    return CRITICAL, f"{text}, not healed"


def overdue(verify: dict[str, Any]) -> str:
    """What `is_overdue` means, with when the copy was found the same for the last time."""
    at, twice = verify["last_clean_at"], format_seconds(2 * (verify["every_seconds"] or 0))
    since = f"since {local(at)}" if at else "yet"
    return f"no verify has found it the same {since}, for longer than {twice}"


def performance(resources: list[dict[str, Any]]) -> str:
    """Performance data after the bar, as plug-ins give it."""
    values = [
        f"rpo_{peer['node']}={peer['rpo_seconds']:.3f}s lag_{peer['node']}={peer['lag']['bytes']}B"
        for resource in resources
        for peer in resource.get("peers", [])
        if peer.get("rpo_seconds") is not None and peer.get("lag")
    ]
    return " | " + " ".join(values) if values else ""
