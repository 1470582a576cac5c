"""Members with a tail come back by themselves, where the settings or an operator say so.

```
 outranked ─▶ may it? ─no─▶ wait for `resolve` ─┐
               │ yes                            │
               ▼                                ▼
        tail durable as a branch ─▶ back ─▶ follow ─▶ ask the primary for a session
               └─ no room for it: say so, ask; once more when a branch is dropped, and after a
                  minute, two, … an hour
```
What an operator asked for is tried again like what the settings ask for, until another history
outranks this one, or a restart. Invariant (I13): nothing is given up before it is durable as a
branch; only an operator drops one, and nothing here needs one that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from functools import partial

import structlog

from geomirror.errors import GeomirrorError
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.service import Service

_log = structlog.get_logger(component="rejoiner")

RETRY_S, RETRY_S_MAX = 60.0, 3600.0
"""A branch that found no room is tried again after this time, twice as long each time: an attempt
may write all that there is room for."""
ASK_TIMEOUT_S = 5.0


@dataclass
class Rejoiner:
    """Of one node. On the event loop."""

    calls: ResourceCalls
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _retries: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _refusals: dict[str, str] = field(default_factory=dict)
    _after_s: dict[str, float] = field(default_factory=dict)
    _branches: dict[str, str] = field(default_factory=dict)
    """What became of the last tail of each."""
    _wanted: dict[str, str] = field(default_factory=dict)
    """The newest generation of the history that an operator wants each to follow, until it does."""
    _asking: set[asyncio.Task[None]] = field(default_factory=set)

    def watch(self, service: Service) -> None:
        """A resource is served: look after it."""
        name = service.definition.name
        service.rejoin_refusal = self._refusals.get(name, "")
        service.on_outranked = partial(self.look, name)
        service.on_rejoined = partial(self._rejoined, name)

    def look(self, name: str) -> None:
        """A member was outranked, or what decides about its return has changed."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.ensure_future(self._try(name))

    async def bring_back(self, service: Service) -> str:
        """Let a member give up its tail and follow; the branch's name, "" without a tail.

        :raises GeomirrorError: it stays as it is.
        """
        name = service.definition.name
        try:
            return await service.follow(gives_up_tail=True)
        except GeomirrorError:
            if service.must_reopen:
                await self._reopen(name)
            raise

    def forget(self, name: str) -> None:
        """What became of earlier tails is of no interest."""
        self._branches.pop(name, None)

    async def bring_back_now(self, name: str) -> str:
        """The same by an operator's word, whatever the settings say.

        :raises GeomirrorError: it stays as it is.
        """
        while (running := self._tasks.get(name)) is not None:
            await asyncio.wait([running])
        service = self.calls.host.get(name)
        if service.is_outranked:
            self._wanted[name] = _newest_above(service)
            try:
                self._branches[name] = await self.bring_back(service)
            except GeomirrorError as error:
                self._refused(name, error)
                raise
        return self._branches.get(name, "")

    def stop(self) -> None:
        """Nothing is tried again."""
        for timer in self._retries.values():
            timer.cancel()
        for task in [*self._tasks.values(), *self._asking]:
            task.cancel()

    async def _try(self, name: str) -> None:
        try:
            service = self.calls.host.services.get(name)
            if service is not None and service.must_reopen:
                await self._reopen(name)
            elif service is not None and service.is_outranked and self._may(name, service):
                self._branches[name] = await self.bring_back(service)
        except GeomirrorError as error:
            self._refused(name, error)
        finally:
            del self._tasks[name]

    def _may(self, name: str, service: Service) -> bool:
        """The settings say so, or an operator did so of this very history."""
        is_wanted = self._wanted.get(name) == _newest_above(service)
        return service.rejoins_by_itself or is_wanted

    def _refused(self, name: str, error: GeomirrorError) -> None:
        text = str(error)
        if self._refusals.get(name) != text:
            _log.warning("rejoin_stopped", resource=name, reason=text)
            self.calls.host.context.emit("rejoin_stopped", {"resource": name, "reason": text})
        self._refusals[name] = text
        service = self.calls.host.services.get(name)
        if service is not None:
            service.rejoin_refusal = text
        after_s = self._after_s.get(name, RETRY_S)
        self._after_s[name] = min(2 * after_s, RETRY_S_MAX)
        if name in self._retries:
            self._retries[name].cancel()
        loop = asyncio.get_running_loop()
        self._retries[name] = loop.call_later(after_s, self.look, name)

    def _rejoined(self, name: str, by: str) -> None:
        for kept in (self._refusals, self._after_s, self._wanted):
            kept.pop(name, None)
        timer = self._retries.pop(name, None)
        if timer is not None:
            timer.cancel()
        task = asyncio.ensure_future(self._ask(name, by))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, name: str, by: str) -> None:
        """The primary offers a session that was refused less and less often: ask for it."""
        entry = self.calls.store.find(name)
        if entry is not None and self.calls.is_connected(by):
            parameters = {"resource_id": entry.definition.resource_id}
            with contextlib.suppress(GeomirrorError):
                await self.calls.links.call(by, "promotion.offer", parameters, ASK_TIMEOUT_S)

    async def _reopen(self, name: str) -> None:
        """What was begun is ended by whoever opens it."""
        await self.calls.host.close(name)
        await self.calls.host.open(self.calls.store.get(name).definition)


def _newest_above(service: Service) -> str:
    """The newest generation of the history that outranks a member."""
    return str(service.tail()["other"]["generation"])
