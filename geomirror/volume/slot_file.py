"""A small file with one value, replaced as a whole: two slots, the newer valid one counts.

```
 slot A, 32 KiB: magic 8 │ length u32 │ 0 u32 │ sequence u64 │ XXH3-128 16 │ body │ zeros
 slot B
```
An update goes to the older slot, then to the other one, each fdatasynced: afterwards one damaged
slot takes nothing back. Deliberately not here: what a body means.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_128_digest

from geomirror.errors import StorageError
from geomirror.volume.store import Store

SLOT_BYTES = 32 * 1024
_MAGIC = b"GMSLOT1\0"
_HEADER = struct.Struct("<8sIIQ16s")
_COVERED = struct.Struct("<IIQ")
BODY_BYTES_MAX = SLOT_BYTES - _HEADER.size


def pack(body: bytes, sequence: int) -> bytes:
    """One slot, without the zeros after it. :raises StorageError: the body is too long."""
    if len(body) > BODY_BYTES_MAX:
        raise StorageError(f"a value of {len(body)} bytes; {BODY_BYTES_MAX} fit in a slot")
    digest = xxh3_128_digest(_COVERED.pack(len(body), 0, sequence) + body)
    return _HEADER.pack(_MAGIC, len(body), 0, sequence, digest) + body


def parse(data: bytes) -> tuple[int, bytes] | None:
    """Sequence and body of a slot, None when it is not valid."""
    if len(data) < _HEADER.size:
        return None
    magic, length, zero, sequence, digest = _HEADER.unpack_from(data)
    if magic != _MAGIC or length > len(data) - _HEADER.size:
        return None
    body = data[_HEADER.size : _HEADER.size + length]
    if xxh3_128_digest(_COVERED.pack(length, zero, sequence) + body) != digest:
        return None
    return sequence, body


class SlotJob:
    """Writes one value; `run` blocks and may run on any thread, one at a time."""

    def __init__(self, owner: SlotFile, body: bytes) -> None:
        self.body = body
        self._owner = owner

    def run(self) -> None:
        """Durable twice on return. :raises StorageError: the value before may count still."""
        self._owner.write(self.body)


class SlotFile:
    """The file `name` in a resource's directory; made with its first value."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._sequence = 0
        self._slot_newest = 1
        self._is_entry_durable = False

    def load(self) -> bytes | None:
        """The newest valid value, perhaps not durable yet; None: there is none. Blocking.

        Whoever promises that it is durable writes it again first.
        """
        if not self._store.exists(self._name):
            return None
        file = self._store.open(self._name)
        try:
            slots = [parse(file.pread(SLOT_BYTES, at * SLOT_BYTES)) for at in (0, 1)]
        finally:
            file.close()
        found = [(slot[0], at, slot[1]) for at, slot in enumerate(slots) if slot is not None]
        if not found:
            return None
        self._sequence, self._slot_newest, body = max(found)
        return body

    def write_job(self, body: bytes) -> SlotJob:
        """A job that replaces the value."""
        return SlotJob(self, body)

    def write(self, body: bytes) -> None:
        """Replace the value durably, in both slots. Blocking. :raises StorageError: see `run`."""
        data = pack(body, self._sequence + 1)
        self._sequence += 1
        if self._store.exists(self._name):
            file = self._store.open(self._name)
        else:
            file = self._store.create(self._name, 2 * SLOT_BYTES, zeroed=True)
        try:
            for _ in range(2):
                slot = 1 - self._slot_newest
                file.pwritev([data], slot * SLOT_BYTES)
                file.fdatasync()
                self._slot_newest = slot
        finally:
            file.close()
        if not self._is_entry_durable:
            # Also of a file that is there: a life before may have ended right after making it.
            self._store.sync_directory()
            self._is_entry_durable = True
