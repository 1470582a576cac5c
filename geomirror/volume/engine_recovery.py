"""From a recovered log back to the state that the engine had before a stop or a crash.

```
 superblock: applied d ──┐
 EPOCH(d) at last_epoch_lsn ◀─previous─ … walk back for peers
 scan_lsn ▼
 W W W EPOCH(d) W W W EPOCH(d+1) W W W EPOCH(d+2) W W        W = WRITE, ZERO, TRIM
       └ applied: skipped ┘└────── index ──────┘ └ open ┘
```
A record belongs to the first epoch whose cut number is not below its own (`docs/disk_format.md`):
LSNs do not decide, because recovery may have moved records above their epoch's LSN range.
Invariant: everything in the recovered log is durable, so every epoch in it is sealed.
Deliberately not here: reading and cutting the log (`recovery`), applying what was half applied.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from geomirror.errors import FencedError, IntegrityError
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.epoch_directory import EpochDirectory, EpochInfo
from geomirror.volume.epoch_record import decode_epoch
from geomirror.volume.epoch_table import KIND_DATA, Epoch, chain_hash
from geomirror.volume.growth_replay import GrowthReplay
from geomirror.volume.journal import Journal
from geomirror.volume.open_epoch import OpenEpoch
from geomirror.volume.record import HEADER_BYTES, RecordInfo, RecordType
from geomirror.volume.superblock import PeerRecord, Superblock
from geomirror.volume.volume_sizes import VolumeSizes

_CHANGES = frozenset((RecordType.WRITE, RecordType.ZERO, RecordType.TRIM, RecordType.RESIZE))


@dataclass
class Replayed:
    """What the log says beyond the superblock."""

    directory: EpochDirectory
    open_epoch: OpenEpoch
    cut_number: int
    """Of the open epoch."""
    sealed_epoch: int
    sealed_hash: bytes
    spooled: list[int] = field(default_factory=list)
    """LSNs of BLOCKS records, ascending."""


def info_of(
    epoch: Epoch,
    *,
    record_lsn: int,
    boundary_lsn: int,
    data_lsn_min: int,
    previous_lsn: int,
    cut_number: int,
) -> EpochInfo:
    """The directory's row of an epoch."""
    return EpochInfo(
        epoch.number,
        epoch.first_number,
        record_lsn,
        epoch.first_lsn,
        epoch.end_lsn,
        boundary_lsn,
        data_lsn_min,
        epoch.raw_bytes(),
        len(epoch.table),
        epoch.wall_ns,
        previous_lsn,
        cut_number & 0xFF,
        epoch.chain_hash,
        epoch.is_mark,
    )


def lowest_address(epoch: Epoch, default: int) -> int:
    """Lowest journal address in the epoch's table, or `default` if it is lower."""
    addresses = epoch.table["address"][epoch.table["kind"] == KIND_DATA]
    return min(default, int(addresses.min())) if len(addresses) else default


def read_epoch(journal: Journal, limits: Limits, record_lsn: int) -> tuple[Epoch, int, int]:
    """(epoch, LSN of the EPOCH record before, flags) of the EPOCH record at `record_lsn`.

    :raises IntegrityError: there is none.
    """
    info, payload = journal.read_record(record_lsn)
    if info.kind != RecordType.EPOCH:
        raise IntegrityError(f"no EPOCH record at LSN {record_lsn}")
    epoch, previous_lsn = decode_epoch(payload, entries_max=limits.epoch_entries_max)
    return epoch, previous_lsn, info.flags


def later(reference: int, flags: int) -> int:
    """The cut number with these low 8 bits that is nearest to `reference`."""
    return reference + ((flags - reference + 128) & 0xFF) - 128


