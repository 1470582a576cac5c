"""Ports that lead to services of other nodes: listens, finds a holder for each connection."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, LinkError, NotFoundError
from geomirror.node.circuit_desk import CircuitDesk, reset_socket
from geomirror.node.context import NodeContext
from geomirror.node.refusals import RefusalAllowance
from geomirror.node.service_directory import ServiceDirectory
from geomirror.tunnel.service_rules import Forward, in_order
from geomirror.tunnel.tcp_io import accept_each, bind_tcp, start_owner

RETRY_S = 3.0
"""Between attempts to get a port that somebody else had when the daemon started."""


@dataclass
class _Port:
    forward: Forward
    sockets: list[socket.socket] = field(default_factory=list)
    accepting: list[asyncio.Task[None]] = field(default_factory=list)
    error: GeomirrorError | None = None


class ForwardListeners:
    """On the event loop."""

    def __init__(
        self, context: NodeContext, desk: CircuitDesk, directory: ServiceDirectory
    ) -> None:
        self._context = context
        self._desk = desk
        self._directory = directory
        self._ports: dict[str, _Port] = {}
        self._carrying: dict[asyncio.Task[None], str] = {}
        self._allowance = RefusalAllowance()

    async def open(self, forward: Forward) -> Forward:
        """Listen, or lead a port that is open already to another node.

        :returns: the same, with the port that is really bound.
        :raises InUseError: another process listens there.
        :raises ConfigError: not an address of this machine, or not ours to bind.
        """
        known = self._ports.get(forward.listen)
        if known is not None and known.sockets:
            known.forward = forward
            return forward
        sockets = await bind_tcp(forward.host, forward.port, 0)
        port = sockets[0].getsockname()[1]
        bound = Forward(forward.name, forward.host, port, forward.node_id)
        loop = asyncio.get_running_loop()
        item = _Port(bound, sockets)
        item.accepting = [loop.create_task(self._accept(item, sock)) for sock in sockets]
        self._ports[bound.listen] = item
        return bound

    async def restore(self, forward: Forward) -> None:
        """Listen as before the daemon's start; where it cannot be now, it is tried again."""
        try:
            await self.open(forward)
        except GeomirrorError as error:
            self._ports[forward.listen] = _Port(forward, error=error)
            fields = {"service": forward.name, "listen": forward.listen, "reason": str(error)}
            self._context.emit("forward_not_listening", fields)

    async def close(self, listen: str) -> None:
        """Listen no more; connections that look for a holder are reset."""
        item = self._ports.pop(listen, None)
        if item is None:
            return
        tasks = item.accepting + [task for task, at in self._carrying.items() if at == listen]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in item.sockets:
            sock.close()

    def error_of(self, listen: str) -> GeomirrorError | None:
        """Why it does not listen now."""
        item = self._ports.get(listen)
        return item.error if item is not None else None

    async def keep(self) -> None:
        """Try again what could not listen, for ever."""
        while True:
            await asyncio.sleep(RETRY_S)
            for item in [item for item in self._ports.values() if item.error is not None]:
                try:
                    await self.open(item.forward)
                except GeomirrorError as error:
                    item.error = error

    async def stop(self) -> None:
        """Close every port."""
        for listen in list(self._ports):
            await self.close(listen)

    async def _accept(self, item: _Port, listening: socket.socket) -> None:
        def failed(error: OSError) -> None:
            self._failed(item.forward, f"accepting: {error.strerror or error}")

        await accept_each(listening, lambda sock, _address: self._take(item, sock), failed)

    def _take(self, item: _Port, sock: socket.socket) -> None:
        if len(self._carrying) >= self._context.limits.circuits_peer_max:
            reset_socket(sock)
            self._failed(item.forward, f"{len(self._carrying)} circuits are being opened")
            return
        task = start_owner(sock, lambda: self._carry(item.forward, sock))
        self._carrying[task] = item.forward.listen
        task.add_done_callback(self._carried)

    def _carried(self, task: asyncio.Task[None]) -> None:
        self._carrying.pop(task, None)

    async def _carry(self, forward: Forward, sock: socket.socket) -> None:
        """The nearest holder that answers gets it; if none does, the application sees a reset."""
        failures: list[str] = []
        try:
            for holder in in_order(self._directory.holders(forward.name), forward.node_id):
                try:
                    await self._desk.carry(forward, holder, sock)
                except GeomirrorError as error:
                    if isinstance(error, NotFoundError):
                        self._directory.forget(holder.node, forward.name)
                    failures.append(f"{holder.node}: {error.message}")
                else:
                    return
        except BaseException:
            reset_socket(sock)
            raise
        reset_socket(sock)
        self._failed(forward, "; ".join(failures) or self.nobody(forward))

    def nobody(self, forward: Forward) -> str:
        """Why there is nobody to ask; empty if there is."""
        holders = self._directory.holders(forward.name)
        if in_order(holders, forward.node_id):
            return ""
        if forward.node_id:
            holders = [each for each in holders if each.node_id == forward.node_id]
        if not holders:
            return f'no other node is known to expose "{forward.name}" to this one'
        links = self._context.links
        found = []
        for each in holders:
            status = links.state(each.node)
            seconds = (self._context.clock.now_ns() - status.since_ns) / SECOND
            why = status.last_error or "not reached yet"
            found.append(f"{each.node} is not connected for {seconds:.0f} s: {why}")
        return "; ".join(found)

    def _failed(self, forward: Forward, reason: str) -> None:
        self._desk.failed(forward.listen, LinkError(reason))
        untold = self._allowance.admit(self._context.clock.now_ns())
        if untold is not None:
            fields = {
                "service": forward.name,
                "listen": forward.listen,
                "reason": reason,
                "untold": untold,
            }
            self._context.emit("circuit_failed", fields)
