"""`Store` over a directory, and the opening of backing files and block devices."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from geomirror.errors import InUseError, NotFoundError, RefusedError, StorageError
from geomirror.limits import MIB
from geomirror.volume.posix_file_io import PosixFile

__all__ = ["DirectoryStore", "PosixFile", "open_backing"]

LOCK_NAME = "lock"
_ZEROS = bytes(1 * MIB)
_FLAGS = os.O_RDWR | os.O_CLOEXEC
_NOT_PLAIN = frozenset(("", ".", ".."))
"""Parts of a name that could lead elsewhere."""


class DirectoryStore:
    """One resource's directory, locked against a second process; files 0600, directories 0700.

    Names are relative and plain: a name that could lead outside is refused.
    """

    def __init__(self, root: Path | str, *, create: bool = False, exclusive: bool = True) -> None:
        """:param create: make the directory if it is missing.

        :raises InUseError: another process serves it. :raises StorageError: it cannot be used.
        """
        self.root = Path(root)
        self._prefix = f"{self.root}/"
        self._lock = -1
        if create:
            self._make_directory(self.root)
        if not self.root.is_dir():
            raise StorageError(f"open {self.root}: no such directory")
        if exclusive:
            self._lock = _open(self.root / LOCK_NAME, _FLAGS | os.O_CREAT)
            try:
                _take_lock(self._lock, str(self.root))
            except (InUseError, StorageError):
                self.close()
                raise

    def open(self, name: str) -> PosixFile:
        """Open an existing file."""
        # As text: history has thousands of files, and paths cost more than the call.
        path = f"{self._prefix}{self._checked(name)}"
        return PosixFile(_open(path, _FLAGS | os.O_NOFOLLOW), path)

    def create(self, name: str, size: int, *, zeroed: bool = False) -> PosixFile:
        """Create a file that is not there yet, sparse or with its blocks written as zeros."""
        path = self._path(name)
        self._make_directory(path.parent)
        file = PosixFile(_open(path, _FLAGS | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL), str(path))
        try:
            if zeroed:
                for offset in range(0, size, len(_ZEROS)):
                    part = memoryview(_ZEROS)[: min(len(_ZEROS), size - offset)]
                    file.pwritev([part], offset)
            else:
                file.truncate(size)
        except StorageError:
            file.close()
            self.unlink(name)
            raise
        return file

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return self._path(name).is_file()

    def rename(self, old: str, new: str) -> None:
        """Rename, replacing; durable after `sync_directory` only."""
        target = self._path(new)
        self._make_directory(target.parent)
        try:
            os.rename(self._path(old), target)
        except OSError as error:
            raise StorageError.from_os(error, operation="rename", path=old) from error

    def unlink(self, name: str) -> None:
        """Remove a file if it is there; durable after `sync_directory` only."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, operation="remove", path=name) from error

    def list(self, directory: str = "") -> list[str]:
        """Sorted names of the plain files in the directory, relative to it."""
        path = self._path(directory) if directory else self.root
        try:
            with os.scandir(path) as entries:
                return sorted(one.name for one in entries if one.is_file(follow_symlinks=False))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError.from_os(error, operation="list", path=str(path)) from error

    def sync_directory(self, directory: str = "") -> None:
        """Make creations, renames and removals in the directory durable.

        A directory that was never needed has none: what is not there is no error, as for `list`.
        """
        path = self._path(directory) if directory else self.root
        if path == self.root or path.exists():
            _sync_directory(path)

    def free_bytes(self) -> int:
        """Space left for this process on the file system."""
        try:
            found = os.statvfs(self.root)
        except OSError as error:
            raise StorageError.from_os(error, operation="stat", path=str(self.root)) from error
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """Release the lock; open files are their owners' business."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _path(self, name: str) -> Path:
        return self.root / self._checked(name)

    def _checked(self, name: str) -> str:
        parts = name.split("/")
        if len(parts) > 2 or "\0" in name or not _NOT_PLAIN.isdisjoint(parts):
            raise StorageError(f"{name!r} is not a name inside {self.root}")
        return name

    def _make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, operation="create", path=str(path)) from error
        # Files in it would be lost with the directory's own entry.
        _sync_directory(path.parent)


def open_backing(
    path: str | Path, *, create_size: int | None = None, exclusive: bool = True
) -> PosixFile:
    """Open a backing file or block device, locked against any other user that locks.

    :param create_size: bytes; a missing file is created, sparse, and an existing backing must
        have at least that size. None: it must be there.
    :raises InUseError: mounted, part of another device, or held by another process.
    :raises NotFoundError: it is not there. :raises RefusedError: too small, or no such kind of
        file. :raises StorageError: it cannot be opened.
    """
    path = Path(path)
    flags = _FLAGS
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise RefusedError(f"backing {path} is neither a regular file nor a block device")
        # On a block device O_EXCL without O_CREAT fails while a file system, md or dm uses it.
        flags |= os.O_EXCL if exclusive and stat.S_ISBLK(mode) else 0
        is_new = False
    except FileNotFoundError as error:
        if create_size is None:
            raise NotFoundError(f"backing {path} does not exist") from error
        flags |= os.O_CREAT | os.O_EXCL
        is_new = True
    except OSError as error:
        raise StorageError.from_os(error, operation="stat", path=str(path)) from error
    descriptor = _open(path, flags)
    file = PosixFile(descriptor, str(path))
    try:
        if exclusive:
            _take_lock(descriptor, str(path))
        if create_size is not None:
            _settle_size(file, create_size, is_new=is_new)
    except BaseException:
        file.close()
        raise
    return file


def _settle_size(file: PosixFile, size: int, *, is_new: bool) -> None:
    if is_new:
        file.truncate(size)
        _sync_directory(Path(file.name).absolute().parent)
    elif file.size() < size:
        raise RefusedError(
            f"backing {file.name} has {file.size()} bytes, {size} are needed",
            hint="grow it or choose another one",
        )


def _open(path: Path | str, flags: int) -> int:
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUseError(
                f"backing {path} is mounted or part of another device", hint="unmount it first"
            ) from error
        raise StorageError.from_os(error, operation="open", path=str(path)) from error


def _take_lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(
            f"{path} is held by a running resource or by another process",
            hint='see "geomirror resource list", or stop its user first',
        ) from error
    except OSError as error:
        raise StorageError.from_os(error, operation="lock", path=path) from error


def _sync_directory(path: Path) -> None:
    descriptor = _open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise StorageError.from_os(error, operation="sync directory", path=str(path)) from error
    finally:
        os.close(descriptor)
