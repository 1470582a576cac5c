"""Where things lie in a node's data directory. Light: every command imports it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from geomirror.errors import StorageError, UsageError

SOCKET_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket on Linux, without the terminating zero."""


def default_data_dir() -> Path:
    """`/var/lib/geomirror` for root, else below the home directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/geomirror")
    return Path.home() / ".local/share/geomirror"


@dataclass(frozen=True)
class DataDir:
    """All paths of one node."""

    root: Path
    """Absolute."""

    @classmethod
    def at(cls, path: str | Path | None) -> DataDir:
        """The data directory at `path`, or the default one; nothing is created."""
        return cls(Path(path).expanduser().absolute() if path else default_data_dir())

    @property
    def config(self) -> Path:
        """The TOML file; may be absent."""
        return self.root / "geomirror.toml"

    @property
    def lock(self) -> Path:
        """Held with flock() by the running daemon; contains its pid."""
        return self.root / "daemon.lock"

    @property
    def resources_file(self) -> Path:
        """Definitions of this node's resources."""
        return self.root / "resources.json"

    @property
    def services_file(self) -> Path:
        """What this node exposes and forwards."""
        return self.root / "services.json"

    @property
    def resources(self) -> Path:
        """One directory per resource."""
        return self.root / "resources"

    @property
    def socket_pointer(self) -> Path:
        """Present when sockets lie elsewhere because their path here would be too long."""
        return self.root / "sockets"

    def create(self) -> None:
        """Make the directory, mode 0700, if it is not there.

        :raises StorageError: it cannot be made.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, operation="create", path=str(self.root)) from error

    def socket_dir(self) -> Path:
        """Directory of `control.sock` and `nbd.sock` as the daemon left it."""
        try:
            return Path(self.socket_pointer.read_text(encoding="utf-8").strip())
        except OSError:
            return self.root

    def prepare_socket_dir(self) -> Path:
        """Choose and make the directory for sockets; the daemon calls it once at start.

        :raises UsageError: no directory with a short enough path can be used safely.
        :raises StorageError: it cannot be made.
        """
        try:
            return self._prepare_socket_dir()
        except OSError as error:
            raise StorageError.from_os(error, operation="use", path=str(self.root)) from error

    def _prepare_socket_dir(self) -> Path:
        longest = max(len(os.fsencode(self.root / name)) for name in ("control.sock", "nbd.sock"))
        if longest <= SOCKET_PATH_BYTES_MAX:
            self.socket_pointer.unlink(missing_ok=True)
            return self.root
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        chosen = base / f"geomirror-{os.geteuid()}-{digest}"
        if len(os.fsencode(chosen / "control.sock")) > SOCKET_PATH_BYTES_MAX:
            raise UsageError(f"{self.root}: path too long for a socket", hint="use a shorter one")
        chosen.mkdir(mode=0o700, exist_ok=True)
        found = chosen.lstat()
        # In a shared /tmp somebody else may have made the directory first.
        if chosen.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise UsageError(f"{chosen}: not ours alone", hint="set XDG_RUNTIME_DIR")
        self.socket_pointer.write_text(f"{chosen}\n", encoding="utf-8")
        return chosen


def write_file_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content, mode 0600; durable, with its directory entry, at return.

    :raises StorageError: the old content is still there.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError.from_os(error, operation="write", path=str(path)) from error


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
