"""Methods about tunnels: what the operator asks for, and what neighbours tell."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from geomirror.environment import SECOND, Entropy
from geomirror.errors import RefusedError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.network_view import address_fields
from geomirror.node.tunnel_service import LOOK_S, TunnelService
from geomirror.tunnel.addresses import ipv6_range
from geomirror.tunnel.membership import Member
from geomirror.tunnel.wireguard_actual import PeerState
from geomirror.tunnel.wireguard_plan import is_alive

HEARD_S_MAX = 2 * LOOK_S + 5
"""Both sides send every 5 s: nothing new in two looks means that nothing comes."""


class Exchange(Parameters, frozen=True):
    """A neighbour's key record."""

    record: dict[str, Any] = msgspec.field(default_factory=dict)

    def __repr__(self) -> str:
        return "Exchange(hidden)"


@dataclass
class TunnelCalls:
    """Handlers."""

    service: TunnelService
    entropy: Entropy

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("tunnel.status", Parameters, self.status)
        methods.add("tunnel.up", Parameters, self.up)
        methods.add("tunnel.down", Parameters, self.down)
        methods.add("tunnel.rotate_keys", Parameters, self.rotate_keys)
        methods.add("tunnel.exchange", Exchange, self.exchange, from_peers=True)

    async def status(self, _caller: Caller, _request: Parameters) -> Result:
        """What there is now."""
        await self.service.refresh()
        return self._status()

    async def up(self, _caller: Caller, _request: Parameters) -> Result:
        """Bring the tunnels up."""
        await self.service.up()
        return self._status()

    async def down(self, _caller: Caller, _request: Parameters) -> Result:
        """Take everything away."""
        return {"removed": await self.service.down()}

    async def rotate_keys(self, _caller: Caller, _request: Parameters) -> Result:
        """Replace the WireGuard key and all shares, and tell them to whom there is a link.

        :raises RefusedError: there are no tunnels here.
        """
        service = self.service
        if not service.is_wanted:
            raise RefusedError("there are no tunnels here", hint='run "geomirror tunnel up"')
        book = await service.store.load_or_create(self.entropy)
        book.rotate(self.entropy)
        await service.store.save()
        connected = service.neighbours_up()
        await asyncio.gather(*(service.tell(peer) for peer in connected))
        service.members_changed()
        own = service.state.node
        others = [m.name for m in service.state.membership.active() if m.name != own]
        told = [name for name in connected if name not in service.reasons]
        not_told = [name for name in others if name not in told]
        return {"public_key": book.public_key, "told": told, "not_told": not_told}

    async def exchange(self, caller: Caller, request: Exchange) -> Result:
        """Learn a neighbour's keys and tell ours."""
        return await self.service.exchange(caller.name, request.record)

    def _status(self) -> Result:
        service, state = self.service, self.service.state
        member = state.membership.by_id(state.identity.node_id)
        assert member is not None
        implementation = {None: None, True: "kernel", False: "wireguard-go"}
        return {
            "state": "down" if not service.is_wanted else "up" if service.is_up else "failed",
            "is_configured": service.config.driver == "wireguard",
            "reason": service.reason,
            "warnings": service.warnings if service.is_wanted else [],
            "implementation": implementation[service.host.is_kernel],
            "range": state.range,
            "range_ipv6": str(ipv6_range(state.authority_hash)),
            **address_fields(state, member),
            "mtu_bytes": service.config.mtu,
            "hosts_file": service.config.hosts_file,
            "neighbours": [
                self._neighbour(other)
                for other in state.membership.active()
                if other.node_id != member.node_id
            ],
        }

    def _neighbour(self, member: Member) -> dict[str, Any]:
        service = self.service
        tunnels = service.desired.tunnels if service.desired else ()
        tunnel = next((t for t in tunnels if t.node == member.name), None)
        found = service.actual.interfaces.get(tunnel.interface) if tunnel else None
        peer = found.peers[0] if found is not None and found.peers else None
        state, reason = self._judge(member.name, peer, is_known=tunnel is not None)
        now_s = self.service.clock.wall_ns() // SECOND
        age_s = now_s - peer.handshake_s if peer is not None and peer.handshake_s else None
        return {
            "node": member.name,
            "site": member.site,
            **address_fields(service.state, member),
            "state": state,
            "reason": reason,
            "interface": tunnel.interface if tunnel else None,
            "process_id": service.host.pid_of(tunnel.interface) if tunnel else None,
            "port": tunnel.port if tunnel else None,
            "public_key": tunnel.public_key if tunnel else None,
            "endpoint": (peer.endpoint if peer else None) or (tunnel.endpoint if tunnel else None),
            "handshake_seconds": float(age_s) if age_s is not None else None,
            "bytes_sent": peer.bytes_sent if peer else 0,
            "bytes_received": peer.bytes_received if peer else 0,
        }

    def _judge(self, node: str, peer: PeerState | None, *, is_known: bool) -> tuple[str, str]:
        """State and reason of one neighbour's tunnel."""
        reason = self.service.reasons.get(node, "")
        if not self.service.is_wanted or not self.service.is_up:
            return "down", ""
        if not is_known:
            return "no_key", reason or "no link to it yet, over which keys are told"
        if peer is None:
            return "down", reason
        heard_ns = self.service.heard_ns(node)
        now_ns = self.service.clock.now_ns()
        is_heard = heard_ns is not None and now_ns - heard_ns < HEARD_S_MAX * SECOND
        if not is_alive(peer.handshake_s, self.service.clock.wall_ns() // SECOND):
            return "connecting", reason or "no handshake: is UDP let through to its port?"
        return ("up", reason) if is_heard else ("silent", reason or "nothing comes from it")
