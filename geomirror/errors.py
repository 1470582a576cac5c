"""Every error class, in one table: exit code, wire code, NBD errno, retry.

A programmer's error is an `assert` and a crash: recovery is the tested path. An operating error is
one of these classes; it names the object, the cause and the next command, and is raised or logged,
never both. `docs/exit_codes.md` is generated from this table and a test compares the two.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class GeomirrorError(Exception):
    """Something went wrong that no more specific class describes."""

    exit_code: ClassVar[int] = 1
    wire_code: ClassVar[int] = 1
    nbd_errno: ClassVar[int] = errno.EIO
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(GeomirrorError):
    """The command line or a request is not understood."""

    exit_code = 2
    wire_code = 2
    nbd_errno = errno.EINVAL


class ConfigError(UsageError):
    """A configuration file has an unknown key, a wrong value or a wrong mode."""

    wire_code = 3


class UnreachableError(GeomirrorError):
    """The daemon, or the node that has to decide, does not answer."""

    exit_code = 3
    wire_code = 4
    is_retryable = True


class NotFoundError(GeomirrorError):
    """No such node, resource, volume, peer or view."""

    exit_code = 4
    wire_code = 5
    nbd_errno = errno.EINVAL


class RefusedError(GeomirrorError):
    """Refused because it could destroy data or because something is in the way."""

    exit_code = 5
    wire_code = 6
    nbd_errno = errno.EPERM


class NotPrimaryError(RefusedError):
    """A write reached a node that is not the primary of the resource."""

    wire_code = 7


class FencedError(RefusedError):
    """A higher fencing token was seen, or the journal is damaged: nothing is served any more."""

    wire_code = 8
    nbd_errno = errno.ESHUTDOWN


class SupersededError(FencedError):
    """A history with a higher fencing token exists: this one accepts no writes any more."""

    wire_code = 26


class InUseError(RefusedError):
    """Another process holds the data directory or the backing device."""

    wire_code = 9


class ChangedError(RefusedError):
    """What was attached is not there any more: another history, role, epoch or size."""

    wire_code = 25
    nbd_errno = errno.EIO


class WaitTimeoutError(GeomirrorError):
    """What was waited for did not happen in time."""

    exit_code = 6
    wire_code = 10
    is_retryable = True


class SplitBrainError(RefusedError):
    """Two histories exist; both tails are kept until the operator chooses."""

    exit_code = 7
    wire_code = 11


class PutBackError(SplitBrainError):
    """A primary's disk was put back to an older state: a copy has epochs that it has lost."""

    wire_code = 27


class StorageError(GeomirrorError):
    """Reading or writing local storage failed."""

    exit_code = 8
    wire_code = 12

    @classmethod
    def from_os(cls, error: OSError, *, operation: str, path: str) -> StorageError:
        """Wrap an OSError, keeping ENOSPC apart because the writer is told so."""
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else cls
        return kind(f"{operation} {path}: {error.strerror or error}")


class NoSpaceError(StorageError):
    """A file system or a device is full."""

    wire_code = 13
    nbd_errno = errno.ENOSPC


class JournalFullError(StorageError):
    """The journal has no room for the batch; back-pressure, not a failure."""

    wire_code = 14
    nbd_errno = errno.ENOSPC
    is_retryable = True


class IntegrityError(GeomirrorError):
    """Stored or received bytes are not the bytes that were written or sent."""

    exit_code = 9
    wire_code = 15


class AuthError(GeomirrorError):
    """A token, certificate or peer is not accepted."""

    exit_code = 10
    wire_code = 16


class TokenError(AuthError):
    """A join token is malformed, unknown, expired or already used."""

    wire_code = 17


class LinkError(GeomirrorError):
    """A link could not be made or was lost; retried for ever and never seen by a writer."""

    exit_code = 11
    wire_code = 18
    is_retryable = True


class ProtocolError(GeomirrorError):
    """Base of the two kinds below; never raised itself."""

    exit_code = 70
    wire_code = 19


class LocalProtocolError(ProtocolError):
    """We asked a protocol core for something it does not allow: our bug."""

    wire_code = 20


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow; its session is closed."""

    exit_code = 12
    wire_code = 21
    is_retryable = True


class LimitExceededError(RemoteProtocolError):
    """The peer announced a size over a limit; refused before any allocation."""

    wire_code = 22


class BadFrameError(RemoteProtocolError):
    """A frame's checksum is wrong; it is asked for again."""

    wire_code = 23


class VersionError(RemoteProtocolError):
    """No protocol version in common."""

    wire_code = 24
    is_retryable = False


def all_errors() -> list[type[GeomirrorError]]:
    """Every class of the table, in the order of this file."""
    values = globals().values()
    return [v for v in values if isinstance(v, type) and issubclass(v, GeomirrorError)]


def from_wire(code: int, message: str) -> GeomirrorError:
    """Rebuild a peer's or the daemon's error from its wire code; unknown codes become the base."""
    for kind in all_errors():
        if kind.wire_code == code:
            return kind(message)
    return GeomirrorError(message)
