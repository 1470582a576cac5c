"""Keeps a node's tunnels as they should be: keys told to neighbours, interfaces, routes, names.

A pass looks at the host, compares it with what members and key records ask for, and does the
difference. It runs when something changed (members, keys, a process that ended, a command), a
moment after it did something, and every 15 s, because others change hosts, too.

The driver is extra: whatever it cannot do is said (`tunnel status`, events) and tried again; the
links and the replication over them neither wait for it nor notice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from geomirror.config import TunnelConfig
from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, RefusedError, UsageError
from geomirror.node.context import NodeContext
from geomirror.node.tunnel_endpoints import Endpoints
from geomirror.node.tunnel_host import TunnelHost, has_ipv6
from geomirror.node.tunnel_store import TunnelStore, hosts_owner, ranges_of, tag_of, take_away
from geomirror.tunnel.addresses import dns_name, find_overlaps, ipv6_address
from geomirror.tunnel.host_routes_io import host_routes
from geomirror.tunnel.hosts_file_io import update_hosts
from geomirror.tunnel.membership import Member
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.wireguard_actual import Actual, only_ours
from geomirror.tunnel.wireguard_desired import Desired, desired_tunnels
from geomirror.tunnel.wireguard_keys import read_record
from geomirror.tunnel.wireguard_kicks import Kicks
from geomirror.tunnel.wireguard_plan import Step, configure, kick, plan

_log = structlog.get_logger(component="tunnel")

LOOK_S = 15.0
"""Between two looks at a host on which all is well."""
RETRY_S = 5.0
"""After a pass that failed."""
RESTART_S = 0.3
"""Least time between two passes, and before a process that died is started again."""
CALM_S = 60.0
"""A process that lived for so long is started again as fast as the first time; else the pause
doubles, up to the one between two looks."""
TELL_S = 3600.0
"""Between two confirmations of a key: much less than the day for which it is used without."""
CALL_S = 20.0


class TunnelService:
    """The tunnels of one node. On the event loop.

    :param endpoints_of: endpoints of a member, the operator's override included.
    """

    def __init__(
        self,
        state: NetworkState,
        context: NodeContext,
        config: TunnelConfig,
        endpoints_of: Callable[[Member], Sequence[str]],
    ) -> None:
        self.state = state
        self.config = config
        self.is_wanted = config.driver == "wireguard"
        self.reason = ""
        """Why there are no tunnels although they are wanted."""
        self.warnings: list[str] = []
        self.reasons: dict[str, str] = {}
        """Node → why its tunnel is not there, or not as it should be."""
        self.desired: Desired | None = None
        self.actual = Actual()
        self.store = TunnelStore(state.data_dir)
        self.host = TunnelHost(tag_of(state), self._ended)
        self.clock = context.clock
        self._context = context
        self._endpoints = Endpoints(context.links, endpoints_of, ranges_of(state))
        self._kicks = Kicks()
        self._wake = asyncio.Event()
        self._busy = asyncio.Lock()
        self._told_ns: dict[str, int] = {}
        self._ends: dict[str, tuple[int, float]] = {}
        """Interface → when its process died last, and the pause after that."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_bare = False
        """Nothing of ours is on the host: looked since the last time that something was."""
        self.is_up = False

    # ---- what the node tells

    def link_up(self, peer: str) -> None:
        """A link is up: exchange keys over it."""
        if self.is_wanted:
            self._begin(self.tell(peer))

    def members_changed(self) -> None:
        """Somebody joined, left or has another name."""
        self._wake.set()

    async def keep(self) -> None:
        """Passes, for ever."""
        while True:
            self._wake.clear()
            delay_s = await self._try_pass()
            await asyncio.sleep(min(RESTART_S, delay_s))
            # Not wait_for: Python 3.11's loses a cancellation that comes with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, delay_s - RESTART_S)):
                    await self._wake.wait()

    async def stop(self) -> None:
        """End the interfaces. Addresses and "unreachable" stay until the next start or `down`:
        nothing of the overlay leaks into the underlay meanwhile, and connections survive."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.host.stop()

    # ---- what the operator and neighbours ask for

    async def up(self) -> None:
        """Have tunnels from now on.

        :raises RefusedError: this host cannot have them; nothing changed.
        :raises LinkError: a tool failed; it is tried again until `down`.
        """
        self._check()
        self.is_wanted = True
        async with self._busy:
            await self._pass()
        for peer in self.neighbours_up():
            self._begin(self.tell(peer))
        self._wake.set()

    async def down(self) -> list[str]:
        """Have none from now on; what was removed, in words."""
        self.is_wanted = False
        async with self._busy:
            return await self._take_away()

    async def exchange(self, peer: str, record: Any) -> dict[str, Any]:
        """A neighbour tells its key record: learn it, and answer with ours for it.

        :raises RefusedError: there are no tunnels here. :raises AuthError: it is no record.
        """
        if not self.is_wanted:
            raise RefusedError(
                f'the node "{self.state.node}" has no tunnel',
                hint='run "geomirror tunnel up" there',
            )
        return await self._learn(peer, record)

    async def refresh(self) -> None:
        """Look at the host now, for counters."""
        if self.is_wanted:
            with contextlib.suppress(GeomirrorError):
                self._saw(await self._look())

    def heard_ns(self, node: str) -> int | None:
        """When bytes of a node were last seen to have arrived."""
        return self._kicks.heard_ns(node)

    # ---- keys

    async def tell(self, peer: str) -> None:
        """Tell a neighbour our key record and learn its; `reasons` says why not."""
        member = self.state.membership.find(peer)
        if member is None or not self.is_wanted:
            return
        try:
            record = await self._own_record(member.node_id)
            answer = await self._context.links.call(
                peer, "tunnel.exchange", {"record": record}, CALL_S
            )
            await self._learn(peer, answer.get("record"))
        except UsageError as error:
            # Before this version there was no such method.
            unknown = "unknown method" in error.message
            self.reasons[peer] = "it runs a version without tunnels" if unknown else str(error)
        except GeomirrorError as error:
            self.reasons[peer] = error.message

    async def _own_record(self, node_id: str) -> dict[str, Any]:
        book = await self.store.load_or_create(self._context.entropy)
        is_new = node_id not in book.neighbours
        record = book.own_record(node_id, self.config.port, self._context.entropy)
        if is_new:
            await self.store.save()
        return {"public_key": record.public_key, "port": record.port, "share": record.share}

    async def _learn(self, peer: str, value: Any) -> dict[str, Any]:
        record = read_record(value)
        member = self.state.membership.find(peer)
        if member is None:
            raise RefusedError(f'"{peer}" is not a member')
        own = await self._own_record(member.node_id)
        assert self.store.book is not None
        is_new = self.store.book.learn(member.node_id, record, self.clock.wall_ns())
        self._told_ns[peer] = self.clock.now_ns()
        self.reasons.pop(peer, None)
        await self.store.save()
        if is_new:
            self._wake.set()
        return {"record": own}

    def neighbours_up(self) -> list[str]:
        """Nodes with which there is a link."""
        names = [m.name for m in self.state.membership.active() if m.name != self.state.node]
        return [name for name in names if self._context.links.state(name).is_established]

    def _confirm(self) -> None:
        now_ns = self.clock.now_ns()
        for peer in self.neighbours_up():
            if now_ns - self._told_ns.setdefault(peer, now_ns) > TELL_S * SECOND:
                self._told_ns[peer] = now_ns
                self._begin(self.tell(peer))

    # ---- passes

    async def _try_pass(self) -> float:
        try:
            async with self._busy:
                if not self.is_wanted:
                    await self._take_away()
                    return LOOK_S
                self._check()
                did_something = await self._pass()
        except GeomirrorError as error:
            if str(error) != self.reason:
                self.reason, self.is_up = str(error), False
                self._context.emit("tunnel_failed", {"reason": self.reason})
            return RETRY_S
        self._confirm()
        if did_something:
            return RESTART_S
        return min(LOOK_S, self._kicks.delay_s(self.clock.now_ns()) or LOOK_S)

    def _check(self) -> None:
        self.host.check()
        tag = tag_of(self.state)
        routes = [route for route in host_routes() if not route.device.startswith(tag)]
        overlaps = find_overlaps(self.state.range, routes)
        inside = [str(overlap) for overlap in overlaps if overlap.is_inside]
        self.warnings = [
            f"addresses of {self.state.range} are no longer reached through {overlap}"
            for overlap in overlaps
            if not overlap.is_inside
        ]
        if inside:
            raise RefusedError(
                f"this host has networks inside of the virtual range {self.state.range}: "
                f"{', '.join(inside)}",
                hint="remove these routes, or make a network with another --range",
            )

    async def _pass(self) -> bool:
        """Look, and do what is missing; whether something was done."""
        self._is_bare = False
        state, now_ns = self.state, self.clock.now_ns()
        book = await self.store.load_or_create(self._context.entropy)
        members = state.membership.active()
        if book.forget_all_but(m.node_id for m in members):
            await self.store.save()
        wall_ns = self.clock.wall_ns()
        desired = desired_tunnels(
            own_id=state.identity.node_id,
            members=members,
            authority_hash=state.authority_hash,
            cidr=state.range,
            book=book,
            hosts=await self._endpoints.hosts(members, state.node),
            has_ipv6=has_ipv6(),
            mtu=self.config.mtu,
            wall_ns=wall_ns,
        )
        actual = await self._look()
        if actual.other_device is not None:
            raise RefusedError(
                f"another node of this network has tunnels on this host: {actual.other_device}",
                hint='one node for a host; run "geomirror tunnel down" for the other one',
            )
        self.desired = desired
        self._saw(actual)
        await self._own(actual)
        owned = frozenset(book.addresses)
        steps = plan(desired, actual, owned, wall_ns // SECOND) or self._kick(now_ns, wall_ns)
        failures = await self.host.run(steps)
        self._say(failures)
        try:
            await self._keep_names(members)
        except GeomirrorError as error:
            # Without names there still are addresses.
            self.warnings.append(str(error))
        if self.reason or not self.is_up:
            self.reason, self.is_up = "", True
            self._context.emit("tunnel_up", {"address": state.claims.address})
        return bool(steps) and not failures

    async def _look(self) -> Actual:
        return only_ours(await self.host.look(), tag_of(self.state), ranges_of(self.state))

    def _saw(self, actual: Actual) -> None:
        self.actual = actual
        for tunnel in self.desired.tunnels if self.desired else ():
            found = actual.interfaces.get(tunnel.interface)
            peer = found.peers[0] if found is not None and found.peers else None
            self._kicks.saw(
                tunnel.node,
                peer,
                self.clock.now_ns(),
                self.clock.wall_ns() // SECOND,
            )

    def _kick(self, now_ns: int, wall_ns: int) -> list[Step]:
        assert self.desired is not None
        steps: list[Step] = []
        for tunnel in self.desired.tunnels:
            jitter = self._context.entropy.uniform(1.0, 1.5)
            if tunnel.endpoint and self._kicks.take(tunnel.node, now_ns, jitter):
                found = self.actual.interfaces.get(tunnel.interface)
                steps += [
                    kick(tunnel),
                    configure(self.desired, tunnel, found, wall_ns // SECOND),
                ]
        return steps

    async def _own(self, actual: Actual) -> None:
        """Remember, durably, which addresses will be ours, before they are there."""
        assert self.desired is not None
        assert self.store.book is not None
        book = self.store.book
        foreign = [
            address
            for address in self.desired.addresses
            if address in actual.addresses and address not in book.addresses
        ]
        if foreign and not book.addresses:
            self.warnings.append(f"{', '.join(foreign)} was there already and will stay")
        new = [a for a in self.desired.addresses if a not in actual.addresses]
        if not set(new) <= set(book.addresses):
            book.addresses = sorted({*book.addresses, *new})
            await self.store.save()

    async def _keep_names(self, members: Sequence[Member]) -> None:
        state, book = self.state, self.store.book
        assert book is not None
        wanted = self.config.hosts_file or ""
        if book.hosts_file and book.hosts_file != wanted:
            await asyncio.to_thread(update_hosts, Path(book.hosts_file), hosts_owner(state), ())
        if book.hosts_file != wanted:
            book.hosts_file = wanted
            await self.store.save()
        if not wanted:
            return
        lines = []
        for member in members:
            name = dns_name(member.name, state.network)
            ipv6 = ipv6_address(state.authority_hash, member.node_id)
            lines += [f"{member.address} {name}", *([f"{ipv6} {name}"] if has_ipv6() else [])]
        await asyncio.to_thread(update_hosts, Path(wanted), hosts_owner(state), lines)

    async def _take_away(self) -> list[str]:
        self.desired, self.actual, self.reason, self.is_up = None, Actual(), "", False
        if self._is_bare:
            return []
        removed = await take_away(self.state, self.host, self.store)
        self._is_bare = True
        if removed:
            self._context.emit("tunnel_down", {"removed": removed})
        return removed

    def _say(self, failures: dict[str, str]) -> None:
        assert self.desired is not None
        nodes = {tunnel.interface: tunnel.node for tunnel in self.desired.tunnels}
        for node in nodes.values():
            self.reasons.pop(node, None)
        for interface, reason in failures.items():
            self.reasons[nodes.get(interface, interface)] = reason
            _log.warning("tunnel_step_failed", interface=interface, reason=reason)

    def _ended(self, interface: str) -> None:
        self._context.emit("tunnel_process_ended", {"interface": interface})
        now_ns = self.clock.now_ns()
        ended_ns, pause_s = self._ends.get(interface, (0, 0.0))
        is_calm = now_ns - ended_ns > CALM_S * SECOND
        pause_s = RESTART_S if is_calm or not pause_s else min(2 * pause_s, LOOK_S)
        self._ends[interface] = now_ns, pause_s
        asyncio.get_running_loop().call_later(pause_s, self._wake.set)

    def _begin(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
