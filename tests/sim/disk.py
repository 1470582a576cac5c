"""A simulated disk: a page cache over durable sectors, with faults and crashes from a seed.

What is modelled:
* Writes go to the cache. `fdatasync` makes a file's data and size durable, never its name.
* `crash()`: every 512-byte sector written since the last sync survives, is lost, or (rarely) holds
  garbage; garbage only where nothing durable was before: overwriting a sector is atomic.
  The kernel may also have written back an older version of a dirty page at any time before.
* Directory entries are durable after `sync_directory` only; at a crash a prefix of the pending
  operations survives, as on journaling file systems, sometimes an arbitrary part of them.
* A failed `fdatasync` leaves the data readable and *clean*: a second one would lie.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from geomirror.errors import StorageError
from tests.sim.disk_file import (
    ALL_SECTORS,
    PAGE,
    SECTOR,
    SECTORS,
    ZERO_PAGE,
    Inode,
    SimFile,
)

__all__ = ["CrashStyle", "SimFile", "SimStore"]

UNLIMITED = 1 << 62


@dataclass
class Fault:
    """Fail matching calls: after `skip` of them, `count` times."""

    operation: str
    pattern: str
    error: int
    skip: int = 0
    count: int = 1


@dataclass(frozen=True)
class CrashStyle:
    """How a crash treats unsynced data: chances that a sector survives or is garbage."""

    survive: float
    garbage: float = 0.0


STYLES = (
    CrashStyle(0.0),
    CrashStyle(1.0),
    CrashStyle(0.5),
    CrashStyle(0.5, 0.05),
    CrashStyle(0.9, 0.02),
    CrashStyle(0.1),
)


Operation = tuple[str, Inode | None, str]
"""A directory operation: (name, file or None for a removal, old name of a rename or "")."""
Names = list[str]
Operations = list[Operation]


class SimStore:
    """Implements `geomirror.volume.store.Store` in memory."""

    def __init__(
        self, seed: int | str = 0, *, capacity_bytes: int = UNLIMITED, writeback: float = 1 / 64
    ) -> None:
        """:param writeback: chance that a write makes the kernel write back one dirty page."""
        self.random = random.Random(seed)
        self.capacity_bytes = capacity_bytes
        self.on_operation: Callable[[str, str], None] | None = None
        """Called before each operation with its name and the file's; may raise to stop there."""
        self.faults: list[Fault] = []
        self.counts: dict[str, int] = {}
        self.writeback = writeback
        self.random_float = self.random.random
        self._names: dict[str, Inode] = {}
        self._durable_names: dict[str, Inode] = {}
        self._pending: dict[str, Operations] = {}
        self.incarnation = 0

    # Store protocol

    def open(self, name: str) -> SimFile:
        """Open an existing file."""
        self.check("open", name)
        inode = self._names.get(name)
        if inode is None:
            raise StorageError(f"open {name}: No such file or directory")
        return SimFile(self, inode, name)

    def create(self, name: str, size: int, *, zeroed: bool = False) -> SimFile:
        """Create a file; `zeroed` reserves its space."""
        self.check("create", name)
        if name in self._names:
            raise StorageError(f"create {name}: File exists")
        inode = Inode(size=size)
        if zeroed:
            self._require_space(size, name)
            inode.reserved_bytes = size
        self._names[name] = inode
        self._pend(name, inode, "")
        return SimFile(self, inode, name)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return name in self._names

    def rename(self, old: str, new: str) -> None:
        """Rename, replacing."""
        self.check("rename", old)
        inode = self._names.pop(old, None)
        if inode is None:
            raise StorageError(f"rename {old}: No such file or directory")
        self._names[new] = inode
        self._pend(new, inode, old)

    def unlink(self, name: str) -> None:
        """Remove if there."""
        self.check("unlink", name)
        if self._names.pop(name, None) is not None:
            self._pend(name, None, "")

    def list(self, directory: str = "") -> Names:
        """Sorted plain files of one directory."""
        self.check("list", directory)
        prefix = directory + "/" if directory else ""
        names = (name[len(prefix) :] for name in self._names if name.startswith(prefix))
        return sorted(name for name in names if "/" not in name)

    def sync_directory(self, directory: str = "") -> None:
        """Make the directory's entries durable."""
        self.check("sync_directory", directory)
        for operation in self._pending.pop(directory, ()):
            self._apply(operation)

    def free_bytes(self) -> int:
        """Space left."""
        used = sum(inode.used_bytes() for inode in self._names.values())
        return max(0, self.capacity_bytes - used)

    # The simulation's side

    def fail(
        self,
        operation: str,
        pattern: str = "*",
        *,
        error: int = errno.EIO,
        skip: int = 0,
        count: int = 1,
    ) -> None:
        """Make matching calls fail with an errno: EIO, ENOSPC, …"""
        self.faults.append(Fault(operation, pattern, error, skip, count))

    def crash(self, *, lose_nothing: bool = False, style: CrashStyle | None = None) -> None:
        """The machine stops and comes back; all open files become unusable.

        :param lose_nothing: only the process died: the page cache survives.
        """
        self.incarnation += 1
        if lose_nothing:
            return
        chosen = style or STYLES[self.random.randrange(len(STYLES))]
        for directory in sorted(self._pending):
            self._crash_directory(self._pending[directory], chosen)
        self._pending.clear()
        self._names = dict(self._durable_names)
        # Files without a durable name are gone; two names never share a file.
        for name in sorted(self._names):
            self._crash_file(self._names[name], chosen)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For looking from outside of the simulation: no fault, no hook."""
        hook, faults = self.on_operation, self.faults
        self.on_operation, self.faults = None, []
        try:
            yield
        finally:
            self.on_operation, self.faults = hook, faults

    def inode(self, name: str) -> Inode | None:
        """A file as it is, None if there is none."""
        return self._names.get(name)

    def inodes(self) -> list[Inode]:
        """All files."""
        return list(self._names.values())

    def snapshot(self) -> dict[str, Inode]:
        """The disk as it would be after a power cut now that loses everything in the cache."""
        return {name: inode.copy_durable() for name, inode in self._durable_names.items()}

    def restore(self, snapshot: dict[str, Inode]) -> None:
        """Put an old state of the whole disk back; all open files become unusable."""
        self.incarnation += 1
        self._pending.clear()
        self._names = {name: inode.copy_durable() for name, inode in snapshot.items()}
        self._durable_names = dict(self._names)

    def clone(self, seed: float) -> SimStore:
        """The same machine's disk and cache, apart from this one from now on."""
        other = SimStore(str(seed), writeback=self.writeback)
        copies: dict[int, Inode] = {}

        def copy(inode: Inode) -> Inode:
            if id(inode) not in copies:
                pages = (inode.cache, inode.durable, inode.dirty, inode.synced)
                sizes = (inode.size, inode.durable_size)
                copies[id(inode)] = Inode(*sizes, *map(dict, pages), inode.reserved_bytes)  # type: ignore[arg-type]
            return copies[id(inode)]

        other._names = {name: copy(inode) for name, inode in self._names.items()}
        other._durable_names = {name: copy(inode) for name, inode in self._durable_names.items()}
        for directory, operations in self._pending.items():
            other._pending[directory] = [
                (name, None if inode is None else copy(inode), old)
                for name, inode, old in operations
            ]
        return other

    def flip_bit(self, name: str, bit: int) -> None:
        """Flip one bit of a file, in the cache and on the disk: silent corruption."""
        inode = self._names[name]
        inode.changes += 1
        page, rest = divmod(bit // 8, PAGE)
        for pages in (inode.cache, inode.durable):
            data = bytearray(pages.get(page, ZERO_PAGE))
            data[rest] ^= 1 << bit % 8
            pages[page] = bytes(data)

    def content(self, name: str) -> bytes:
        """The whole file as a reader would see it now."""
        inode = self._names[name]
        whole = b"".join(inode.cache.get(i, ZERO_PAGE) for i in range(-(-inode.size // PAGE)))
        return whole[: inode.size]

    def names(self) -> Names:
        """All files, sorted."""
        return sorted(self._names)

    def check(self, operation: str, name: str) -> None:
        """Count the call, call the hook, raise an injected fault."""
        self.counts[operation] = self.counts.get(operation, 0) + 1
        self.disturb(operation, name)

    def disturb(self, operation: str, name: str) -> None:
        """Call the hook, raise an injected fault."""
        if self.on_operation is not None:
            self.on_operation(operation, name)
        if self.faults:
            self._inject(operation, name)

    def write_back(self, inode: Inode) -> None:
        """The kernel writes one dirty page back, long before it is synced."""
        page = self.random.choice([*inode.dirty])
        self._survive(inode, page, inode.dirty[page])

    def require_space(self, inode: Inode, first: int, last: int, name: str) -> None:
        """Refuse a write to the pages [first, last) when the disk has no room for new ones."""
        count = sum(page not in inode.cache for page in range(first, last))
        grown = (len(inode.cache) + count) * PAGE - inode.used_bytes()
        if grown > 0:
            self._require_space(grown, name)

    @property
    def is_limited(self) -> bool:
        """Whether the disk can become full."""
        return self.capacity_bytes < UNLIMITED

    def _require_space(self, size: int, name: str) -> None:
        if self.is_limited and size > self.free_bytes():
            raise StorageError.from_os(
                OSError(errno.ENOSPC, "No space left on device"), operation="write", path=name
            )

    def _inject(self, operation: str, name: str) -> None:
        for fault in self.faults:
            if fault.operation == operation and fnmatchcase(name, fault.pattern):
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.count -= 1
                if fault.count <= 0:
                    self.faults.remove(fault)
                error = OSError(fault.error, errno.errorcode[fault.error])
                raise StorageError.from_os(error, operation=operation, path=name)

    def _pend(self, name: str, inode: Inode | None, old: str) -> None:
        directory = name.rpartition("/")[0]
        self._pending.setdefault(directory, []).append((name, inode, old))

    def _apply(self, operation: Operation) -> None:
        name, inode, old = operation
        if old and self._durable_names.get(old) is inode:
            del self._durable_names[old]
        if inode is None:
            self._durable_names.pop(name, None)
            return
        for other in [n for n, i in self._durable_names.items() if i is inode]:
            del self._durable_names[other]
        self._durable_names[name] = inode

    def _crash_directory(self, pending: Operations, style: CrashStyle) -> None:
        if style.survive in (0.0, 1.0):
            chosen = pending if style.survive else []
        elif self.random.random() < 0.8:
            chosen = pending[: self.random.randint(0, len(pending))]
        else:
            chosen = [one for one in pending if self.random.random() < style.survive]
        for operation in chosen:
            self._apply(operation)

    def _crash_file(self, inode: Inode, style: CrashStyle) -> None:
        chance = self.random.random
        for page, mask in sorted(inode.dirty.items()):
            surviving = garbage = 0
            for sector in range(SECTORS):
                bit = 1 << sector
                if mask & bit == 0:
                    continue
                luck = chance()
                if luck < style.garbage and self._is_virgin(inode, page, sector):
                    garbage |= bit
                elif luck < style.garbage + style.survive:
                    surviving |= bit
            self._survive(inode, page, surviving)
            if garbage:
                self._scramble(inode, page, garbage)
        if inode.size != inode.durable_size and chance() < style.survive:
            inode.durable_size = inode.size
        inode.size = inode.durable_size
        for page in [page for page in inode.durable if page * PAGE >= inode.size]:
            # Written back, but behind the end of what the file is now.
            del inode.durable[page]
            inode.synced.pop(page, None)
        last, rest = divmod(inode.size, PAGE)
        if rest and last in inode.durable:
            inode.durable[last] = inode.durable[last][:rest].ljust(PAGE, b"\0")
        inode.dirty.clear()
        inode.cache = dict(inode.durable)
        inode.changes += 1

    def _is_virgin(self, inode: Inode, page: int, sector: int) -> bool:
        if inode.synced.get(page, 0) >> sector & 1:
            return False
        old = inode.durable.get(page)
        start = sector * SECTOR
        return old is None or old[start : start + SECTOR] == ZERO_PAGE[:SECTOR]

    def _survive(self, inode: Inode, page: int, mask: int) -> None:
        new = inode.cache.get(page, ZERO_PAGE)
        if mask != ALL_SECTORS:
            old = inode.durable.get(page, ZERO_PAGE)
            new = b"".join(
                (new if mask >> i & 1 else old)[i * SECTOR : (i + 1) * SECTOR]
                for i in range(SECTORS)
            )
        inode.durable[page] = new

    def _scramble(self, inode: Inode, page: int, mask: int) -> None:
        data = bytearray(inode.durable.get(page, ZERO_PAGE))
        new = inode.cache.get(page, ZERO_PAGE)
        for sector in range(SECTORS):
            if mask >> sector & 1:
                at = slice(sector * SECTOR, (sector + 1) * SECTOR)
                if self.random.random() < 0.5:
                    data[at] = self.random.randbytes(SECTOR)
                else:
                    data[at] = new[at]
                    data[sector * SECTOR + self.random.randrange(SECTOR)] ^= 1
        inode.durable[page] = bytes(data)
