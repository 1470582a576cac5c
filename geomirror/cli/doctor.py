"""`geomirror doctor`: why there is no link, or not the best one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, print_json
from geomirror.errors import NotFoundError

if TYPE_CHECKING:
    from geomirror.config import Config
    from geomirror.tunnel.diagnosis import Finding, Place
    from geomirror.tunnel.membership import Member
    from geomirror.tunnel.network_state_io import NetworkState


@click.command()
@click.argument("peer", metavar="[PEER]", required=False)
@json_option
@pass_app
def doctor(app: App, peer: str | None) -> int:
    """Find out what keeps this node from the others, or from PEER.

    Tells apart: a name that is not known, a port that nobody listens on, packets that vanish, a
    proxy that wants credentials or refuses, TLS that is opened on the way, a wrong clock,
    certificates that are expired, revoked or of another network, and UDP that is dropped. Each with
    the next step. Works without a daemon too, and changes nothing.

    Exit 0: nothing is wrong; 10: a certificate or a clock; 11: the network; 3: only the daemon is
    down.
    """
    import asyncio

    from geomirror.node.config_io import load_config
    from geomirror.tunnel.diagnosis import exit_code
    from geomirror.tunnel.network_state_io import load_network

    config = load_config(app.data_dir.config)
    state = load_network(app.data_dir.root, config.limits())
    others = [member for member in state.membership.active() if member.name != state.node]
    members = [member for member in others if peer in (None, member.name)]
    if peer is not None and not members:
        raise NotFoundError(f'no other node "{peer}" is known', hint='see "geomirror node list"')
    findings = asyncio.run(_diagnose(app, config, state, members))
    code = exit_code(findings)
    if app.is_json:
        print_json(
            {"node": state.node, "exit_code": code, "findings": list(map(_object, findings))}
        )
    else:
        click.echo(_shown(findings))
    return code


async def _diagnose(
    app: App, config: Config, state: NetworkState, members: list[Member]
) -> list[Finding]:
    import asyncio

    from geomirror.environment import SystemClock, SystemEntropy
    from geomirror.node.way_out import load_way_out
    from geomirror.tunnel import diagnosis
    from geomirror.tunnel.diagnosis_io import authority_skew_ns, try_path
    from geomirror.tunnel.link_path import expand_paths

    clock, entropy = SystemClock(), SystemEntropy()
    way_out = load_way_out(config.links, app.data_dir.root)
    is_running = app.client().is_running()
    links = {o["node"]: o for o in app.call("link.list")["links"]} if is_running else {}

    def paths_of(member: Member) -> list[str]:
        override = config.peers.get(member.name)
        endpoints = override.endpoints if override and override.endpoints else member.endpoints
        return expand_paths(endpoints, config.links.proxy)

    async def examine(member: Member) -> list[Finding]:
        place = _place(app, state, member.name)
        facts = await asyncio.gather(
            *(
                try_path(path, member.name, state, way_out, clock, entropy)
                for path in paths_of(member)
            )
        )
        judged = [diagnosis.judge_path(found, place, clock.wall_ns()) for found in facts]
        is_connected = links[member.name]["is_established"] if member.name in links else None
        return diagnosis.judge_peer(judged, place, is_connected=is_connected)

    place = _place(app, state, state.node)
    holders = [state.membership.find(name) for name in state.authority_names()]
    asked = [p for m in holders if m is not None and m.name != state.node for p in paths_of(m)]
    skew_ns, found = await asyncio.gather(
        authority_skew_ns(asked, state, way_out, clock, entropy),
        asyncio.gather(*map(examine, members)),
    )
    if state.authority is not None:
        skew_ns = 0  # it is the authority
    wall_ns = clock.wall_ns()
    findings = [
        diagnosis.judge_daemon(place, is_running=is_running),
        diagnosis.judge_own(state.claims, place, wall_ns),
        diagnosis.judge_clock(skew_ns, state.claims, place, wall_ns),
    ]
    findings += [finding for some in found for finding in some]
    return findings + (_tunnels(app, state, members, links) if is_running else [])


def _tunnels(
    app: App, state: NetworkState, members: list[Member], links: dict[str, Any]
) -> list[Finding]:
    from geomirror.tunnel.diagnosis import judge_udp

    names = {member.name for member in members}
    status = app.call("tunnel.status")
    if status["state"] == "down":
        return []
    found = []
    for neighbour in status["neighbours"]:
        name = neighbour["node"]
        if name in names and name in links:
            place, is_connected = _place(app, state, name), links[name]["is_established"]
            found.append(judge_udp(name, neighbour["state"], place, is_connected=is_connected))
    return [finding for finding in found if finding is not None]


def _place(app: App, state: NetworkState, peer: str) -> Place:
    from geomirror.tunnel.diagnosis import Place

    membership = state.membership
    known = [state.claims.node_id, *(member.node_id for member in membership.members())]
    return Place(
        peer=peer,
        config=str(app.data_dir.config),
        node=state.node,
        network=state.network,
        authority=state.authority_certificate,
        revoked=frozenset(node_id for node_id in known if membership.is_revoked(node_id)),
    )


def _object(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "subject": finding.subject,
        "text": finding.text,
        "next": finding.next or None,
        "is_problem": finding.is_problem,
    }


def _shown(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        word = "ok" if finding.code == "ok" else "problem" if finding.is_problem else "notice"
        lines.append(f"{word:<8} {finding.subject}: {finding.text}")
        if finding.next:
            lines.append(f"{'':<8} next: {finding.next}")
    count = sum(finding.is_problem for finding in findings)
    lines.append(f"{count} problems" if count else "nothing is wrong")
    return "\n".join(lines)
