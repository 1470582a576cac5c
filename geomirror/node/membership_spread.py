"""Brings membership records to all neighbours: when a link comes up, and when they change.

Decides nothing: `tunnel.flood` says whom to ask. One call carries all records both ways.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog

from geomirror.environment import SECOND
from geomirror.errors import AuthError, GeomirrorError
from geomirror.node.context import NodeContext
from geomirror.tunnel.decoding import convert
from geomirror.tunnel.flood import Flood
from geomirror.tunnel.membership import Signed, fingerprint_of
from geomirror.tunnel.network_state_io import NetworkState

_log = structlog.get_logger(component="network")

CALL_TIMEOUT_S = 20.0
Updates = list[dict[str, Any]]


class MembershipSpread:
    """On the event loop.

    :param learn: (source, records) → takes over what is newer; raises `GeomirrorError`.
    """

    def __init__(
        self, state: NetworkState, context: NodeContext, learn: Callable[[str, Updates], None]
    ) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self._state = state
        self._context = context
        self._learn = learn
        self._flood = Flood()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def link_up(self, peer: str) -> None:
        """A node is reachable again."""
        self._flood.link_up(peer)
        self.changed()

    def changed(self) -> None:
        """Our records may have changed: tell whom it concerns."""
        if self._closing:
            return
        now_ns, own = self._context.clock.now_ns(), self._state.membership.fingerprint()
        while (peer := self._flood.next_exchange(own, now_ns)) is not None:
            task = asyncio.ensure_future(self._exchange(peer))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self._arm(self._flood.get_timer(own), now_ns)

    def answered(self, peer: str) -> None:
        """A neighbour told us its records, and gets all of ours as the answer."""
        self._flood.heard(peer, self._state.membership.fingerprint())

    async def settled(self, timeout_s: float) -> tuple[list[str], list[str]]:
        """Wait until every neighbour has our records: those that have, those that have not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.tasks:
                    await asyncio.wait(set(self.tasks))
        own = self._state.membership.fingerprint()
        return self._flood.told(own), self._flood.untold(own)

    async def stop(self) -> None:
        """Cancel exchanges under way."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _arm(self, due_ns: int | None, now_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_ns is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0, due_ns - now_ns) / SECOND, self.changed)

    async def _exchange(self, peer: str) -> None:
        links = self._context.links
        parameters = {"updates": self._state.export_updates()}
        try:
            reply = await links.call(peer, "membership.exchange", parameters, CALL_TIMEOUT_S)
            updates = reply.get("updates", [])
            unreadable = AuthError("membership entries cannot be read")
            theirs: list[Signed] = convert(updates, list[Signed], unreadable)
            self._learn(peer, updates)
            self._flood.heard(peer, fingerprint_of(theirs))
        except GeomirrorError as error:
            _log.warning("exchange_failed", peer=peer, reason=str(error))
            if links.state(peer).is_established:
                self._flood.failed(peer, self._context.clock.now_ns())
            else:
                self._flood.link_down(peer)
        finally:
            self._flood.ended(peer)
        self.changed()
