"""The superblock: what a resource is, how far it is applied, and where its recovery starts.

Two slots, A and B; the valid one with the higher sequence counts. An update goes to the older one,
then to the other, so a torn update leaves one that is whole, and afterwards both are equal.
```
 slot, 64 KiB: magic 8 │ version u32 │ body length u32 │ sequence u64 │ XXH3-128 16 │ body, JSON
```
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec
from xxhash import xxh3_128_digest

from geomirror.errors import IntegrityError, StorageError
from geomirror.volume.store import File, Store

NAME = "superblock"
SLOT_BYTES = 64 * 1024
FORMAT_VERSION = 1
_MAGIC = b"GMSBv1\0\0"
_HEADER = struct.Struct("<8sIIQ16s")
_COVERED = struct.Struct("<IIQ")
"""Version, body length and sequence: the part of the header that the digest covers."""
BODY_BYTES_MAX = SLOT_BYTES - _HEADER.size

Role = Literal["primary", "secondary"]
DataState = Literal["blank", "inconsistent", "consistent"]


class VolumeRecord(msgspec.Struct):
    """A volume; `backing` is "" for the resource's own `volumes/INDEX.img`.

    Of size 0 is one whose backing is taken and that no applied epoch has yet.
    """

    index: int
    name: str
    size_bytes: int
    backing: str = ""
    peers: dict[str, str] = msgspec.field(default_factory=dict)
    """Of a volume that was added later: its backings at other nodes, for a resync."""
    is_forced: bool = False
    """They are overwritten if they hold data."""


class GenerationRecord(msgspec.Struct):
    """One entry of the generation chain; identities and hashes in hex, "" where there is none."""

    identity: str
    token: int = 0
    parent: str = ""
    parent_epoch: int = 0
    parent_hash: str = ""
    reason: str = ""
    by: str = ""
    wall_ns: int = 0


class PeerRecord(msgspec.Struct):
    """A peer's position as this node knows it; `mode`: see `wan_protocol/sender.py`."""

    durable_epoch: int = 0
    durable_hash: str = ""
    mode: str = "Stream"
    bitmap_base: int = 0
    """The dirty bitmap is right for a peer at or past this epoch."""
    bitmap_base_hash: str = ""
    """H(bitmap_base), hexadecimal; empty: as the bitmap's file says."""
    bitmap_later: dict[int, str] = msgspec.field(default_factory=dict)
    """Epochs after it that the peer may have reached -> H, as far as they are remembered."""
    bitmap_through: int = 0
    """Epochs up to this one are in the durable bitmap; later ones are kept in the journal."""
    bitmap_is_full: bool = False
    """No file of the bitmap counts yet: every bit is set."""
    is_initial: bool = False
    """The peer never had a consistent image: its first sync is no resync."""
    consistent_from: int = 0
    """After a resync: the epoch from which on the peer's image is consistent."""
    resyncs: int = 0
    in_sync: bool = False
    """No flush that waits for this peer was answered without it since it was at zero lag."""
    left_epoch: int = 0
    """While not in sync: the first epoch that may be confirmed without it."""
    left_wall_ns: int = 0
    """When that began; 0: it never was in sync, or is."""
    said_epoch: int = 0
    """The highest that it ever said to be durable there, in this generation."""
    is_relied: bool = False
    """It may have been told that nothing is confirmed against the rules in force."""


class StartRecord(msgspec.Struct):
    """A start of a primary: see `cluster/history.py`."""

    identity: str
    """Hex, new at each start."""
    epoch: int
    """The last sealed one when it began."""
    chain_hash: str


class SyncRecord(msgspec.Struct):
    """The rules for flushes that are in force, as every member may have been told them.

    The in-sync set is in the peers' records; `acks`, `copies` and `degrade_after_ns` are as in
    `cluster/standing.py`.
    """

    version: int = 0
    """Of rules and in-sync set."""
    acks: dict[str, str] = msgspec.field(default_factory=dict)
    copies: int = 0
    degrade_after_ns: int = 0
    is_binding: bool = False


