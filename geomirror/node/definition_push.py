"""Brings definitions to the secondaries: at once when the link is up, else as soon as it is.

A resource's traffic to a secondary starts only when that secondary has confirmed the definition,
so a session is never opened for a resource that the peer does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

import msgspec
import structlog

from geomirror.errors import GeomirrorError, StorageError
from geomirror.node.definition_store import DefinitionStore, ResourceEntry
from geomirror.node.resource_host import ResourceHost

_log = structlog.get_logger(component="definitions")

PUSH_TIMEOUT_S = 30.0
"""A secondary makes its journal before it answers."""
RETRY_S_MIN = 2.0
RETRY_S_MAX = 60.0


class Calls(Protocol):
    """The part of the links that is needed here."""

    async def call(
        self, peer: str, method: str, parameters: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Call a method of a peer."""


class DefinitionPush:
    """One task per peer whose link is up."""

    def __init__(self, store: DefinitionStore, host: ResourceHost, links: Calls) -> None:
        self._store = store
        self._host = host
        self._links = links
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self.refusals: dict[tuple[str, str], str] = {}
        """(resource, peer) -> why the peer has not taken the definition."""

    def link_up(self, peer: str) -> None:
        """Start to bring `peer` what it does not have yet."""
        self.link_down(peer)
        self._wake[peer] = asyncio.Event()
        self._tasks[peer] = asyncio.ensure_future(self._run(peer))

    def link_down(self, peer: str) -> None:
        """Stop until the link is up again."""
        task = self._tasks.pop(peer, None)
        if task is not None:
            task.cancel()
        self._wake.pop(peer, None)

    def changed(self) -> None:
        """Some entry changed: look again."""
        for event in self._wake.values():
            event.set()

    def forgotten(self, name: str, peer: str) -> None:
        """The peer said that it does not know the resource: bring it again."""
        entry = self._store.find(name)
        if entry is not None and entry.confirmed.pop(peer, None) is not None:
            _log.warning("definition_lost_by_peer", resource=name, peer=peer)
            self.changed()

    def members_changed(self, known: set[str]) -> None:
        """Do not wait for nodes that are in the network no more to forget anything."""
        for entry in self._store.entries():
            if not self._is_ours(entry):
                continue
            gone = [name for name in entry.pending_peers() if name not in known]
            leaving = [name for name in gone if name in entry.leaving]
            for name in leaving:
                del entry.leaving[name]
                entry.confirmed.pop(name, None)
            if entry.state == "deleting":
                entry.confirmed.update(dict.fromkeys(gone, 0))
            if leaving or entry.state == "deleting":
                # Where the disk is full it is found again at the next start.
                with contextlib.suppress(StorageError):
                    self._settle(entry)

    def is_confirmed(self, name: str, peer: str) -> bool:
        """Whether the peer knows the resource."""
        entry = self._store.find(name)
        return entry is not None and entry.is_known_to(peer)

    async def stop(self) -> None:
        """Cancel all tasks."""
        tasks = list(self._tasks.values())
        for peer in list(self._tasks):
            self.link_down(peer)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, peer: str) -> None:
        delay = RETRY_S_MIN
        wake = self._wake[peer]
        while True:
            wake.clear()
            if await self._push_all(peer):
                await wake.wait()
                delay = RETRY_S_MIN
                continue
            try:
                # Not wait_for: Python 3.11's loses a cancellation that comes with the event.
                async with asyncio.timeout(delay):
                    await wake.wait()
            except TimeoutError:
                delay = min(delay * 2, RETRY_S_MAX)

    async def _push_all(self, peer: str) -> bool:
        is_done = True
        # A deleted resource first: its name may have been given to a new one.
        for entry in sorted(self._store.entries(), key=lambda found: found.state != "deleting"):
            if self._is_ours(entry) and peer in entry.pending_peers():
                is_done = await self._push(peer, entry) and is_done
        return is_done

    def _is_ours(self, entry: ResourceEntry) -> bool:
        is_mine = entry.definition.primary == self._host.context.name
        return is_mine and entry.state != "creating"

    async def _push(self, peer: str, entry: ResourceEntry) -> bool:
        definition = entry.definition
        name, version = definition.name, definition.version
        is_leaving = peer in entry.leaving
        is_deleting = entry.state == "deleting" or is_leaving
        try:
            if is_deleting:
                parameters = {
                    "name": name,
                    "resource_id": definition.resource_id,
                    "keep_data": entry.leaving.get(peer, entry.keep_data),
                }
                await self._links.call(peer, "resource.forget", parameters, PUSH_TIMEOUT_S)
            else:
                parameters = {
                    "definition": msgspec.to_builtins(definition),
                    "is_forced": entry.is_forced,
                }
                await self._links.call(peer, "resource.define", parameters, PUSH_TIMEOUT_S)
        except GeomirrorError as error:
            if self.refusals.get((name, peer)) != str(error):
                self.refusals[name, peer] = str(error)
                _log.warning("definition_pending", resource=name, peer=peer, reason=str(error))
                fields = {"resource": name, "peer": peer, "reason": str(error)}
                self._host.context.emit("definition_pending", fields)
            return False
        self.refusals.pop((name, peer), None)
        # It may have been changed meanwhile; what the peer confirmed is the version above.
        entry = self._store.by_id(definition.resource_id) or entry
        was_known = entry.is_known_to(peer)
        if is_leaving:
            entry.leaving.pop(peer, None)
            entry.confirmed.pop(peer, None)
        else:
            entry.confirmed[peer] = 0 if is_deleting else version
        self._settle(entry)
        service = self._host.services.get(name)
        if service is not None and not is_deleting and not was_known:
            service.link_up(peer)
        return True

    def _settle(self, entry: ResourceEntry) -> None:
        if entry.state == "deleting" and not entry.pending_peers():
            self._store.remove(entry.definition.resource_id)
        else:
            self._store.save()
