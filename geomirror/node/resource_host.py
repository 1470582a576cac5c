"""The running resources of a node: opened, started, stopped, and found by name and by session."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from geomirror.errors import (
    GeomirrorError,
    InUseError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    StorageError,
)
from geomirror.node.context import NodeContext
from geomirror.node.file_limit import circuits_that_fit, file_limit, require_files
from geomirror.node.resource_definition import ResourceDefinition, default_journal_bytes
from geomirror.node.service import Service, ServiceFactory

if TYPE_CHECKING:
    from geomirror.nbd.protocol import Export

_log = structlog.get_logger(component="resources")

TRIED_AGAIN = "it is tried again by itself"
RETRY_S, RETRY_S_MAX = 1.0, 60.0
"""A resource whose failure may pass is opened again after this time, twice as long each time."""


class ResourceHost:
    """Services by name. A resource that cannot be opened is remembered with its error."""

    def __init__(self, context: NodeContext, factory: ServiceFactory) -> None:
        self.context = context
        self.services: dict[str, Service] = {}
        self.failures: dict[str, GeomirrorError] = {}
        """name -> why it is not served; nothing of it was changed."""
        self.opening: set[str] = set()
        self.on_started: Callable[[Service], None] = lambda service: None
        """Called on the loop when a service has started; the node connects it to its links."""
        self.definition_of: Callable[[ResourceDefinition], ResourceDefinition] = lambda old: old
        """What a resource is by now; it may have changed while it could not be opened."""
        self._factory = factory
        self._retries: dict[str, asyncio.TimerHandle] = {}
        self._retry_after_s: dict[str, float] = {}
        self._reopening: set[asyncio.Task[None]] = set()
        self._sessions: dict[int, Service] = {}

    async def create(self, definition: ResourceDefinition) -> Service:
        """Make a resource's state on this node and serve it.

        :raises RefusedError: the name is in use here, or too many resources.
        :raises GeomirrorError: storage; what was made is removed again.
        """
        name = definition.name
        if name in self.services or name in self.opening or name in self.failures:
            raise RefusedError(f'resource "{name}" exists on node "{self.context.name}"')
        if len(self.services) + len(self.opening) >= self.context.limits.resources_max:
            raise RefusedError(f"node has {self.context.limits.resources_max} resources already")
        self.opening.add(name)
        directory = self.context.resource_dir(name)
        try:
            if await self._run(directory.exists):
                return await self._start(await self._open_left(definition, directory))
            try:
                wanted = await self._run(self._with_journal_size, definition)
                self._require_files(wanted)
                return await self._start(await self._make(wanted, directory))
            except GeomirrorError:
                await self._run(remove_tree, directory)
                raise
        finally:
            self.opening.discard(name)

    async def _make(self, wanted: ResourceDefinition, directory: Path) -> Service:
        """Make it on a thread; nothing is left when the caller gives up, or the node stops."""
        making = asyncio.ensure_future(self._run(self._factory.create, wanted, self.context))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            with contextlib.suppress(GeomirrorError):
                await asyncio.shield(making)
            remove_tree(directory)
            raise

    async def _open_left(self, definition: ResourceDefinition, directory: Path) -> Service:
        """What a creation has left that was cut off by a stop: this very resource, and no other.

        :raises RefusedError: it is something else, or not whole; nothing was changed.
        """
        try:
            service: Service = await self._run(self._factory.open, definition, self.context)
        except GeomirrorError as error:
            raise RefusedError(
                f"{directory} is in the way: {error.message}",
                hint="move it away: it may hold a resource",
            ) from error
        _log.info("resource_found", resource=definition.name, directory=str(directory))
        return service

    async def open(self, definition: ResourceDefinition) -> None:
        """Recover and serve a resource; a failure is kept in `failures`, not raised.

        One that can pass by itself (device in use, no space) is tried again for ever.
        """
        name = definition.name
        self.opening.add(name)
        try:
            service = await self._run(self._factory.open, definition, self.context)
            await self._start(service)
        except GeomirrorError as error:
            self._failed(definition, error)
        finally:
            self.opening.discard(name)

    def _failed(self, definition: ResourceDefinition, error: GeomirrorError) -> None:
        name, may_pass = definition.name, isinstance(error, (InUseError, NoSpaceError))
        if may_pass:
            error = type(error)(
                error.message, hint="; ".join(filter(None, [error.hint, TRIED_AGAIN]))
            )
        if str(self.failures.get(name)) != str(error):
            _log.error("resource_not_served", resource=name, reason=str(error))
            self.context.emit("resource_failed", {"resource": name, "reason": str(error)})
        self.failures[name] = error
        if may_pass:
            after_s = self._retry_after_s.get(name, RETRY_S)
            self._retry_after_s[name] = min(2 * after_s, RETRY_S_MAX)
            loop = asyncio.get_running_loop()
            self._retries[name] = loop.call_later(after_s, self._retry, definition)

    def _retry(self, definition: ResourceDefinition) -> None:
        del self._retries[definition.name]
        task = asyncio.ensure_future(self.open(self.definition_of(definition)))
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    def _forget_failure(self, name: str) -> None:
        self.failures.pop(name, None)
        self._retry_after_s.pop(name, None)
        timer = self._retries.pop(name, None)
        if timer is not None:
            timer.cancel()

    async def close(self, name: str) -> None:
        """Stop serving a resource, or trying to; its state stays."""
        service = self.services.pop(name, None)
        self._forget_failure(name)
        if service is None:
            return
        self._sessions.pop(service.definition.session, None)
        await service.stop()

    async def destage(self, definition: ResourceDefinition) -> None:
        """Stop a resource with all that it was told in its images.

        :raises GeomirrorError: it is not served, or its images do not catch up; it is served again.
        """
        name, last_left = definition.name, None
        while True:
            service = self.get(name)
            await self.close(name)
            # A stop destages within its time limit: opening and stopping again goes on with it.
            position = service.position()
            left = position.get("durable_epoch", 0) - position.get("applied_epoch", 0)
            if left <= 0:
                return
            await self.open(definition)
            if last_left is not None and left >= last_left:
                raise StorageError(f'resource "{name}": {left} epochs cannot be destaged')
            last_left = left

    async def close_all(self) -> None:
        """Stop every service, in parallel; one that fails to does not keep the others."""
        reopening = list(self._reopening)
        for task in reopening:
            task.cancel()
        await asyncio.gather(*reopening, return_exceptions=True)
        for name in list(self._retries):
            self._forget_failure(name)

        async def close_one(name: str) -> None:
            try:
                await self.close(name)
            except GeomirrorError as error:
                _log.error("stop_failed", resource=name, reason=str(error))

        await asyncio.gather(*(close_one(name) for name in list(self.services)))

    def get(self, name: str) -> Service:
        """A running service.

        :raises GeomirrorError: why it is not served, or NotFoundError.
        """
        if name in self.services:
            return self.services[name]
        if name in self.failures:
            raise self.failures[name]
        if name in self.opening:
            raise RefusedError(f'resource "{name}" is being opened', hint="try again in a moment")
        raise NotFoundError(f'no resource "{name}" on this node')

    def with_peer(self, peer: str) -> Iterator[Service]:
        """Services that exchange data with `peer`."""
        for service in list(self.services.values()):
            if peer in service.definition.peers_of(self.context.name):
                yield service

    def by_session(self, session: int, peer: str) -> Service | None:
        """The service of a session, if `peer` is a member of its resource."""
        service = self._sessions.get(session)
        if service is None or peer not in service.definition.peers_of(self.context.name):
            return None
        return service

    def exports(self) -> dict[str, Export]:
        """NBD exports of all resources."""
        found: dict[str, Export] = {}
        for service in self.services.values():
            found.update(service.exports())
        return found

    async def keep_images(self, name: str) -> list[str]:
        """Move image files that lie in the data directory to `kept/NAME`; their new paths."""
        kept: list[str] = await self._run(self._keep_images, name)
        return kept

    async def remove_state(self, name: str) -> None:
        """Remove a closed resource's directory; backing devices elsewhere stay."""
        await self._run(remove_tree, self.context.resource_dir(name))

    async def _start(self, service: Service) -> Service:
        await service.start()
        name = service.definition.name
        self.services[name] = service
        self._sessions[service.definition.session] = service
        self._forget_failure(name)
        self.on_started(service)
        return service

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.context.executor, function, *arguments)

    def _with_journal_size(self, definition: ResourceDefinition) -> ResourceDefinition:
        if definition.journal_bytes is not None:
            return definition
        free = shutil.disk_usage(self.context.data_dir).free
        size = default_journal_bytes(definition.size_bytes, free, self.context.limits)
        return msgspec.structs.replace(definition, journal_bytes=size)

    def _require_files(self, wanted: ResourceDefinition) -> None:
        journals = [wanted.journal_bytes or 0, *self._journals_bytes()]
        require_files(journals, self.context.limits, file_limit())

    def circuits_max(self) -> int:
        """Forwarded connections for which there are files beside those of the journals."""
        return circuits_that_fit(self._journals_bytes(), self.context.limits, file_limit())

    def _journals_bytes(self) -> list[int]:
        return [service.definition.journal_bytes or 0 for service in self.services.values()]

    def _keep_images(self, name: str) -> list[str]:
        source = self.context.resource_dir(name) / "volumes"
        if not source.is_dir():
            return []
        target = self.context.data_dir / "kept" / name
        number = 1
        while target.exists():
            number += 1
            target = self.context.data_dir / "kept" / f"{name}.{number}"
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            source.rename(target)
        except OSError as error:
            raise StorageError.from_os(error, operation="keep", path=str(source)) from error
        return [str(path) for path in sorted(target.iterdir())]


def remove_tree(directory: Path) -> None:
    """Remove a directory if it is there.

    :raises StorageError: something is left.
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError.from_os(error, operation="remove", path=str(directory)) from error
