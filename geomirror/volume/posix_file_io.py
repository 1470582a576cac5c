"""`File` over a descriptor of a regular file or a block device.

All offsets are passed explicitly and every call releases the interpreter lock, so that several
threads may use one file at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Sequence

from geomirror.errors import NoSpaceError, StorageError
from geomirror.limits import MIB
from geomirror.volume.store import Buffer

_IOV_MAX = 1024
"""Buffers of one `pwritev`; Linux' UIO_MAXIOV."""
_ZEROS = bytes(1 * MIB)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
"""Modes of fallocate(2), from linux/falloc.h."""
_NOWAIT = os.RWF_NOWAIT
_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM))

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    _fallocate.restype = ctypes.c_int


class PosixFile:
    """Owns a descriptor. Errors are `StorageError` and name the path."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._is_block_device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        self._failure = ""
        # One fdatasync at a time: the kernel reports a write-back error to one caller only, and
        # another one that runs beside it would claim success.
        self._sync_lock = threading.Lock()

    @property
    def name(self) -> str:
        """The path it was opened by."""
        return self._name

    def size(self) -> int:
        """Size in bytes now."""
        self._require()
        try:
            if self._is_block_device:
                return os.lseek(self._descriptor, 0, os.SEEK_END)
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            raise self._error(error, "stat") from error

    def pread(self, length: int, offset: int) -> bytes:
        """Exactly `length` bytes; zeros beyond the end."""
        if self._failure:
            self._require()
        try:
            data = os.pread(self._descriptor, length, offset)
            if len(data) == length:
                return data
            parts = [data]
            missing = length - len(data)
            while missing and parts[-1]:
                parts.append(os.pread(self._descriptor, missing, offset + length - missing))
                missing -= len(parts[-1])
        except OSError as error:
            raise self._error(error, "read") from error
        return b"".join(parts) + bytes(missing)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`; zeros beyond the end."""
        if self._failure:
            self._require()
        position = 0
        try:
            while position < len(buffer):
                found = os.preadv(self._descriptor, [buffer[position:]], offset + position)
                if not found:
                    break
                position += found
        except OSError as error:
            raise self._error(error, "read") from error
        if position < len(buffer):
            buffer[position:] = bytes(len(buffer) - position)

    def pread_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """`pread` of many (offset, length)."""
        if self._failure:
            self._require()
        descriptor, pread = self._descriptor, os.pread
        try:
            parts = [pread(descriptor, length, offset) for offset, length in ranges]
        except OSError as error:
            raise self._error(error, "read") from error
        for index, (offset, length) in enumerate(ranges):
            if len(parts[index]) != length:
                parts[index] = self.pread(length, offset)
        return parts

    def try_read(self, length: int, offset: int) -> bytearray | None:
        """The bytes if all of them are in memory (RWF_NOWAIT), else None."""
        if self._failure:
            self._require()
        data = bytearray(length)
        try:
            found = os.preadv(self._descriptor, [data], offset, _NOWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return None
            raise self._error(error, "read") from error
        # Fewer bytes: only the first of them are in memory, or the file ends; `pread` will tell.
        return data if found == length else None

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        """Turn the kernel's read-ahead off or on; a refusal is ignored.

        Reading ascending blocks with gaps looks sequential to it: it would read the gaps as well,
        and throw as many pages out of the cache.
        """
        advice = os.POSIX_FADV_RANDOM if is_scattered else os.POSIX_FADV_NORMAL
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, advice)

    def expect_reads(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Let the kernel fetch (offset, length) of them now; a refusal is ignored."""
        with contextlib.suppress(OSError):
            for offset, length in ranges:
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers, completely. :raises NoSpaceError: the file system is full."""
        if self._failure:
            self._require()
        for start in range(0, len(buffers), _IOV_MAX):
            chunk = buffers if len(buffers) <= _IOV_MAX else buffers[start : start + _IOV_MAX]
            size = sum(map(len, chunk))
            try:
                written = os.pwritev(self._descriptor, chunk, offset)
                if written != size:
                    self._write_rest(b"".join(chunk), written, offset)
            except OSError as error:
                raise self._error(error, "write") from error
            offset += size

    def pwritev_each(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """`pwritev` of many (offset, buffers). :raises NoSpaceError: the file system is full."""
        if self._failure:
            self._require()
        descriptor, pwrite = self._descriptor, os.pwrite
        try:
            for offset, buffers in runs:
                if len(buffers) == 1 and pwrite(descriptor, buffers[0], offset) == len(buffers[0]):
                    continue
                # Many buffers, or a short write, which is simply done again.
                self.pwritev(buffers, offset)
        except OSError as error:
            raise self._error(error, "write") from error

    def fdatasync(self) -> None:
        """Make what was written durable. :raises StorageError: now and at every later call."""
        with self._sync_lock:
            if self._failure:
                self._require()
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._failure = f"{self._name} is not used after a failed fdatasync"
                raise self._error(error, "fdatasync") from error

    def zero(self, length: int, offset: int, *, punch: bool) -> None:
        """Make a range read as zeros; never beyond the end of the file.

        Both modes of fallocate guarantee zeros, also on block devices (the kernel refuses a
        discard that may leave old data); where it refuses, zeros are written.
        """
        self._require()
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        modes = [_ZERO_RANGE | _KEEP_SIZE]
        if punch:
            modes.insert(0, _PUNCH_HOLE | _KEEP_SIZE)
        for mode in modes:
            if self._try_fallocate(mode, offset, length):
                return
        while length > 0:
            size = min(length, len(_ZEROS))
            self.pwritev([memoryview(_ZEROS)[:size]], offset)
            offset, length = offset + size, length - size

    def data_ranges(
        self, length: int, offset: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The (offset, length) parts that may hold anything but zeros, ascending."""
        self._require()
        end = min(offset + length, self.size())
        ranges: list[tuple[int, int]] = []
        position = offset
        while position < end:
            if count_max is not None and len(ranges) >= count_max:
                return [*ranges, (position, end - position)]
            try:
                start = os.lseek(self._descriptor, position, os.SEEK_DATA)
                stop = os.lseek(self._descriptor, start, os.SEEK_HOLE) if start < end else end
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return ranges
                if error.errno in _UNSUPPORTED:
                    return [*ranges, (position, end - position)]
                raise self._error(error, "seek in") from error
            if start >= end:
                return ranges
            ranges.append((start, min(stop, end) - start))
            position = stop
        return ranges

    def truncate(self, size: int) -> None:
        """Grow or shrink. :raises StorageError: it is a block device of another size."""
        self._require()
        if self._is_block_device:
            if size > self.size():
                raise NoSpaceError(
                    f"block device {self._name} has {self.size()} bytes, {size} are needed",
                    hint="enlarge the device",
                )
            if size != self.size():
                raise StorageError(f"block device {self._name} cannot be cut to {size} bytes")
            return
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise NoSpaceError(
                    f"{self._name} cannot have {size} bytes: its file system takes no such file",
                    hint="use a smaller size, or a file system for larger files",
                ) from error
            raise self._error(error, "truncate") from error

    def close(self) -> None:
        """Release the descriptor and its lock; twice is once."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            self._failure = f"{self._name} is closed"
            os.close(descriptor)

    def _require(self) -> None:
        if self._failure:
            raise StorageError(self._failure)

    def _error(self, error: OSError, operation: str) -> StorageError:
        return StorageError.from_os(error, operation=operation, path=self._name)

    def _write_rest(self, data: bytes, position: int, offset: int) -> None:
        """After a short write, which a full file system or a signal may cause."""
        view = memoryview(data)
        while position < len(data):
            written = os.pwrite(self._descriptor, view[position:], offset + position)
            if written == 0:
                raise OSError(errno.EIO, "the device takes no more bytes")
            position += written

    def _try_fallocate(self, mode: int, offset: int, length: int) -> bool:
        if _fallocate is None:
            return False
        while _fallocate(self._descriptor, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in _UNSUPPORTED:
                return False
            raise self._error(OSError(number, os.strerror(number)), "zero a range of")
        return True
