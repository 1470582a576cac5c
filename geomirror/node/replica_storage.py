"""Makes and opens the storage of a resource on this node; both block."""

from __future__ import annotations

from geomirror.errors import NotFoundError, RefusedError
from geomirror.node.context import NodeContext
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.store import File
from geomirror.volume.store_io import DirectoryStore, open_backing
from geomirror.volume.superblock import GenerationRecord, PeerRecord, VolumeRecord
from geomirror.wan_protocol.secondary import BLANK, CONSISTENT
from geomirror.wan_protocol.sender import BITMAP, STREAM


def starts_as_zeros(definition: ResourceDefinition) -> bool:
    """Every member begins with the same, empty content: nothing has to be copied first."""
    return definition.adopt is None and not definition.backings


def create_engine(
    definition: ResourceDefinition, node: NodeContext
) -> tuple[DirectoryStore, Engine]:
    """Make superblock, journal and volumes.

    :raises InUseError, StorageError, RefusedError: the backing is in use, missing or too small.
    """
    is_primary = definition.primary == node.name
    store = DirectoryStore(node.resource_dir(definition.name), create=True)
    try:
        chain: list[GenerationRecord] = []
        if is_primary:
            identity = node.entropy.token_bytes(16).hex()
            wall_ns = node.clock.wall_ns()
            chain.append(
                GenerationRecord(identity, 1, reason="created", by=node.name, wall_ns=wall_ns)
            )
        specs = [
            VolumeSpec(
                volume.index,
                volume.name,
                volume.size_bytes,
                _open_path(definition.backing_path(node.name, volume.name), volume.size_bytes),
                definition.backing_path(node.name, volume.name) or "",
            )
            for volume in definition.volumes
        ]
        is_fresh = starts_as_zeros(definition)
        assert definition.journal_bytes is not None
        engine = Engine.create(
            store,
            node.limits,
            node.entropy,
            name=definition.name,
            resource_id=definition.identity,
            volumes=specs,
            journal_bytes=definition.journal_bytes,
            role="primary" if is_primary else "secondary",
            data_state=CONSISTENT if is_primary or is_fresh else BLANK,
            chain=chain,
            wall_ns=node.clock.wall_ns(),
        )
        if is_primary:
            for name in definition.secondaries:
                mode = STREAM if is_fresh else BITMAP
                record = PeerRecord(mode=mode, is_initial=not is_fresh)
                engine.superblock.peers[name] = record
            job = engine.checkpoint_job()
            if job is not None:
                job.run()
                engine.complete_checkpoint(job)
    except BaseException:
        store.close()
        raise
    return store, engine


def open_engine(
    definition: ResourceDefinition, node: NodeContext
) -> tuple[DirectoryStore, Engine]:
    """Recover what is on disk.

    :raises NotFoundError: the resource's directory is gone.
    :raises FencedError, IntegrityError, InUseError, StorageError: nothing was changed.
    """
    directory = node.resource_dir(definition.name)
    if not directory.is_dir():
        raise NotFoundError(f'the state of "{definition.name}" is not at {directory}')
    store = DirectoryStore(directory)
    try:
        engine = Engine.open(store, node.limits, node.entropy, _open_volume)
        if engine.superblock.resource_id != definition.resource_id:
            engine.close()
            raise RefusedError(f"{directory} holds another resource of this name")
    except BaseException:
        store.close()
        raise
    return store, engine


def _open_volume(volume: VolumeRecord) -> File | None:
    return _open_path(volume.backing or None, volume.size_bytes)


def _open_path(path: str | None, size_bytes: int) -> File | None:
    """The backing device, at least as large as the volume; None: a file of the resource's own."""
    if path is None:
        return None
    file = open_backing(path)
    if file.size() < size_bytes:
        found = file.size()
        file.close()
        raise RefusedError(f"backing device {path} has {found} bytes, {size_bytes} are needed")
    return file
