"""Keeps this network's block in a hosts file; see `hosts_block`."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from geomirror.errors import RefusedError, StorageError
from geomirror.tunnel.hosts_block import with_block

HOSTS_BYTES_MAX = 4 << 20
"""Largest hosts file that is rewritten: those of advertisement blockers have 2 MiB."""


def update_hosts(path: Path, owner: str, lines: Sequence[str]) -> bool:
    """Make the owner's block have exactly these lines; empty: remove it.

    Readers see the old file or the new one, whole; mode and owner of the file stay. Blocks for two
    syncs when something changes.

    :returns: whether the file was changed.
    :raises RefusedError: marks are damaged, the file is too large, or it cannot be replaced.
    :raises StorageError: reading or writing failed; the old content is still there.
    """
    # A link (as on NixOS) is followed: its target is replaced, not the link.
    path = path.resolve()
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Of several nodes on a machine, each must see what the others have written.
            fcntl.flock(directory, fcntl.LOCK_EX)
            return _update(path, owner, lines, directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StorageError.from_os(error, operation="writing", path=str(path)) from error


def _update(path: Path, owner: str, lines: Sequence[str], directory: int) -> bool:
    try:
        with path.open("rb") as file:
            found, old = os.fstat(file.fileno()), file.read(HOSTS_BYTES_MAX + 1)
    except FileNotFoundError:
        if not lines:
            return False
        raise
    if len(old) > HOSTS_BYTES_MAX:
        raise RefusedError(f"{path} is larger than {HOSTS_BYTES_MAX} bytes")
    new = with_block(old, owner, lines)
    if new == old:
        return False
    temporary = path.with_name(f".{path.name}.geomirror")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as out:
        out.write(new)
        os.fchmod(out.fileno(), stat.S_IMODE(found.st_mode))
        os.fchown(out.fileno(), found.st_uid, found.st_gid)
        out.flush()
        os.fsync(out.fileno())
    try:
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink()
        if error.errno != errno.EBUSY:
            raise
        # Written in place, a reader or a crash would see half of it.
        raise RefusedError(
            f"{path} is a mount of its own and cannot be replaced (a container's, perhaps)",
            hint="leave [tunnel] hosts_file away, or name another file",
        ) from None
    os.fsync(directory)
    return True
