"""Making a resource's storage, and opening it again.

Order of creation: images, journal, superblock; the superblock is what makes the resource exist, so
a crash before leaves files that belong to nothing.
Deliberately not here: locks against a second daemon (the node), running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from geomirror.environment import Entropy
from geomirror.errors import IntegrityError, RefusedError, UsageError
from geomirror.limits import SECTOR_BYTES, Limits
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.engine_base import EngineParts
from geomirror.volume.engine_growth import VOLUMES_DIRECTORY, volume_file_name
from geomirror.volume.engine_recovery import replay
from geomirror.volume.epoch_directory import EpochDirectory
from geomirror.volume.epoch_table import HASH_ZERO
from geomirror.volume.image import Image
from geomirror.volume.journal import Journal
from geomirror.volume.mark_log import replay_marks
from geomirror.volume.marks import MarkTable
from geomirror.volume.marks_file import load_marks
from geomirror.volume.open_epoch import OpenEpoch
from geomirror.volume.recovery import Recovered, recover_journal
from geomirror.volume.store import File, Store
from geomirror.volume.superblock import (
    GenerationRecord,
    Role,
    Superblock,
    SuperblockFile,
    VolumeRecord,
)
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_open import OpenPass, open_pass_of
from geomirror.volume.volume_sizes import VolumeSizes
from geomirror.volume.way_back import way_back_floor


@dataclass(frozen=True)
class VolumeSpec:
    """A volume to be made; without a backing it gets a sparse file in the store."""

    index: int
    name: str
    size_bytes: int
    backing: File | None = None
    backing_name: str = ""
    """How the superblock names the backing, for `open`; "" for the file in the store."""


@dataclass(frozen=True)
class NewResource:
    """A resource to be made; see `Engine.create`."""

    name: str
    resource_id: bytes
    volumes: Sequence[VolumeSpec]
    journal_bytes: int
    role: Role
    chain: Sequence[GenerationRecord]
    wall_ns: int


def create_parts(store: Store, limits: Limits, entropy: Entropy, new: NewResource) -> EngineParts:
    """See `Engine.create`."""
    _check(limits, new.volumes, new.journal_bytes)
    with ExitStack() as stack:
        images = _create_images(store, new, stack)
        segments = new.journal_bytes // limits.segment_bytes
        journal = Journal.create(
            store,
            limits,
            entropy,
            resource_id=new.resource_id,
            journal_bytes=segments * limits.segment_bytes,
        )
        stack.callback(journal.close)
        undo = UndoStore(store, limits)
        superblock = _first_superblock(new, journal, limits)
        superblock_file = SuperblockFile(store)
        stack.callback(superblock_file.close)
        superblock_file.create(superblock)
        stack.pop_all()
    return EngineParts(
        store,
        limits,
        entropy,
        superblock,
        superblock_file,
        journal,
        images,
        _indexes(images, limits),
        undo,
        EpochDirectory(),
        OpenEpoch(1, journal.end_lsn, journal.end_lsn),
        cut_number=1,
        sealed_epoch=0,
        sealed_hash=HASH_ZERO,
        marks=MarkTable(),
        sizes=volume_sizes(superblock),
    )


def _create_images(store: Store, new: NewResource, stack: ExitStack) -> dict[int, Image]:
    images: dict[int, Image] = {}
    for spec in new.volumes:
        file = spec.backing or store.create(volume_file_name(spec.index), spec.size_bytes)
        stack.callback(file.close)
        if spec.backing is None:
            file.fdatasync()  # Its size: it holds nothing yet.
        if file.size() < spec.size_bytes:
            raise RefusedError(
                f'volume "{spec.name}" of "{new.name}" needs {spec.size_bytes} bytes, '
                f"{file.name} has {file.size()}"
            )
        images[spec.index] = Image(spec.index, spec.name, spec.size_bytes, file)
    if any(spec.backing is None for spec in new.volumes):
        store.sync_directory(VOLUMES_DIRECTORY)
    return images


def _first_superblock(new: NewResource, journal: Journal, limits: Limits) -> Superblock:
    return Superblock(
        resource_id=new.resource_id.hex(),
        name=new.name,
        segment_bytes=limits.segment_bytes,
        journal_bytes=journal.bytes_total,
        volumes=[
            VolumeRecord(each.index, each.name, each.size_bytes, each.backing_name)
            for each in new.volumes
        ],
        role=new.role,
        data_state="consistent" if new.role == "primary" else "blank",
        chain=list(new.chain),
        scan_lsn=journal.end_lsn,
        known_durable_lsn=journal.end_lsn,
        applied_end_lsn=journal.end_lsn,
        applied_wall_ns=new.wall_ns,
    )


def open_parts(
    store: Store,
    limits: Limits,
    entropy: Entropy,
    open_backing: Callable[[VolumeRecord], File],
) -> EngineParts:
    """See `Engine.open`."""
    with ExitStack() as stack:
        superblock_file = SuperblockFile(store)
        stack.callback(superblock_file.close)
        superblock = superblock_file.load()
        images = _open_images(store, superblock, open_backing, stack)
        recovered = _recover(store, limits, entropy, superblock)
        stack.callback(recovered.journal.close)
        undo, open_pass = _open_undo(store, superblock, limits)
        if open_pass is not None:
            stack.callback(open_pass.stop)
        sizes, indexes = volume_sizes(superblock), _indexes(images, limits)
        marks, log = load_marks(store), (recovered.journal, recovered.records)
        replay_marks(marks, superblock, *log)
        replayed = replay(
            superblock,
            *log,
            indexes,
            sizes,
            limits,
            way_back_floor(undo.history, superblock, limits),
        )
        stack.pop_all()
    return EngineParts(
        store,
        limits,
        entropy,
        superblock,
        superblock_file,
        recovered.journal,
        images,
        indexes,
        undo,
        replayed.directory,
        replayed.open_epoch,
        replayed.cut_number,
        replayed.sealed_epoch,
        replayed.sealed_hash,
        marks,
        sizes,
        open_pass=open_pass,
        spooled=replayed.spooled,
        moved=recovered.moved,
    )


def _recover(store: Store, limits: Limits, entropy: Entropy, superblock: Superblock) -> Recovered:
    return recover_journal(
        store,
        limits,
        entropy,
        resource_id=bytes.fromhex(superblock.resource_id),
        journal_bytes=superblock.journal_bytes,
        scan_lsn=superblock.scan_lsn,
        known_durable_lsn=superblock.known_durable_lsn,
    )


def _open_undo(
    store: Store, superblock: Superblock, limits: Limits
) -> tuple[UndoStore, OpenPass | None]:
    """All undo; of a resync under way, the open pass too. :raises FencedError: it is damaged."""
    held = superblock.held
    number = None if held is None else held.undo_number
    undo = UndoStore(store, limits, superblock.undo_next, number)
    open_pass: OpenPass | None = None
    if held is not None:
        open_pass = open_pass_of(store, undo, held, limits)
        open_pass.load()
    elif superblock.data_state != "consistent":
        undo.drop_all()
    state_epoch = superblock.applied_epoch if held is None else held.epoch
    is_at_rest = superblock.rollback is None
    undo.found(state_epoch if is_at_rest else None, superblock.undo_settled)
    return undo, open_pass


def _open_images(
    store: Store,
    superblock: Superblock,
    open_backing: Callable[[VolumeRecord], File],
    stack: ExitStack,
) -> dict[int, Image]:
    images: dict[int, Image] = {}
    for volume in superblock.volumes:
        own = volume_file_name(volume.index)
        file = open_backing(volume) if volume.backing else store.open(own)
        stack.callback(file.close)
        if file.size() < volume.size_bytes:
            raise IntegrityError(
                f'volume "{volume.name}" of "{superblock.name}" has {volume.size_bytes} bytes, '
                f"{file.name} only {file.size()}",
                hint="the file was cut; keep the data directory and make this copy anew",
            )
        images[volume.index] = Image(volume.index, volume.name, volume.size_bytes, file)
    return images


def volume_sizes(superblock: Superblock) -> VolumeSizes:
    """Sizes at the applied epoch."""
    return VolumeSizes((each.index, each.name, each.size_bytes) for each in superblock.volumes)


def _indexes(images: dict[int, Image], limits: Limits) -> dict[int, DirtyIndex]:
    run_min = limits.zero_run_blocks_min
    return {index: DirtyIndex(image.size_bytes, run_min) for index, image in images.items()}


def _check(limits: Limits, volumes: Sequence[VolumeSpec], journal_bytes: int) -> None:
    # An epoch's table has at most two entries for each of the index, so it always fits its bound.
    assert 4 * limits.dirty_entries_max <= limits.epoch_entries_max
    if not 0 < len(volumes) <= limits.volumes_max:
        raise UsageError(f"{len(volumes)} volumes; a resource has 1 to {limits.volumes_max}")
    if journal_bytes < limits.journal_bytes_min:
        raise UsageError(
            f"a journal of {journal_bytes} bytes is too small; at least {limits.journal_bytes_min}"
        )
    if not any(spec.size_bytes for spec in volumes):
        raise UsageError("no volume has a size")
    for spec in volumes:
        # 0: it is added in a later epoch.
        if spec.size_bytes % SECTOR_BYTES or not 0 <= spec.size_bytes <= limits.volume_bytes_max:
            raise UsageError(
                f'volume "{spec.name}" of {spec.size_bytes} bytes: a multiple of {SECTOR_BYTES} '
                f"up to {limits.volume_bytes_max} is wanted"
            )
