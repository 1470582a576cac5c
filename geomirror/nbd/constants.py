"""Every number of the NBD protocol that geomirror speaks, as in NetworkBlockDevice `doc/proto.md`.

Plain integers instead of enumerations: an `IntEnum` comparison costs ten times an `int` one, and
these are compared once per request.
"""

from __future__ import annotations

import errno
from typing import Final

# Handshake (fixed newstyle). Everything on the wire is big endian.
HELLO_MAGIC: Final = 0x4E42444D41474943
"""`NBDMAGIC`."""
OPTION_MAGIC: Final = 0x49484156454F5054
"""`IHAVEOPT`."""
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_CONFINE: Final = 0x67656F6D
"""Our own, between relay and daemon: the name of the only export that this connection may see, and
that the empty name stands for. It can be given once and not taken back."""

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR_BIT: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR_BIT + 1
REP_ERR_POLICY: Final = REP_ERROR_BIT + 2
REP_ERR_INVALID: Final = REP_ERROR_BIT + 3
REP_ERR_PLATFORM: Final = REP_ERROR_BIT + 4
REP_ERR_TLS_REQD: Final = REP_ERROR_BIT + 5
REP_ERR_UNKNOWN: Final = REP_ERROR_BIT + 6
REP_ERR_SHUTDOWN: Final = REP_ERROR_BIT + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERROR_BIT + 8
REP_ERR_TOO_BIG: Final = REP_ERROR_BIT + 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

NAME_BYTES_MAX: Final = 4096
"""Longest export name or human string that the protocol allows."""
OPTION_BYTES_MAX: Final = 64 * 1024
"""Longest option data accepted: a 4 KiB name with 59 KiB of info requests or context queries."""
OPTIONS_MAX: Final = 256
"""Options of one handshake; a client needs about five, a loop of LIST is somebody's mischief."""

# Transmission flags of an export.
EXPORT_HAS_FLAGS: Final = 1 << 0
EXPORT_READ_ONLY: Final = 1 << 1
EXPORT_SEND_FLUSH: Final = 1 << 2
EXPORT_SEND_FUA: Final = 1 << 3
EXPORT_SEND_TRIM: Final = 1 << 5
EXPORT_SEND_WRITE_ZEROES: Final = 1 << 6
EXPORT_SEND_DF: Final = 1 << 7
EXPORT_CAN_MULTI_CONN: Final = 1 << 8
EXPORT_SEND_CACHE: Final = 1 << 10
EXPORT_SEND_FAST_ZERO: Final = 1 << 11

# Requests.
REQUEST_MAGIC: Final = 0x25609513
REQUEST_BYTES: Final = 28
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISCONNECT: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

# Replies.
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
REPLY_FLAG_DONE: Final = 1 << 0
REPLY_NONE: Final = 0
REPLY_OFFSET_DATA: Final = 1
REPLY_OFFSET_HOLE: Final = 2
REPLY_BLOCK_STATUS: Final = 5
REPLY_ERROR_BIT: Final = 1 << 15
REPLY_ERROR: Final = REPLY_ERROR_BIT + 1
REPLY_ERROR_OFFSET: Final = REPLY_ERROR_BIT + 2

ALLOCATION_CONTEXT: Final = "base:allocation"
ALLOCATION_CONTEXT_ID: Final = 1
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1
EXTENTS_MAX: Final = 1 << 16
"""Extents in one block status reply, of all contexts together; the protocol allows 2^20 each, but
half a MiB is enough a time."""

ESHUTDOWN: Final = errno.ESHUTDOWN
_ALLOWED_ERRORS: Final = frozenset(
    (
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.EOPNOTSUPP,
        errno.ESHUTDOWN,
    )
)
_NEAREST_ERRORS: Final = {
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
}


def wire_error(number: int) -> int:
    """The errno to put on the wire: only eight are defined; unknown ones become EIO."""
    if number in _ALLOWED_ERRORS:
        return number
    return _NEAREST_ERRORS.get(number, errno.EIO)
