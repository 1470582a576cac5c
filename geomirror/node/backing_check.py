"""Looks at a backing device before a resource takes it: its size, and whether it holds data."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from geomirror.errors import NotFoundError, RefusedError, StorageError, UsageError
from geomirror.limits import MIB
from geomirror.volume.store_io import open_backing

PROBE_BYTES = 1 * MIB
"""Read at either end of a block device: partition tables, file systems, RAID and LVM labels."""


def backing_size(path: str) -> int | None:
    """Size in bytes; None when there is no such file yet.

    :raises UsageError: the path is relative, or neither a file nor a block device.
    :raises StorageError: it cannot be opened.
    """
    if not os.path.isabs(path):
        raise UsageError(f"backing {path}: not an absolute path")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError.from_os(error, operation="open", path=path) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"backing {path}: neither a file nor a block device")
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def holds_data(path: str) -> bool:
    """Whether overwriting `path` could destroy something.

    A file holds data when any part of it is allocated; a block device when its first or last MiB
    is not all zeros. A file that does not exist, is empty or is one hole holds none.

    :raises StorageError: it cannot be read.
    """
    size = backing_size(path)
    if not size:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return _has_extent(descriptor)
            ends = {0, max(0, size - PROBE_BYTES)}
            return any(any(os.pread(descriptor, PROBE_BYTES, offset)) for offset in ends)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError.from_os(error, operation="read", path=path) from error


def _has_extent(descriptor: int) -> bool:
    try:
        os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
    return True


def check_backing(path: str, size_bytes: int, *, is_adopted: bool, is_forced: bool) -> None:
    """Refuse a backing that is too small, missing where its content is wanted, or holds data.

    :raises RefusedError: it holds data and neither `--adopt` nor `--force` was given, or it is
        smaller than the volume.
    :raises InUseError: it is mounted, or a resource or another process uses it.
    :raises NotFoundError: its content is to be adopted and it does not exist.
    """
    size = backing_size(path)
    if size is None:
        if is_adopted:
            raise NotFoundError(f"backing {path}: to be adopted, and does not exist")
        if not Path(path).parent.is_dir():
            raise NotFoundError(f"backing {path}: no such directory")
        return
    if 0 < size < size_bytes:
        raise RefusedError(
            f"backing {path}: {size} bytes, the volume has {size_bytes}",
            hint="give a smaller --size or a larger device",
        )
    open_backing(path).close()
    if not is_adopted and not is_forced and holds_data(path):
        raise RefusedError(
            f"backing {path} holds data",
            hint="--adopt NODE keeps and sends it, --force overwrites it",
        )


def zero_backing(path: str) -> None:
    """Make every byte of an existing backing zero (`--force`); its size stays.

    :raises InUseError: somebody uses it; nothing changed.
    :raises StorageError: it is not, or not wholly, zero.
    """
    size = backing_size(path)
    if not size:
        return
    # Locked: between the check and now somebody may have begun to use it.
    file = open_backing(path)
    try:
        file.zero(size, 0, punch=True)
        file.fdatasync()
    finally:
        file.close()