def replay(
    superblock: Superblock,
    journal: Journal,
    records: Sequence[RecordInfo],
    indexes: dict[int, DirtyIndex],
    sizes: VolumeSizes,
    limits: Limits,
    way_back_epoch: int,
) -> Replayed:
    """Rebuild directory, indexes, sizes and open epoch. Blocking.

    :param way_back_epoch: later applied epochs are wanted, too, within the bounds of `way_back`.
    :param records: of the log, from the superblock's scan position on, ascending.
    :param sizes: of the applied epoch.
    :raises FencedError: epochs are missing or their hashes do not follow each other.
    """
    history, applied_cut = _walk_back(superblock, journal, limits, sizes, way_back_epoch)
    epochs, cuts = _sealed(superblock, journal, records, limits, applied_cut)
    owners, cut_number, boundaries = _assign(records, applied_cut, cuts)
    boundaries += [journal.end_lsn] * (len(epochs) - len(boundaries))
    blocks = RecordType.BLOCKS
    spooled = [each.lsn for each in records if each.kind is blocks]
    directory = EpochDirectory()
    for info in [*history, *_rows(superblock, epochs, cuts, boundaries, spooled)]:
        directory.append(info)
    fresh = GrowthReplay(journal, indexes, limits.zero_run_blocks_min)
    open_epoch = _fill_indexes(superblock, records, owners, len(epochs), fresh)
    sealed_hash = bytes.fromhex(superblock.applied_hash)
    if epochs:
        last = epochs[-1][1]
        open_epoch.number = last.number + 1
        open_epoch.first_lsn = directory.info(last.number).end_lsn
        open_epoch.boundary_lsn = boundaries[-1]
        sealed_hash = last.chain_hash
    elif open_epoch.since_wall_ns is None:
        open_epoch.boundary_lsn = journal.end_lsn  # Not where the log was left.
    for _, epoch, _ in epochs:
        sizes.add(epoch.number, epoch.changes)
    sizes.add(open_epoch.number, open_epoch.changes)
    return Replayed(directory, open_epoch, cut_number, open_epoch.number - 1, sealed_hash, spooled)


def _rows(
    superblock: Superblock,
    epochs: Sequence[tuple[int, Epoch, int]],
    cuts: Sequence[int],
    boundaries: Sequence[int],
    spooled: Sequence[int],
) -> list[EpochInfo]:
    """Directory rows of the epochs beyond the applied one."""
    rows: list[EpochInfo] = []
    own = superblock.chain[-1].identity if superblock.role == "primary" else ""
    for at, (record_lsn, epoch, previous_lsn) in enumerate(epochs):
        lowest = lowest_address(epoch, record_lsn)
        is_own = epoch.generation.hex() == own
        if is_own:
            lowest = min(lowest, boundaries[at - 1] if at else superblock.scan_lsn)
        else:
            lowest = record_start(spooled, lowest)
        row = info_of(
            epoch,
            record_lsn=record_lsn,
            boundary_lsn=boundaries[at],
            data_lsn_min=lowest,
            previous_lsn=previous_lsn,
            cut_number=cuts[at],
        )
        # From before this node's promotion: LSNs of another journal.
        rows.append(row if is_own or not own else row._replace(end_lsn=boundaries[at]))
    return rows


def record_start(lsns: Sequence[int], address: int) -> int:
    """The highest of ascending `lsns` that is not above `address`; itself if there is none."""
    at = bisect_right(lsns, address)
    return lsns[at - 1] if at else address