class RollbackRecord(msgspec.Struct):
    """A rollback that was begun: whoever opens the resource finishes it first."""

    to_epoch: int
    to_hash: str
    to_first_epoch: int
    to_wall_ns: int
    to_end_lsn: int
    boundary_epoch: int
    """The images go back to this epoch by undo, and on to `to_epoch` by the journal."""
    branch: str
    """Name of the branch that the tail was saved as, "" without a tail."""
    chain: list[GenerationRecord]
    """The generation chain afterwards."""
    is_restored: bool = False
    """The images are at `to_epoch`; undo beyond it is void."""
    sizes: dict[int, int] = msgspec.field(default_factory=dict)
    """Bytes of each volume at `to_epoch`; empty in a record of an older version: as before."""


class HeldRecord(msgspec.Struct):
    """The consistent state from before a resync that is under way: image and open undo pass."""

    generation: str
    epoch: int
    chain_hash: str
    first_epoch: int
    end_lsn: int
    wall_ns: int
    consistent_from: int
    former_from: int
    former_until: int
    """As they were before the resync."""
    undo_number: int
    """Of the open pass's file."""
    sizes: dict[int, int]
    """Bytes of each volume."""
    is_returning: bool = False
    """Its before-images are being written back; nothing else may change the images."""


class Superblock(msgspec.Struct):
    """The body of a slot. LSNs are of this node's journal; hashes and identities are hex.

    `scan_lsn` is where recovery starts, `known_durable_lsn` what no recovery may cut.
    """

    resource_id: str
    name: str
    segment_bytes: int
    journal_bytes: int
    volumes: list[VolumeRecord]
    role: Role
    data_state: DataState
    chain: list[GenerationRecord]
    scan_lsn: int
    known_durable_lsn: int
    format: int = FORMAT_VERSION
    applied_epoch: int = 0
    applied_hash: str = "00" * 32
    applied_first_epoch: int = 0
    applied_end_lsn: int = 0
    applied_wall_ns: int = 0
    applied_cut: int = -1
    """Low byte of the applied epoch's cut number: records up to it are applied; -1: unknown."""
    last_epoch_lsn: int = 0
    undo_next: int = 1
    undo_settled: int = 1
    """Undo files with lower numbers are of passes that the images have as a whole."""
    consistent_from: int = -1
    """Of this node's own resync: consistent once applied this far; -1 while that is not known."""
    former_from: int = 0
    former_until: int = -1
    """Epochs from … until that were states of this copy before its last resync; undo has them."""
    held: HeldRecord | None = None
    """While `data_state` is "inconsistent" because of a resync."""
    peers: dict[str, PeerRecord] = msgspec.field(default_factory=dict)
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    sync: SyncRecord = msgspec.field(default_factory=SyncRecord)
    """At a primary."""
    rollback: RollbackRecord | None = None
    starts: list[StartRecord] = msgspec.field(default_factory=list)
    """The last starts of the primaries that wrote this history, oldest first, epochs ascending; at
    a secondary the list of the primary that it followed last, which may go on past its epochs."""
    superseded_by: list[GenerationRecord] = msgspec.field(default_factory=list)
    """A chain with a higher token than the own one, of a history that lacks epochs that are here.
    A primary serves nothing then, a secondary follows nobody with less."""
    superseded_starts: list[StartRecord] = msgspec.field(default_factory=list)
    """The starts of that history, as far as they were told."""
    sequence: int = 0
    """Of the slot it was loaded from; given by the file, not by the caller."""


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Superblock)


def body_bytes(superblock: Superblock) -> int:
    """Bytes that it takes in a slot, of `BODY_BYTES_MAX`."""
    return len(_ENCODER.encode(superblock))


def copy_of(superblock: Superblock) -> Superblock:
    """A version of its own; 20 times cheaper than `deepcopy`."""
    return _DECODER.decode(_ENCODER.encode(superblock))


def pack_slot(superblock: Superblock, sequence: int) -> bytes:
    """One slot, without what follows the body. :raises StorageError: the body is too long."""
    body = _ENCODER.encode(msgspec.structs.replace(superblock, sequence=sequence))
    if len(body) > BODY_BYTES_MAX:
        raise StorageError(
            f"superblock of {superblock.name} would have {len(body)} bytes; {BODY_BYTES_MAX} fit"
        )
    digest = xxh3_128_digest(_COVERED.pack(FORMAT_VERSION, len(body), sequence) + body)
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, len(body), sequence, digest) + body


