"""A whole resource on a damaged disk: it opens at a legal moment of its history, or refuses.

Damaged is every file but the images, which carry no checksums of their own; or a record is forged,
with right checks, that our software never wrote: then a typed error is all that is asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from geomirror.environment import SeededEntropy
from geomirror.errors import FencedError, IntegrityError, StorageError
from geomirror.limits import SIMULATION
from geomirror.volume.engine import Engine
from geomirror.volume.record import HEADER_BYTES, RecordInfo, pack_header
from geomirror.volume.segment import segment_name
from tests.fuzz.source import Source
from tests.sim.disk import SimStore
from tests.sim.disk_file import Inode
from tests.volume.engine_rig import SIZES, Rig, apply_step

INPUT_BYTES_MAX = 512
RIGS = 6
ACTIONS = 70
_REFUSED = (FencedError, IntegrityError, StorageError)


def seeds() -> list[bytes]:
    """No damage; each kind of damage to some files; forged records of each kind."""
    found = [bytes([rig]) for rig in range(RIGS)]
    for kind in range(4):
        found += [bytes([kind, kind, file, 3 * file, 9, 1, 2, 3]) for file in range(8)]
    for kind in range(1, 11):
        found.append(bytes([kind, 128, kind, 0, 0, 0, 8, 0, 0, 2, 40]) + bytes(40))
    return found


@dataclass(frozen=True)
class _Made:
    """A resource that was worked on, as it lies on the disk."""

    files: dict[str, Inode]
    states: frozenset[bytes]
    """Hashes of the contents after each step."""
    last: bytes
    end: tuple[int, int, int]
    """Where a record could be appended: its LSN, the check before it, the salt."""


def _hash(content: dict[int, bytes]) -> bytes:
    digest = hashlib.sha256()
    for volume in sorted(content):
        digest.update(content[volume])
    return digest.digest()


@cache
def _made(number: int) -> _Made:
    rig = Rig(1000 + number)
    for _ in range(ACTIONS):
        rig.random_action()
    rig.sync()
    if number % 2:
        rig.persist()
    content = {volume: bytearray(size) for volume, size in SIZES.items()}
    states = [_hash({volume: bytes(data) for volume, data in content.items()})]
    for step in rig.steps:
        apply_step(content, step)
        states.append(_hash({volume: bytes(data) for volume, data in content.items()}))
    end = rig.engine.journal._end
    rig.store.crash(lose_nothing=True)
    files = {name: _copy(inode) for name, inode in rig.store._names.items()}
    return _Made(files, frozenset(states), states[-1], (end.end_lsn, end.check, end.salt))


def _copy(inode: Inode) -> Inode:
    return Inode(inode.size, inode.size, dict(inode.cache), dict(inode.cache))


def _placed(made: _Made) -> SimStore:
    store = SimStore(0)
    store._names = {name: _copy(inode) for name, inode in made.files.items()}
    store._durable_names = dict(store._names)
    return store


def run(data: bytes) -> None:
    """Damage or forge, open, read everything."""
    source = Source(data)
    made = _made(source.below(RIGS))
    store = _placed(made)
    is_changed = is_forged = False
    lsn, check, salt = made.end
    while not source.is_empty:
        kind = source.number()
        if kind & 128:
            is_forged = True
            lsn, check = _forge(store, source, lsn, check, salt)
        else:
            is_changed |= _damage(store, source, kind % 4)
    try:
        engine = Engine.open(store, SIMULATION, SeededEntropy("fuzz"), lambda _: store.open(""))
    except _REFUSED:
        assert is_changed or is_forged, "refused without any damage"
        return
    try:
        found = {volume: engine.read(volume, 0, size) for volume, size in SIZES.items()}
        for number in engine.epoch_numbers():
            engine.load_epoch(number)
    except _REFUSED:
        assert is_changed or is_forged
        return
    if is_forged:
        return
    assert _hash(found) in made.states, "the content is of no moment of the history"
    if not is_changed:
        assert _hash(found) == made.last, "something is missing"


def _damage(store: SimStore, source: Source, kind: int) -> bool:
    names = [name for name in sorted(store._names) if not name.startswith("volumes/")]
    if not names:
        return False
    name = source.pick(names)
    file = store.open(name)
    size = file.size()
    at = source.number(2) * 8 % max(1, size)
    if kind == 0:
        value = source.number() or 1
        file.pwritev([bytes(b ^ value for b in file.pread(1, at))], at)
    elif kind == 1:
        file.pwritev([bytes(512)], at - at % 512)
    elif kind == 2:
        file.truncate(at)
    else:
        store.unlink(name)
    return True


def _forge(store: SimStore, source: Source, lsn: int, check: int, salt: int) -> tuple[int, int]:
    """A record behind the last one, with checks as they should be."""
    from xxhash import xxh3_64_intdigest

    kind, flags, volume = source.number(), source.number(), source.number()
    offset, length = source.number(3) * 512, source.number(2) * 512
    payload = source.take(source.number())
    info = RecordInfo(kind, flags, volume, lsn, offset, length, 7, len(payload))  # type: ignore[arg-type]
    payload_check = xxh3_64_intdigest(payload) if payload else 0
    header, new_check = pack_header(
        info, lsn=lsn, durable_lsn=0, previous=check, payload_check=payload_check, salt=salt
    )
    number, at = divmod(lsn, SIMULATION.segment_bytes)
    if at + HEADER_BYTES + len(payload) + 8 < SIMULATION.segment_bytes and store.exists(
        segment_name(number)
    ):
        store.open(segment_name(number)).pwritev([header + payload], at)
        return info.end_lsn, new_check
    return lsn, check
