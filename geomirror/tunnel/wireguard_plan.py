"""Decides what has to be done so that a host is as desired: the least that is enough, in order.

    desired ─┐
    actual  ─┼─▶ steps: what is too much goes, then what is missing or different comes
    owned   ─┘

Invariants: a host that is as desired needs no step; after the steps it is; nothing is touched that
does not carry our marks (`wireguard_actual`) or was not put there by us (`owned`). Any prefix of
the steps may have happened before a crash: the next plan starts from what is there.

Routes lead to an interface before the rules lead to the table, and rules go first when all goes;
what is between finds "unreachable", never the way into the Internet.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_actual import (
    PROTOCOL,
    TABLE,
    Actual,
    InterfaceState,
    Route,
)
from geomirror.tunnel.wireguard_desired import KEEPALIVE_S, Desired, Tunnel

SESSION_S = 180
"""WireGuard's REJECT_AFTER_TIME: an older handshake is no session, so its endpoint may be wrong."""


@dataclass(frozen=True)
class Start:
    """Make an interface: a kernel device, or a process that serves one."""

    interface: str


@dataclass(frozen=True)
class Remove:
    """Remove an interface, and the process that serves it."""

    interface: str


@dataclass(frozen=True)
class Run:
    """Run a command. Secrets go through its standard input, never into its arguments."""

    arguments: tuple[str, ...]
    interface: str | None = None
    """The one that it is about; when it fails, others need not wait."""
    stdin: Secret | None = None


Step = Start | Remove | Run


def plan(desired: Desired, actual: Actual, owned: AbstractSet[str], wall_s: int) -> list[Step]:
    """Steps from `actual` to `desired`.

    :param actual: nothing of other networks in it, see `wireguard_actual.only_ours`.
    :param owned: addresses on lo that we have put there, or were about to.
    :param wall_s: Unix time, to know a live session from an old one.
    """
    wanted = {tunnel.interface: tunnel for tunnel in desired.tunnels}
    steps: list[Step] = _surplus(desired, actual, owned)
    for name, tunnel in wanted.items():
        state = actual.interfaces.get(name)
        if state is not None and state.private_key is None:
            # Its process is gone or hangs; what is left of it cannot be configured.
            steps.append(Remove(name))
            state = None
        if state is None:
            steps.append(Start(name))
        steps += _interface_steps(desired, tunnel, state, wall_s)
    for address in desired.addresses:
        if address not in actual.addresses:
            tail = ("nodad",) if ":" in address else ()
            steps.append(Run(("ip", "address", "replace", address, "dev", "lo", *tail)))
    for route in _routes(desired):
        # The kernel drops routes together with their interface.
        is_there = route in actual.routes and route.device not in _restarted(steps)
        if not is_there:
            words = _ip(route.destination, "route", "replace", *_words(route))
            steps.append(Run(words, route.device))
    for target in desired.ranges:
        if target not in actual.rules:
            steps.append(Run(_ip(target, "rule", "add", *_rule(target))))
    return steps


def _surplus(desired: Desired, actual: Actual, owned: AbstractSet[str]) -> list[Step]:
    steps: list[Step] = []
    for index, target in enumerate(actual.rules):
        if target not in desired.ranges or target in actual.rules[:index]:
            steps.append(Run(_ip(target, "rule", "delete", *_rule(target))))
    wanted = {route.destination for route in _routes(desired)}
    for route in sorted(actual.routes, key=lambda route: (route.destination, route.device or "")):
        if route.destination not in wanted:
            words = _ip(route.destination, "route", "delete", *_words(route))
            steps.append(Run(words, route.device))
    surplus = sorted(owned & actual.addresses - set(desired.addresses))
    steps += [Run(("ip", "address", "delete", address, "dev", "lo")) for address in surplus]
    names = {tunnel.interface for tunnel in desired.tunnels}
    # Last: a route that was deleted by hand above must not be gone with its interface already.
    return steps + [Remove(name) for name in sorted(actual.interfaces) if name not in names]


def _interface_steps(
    desired: Desired, tunnel: Tunnel, state: InterfaceState | None, wall_s: int
) -> list[Step]:
    steps: list[Step] = []
    if state is None or not _is_configured(desired, tunnel, state, wall_s):
        steps.append(configure(desired, tunnel, state, wall_s))
    if state is None or not state.is_up or state.mtu != desired.mtu:
        words = ("ip", "link", "set", "dev", tunnel.interface, "mtu", str(desired.mtu), "up")
        steps.append(Run(words, tunnel.interface))
    return steps


def configure(desired: Desired, tunnel: Tunnel, state: InterfaceState | None, wall_s: int) -> Run:
    """Set keys, port and the peer in one step; a live session goes on, with its endpoint."""
    endpoint = tunnel.endpoint
    for peer in state.peers if state else ():
        if peer.public_key == tunnel.public_key and is_alive(peer.handshake_s, wall_s):
            endpoint = peer.endpoint or endpoint
    config = tunnel.to_config(desired.private_key, endpoint)
    return Run(("wg", "syncconf", tunnel.interface, "/dev/stdin"), tunnel.interface, config)


def kick(tunnel: Tunnel) -> Run:
    """Forget the peer; `configure` after it begins a new handshake at once, not after 5 s."""
    words = ("wg", "set", tunnel.interface, "peer", tunnel.public_key, "remove")
    return Run(words, tunnel.interface)


def _is_configured(desired: Desired, tunnel: Tunnel, state: InterfaceState, wall_s: int) -> bool:
    if state.private_key is None or state.private_key.reveal() != desired.private_key.reveal():
        return False
    if state.port != tunnel.port or len(state.peers) != 1:
        return False
    peer = state.peers[0]
    is_endpoint_good = (
        tunnel.endpoint is None
        or peer.endpoint == tunnel.endpoint
        # The neighbour has been heard from elsewhere: there it is.
        or (peer.endpoint is not None and is_alive(peer.handshake_s, wall_s))
    )
    return (
        is_endpoint_good
        and peer.public_key == tunnel.public_key
        and peer.pre_shared_key.reveal() == tunnel.pre_shared_key.reveal()
        and peer.allowed == frozenset(tunnel.allowed)
        and peer.keepalive_s == KEEPALIVE_S
    )


def is_alive(handshake_s: int, wall_s: int) -> bool:
    """Whether a session can be going on: its handshake is recent by the wall clock."""
    return handshake_s > 0 and abs(wall_s - handshake_s) < SESSION_S


def _routes(desired: Desired) -> list[Route]:
    own = {":" in address: address.partition("/")[0] for address in desired.addresses}
    routes = [Route(target) for target in desired.ranges]
    for tunnel in desired.tunnels:
        routes += [Route(cidr, tunnel.interface, own.get(":" in cidr)) for cidr in tunnel.allowed]
    return routes


def _restarted(steps: list[Step]) -> set[str | None]:
    return {step.interface for step in steps if isinstance(step, Remove)}


def _ip(target: str, *words: str) -> tuple[str, ...]:
    return ("ip", "-6" if ":" in target else "-4", *words)


def _words(route: Route) -> tuple[str, ...]:
    kind = () if route.device else ("unreachable",)
    device = ("dev", route.device) if route.device else ()
    source = ("src", route.source) if route.source else ()
    mark = ("table", str(TABLE), "protocol", str(PROTOCOL))
    return (*kind, route.destination, *device, *source, *mark)


def _rule(target: str) -> tuple[str, ...]:
    words = ("to", target, "lookup", str(TABLE), "priority", str(TABLE))
    return (*words, "protocol", str(PROTOCOL))
