"""Methods that add and grow volumes. The primary's journal decides what volumes there are; the
definition follows it, also after a crash between the two.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import dataclass

import msgspec

from geomirror.errors import NotFoundError, RefusedError, UsageError
from geomirror.node.backing_check import backing_size, check_backing
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_store import ResourceEntry
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_definition import (
    ResourceDefinition,
    VolumeDefinition,
    check_name,
    check_volume_size,
)
from geomirror.node.service import Service
from geomirror.volume.superblock import VolumeRecord
from geomirror.volume.volume_change import VolumeChange


class AddVolume(Parameters, frozen=True):
    """`volume add`"""

    name: str
    size_bytes: int
    volume: str | None = None
    """None: its number."""
    backings: dict[str, str] = msgspec.field(default_factory=dict)
    """Node -> absolute path."""
    is_forced: bool = False


class ResizeVolume(Parameters, frozen=True):
    """`volume resize`"""

    name: str
    size_bytes: int
    volume: str | None = None
    """None: the first."""


@dataclass
class VolumeChanges:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("volume.add", AddVolume, self.add, from_peers=True)
        methods.add("volume.resize", ResizeVolume, self.resize, from_peers=True)

    async def add(self, caller: Caller, request: AddVolume) -> Result:
        """Add a volume; answers when it is sealed in an epoch, so that it cannot be lost."""
        entry = self.calls.store.get(request.name)
        if not self._is_here(entry):
            return await self._forward(caller, entry, "volume.add", request)
        service = self.calls.host.get(request.name)
        volumes = service.volumes()
        name = request.volume if request.volume is not None else _free_name(volumes)
        check_name("volume", name)
        check_volume_size(f"{request.name}/{name}", request.size_bytes)
        if any(each.name == name for each in volumes):
            raise RefusedError(f'resource "{request.name}" has a volume "{name}" already')
        for node in request.backings:
            if node not in entry.definition.members:
                raise UsageError(f'--backing {node}: "{node}" is no member of "{request.name}"')
        change = VolumeChange(
            len(volumes), name, 0, request.size_bytes, request.backings, request.is_forced
        )
        await self._check_backings(entry.definition, change)
        epoch = await service.grow(change)
        return self._grown(caller, request.name, name, epoch, is_changed=True)

    async def resize(self, caller: Caller, request: ResizeVolume) -> Result:
        """Grow a volume; answers when it is sealed in an epoch, so that it cannot be lost."""
        entry = self.calls.store.get(request.name)
        if not self._is_here(entry):
            return await self._forward(caller, entry, "volume.resize", request)
        service = self.calls.host.get(request.name)
        found = _find(request.name, service.volumes(), request.volume)
        check_volume_size(f"{request.name}/{found.name}", request.size_bytes)
        if request.size_bytes < found.size_bytes:
            raise RefusedError(
                f'volume "{request.name}/{found.name}" has {found.size_bytes} bytes and cannot be '
                f"shrunk to {request.size_bytes}",
                hint="make a smaller resource and copy what is to be kept",
            )
        if request.size_bytes == found.size_bytes:
            return self._grown(caller, request.name, found.name, 0, is_changed=False)
        await asyncio.to_thread(_check_device, found.backing, request.size_bytes)
        change = VolumeChange(found.index, found.name, found.size_bytes, request.size_bytes)
        epoch = await service.grow(change)
        return self._grown(caller, request.name, found.name, epoch, is_changed=True)

    def reconcile(self, service: Service) -> None:
        """Let the definition follow the journal of a primary: a crash may have come between."""
        name = service.definition.name
        entry = self.calls.store.find(name)
        if entry is None or entry.state != "active" or not self._is_here(entry):
            return
        definition = with_volumes(entry.definition, service.volumes())
        if definition is None:
            return
        self.calls.store.put(msgspec.structs.replace(entry, definition=definition))
        service.set_definition(definition)
        self.calls.push.changed()

    def _grown(
        self, caller: Caller, resource: str, volume: str, epoch: int, *, is_changed: bool
    ) -> Result:
        self.reconcile(self.calls.host.get(resource))
        status = self.calls.describe(resource)
        found = next(each for each in status["volumes"] if each["name"] == volume)
        if is_changed:
            fields = {"resource": resource, "volume": volume, "by": caller.name}
            self.calls.host.context.emit(
                "volume_resized", {**fields, "size_bytes": found["size_bytes"], "epoch": epoch}
            )
        pending = self.calls.store.get(resource).pending_peers()
        return {
            "name": resource,
            "volume": found,
            "changed": is_changed,
            "epoch": epoch or None,
            "pending": pending,
        }

    async def _check_backings(self, definition: ResourceDefinition, change: VolumeChange) -> None:
        """Refuse before anything changes; a secondary that is away looks when it has to."""
        here = self.calls.host.context.name
        path = change.backings.get(here)
        if path is not None:
            await asyncio.to_thread(
                check_backing,
                path,
                change.size_bytes,
                is_adopted=False,
                is_forced=change.is_forced,
            )
        probe = msgspec.structs.replace(
            definition,
            volumes=[VolumeDefinition(0, change.name, change.size_bytes)],
            backings={node: {change.name: path} for node, path in change.backings.items()},
        )
        for node in change.backings:
            if node != here:
                await self.calls.check_backing_of(probe, node, change.is_forced)

    def _is_here(self, entry: ResourceEntry) -> bool:
        return entry.definition.primary == self.calls.host.context.name

    async def _forward(
        self, caller: Caller, entry: ResourceEntry, method: str, request: Parameters
    ) -> Result:
        return await self.calls.forward(caller, entry.definition.primary, method, request)


def with_volumes(
    definition: ResourceDefinition, records: list[VolumeRecord]
) -> ResourceDefinition | None:
    """The next version with the volumes that the journal has; None when it has them already."""
    known = {volume.index: volume for volume in definition.volumes}
    backings = {node: dict(paths) for node, paths in definition.backings.items()}
    volumes: list[VolumeDefinition] = []
    for record in records:
        old = known.get(record.index)
        first_bytes = 0 if old is None else old.size_bytes
        if old is not None and old.first_size_bytes is not None:
            first_bytes = old.first_size_bytes
        is_as_made = first_bytes == record.size_bytes
        volumes.append(
            VolumeDefinition(
                record.index, record.name, record.size_bytes, None if is_as_made else first_bytes
            )
        )
        if old is None:
            for node, path in record.peers.items():
                backings.setdefault(node, {})[record.name] = path
    if volumes == definition.volumes:
        return None
    return msgspec.structs.replace(
        definition, version=definition.version + 1, volumes=volumes, backings=backings
    )


def _free_name(volumes: list[VolumeRecord]) -> str:
    taken = {each.name for each in volumes}
    number = len(volumes)
    while str(number) in taken:
        number += 1
    return str(number)


def _find(resource: str, volumes: list[VolumeRecord], name: str | None) -> VolumeRecord:
    for each in volumes:
        if name in (None, each.name):
            return each
    raise NotFoundError(
        f'resource "{resource}" has no volume "{name}"', hint=f'see "geomirror status {resource}"'
    )


def _check_device(path: str, size_bytes: int) -> None:
    """Refuse a backing device that is too small; files are extended.

    :raises RefusedError: it is.
    """
    size = backing_size(path) if path else None
    if size is not None and size < size_bytes and stat.S_ISBLK(os.stat(path).st_mode):
        raise RefusedError(
            f"backing device {path} has {size} bytes, {size_bytes} are needed",
            hint="enlarge the device first",
        )
