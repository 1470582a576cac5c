"""Methods about services: what this node exposes to others, and forwards from them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import msgspec

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, UsageError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.circuit_desk import CircuitDesk, OpenCircuit
from geomirror.node.circuit_pacer import CircuitPacer
from geomirror.node.context import NodeContext
from geomirror.node.error_json import error_object
from geomirror.node.forward_listeners import ForwardListeners
from geomirror.node.refusals import RefusalAllowance
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.service_directory import Announce, ServiceDirectory
from geomirror.node.service_store import ServiceStore
from geomirror.tunnel.circuit_table import CircuitEntry, Tally
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.service_rules import Exposure, Forward, in_order
from geomirror.tunnel.tls_io import TlsDriver

Host = Annotated[str, msgspec.Meta(min_length=1, max_length=120)]


class Expose(Parameters, frozen=True):
    """`service.expose`"""

    name: str
    port: int
    host: Host = "127.0.0.1"
    allow: tuple[str, ...] = ()
    """Node names; empty: every member."""


class Named(Parameters, frozen=True):
    """A service by its name."""

    name: str


class AddForward(Parameters, frozen=True):
    """`service.forward`"""

    name: str
    port: int
    host: Host = "127.0.0.1"
    node: str | None = None


class RemoveForward(Parameters, frozen=True):
    """`service.unforward`"""

    name: str
    port: int | None = None


class ServiceCalls:
    """Handlers, and the parts that they work on."""

    def __init__(
        self, context: NodeContext, state: NetworkState, driver: TlsDriver, path: Path
    ) -> None:
        """Load the rules from `path`. :raises IntegrityError: they cannot be used."""
        self._context = context
        self._state = state
        self._store = store = ServiceStore(path, context.limits)
        self.directory = ServiceDirectory(context, state, lambda: store.rules)
        self.desk = CircuitDesk(context, driver, self._exposed)
        driver.accept_circuit = self.desk.accept
        self.listeners = ForwardListeners(context, self.desk, self.directory)
        self.pacer = CircuitPacer(context, self.desk)
        self._allowance = RefusalAllowance()
        self._changing = asyncio.Lock()

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("service.expose", Expose, self.expose)
        methods.add("service.unexpose", Named, self.unexpose)
        methods.add("service.forward", AddForward, self.forward)
        methods.add("service.unforward", RemoveForward, self.unforward)
        methods.add("service.list", Parameters, self.list_all)
        methods.add("service.circuits", Parameters, self.circuits)
        methods.add("service.announce", Announce, self.directory.announce, from_peers=True)
        methods.add("circuit.open", OpenCircuit, self.desk.open_here, from_peers=True)

    async def start(self) -> None:
        """Listen on every port that is forwarded."""
        for forward in self._store.rules.forwards.values():
            await self.listeners.restore(forward)

    def upkeep(self) -> dict[str, Coroutine[Any, Any, None]]:
        """What has to run for ever, by name."""
        return {
            "circuits": self.desk.watch(),
            "forwards": self.listeners.keep(),
            "circuit pace": self.pacer.keep(),
        }

    async def stop(self) -> None:
        """Reset every circuit and close every port."""
        await self.listeners.stop()
        await self.directory.stop()
        await self.desk.stop()

    # What the operator says.

    async def expose(self, _caller: Caller, request: Expose) -> Result:
        """Let others reach a port under a name; again: another port, or others."""
        allow = tuple(sorted({self._node_id(name) for name in request.allow}))
        exposure = Exposure(request.name, request.host, request.port, allow)
        async with self._changing:
            before = self._store.rules.exposures.get(exposure.name)
            self._store.save(self._store.rules.with_exposure(exposure))
        if before is not None and before.target != exposure.target:
            self._reset_service(exposure.name, "the service is exposed at another port now")
        self.desk.reset(lambda entry: self._is_shut_out(entry, exposure), "not allowed any more")
        self.directory.changed()
        fields = {"service": exposure.name, "target": exposure.target, "allow": request.allow}
        self._context.emit("service_exposed", fields)
        return self._exposure(exposure)

    async def unexpose(self, _caller: Caller, request: Named) -> Result:
        """Nobody reaches it any more; circuits that exist are reset."""
        async with self._changing:
            self._store.save(self._store.rules.without_exposure(request.name))
        self._reset_service(request.name, "the service is not exposed any more")
        self.desk.forget_tally(request.name)
        self.directory.changed()
        self._context.emit("service_unexposed", {"service": request.name})
        return {"name": request.name}

    async def forward(self, _caller: Caller, request: AddForward) -> Result:
        """Listen on a port that leads to a service of another node."""
        node_id = self._node_id(request.node) if request.node else ""
        if node_id == self._state.identity.node_id:
            raise UsageError("that is this node", hint="connect to the service itself")
        wanted = Forward(request.name, request.host, request.port, node_id)
        async with self._changing:
            self._store.rules.with_forward(wanted)  # before a port is bound
            is_new = wanted.listen not in self._store.rules.forwards
            found = await self.listeners.open(wanted)
            try:
                self._store.save(self._store.rules.with_forward(found))
            except GeomirrorError:
                if is_new:
                    await self.listeners.close(found.listen)
                raise
        fields = {"service": found.name, "listen": found.listen}
        self._context.emit("forward_started", fields)
        return self._forward(found)

    async def unforward(self, _caller: Caller, request: RemoveForward) -> Result:
        """Listen no more; circuits that came through the port are reset."""
        async with self._changing:
            gone = self._store.rules.forwards_of(request.name, request.port)
            self._store.save(self._store.rules.without_forwards(gone))
        listens = [item.listen for item in gone]
        for listen in listens:
            await self.listeners.close(listen)
            self.desk.forget_tally(listen)
        self.desk.reset(
            lambda entry: entry.is_forwarded and entry.place in listens,
            "the port is not forwarded any more",
        )
        self._context.emit("forward_ended", {"service": request.name, "listen": listens})
        return {"name": request.name, "listen": listens}

    async def list_all(self, _caller: Caller, _request: Parameters) -> Result:
        """Services of the network as far as this node knows, and its own part in them."""
        rules = self._store.rules
        found = self.directory.by_name()
        for name in rules.exposures:
            found.setdefault(name, [])
        return {
            "node": self._context.name,
            "services": [self._service(name) for name in sorted(found)],
            "exposures": [self._exposure(item) for item in rules.exposures.values()],
            "forwards": [self._forward(item) for item in rules.forwards.values()],
            "circuits_open": len(self.desk.live()),
            "held_back": [
                {"node": node, "bytes_per_second": limit}
                for node, limit in self.pacer.limits().items()
            ],
            "older_nodes": self.directory.strangers(),
        }

    async def circuits(self, _caller: Caller, _request: Parameters) -> Result:
        """Every forwarded connection that is open, or being opened."""
        now_ns = self._context.clock.now_ns()
        found = [
            {
                "service": entry.service,
                "node": entry.peer,
                "direction": "forward" if entry.is_forwarded else "expose",
                "place": entry.place,
                "is_open": entry.is_joined,
                "seconds": (now_ns - entry.opened_ns) / SECOND,
                "bytes_sent": entry.bytes_sent,
                "bytes_received": entry.bytes_received,
            }
            for entry in self.desk.live()
        ]
        return {"node": self._context.name, "circuits": found}

    # Who may what.

    def _exposed(self, service: str, peer: str) -> Exposure:
        member = self._state.membership.find(peer)
        try:
            if member is None:
                raise RefusedError(f'"{peer}" is not a member of this network')
            return self._store.rules.exposed_to(service, member.node_id)
        except GeomirrorError as error:
            if service in self._store.rules.exposures:
                self.desk.failed(service, error)
            untold = self._allowance.admit(self._context.clock.now_ns())
            if untold is not None:
                fields = {"peer": peer, "service": service[:64], "reason": str(error)}
                self._context.emit("circuit_refused", {**fields, "untold": untold})
            raise

    def _is_shut_out(self, entry: CircuitEntry, exposure: Exposure) -> bool:
        if entry.is_forwarded or entry.service != exposure.name:
            return False
        member = self._state.membership.find(entry.peer)
        return member is None or not exposure.allows(member.node_id)

    def _reset_service(self, name: str, reason: str) -> None:
        self.desk.reset(lambda entry: not entry.is_forwarded and entry.service == name, reason)

    def _node_id(self, name: str) -> str:
        member = self._state.membership.find(name)
        if member is None:
            raise NotFoundError(
                f'no node "{name}" in this network', hint='see "geomirror node list"'
            )
        return member.node_id

    def _node_name(self, node_id: str) -> str:
        member = self._state.membership.by_id(node_id)
        return member.name if member is not None else node_id

    # As JSON.

    def _service(self, name: str) -> dict[str, Any]:
        holders = self.directory.holders(name)
        best = in_order(holders)
        rows: list[dict[str, Any]] = [
            {
                "node": each.node,
                "is_self": False,
                "is_connected": each.is_connected,
                "rtt_seconds": each.rtt_ns / SECOND if each.rtt_ns else None,
            }
            for each in sorted(holders, key=lambda each: each.node)
        ]
        is_own = name in self._store.rules.exposures
        if is_own:
            own = {"node": self._context.name, "is_self": True, "is_connected": True}
            rows.insert(0, {**own, "rtt_seconds": None})
        return {
            "name": name,
            "state": "available" if best or is_own else "unreachable",
            "nearest": best[0].node if best else None,
            "holders": rows,
        }

    def _exposure(self, item: Exposure) -> dict[str, Any]:
        allow = [self._node_name(each) for each in item.allow] if item.allow else None
        head = {"name": item.name, "target": item.target, "allow": allow}
        live = [e for e in self.desk.live() if not e.is_forwarded and e.service == item.name]
        return {**head, **self._counted(item.name, live)}

    def _forward(self, item: Forward) -> dict[str, Any]:
        error = self.listeners.error_of(item.listen)
        best = in_order(self.directory.holders(item.name), item.node_id)
        live = [e for e in self.desk.live() if e.is_forwarded and e.place == item.listen]
        return {
            "name": item.name,
            "listen": item.listen,
            "node": self._node_name(item.node_id) if item.node_id else None,
            "state": "failed" if error else "listening" if best else "waiting",
            "error": error_object(error) if error else None,
            "nearest": best[0].node if best else None,
            "rtt_seconds": best[0].rtt_ns / SECOND if best and best[0].rtt_ns else None,
            "reason": self.listeners.nobody(item),
            **self._counted(item.listen, live),
        }

    def _counted(self, key: str, live: list[CircuitEntry]) -> dict[str, Any]:
        tally: Tally = self.desk.tally(key)
        at_ns = tally.last_error_wall_ns
        return {
            "circuits_open": len(live),
            "circuits": tally.circuits,
            "refused": tally.refused,
            "reset": tally.reset,
            "bytes_sent": tally.bytes_sent + sum(entry.bytes_sent for entry in live),
            "bytes_received": tally.bytes_received + sum(entry.bytes_received for entry in live),
            "last_error": tally.last_error,
            "last_error_at": rfc3339(at_ns) if at_ns else None,
        }