def _walk_back(
    superblock: Superblock,
    journal: Journal,
    limits: Limits,
    sizes: VolumeSizes,
    way_back_epoch: int,
) -> tuple[list[EpochInfo], int]:
    """Rows of applied epochs that peers or a rollback may need, and the applied epoch's cut number.

    The latter is in the superblock, because the epoch's record may be gone: everything before the
    scan position is recycled as soon as no peer needs it.
    """
    needed = [needed_after(record) for record in superblock.peers.values()]
    lowest_needed = min(needed, default=superblock.applied_epoch)
    lowest_wanted = min(lowest_needed, way_back_epoch)
    found: list[EpochInfo] = []
    cut_number = max(superblock.applied_cut, 0)
    record_lsn = superblock.last_epoch_lsn
    number = superblock.applied_epoch
    while record_lsn and journal.holds(record_lsn):
        is_far = superblock.scan_lsn - record_lsn > limits.way_back_bytes(superblock.journal_bytes)
        if found and (number <= lowest_wanted or (is_far and number <= lowest_needed)):
            break
        try:
            epoch, previous_lsn, flags = read_epoch(journal, limits, record_lsn)
        except IntegrityError:
            break
        if epoch.number != number:
            break
        if number == superblock.applied_epoch and superblock.applied_cut < 0:
            cut_number = flags
        lowest = lowest_address(epoch, record_lsn)
        if number <= lowest_wanted or not _holds_all(journal, epoch, limits.segment_bytes):
            break
        found.append(
            info_of(
                epoch,
                record_lsn=record_lsn,
                boundary_lsn=epoch.end_lsn,
                data_lsn_min=lowest,
                previous_lsn=previous_lsn,
                cut_number=flags,
            )
        )
        sizes.note_past(epoch.number, epoch.changes)
        number = epoch.first_number - 1
        record_lsn = previous_lsn
    return found[::-1], cut_number


