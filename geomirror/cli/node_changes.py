"""`geomirror node revoke|rename|leave|audit`: who is in the network, and what was done to it."""

from __future__ import annotations

import json
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, yes_option
from geomirror.cli.node import node
from geomirror.cli.timeline import local

CALL_S = 90.0
LEAVE_S = 180.0
END_S = 20.0
"""How long a daemon that leaves may take to end."""


@node.command()
@click.argument("name", metavar="NODE")
@yes_option
@json_option
@pass_app
def revoke(app: App, name: str, yes: bool) -> None:
    """Refuse a node's key for ever: cut it off everywhere, at once where the network is connected.

    Runs on the node that holds the authority's key; without a daemon too, then the others are told
    when it runs again. Whoever cannot be told goes on for as long as certificates live, 24 hours at
    most. The name becomes free: the machine can join again with a new data directory.
    """
    app.confirm(f"refuse the key of {name} for ever", is_confirmed=yes)
    if app.client().is_running():
        result = app.call("node.revoke", {"name": name}, timeout_s=CALL_S)
    else:
        result = _revoke_here(app, name)
    app.show(result, lambda: "\n".join(_revoked(result)))


@node.command()
@click.argument("name", metavar="NODE")
@click.argument("new_name", metavar="NEW")
@json_option
@pass_app
def rename(app: App, name: str, new_name: str) -> None:
    """Give a node another name; key and virtual addresses stay.

    Runs on the node that holds the authority's key. The node has to be connected, and a member of
    no resource: resources know their members by name. Its links are made anew, within seconds.
    Sections `[peers.NODE]` of configuration files are yours to change.
    """
    result = app.call("node.rename", {"name": name, "new_name": new_name}, timeout_s=CALL_S)
    text = f'"{result["old_name"]}" is "{result["node"]}" now'
    app.show(result, lambda: "\n".join([text, *_told(result)]))


@node.command()
@click.option(
    "--force",
    is_flag=True,
    help="Leave although something is lost; without it the command says what that would be.",
)
@yes_option
@json_option
@pass_app
def leave(app: App, force: bool, yes: bool) -> None:
    """Leave the network: take this node's copies out of resources, tell the others, and remove its
    keys, records, tunnels and services from this machine. The daemon ends.

    Refused while it is the primary of a resource, while its copy may be the only one, or when
    nobody could be told; it says what to do. After a crash, give the command again. The
    configuration file, the audit log, images that were kept and backing devices outside of the data
    directory stay.
    """
    from geomirror.node.leaving import load_leaving

    root = app.data_dir.root
    is_running, begun = app.client().is_running(), load_leaving(root)
    if begun is None:
        app.confirm(f"leave the network for ever with the node in {root}", is_confirmed=yes)
    if is_running:
        result = app.call("node.leave", {"is_forced": force}, timeout_s=LEAVE_S)
    else:
        result = _leave_here(app, is_forced=force)
    result["removed"] = [*result["removed"], *_finish(app)]
    app.show(result, lambda: "\n".join(_left(result)))


def _leave_here(app: App, *, is_forced: bool) -> dict[str, Any]:
    """Without a daemon: go on with what was begun, or begin by force."""
    from geomirror.errors import RefusedError
    from geomirror.node.leaving import Leaving, begin_leaving, load_leaving
    from geomirror.tunnel.network_state_io import load_network

    root = app.data_dir.root
    leaving, lost = load_leaving(root), []
    if leaving is None:
        state = load_network(root)
        lost = [
            f'the network still lists "{state.node}" until it is revoked at its authority',
            "all copies here",
        ]
        if not is_forced:
            raise RefusedError(
                f"the daemon in {root} does not run: nobody could be told",
                hint=f"start it; or --force: {'; '.join(lost)}",
            )
        leaving = Leaving(state.network, state.node, state.identity.node_id, is_told=False)
        begin_leaving(root, leaving)
        app.note("node.leave", {"is_forced": True})
    return {
        "network": leaving.network,
        "node": leaving.node,
        "is_told": leaving.is_told,
        "copies": [],
        "removed": [],
        "lost": lost,
    }


def _finish(app: App) -> list[str]:
    """Remove what is left as soon as the daemon has ended."""
    import time

    from geomirror.errors import InUseError
    from geomirror.node.leaving import finish_leaving
    from geomirror.node.lock_io import DaemonLock

    give_up = time.monotonic() + END_S
    while True:
        try:
            lock = DaemonLock(app.data_dir)
            break
        except InUseError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)
    try:
        removed = finish_leaving(app.data_dir)
        app.data_dir.lock.unlink(missing_ok=True)
    finally:
        lock.release()
    return removed


def _left(result: dict[str, Any]) -> list[str]:
    lines = [f'"{result["node"]}" has left the network "{result["network"]}"']
    lines += [f"removed: {words}" for words in result["removed"]]
    lines += [f"lost: {words}" for words in result["lost"]]
    if not result["is_told"]:
        lines.append(f"next, where the authority is: geomirror node revoke {result['node']}")
    return lines


@node.command()
@click.option(
    "--count",
    "-n",
    metavar="N",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="The newest N acts.",
)
@json_option
@pass_app
def audit(app: App, count: int) -> None:
    """Show the administrative acts on this node, newest last: when, who, what, and what came of it.

    Works without a daemon too. The file DATA_DIR/audit.ndjson is only ever appended to; it and the
    one before it, audit.1.ndjson, have 16 MiB at most. What several nodes took part in is in the
    log of each.
    """
    from geomirror.node.audit import read_acts

    acts = read_acts(app.data_dir.root, count)
    app.show({"acts": acts}, lambda: "\n".join(_act(act) for act in acts))


def _act(act: dict[str, Any]) -> str:
    parameters = act["parameters"]
    if isinstance(parameters, dict):
        pairs = [f"{k}={json.dumps(v)}" for k, v in parameters.items() if v not in (None, [], {})]
        parameters = " ".join(pairs)
    error = act["error"]
    came = f"failed: {error['message']}" if error else act["result"]
    return f"{local(act['time'])}  {act['who']}  {act['act']}  {parameters}  {came}"


def _revoke_here(app: App, name: str) -> dict[str, Any]:
    from geomirror.environment import SystemClock
    from geomirror.node.definition_store import DefinitionStore
    from geomirror.node.lifecycle_calls import held_resources
    from geomirror.node.lock_io import DaemonLock
    from geomirror.tunnel.network_io import load_network, revoke_node

    state = load_network(app.data_dir.root)
    # A daemon that starts now would not know of it.
    lock = DaemonLock(app.data_dir)
    try:
        member = revoke_node(state, name, wall_ns=SystemClock().wall_ns())
        app.note("node.revoke", {"name": name})
        store = DefinitionStore(app.data_dir.resources_file)
    finally:
        lock.release()
    others = [found.name for found in state.membership.active() if found.name != state.node]
    return {
        "node": member.name,
        "node_id": member.node_id,
        "told": [],
        "not_told": others,
        "resources": held_resources(store, name),
    }


def _revoked(result: dict[str, Any]) -> list[str]:
    lines = [f'"{result["node"]}" is revoked: its key is refused for ever', *_told(result)]
    return lines + [
        f'it was {found["role"]} of "{found["name"]}"; next: {found["next"]}'
        for found in result["resources"]
    ]


def _told(result: dict[str, Any]) -> list[str]:
    lines = [f"told: {', '.join(result['told'])}"] if result["told"] else []
    if result["not_told"]:
        lines.append(f"told when they are connected again: {', '.join(result['not_told'])}")
    return lines