def parse_slot(data: bytes) -> Superblock | None:
    """The superblock of a slot, None when the slot is not valid.

    :raises IntegrityError: it is valid but of another format version.
    """
    if len(data) < _HEADER.size:
        return None
    magic, version, length, sequence, digest = _HEADER.unpack_from(data)
    if magic != _MAGIC or length > min(BODY_BYTES_MAX, len(data) - _HEADER.size):
        return None
    body = data[_HEADER.size : _HEADER.size + length]
    if xxh3_128_digest(_COVERED.pack(version, length, sequence) + body) != digest:
        return None
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"superblock has format version {version}, this software knows {FORMAT_VERSION}",
            hint="install the version of geomirror that wrote it",
        )
    try:
        superblock = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # Not UTF-8 is a ValueError, deep nesting a RecursionError: damaged all the same.
        return None
    superblock.sequence = sequence
    return superblock


class SuperblockJob:
    """Writes one version of the superblock; `run` blocks and may run on any thread.

    Both slots get it, one after the other: what it allows (trimming the journal) would otherwise
    leave the older slot pointing at what is gone, of no use when the newer one rots.
    """

    def __init__(self, owner: SuperblockFile, sequence: int, data: bytes) -> None:
        self.sequence = sequence
        self._owner = owner
        self._data = data

    def run(self) -> None:
        """Durable twice on return. :raises StorageError: one slot may hold the state before."""
        self._owner.write_slot(self._data)
        self._owner.write_slot(self._data)


class SuperblockFile:
    """The file with both slots. Jobs must run one at a time, in the order they were made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file: File | None = None
        self._sequence = 0
        self._slot_newest = 1

    def create(self, superblock: Superblock) -> None:
        """Make the file with a first version in slot A; durable on return. Blocking."""
        assert self._file is None
        self._file = self._store.create(NAME, 2 * SLOT_BYTES, zeroed=True)
        self.write_job(superblock).run()
        self._store.sync_directory()

    def load(self) -> Superblock:
        """The newest valid version. Blocking. :raises IntegrityError: no slot is valid."""
        if self._file is None:
            self._file = self._store.open(NAME)
        data = [self._file.pread(SLOT_BYTES, slot * SLOT_BYTES) for slot in (0, 1)]
        slots = [parse_slot(one) for one in data]
        valid = [(slot.sequence, index) for index, slot in enumerate(slots) if slot is not None]
        if not valid:
            raise IntegrityError(
                f"both copies in {self._file.name} are damaged",
                hint='restore the file, or "geomirror resource delete" and add this node again',
            )
        self._sequence, self._slot_newest = max(valid)
        newest = slots[self._slot_newest]
        assert newest is not None
        # It may have been read from pages that never reached the disk. The next update overwrites
        # the other slot, so this one must be durable first; the other one still is.
        self._file.pwritev([data[self._slot_newest]], self._slot_newest * SLOT_BYTES)
        self._file.fdatasync()
        other = slots[1 - self._slot_newest]
        if other is None or other.sequence != newest.sequence:
            # A resource that is never changed again must not live on with one copy.
            self.write_slot(data[self._slot_newest])
        return newest

    def write_job(self, superblock: Superblock) -> SuperblockJob:
        """A job that writes this version to the slot that does not hold the newest one.

        :param superblock: encoded now; the caller may change it while the job runs.
        :raises StorageError: the body does not fit in a slot.
        """
        data = pack_slot(superblock, self._sequence + 1)
        self._sequence += 1
        return SuperblockJob(self, self._sequence, data)

    def write_slot(self, data: bytes) -> None:
        """Write the older slot durably; only then does it count as the newest."""
        assert self._file is not None, "create() or load() comes first"
        slot = 1 - self._slot_newest
        self._file.pwritev([data], slot * SLOT_BYTES)
        self._file.fdatasync()
        self._slot_newest = slot

    def close(self) -> None:
        """Close the file; nothing is synced."""
        if self._file is not None:
            self._file.close()
            self._file = None
