"""A resource's directory that counts what is written to it, by kind of file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from geomirror.volume.store import Buffer
from geomirror.volume.store_io import DirectoryStore, PosixFile

IMAGE, JOURNAL, UNDO, OTHER = "image", "journal", "undo", "other"
_KINDS = {"volumes": IMAGE, "journal": JOURNAL, "undo": UNDO}


class CountedFile:
    """One file; implements `volume.store.File` by another one."""

    def __init__(self, file: PosixFile, kind: str, store: CountedStore) -> None:
        self._file = file
        self._kind = kind
        self._store = store
        self.name = file.name
        self.size, self.pread, self.pread_into = file.size, file.pread, file.pread_into
        self.pread_each, self.try_read = file.pread_each, file.try_read
        self.expect_scattered_reads = file.expect_scattered_reads
        self.expect_reads = file.expect_reads
        self.zero, self.data_ranges = file.zero, file.data_ranges
        self.truncate, self.close = file.truncate, file.close

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Count, and write."""
        self._store.written[self._kind] += sum(map(len, buffers))
        self._file.pwritev(buffers, offset)

    def pwritev_each(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """Count, and write."""
        self._store.written[self._kind] += sum(len(part) for _, parts in runs for part in parts)
        self._file.pwritev_each(runs)

    def fdatasync(self) -> None:
        """Make it durable, unless the store does not."""
        if self._store.is_durable:
            self._file.fdatasync()


class CountedStore:
    """Implements `volume.store.Store` over a new directory.

    :param is_durable: whether syncs are done; not where only bytes are counted.
    """

    def __init__(self, root: Path, *, is_durable: bool) -> None:
        self.written: Counter[str] = Counter()
        """Bytes, by kind of file. Zeroing and punching count nothing."""
        self.is_durable = is_durable
        self._store = DirectoryStore(root, create=True)
        self.exists, self.rename, self.unlink = (
            self._store.exists,
            self._store.rename,
            self._store.unlink,
        )
        self.list, self.free_bytes = self._store.list, self._store.free_bytes
        self.close = self._store.close

    def open(self, name: str) -> CountedFile:
        """Open an existing file."""
        return CountedFile(self._store.open(name), _kind(name), self)

    def create(self, name: str, size: int, *, zeroed: bool = False) -> CountedFile:
        """Create a file; zeros written ahead count as its content does."""
        kind = _kind(name)
        if zeroed:
            self.written[kind] += size
        return CountedFile(self._store.create(name, size, zeroed=zeroed), kind, self)

    def sync_directory(self, directory: str = "") -> None:
        """Make names durable, unless the store does not."""
        if self.is_durable:
            self._store.sync_directory(directory)


def _kind(name: str) -> str:
    return _KINDS.get(name.partition("/")[0], OTHER)
