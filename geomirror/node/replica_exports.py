"""The NBD exports of one replica: a volume each, more of them when some are added."""

from __future__ import annotations

import msgspec

from geomirror.nbd.protocol import Export
from geomirror.node.context import NodeContext
from geomirror.node.primary_export import HeldWriters, PrimaryExport
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.secondary_export import ReaderPins, SecondaryExport
from geomirror.node.status_contexts import StatusContexts
from geomirror.volume.superblock import VolumeRecord
from geomirror.wan_protocol.primary import Primary


class ReplicaExports:
    """`exports` is by name: `RES/VOLUME` for every volume, and `RES` for the first."""

    def __init__(
        self,
        resource: str,
        node: NodeContext,
        runner: ReplicaRunner,
        held: HeldWriters,
        pins: ReaderPins | None,
        *,
        is_writable: bool,
    ) -> None:
        """:param is_writable: the role accepts writes (`cluster.promotion`)."""
        self.exports: dict[str, Export] = {}
        self._resource = resource
        self._node = node
        self._runner = runner
        self._held = held
        self._pins = pins
        self._is_read_only = node.is_read_only or not is_writable
        core = runner.core
        self._contexts = StatusContexts(runner, core) if isinstance(core, Primary) else None
        self._epoch = -1
        self.update()

    def volumes(self) -> list[VolumeRecord]:
        """The volumes now, or as of the applied epoch at a secondary, by index."""
        core = self._runner.core
        sizes = core.engine.sizes.now if isinstance(core, Primary) else core.served_sizes
        records = {record.index: record for record in core.engine.superblock.volumes}
        return [
            msgspec.structs.replace(records[index], size_bytes=size_bytes)
            for index, size_bytes in sorted(sizes.items())
            if index in records
        ]

    def progress(self) -> None:
        """At a secondary: an epoch that was applied may have added volumes."""
        epoch = self._runner.core.engine.applied_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self.update()

    def update(self) -> None:
        """Export what is not exported yet."""
        for volume in self.volumes():
            full = f"{self._resource}/{volume.name}"
            if full not in self.exports:
                export = self.exports[full] = self._export(full, volume.index)
                self.exports.setdefault(self._resource, export)

    def _export(self, full: str, volume: int) -> Export:
        if self._contexts is not None:
            return PrimaryExport(
                full,
                volume,
                self._runner,
                self._held,
                self._contexts,
                is_single_writer=self._node.is_single_writer,
                description=f"primary of {full}",
                is_read_only=self._is_read_only,
                is_multi_conn=not self._node.is_single_writer,
            )
        assert self._pins is not None
        text = f"read-only secondary of {full}"
        return SecondaryExport(full, volume, self._pins, description=text)