def _holds_all(journal: Journal, epoch: Epoch, segment_bytes: int) -> bool:
    """Whether every content of an epoch is still in the journal."""
    addresses = epoch.table["address"][epoch.table["kind"] == KIND_DATA]
    numbers = np.unique(addresses // np.uint64(segment_bytes)).tolist()
    return all(journal.holds(number * segment_bytes) for number in numbers)


def needed_after(record: PeerRecord) -> int:
    """The newest epoch that a peer does not need from this journal."""
    return record.bitmap_through if record.mode == "Bitmap" else record.durable_epoch


def _sealed(
    superblock: Superblock,
    journal: Journal,
    records: Sequence[RecordInfo],
    limits: Limits,
    applied_cut: int,
) -> tuple[list[tuple[int, Epoch, int]], list[int]]:
    """(record LSN, epoch, previous LSN) of the epochs beyond the applied one, and their cuts."""
    epochs: list[tuple[int, Epoch, int]] = []
    cuts: list[int] = []
    number = superblock.applied_epoch
    previous_hash = bytes.fromhex(superblock.applied_hash)
    cut_number = applied_cut
    low_byte = -1
    write = RecordType.WRITE
    for record in records:
        kind = record.kind
        if kind is write or kind in _CHANGES:
            if record.flags != low_byte:
                cut_number = max(cut_number, later(cut_number, record.flags))
                low_byte = cut_number & 0xFF
            continue
        if kind is not RecordType.EPOCH:
            continue
        payload = journal.read(record.lsn + HEADER_BYTES, record.payload_length)
        epoch, previous_lsn = decode_epoch(payload, entries_max=limits.epoch_entries_max)
        if epoch.number <= superblock.applied_epoch:
            continue
        if epoch.first_number != number + 1 or not _follows(epoch, previous_hash):
            raise FencedError(
                f'resource "{superblock.name}": epoch {epoch.number} in the journal does not '
                f"follow epoch {number}",
                hint="the journal is damaged; keep the data directory and make this copy anew",
            )
        epochs.append((record.lsn, epoch, previous_lsn))
        # Marks cut epochs without any change: hundreds may come between two changes.
        cuts.append(later(cut_number, record.flags))
        cut_number = max(cut_number, cuts[-1])
        number, previous_hash = epoch.number, epoch.chain_hash
    return epochs, cuts


def _follows(epoch: Epoch, previous_hash: bytes) -> bool:
    """Whether H(epoch) follows from the hash before; of an asserted one it cannot be known."""
    return epoch.is_asserted or epoch.chain_hash == chain_hash(
        previous_hash,
        epoch.generation,
        epoch.number,
        epoch.first_lsn,
        epoch.end_lsn,
        epoch.table,
        epoch.changes,
    )


def _assign(
    records: Sequence[RecordInfo], applied_cut: int, cuts: Sequence[int]
) -> tuple[list[int], int, list[int]]:
    """For each record the index of its epoch in `cuts`: -1 applied, len(cuts) open, -2 neither.

    Also returns the cut number to go on with, and for the sealed epochs, as far as there is one,
    the LSN of the first change after each.
    """
    owners: list[int] = []
    boundaries: list[int] = []
    cut_number, sealed = applied_cut, 0
    owner, low_byte = -2, -1
    write, epoch = RecordType.WRITE, RecordType.EPOCH
    for record in records:
        kind = record.kind
        if kind is not write:
            if kind is epoch:
                cut_number = max(cut_number, later(cut_number, record.flags))
                low_byte = -1
            if kind not in _CHANGES:
                owners.append(-2)
                continue
        if record.flags != low_byte:
            # A new cut; thousands of records follow each other with the same.
            own = later(cut_number, record.flags)
            cut_number = max(cut_number, own)
            low_byte = record.flags if own == cut_number else -1
            while sealed < len(cuts) and cuts[sealed] < own:
                sealed += 1
            owner = -1 if own <= applied_cut else sealed
            while owner > len(boundaries):
                boundaries.append(record.lsn)
        owners.append(owner)
    return owners, max(cut_number, (cuts[-1] if cuts else applied_cut) + 1), boundaries


def _fill_indexes(
    superblock: Superblock,
    records: Sequence[RecordInfo],
    owners: Sequence[int],
    sealed_count: int,
    growth: GrowthReplay,
) -> OpenEpoch:
    """Enter every change that is not applied; what no epoch holds is touched.

    :raises FencedError: a change that cannot be one of this resource.
    """
    applied_end_lsn = superblock.applied_end_lsn or superblock.scan_lsn
    open_epoch = OpenEpoch(superblock.applied_epoch + 1, applied_end_lsn, superblock.scan_lsn)
    is_open, indexes = False, growth.indexes
    write, resize, volume = RecordType.WRITE, RecordType.RESIZE, -1
    index = DirtyIndex(0, 1)
    # A backlog has hundreds of thousands of records, nearly all of them plain writes.
    for record, owner in zip(records, owners, strict=True):
        if owner < 0:
            continue
        kind, offset, length = record.kind, record.offset, record.length
        if owner == sealed_count and not is_open:
            is_open = True
            _settle(indexes)
            open_epoch.since_wall_ns = record.wall_ns
        if kind is resize:
            change, volume = growth.replay(record), -1
            if owner == sealed_count:
                open_epoch.changes.append(change)
            open_epoch.last_wall_ns = record.wall_ns
            continue
        if record.volume != volume:
            volume = record.volume
            index = indexes.get(volume) or DirtyIndex(0, 1)
        is_short = kind is write and record.payload_length != length
        if offset + length > index.size_bytes or not length or is_short:
            raise _impossible(superblock, record)
        if kind is write:
            if is_open or length != BLOCK_BYTES or offset % BLOCK_BYTES:
                index.write(offset, length, record.lsn + HEADER_BYTES)
            else:
                # The same; but what a sealed epoch touched would be forgotten in a moment.
                index.entries[offset // BLOCK_BYTES] = record.lsn + HEADER_BYTES
        else:
            index.zero(offset, length, record.lsn, punch=kind is RecordType.TRIM)
        open_epoch.last_wall_ns = record.wall_ns
    if not is_open:
        _settle(indexes)
    return open_epoch


def _impossible(superblock: Superblock, record: RecordInfo) -> FencedError:
    """A record with right checks that no write of this resource can have made."""
    return FencedError(
        f'resource "{superblock.name}": the record at LSN {record.lsn} is about '
        f"{record.offset}+{record.length} of volume {record.volume}, which is not there",
        hint="was the data directory mixed with another one? keep it, and make this copy anew",
    )


def _settle(indexes: dict[int, DirtyIndex]) -> None:
    """What is in the indexes so far belongs to sealed epochs."""
    for index in indexes.values():
        index.touched.clear()
        index.open_partial.clear()
