"""Files of the overlay in the data directory: private, written whole or not at all, and locked.

    DATA_DIR/identity/   node.key  node.crt  authority.crt
    DATA_DIR/network/    network.json  membership.json  lock
    DATA_DIR/authority/  authority.key  tokens.json            only on an authority node

Files are 0600, directories 0700, and loading refuses anything wider. A file is replaced by a synced
temporary, a rename and a sync of the directory: after a crash there is the old or the new content.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from geomirror.errors import ConfigError, NotFoundError, StorageError

FILE_BYTES_MAX = 1 << 20
"""Largest file read here; the largest real one is the membership, under 400 KiB."""


def make_directory(path: Path) -> None:
    """Create a directory of mode 0700 (its parents too); one that exists is left as it is."""
    try:
        for missing in reversed([path, *path.parents]):
            if not missing.exists():
                os.mkdir(missing, 0o700)
    except FileExistsError:
        return
    except OSError as error:
        raise StorageError.from_os(error, operation="creating", path=str(path)) from error


def write_file(path: Path, data: bytes) -> None:
    """Replace a file durably; mode 0600 whatever the umask.

    :raises StorageError: the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        # A left-over of a crash is replaced: whoever writes here holds the lock, or is creating.
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise StorageError.from_os(error, operation="writing", path=str(path)) from error


def read_file(path: Path) -> bytes:
    """Read a private file.

    :raises ConfigError: others may read or write it or its directory; the message has the command.
    :raises NotFoundError: there is none.
    :raises StorageError: reading failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_mode(path.parent, os.stat(path.parent).st_mode, "700")
            _check_mode(path, os.fstat(descriptor).st_mode, "600")
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise StorageError.from_os(error, operation="reading", path=str(path)) from error
    if len(data) > FILE_BYTES_MAX:
        raise StorageError(f"{path} is larger than {FILE_BYTES_MAX} bytes", hint="restore it")
    return data


def _check_mode(path: Path, mode: int, wanted: str) -> None:
    bits = stat.S_IMODE(mode)
    if bits & 0o077:
        raise ConfigError(
            f"{path} may be used by other users (mode {bits:04o})",
            hint=f"run: chmod {wanted} {path}",
        )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, against other processes and other threads.

    Blocks while another holds it: the holders only write a few small files.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, operation="locking", path=str(path)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
