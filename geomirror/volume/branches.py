"""Branches: tails that a rollback cut off, kept until an operator drops them.

```
 branches/NAME.und      final content of every block that the tail changed, an undo file's format
 branches/NAME.new      its record, while the rollback is not done
 branches/NAME.branch   its record: with it the branch exists
```
State at the end of a branch of a block = what the branch holds of it, else the state at its base.
Invariant: nothing here is removed but by `drop`, or when the rollback that it was for never began.
Deliberately not here: what is in a tail (`rollback_tail`), viewing (`branch_view`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from geomirror.errors import IntegrityError, NotFoundError, RefusedError, UsageError
from geomirror.limits import GIB, Limits
from geomirror.volume.store import Store
from geomirror.volume.undo_file import PassLabel, UndoReader, UndoWriter

DIRECTORY = "branches"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_DATA, _PENDING, _RECORD = ".und", ".new", ".branch"


class BranchVolume(msgspec.Struct, frozen=True):
    """A volume that grew or was added in a tail, as it was at the end of it."""

    index: int
    name: str
    size_bytes: int


class BranchRecord(msgspec.Struct, frozen=True):
    """`NAME.branch`: what a tail is. Identities and hashes in hex, times Unix ns."""

    name: str
    base_generation: str
    base_epoch: int
    base_hash: str
    base_wall_ns: int
    generation: str
    """Of the tail's end."""
    end_epoch: int
    end_hash: str
    end_lsn: int
    end_wall_ns: int
    created_wall_ns: int
    raw_bytes: int = 0
    """Contents held, uncompressed; zeros count nothing."""
    stored_bytes: int = 0
    marks: list[tuple[str, int]] = msgspec.field(default_factory=list)
    """Names and epochs of the marks in the tail."""
    volumes: list[BranchVolume] = msgspec.field(default_factory=list)
    """Those that have another size than at the base."""


class BranchStore:
    """All branches of one resource. Blocking; one job at a time changes it.

    :param pending: name of the branch of a rollback that was begun, "" for none: what else has no
        record is removed.
    """

    def __init__(self, store: Store, limits: Limits, pending: str = "") -> None:
        self.store = store
        self._limits = limits
        self._records: dict[str, BranchRecord] = {}
        self.damaged: list[str] = []
        """Names of branches whose record cannot be read; kept, and of no use."""
        self._load(pending)

    def records(self) -> list[BranchRecord]:
        """The branches, oldest first."""
        return sorted(self._records.values(), key=lambda each: (each.created_wall_ns, each.name))

    def get(self, name: str) -> BranchRecord:
        """The branch of this name. :raises NotFoundError: there is none."""
        found = self._records.get(name)
        if found is None:
            raise NotFoundError(f'no branch "{name}"', hint='see "geomirror branch list RES"')
        return found

    def stored_bytes(self) -> int:
        """Bytes of all files with contents."""
        return sum(each.stored_bytes for each in self._records.values())

    def free_name(self, name: str) -> str:
        """`name`, or it with the lowest number that makes it a new one.

        :raises UsageError: it is not allowed.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise UsageError(
                f"branch name {name!r} is not allowed",
                hint="use 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
            )
        taken = {*self._records, *self.damaged}
        found, number = name, 1
        while found in taken:
            number += 1
            found = f"{name[:56]}-{number}"
        return found

    def room_bytes(self) -> int:
        """Bytes that one more branch may have. :raises RefusedError: no branch can be added."""
        free = self._limits.branches_bytes_max - self.stored_bytes()
        if free <= 0 or len(self._records) + len(self.damaged) >= self._limits.branches_max:
            raise RefusedError(
                f"{len(self._records)} branches with {self.stored_bytes() / GIB:.1f} GiB are kept "
                "already, and one more does not fit",
                hint='drop one: "geomirror branch list RES", "geomirror branch drop RES NAME"',
            )
        return free

    def save(self, record: BranchRecord, fill: Callable[[UndoWriter], None]) -> BranchRecord:
        """Write a branch durably; it exists when `confirm` says so.

        :param fill: adds the contents to the writer, ascending.
        :raises StorageError: it is not there.
        """
        store, data = self.store, _path(record.name, _DATA)
        store.unlink(data)
        store.unlink(_path(record.name, _PENDING))
        label = PassLabel(
            bytes.fromhex(record.generation),
            record.base_epoch,
            record.end_epoch,
            record.end_wall_ns,
            bytes.fromhex(record.end_hash),
        )
        file = store.create(data, 0)
        try:
            writer = UndoWriter(file)
            fill(writer)
            stored_bytes = writer.finish(label)
        except BaseException:
            file.close()
            store.unlink(data)
            raise
        file.close()
        full = msgspec.structs.replace(
            record, raw_bytes=writer.raw_bytes, stored_bytes=stored_bytes
        )
        file = store.create(_path(record.name, _PENDING), 0)
        try:
            file.pwritev([msgspec.json.encode(full)], 0)
            file.fdatasync()
        finally:
            file.close()
        store.sync_directory(DIRECTORY)
        return full

    def confirm(self, name: str) -> None:
        """The rollback is done: the branch exists, durably. Repeating it changes nothing."""
        if self.store.exists(_path(name, _PENDING)):
            self.store.rename(_path(name, _PENDING), _path(name, _RECORD))
            self.store.sync_directory(DIRECTORY)
        self._records[name] = self._read(_path(name, _RECORD))

    def drop(self, name: str) -> None:
        """Forget a branch: what is only in it is lost. :raises NotFoundError: there is none."""
        if name not in self.damaged:
            self.get(name)
        # The record first: without it the rest is nothing.
        self.store.unlink(_path(name, _RECORD))
        self.store.sync_directory(DIRECTORY)
        self.store.unlink(_path(name, _DATA))
        self._records.pop(name, None)
        if name in self.damaged:
            self.damaged.remove(name)

    def reader(self, name: str) -> UndoReader:
        """Its contents, to be closed.

        :raises NotFoundError: there is no such branch. :raises IntegrityError: it is damaged.
        """
        self.get(name)
        return UndoReader(self.store.open(_path(name, _DATA)), _path(name, _DATA))

    def _load(self, pending: str) -> None:
        names = self.store.list(DIRECTORY)
        for name in names:
            base, dot, suffix = name.rpartition(".")
            if dot + suffix == _RECORD:
                try:
                    self._records[base] = self._read(f"{DIRECTORY}/{name}")
                except IntegrityError:
                    self.damaged.append(base)
        for name in names:
            base, dot, suffix = name.rpartition(".")
            is_known = base in self._records or base in self.damaged
            if dot + suffix in (_DATA, _PENDING) and not is_known and base != pending:
                self.store.unlink(f"{DIRECTORY}/{name}")

    def _read(self, path: str) -> BranchRecord:
        file = self.store.open(path)
        try:
            return msgspec.json.decode(file.pread(file.size(), 0), type=BranchRecord)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise IntegrityError(f"{path} is damaged") from error
        finally:
            file.close()


def data_name(name: str) -> str:
    """Name in the store of a branch's contents."""
    return _path(name, _DATA)


def _path(name: str, suffix: str) -> str:
    return f"{DIRECTORY}/{name}{suffix}"
