"""What is attached, as files: `DATA_DIR/attachments/RES/VOLUME/`, one directory an attachment.

    lock             held with flock() by the process that serves the attachment
    attachment.json  what it has made so far: to take it down after any crash
    control          its socket; `log`: what it said; `fuse/`: where nbdfuse is mounted

The file is written *before* a thing is made where its name is known before, else right after;
whoever cleans up compares what he finds with it and touches nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from geomirror.errors import InUseError, StorageError, UsageError
from geomirror.node.attach_plan import split_volume
from geomirror.node.paths import DataDir, write_file_atomic

FORMAT = 1


class Attachment(msgspec.Struct):
    """One attachment; unknown keys of a newer version are ignored."""

    resource: str
    volume: str
    method: str
    mountpoint: str | None
    """Where the file system is mounted; None: the device alone is wanted."""
    is_read_only: bool = False
    has_scratch: bool = False
    """The device, not the mount, takes writes, and forgets them."""
    format: int = FORMAT
    pid: int = 0
    start_time: str = ""
    """Of the process that serves it; with the pid nobody else's."""
    helper_pid: int = 0
    helper_start_time: str = ""
    """Of nbdfuse or nbd-client."""
    device: str | None = None
    file_system: str | None = None
    is_mounted: bool = False
    epoch: int | None = None
    """Of a secondary's copy: the epoch that is seen."""
    attached_at: str = ""
    """RFC 3339."""
    failure: str | None = None
    """Why it ended by itself."""

    @property
    def name(self) -> str:
        """`RES/VOLUME`."""
        return f"{self.resource}/{self.volume}"


@dataclass(frozen=True)
class AttachmentDir:
    """The files of one attachment."""

    path: Path

    @classmethod
    def of(cls, data_dir: DataDir, resource: str, volume: str) -> AttachmentDir:
        """Of a volume; nothing is created."""
        return cls(data_dir.root / "attachments" / resource / volume)

    @property
    def fuse(self) -> Path:
        """Mountpoint of nbdfuse."""
        return self.path / "fuse"

    @property
    def disk(self) -> Path:
        """The file that nbdfuse shows."""
        return self.fuse / "nbd"

    @property
    def log(self) -> Path:
        """What a process in the background said."""
        return self.path / "log"

    @property
    def control(self) -> Path:
        """Socket of the process that serves it."""
        return self.path / "control"

    @property
    def _file(self) -> Path:
        return self.path / "attachment.json"

    def create(self) -> None:
        """Make the directory, mode 0700.

        :raises StorageError: it cannot be made.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, operation="create", path=str(self.path)) from error

    def lock(self) -> int:
        """Take the lock; its descriptor. It ends with it, or with the process.

        :raises InUseError: somebody serves the attachment.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            name = f"{self.path.parent.name}/{self.path.name}"
            raise InUseError(
                f'"{name}" is attached already',
                hint=f'see "geomirror attach --list"; "geomirror detach {name}" ends it',
            ) from None
        return descriptor

    def is_served(self) -> bool:
        """Whether a process holds the lock."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def load(self) -> Attachment | None:
        """What is known; None when nothing is attached, or the file is none."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Attachment)
        except (OSError, msgspec.MsgspecError, ValueError):
            # It is written in one step: a file that is none was never ours.
            return None

    def save(self, attachment: Attachment) -> None:
        """Replace what is known; durable at return.

        :raises StorageError: the old one is still there.
        """
        write_file_atomic(self._file, msgspec.json.encode(attachment))

    def remove(self) -> None:
        """Nothing is attached any more. The lock stays with whoever has it."""
        self._file.unlink(missing_ok=True)
        self.control.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.fuse.rmdir()


def attachments(data_dir: DataDir) -> list[AttachmentDir]:
    """Directories of all volumes that are, or were, attached; by name."""
    found = sorted((data_dir.root / "attachments").glob("*/*"))
    return [AttachmentDir(path) for path in found if _is_volume(path)]


def _is_volume(path: Path) -> bool:
    with contextlib.suppress(UsageError):
        split_volume(f"{path.parent.name}/{path.name}")
        return path.is_dir()
    return False
