"""Makes and opens the storage of a resource on this node; both block."""

from __future__ import annotations

import os
from contextlib import ExitStack

from geomirror.errors import NotFoundError, RefusedError
from geomirror.node.backing_check import check_backing
from geomirror.node.context import NodeContext
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.rewinding import finish_return
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.engine_base import MakeBacking
from geomirror.volume.store import File
from geomirror.volume.store_io import DirectoryStore, open_backing
from geomirror.volume.superblock import GenerationRecord, PeerRecord, VolumeRecord
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.resync_intake import BLANK, CONSISTENT
from geomirror.wan_protocol.sender import BITMAP, STREAM


def starts_as_zeros(definition: ResourceDefinition) -> bool:
    """Every member begins with the same, empty content: nothing has to be copied first."""
    return definition.adopt is None and not definition.backings


def backing_maker(node: str) -> MakeBacking:
    """Opens what a volume that is added uses on this node, or makes it; for the engine."""

    def make(change: VolumeChange) -> tuple[str, File] | None:
        path = change.backings.get(node)
        if path is None:
            return None
        check_backing(path, change.size_bytes, is_adopted=False, is_forced=change.is_forced)
        return path, create_path(path, change.size_bytes)

    return make


def create_engine(
    definition: ResourceDefinition, node: NodeContext
) -> tuple[DirectoryStore, Engine]:
    """Make superblock, journal and volumes.

    :raises InUseError, StorageError, RefusedError: the backing is in use, missing or too small.
    """
    is_primary = definition.primary == node.name
    assert definition.journal_bytes is not None
    # What fails half-way must not keep its backings locked: the operator tries again.
    with ExitStack() as stack:
        store = DirectoryStore(node.resource_dir(definition.name), create=True)
        stack.callback(store.close)
        engine = Engine.create(
            store,
            node.limits,
            node.entropy,
            name=definition.name,
            resource_id=definition.identity,
            volumes=_volume_specs(definition, node.name, stack),
            journal_bytes=definition.journal_bytes,
            role="primary" if is_primary else "secondary",
            chain=[_first_generation(node)] if is_primary else [],
            wall_ns=node.clock.wall_ns(),
            make_backing=backing_maker(node.name),
        )
        stack.callback(engine.close)
        _note_beginning(engine, definition, is_primary=is_primary)
        stack.pop_all()
    return store, engine


def _volume_specs(definition: ResourceDefinition, node: str, stack: ExitStack) -> list[VolumeSpec]:
    specs: list[VolumeSpec] = []
    for volume in definition.volumes:
        path = definition.backing_path(node, volume.name)
        # As large as it is by now; the image has the size that the volume began with.
        file = None if path is None else create_path(path, volume.size_bytes)
        if file is not None:
            stack.callback(file.close)
        specs.append(VolumeSpec(volume.index, volume.name, volume.bytes_at_first, file, path or ""))
    return specs


def _first_generation(node: NodeContext) -> GenerationRecord:
    identity = node.entropy.token_bytes(16).hex()
    return GenerationRecord(
        identity, 1, reason="created", by=node.name, wall_ns=node.clock.wall_ns()
    )


def _note_beginning(engine: Engine, definition: ResourceDefinition, *, is_primary: bool) -> None:
    """Record what the copies hold at the start: the same zeros, or nothing yet."""
    is_fresh = starts_as_zeros(definition)
    superblock = engine.superblock
    superblock.data_state = CONSISTENT if is_primary or is_fresh else BLANK
    if is_primary:
        for name in definition.secondaries:
            mode = STREAM if is_fresh else BITMAP
            superblock.peers[name] = PeerRecord(mode=mode, is_initial=not is_fresh)
    job = engine.checkpoint_job()
    if job is not None:
        job.run()
        engine.complete_checkpoint(job)


def open_engine(definition: ResourceDefinition, node: NodeContext) -> tuple[DirectoryStore, Engine]:
    """Recover what is on disk.

    :raises NotFoundError: the resource's directory is gone.
    :raises FencedError, IntegrityError, InUseError, StorageError: nothing was changed.
    """
    directory = node.resource_dir(definition.name)
    if not directory.is_dir():
        raise NotFoundError(f'the state of "{definition.name}" is not at {directory}')
    store = DirectoryStore(directory)
    try:
        maker = backing_maker(node.name)
        engine = Engine.open(store, node.limits, node.entropy, _open_volume, maker)
        if engine.superblock.resource_id != definition.resource_id:
            engine.close()
            raise RefusedError(f"{directory} holds another resource of this name")
        finish_return(engine, node)
    except BaseException:
        store.close()
        raise
    return store, engine


def _open_volume(volume: VolumeRecord) -> File:
    return _open_path(volume.backing, volume.size_bytes)


def create_path(path: str, size_bytes: int) -> File:
    """The backing device of a new volume; a file that is missing or empty is made, one hole."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        file = open_backing(path)
        file.truncate(size_bytes)
        return file
    return open_backing(path, create_size=size_bytes)


def _open_path(path: str, size_bytes: int) -> File:
    """The backing device, at least as large as the volume."""
    file = open_backing(path)
    if file.size() < size_bytes:
        found = file.size()
        file.close()
        raise RefusedError(f"backing device {path} has {found} bytes, {size_bytes} are needed")
    return file
