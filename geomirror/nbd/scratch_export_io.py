"""A disk that nobody may write, with a scratch file over it that takes what is written.

    READ  ──> the disk ──> what the scratch file has of it, laid over ──> reply
    WRITE, TRIM, WRITE_ZEROES ──> the scratch file;  FLUSH ──> nothing to do

For mounting a crash image: the file system's journal is replayed into the scratch file, which is
forgotten with the process. Kept per 64 KiB is one integer, a bit for each 512 byte sector.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomirror.errors import StorageError
from geomirror.limits import SECTOR_BYTES
from geomirror.nbd.constants import CMD_FLUSH, CMD_READ
from geomirror.nbd.protocol import Buffer, Export, ReadAnswer, ReplySink, Request

_CHUNK_SECTORS = 128
_ZEROS = bytes(1 << 20)


class ScratchExport:
    """Implements `protocol.Export` over another one.

    :param path: made, opened and unlinked at once; as long as the disk, and sparse.
    :param bytes_max: of scratch; beyond it changes get ENOSPC.
    """

    is_read_only = False
    is_multi_conn = True
    minimum_block = SECTOR_BYTES

    def __init__(self, disk: Export, path: Path, bytes_max: int) -> None:
        self._disk = disk
        self._sectors_max = bytes_max // SECTOR_BYTES
        self._sectors = 0
        self._written: dict[int, int] = {}
        self.name, self.description = disk.name, disk.description
        self.size_bytes = disk.size_bytes
        self.preferred_block, self.maximum_payload = disk.preferred_block, disk.maximum_payload
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
            path.unlink()
        except OSError as error:
            raise StorageError.from_os(error, operation="create", path=str(path)) from error

    def end(self) -> None:
        """Forget what was written."""
        os.close(self._file)

    @property
    def scratch_bytes(self) -> int:
        """What is laid over the disk."""
        return self._sectors * SECTOR_BYTES

    def open(self, sink: ReplySink) -> object:
        """A user attaches."""
        overlaying = _Overlaying(self, sink)
        return _User(self._disk.open(overlaying), overlaying)

    def close(self, handle: object) -> None:
        """A user is gone."""
        assert isinstance(handle, _User)
        self._disk.close(handle.below)

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        """Reads go to the disk, changes to the scratch file."""
        assert isinstance(handle, _User)
        for request in requests:
            if request.command != CMD_READ:
                sink.reply(request.cookie, self._change(request))
        reads = [request for request in requests if request.command == CMD_READ]
        if reads:
            self._disk.submit(handle.below, reads, handle.sink)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Everything counts as data."""
        return [(length, 0)]

    def _change(self, request: Request) -> int:
        """0, or the errno of what went wrong."""
        if request.command == CMD_FLUSH:
            return 0
        first = request.offset // SECTOR_BYTES
        masks = list(_masks(first, request.length // SECTOR_BYTES))
        new = sum((mask & ~self._written.get(chunk, 0)).bit_count() for chunk, mask in masks)
        if self._sectors + new > self._sectors_max:
            return errno.ENOSPC
        try:
            at, end = request.offset, request.offset + request.length
            while at < end:
                part = _ZEROS[: end - at] if request.payload is None else request.payload
                at += os.pwrite(self._file, part[-(end - at) :], at)
        except OSError as error:
            return error.errno or errno.EIO
        for chunk, mask in masks:
            self._written[chunk] = self._written.get(chunk, 0) | mask
        self._sectors += new
        return 0

    def overlay(self, offset: int, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """What a read of the disk brought, with the scratch file's sectors over it.

        :raises OSError: the scratch file cannot be read.
        """
        length = sum(map(len, buffers))
        first = offset // SECTOR_BYTES
        hits = [
            (chunk, mask & self._written[chunk])
            for chunk, mask in _masks(first, length // SECTOR_BYTES)
            if chunk in self._written
        ]
        if not any(mask for _, mask in hits):
            return buffers
        data = bytearray().join(buffers)
        view = memoryview(data)
        for chunk, mask in hits:
            for start, count in _runs(mask):
                at = (chunk * _CHUNK_SECTORS + start) * SECTOR_BYTES - offset
                target = view[at : at + count * SECTOR_BYTES]
                if os.preadv(self._file, [target], offset + at) != len(target):
                    raise OSError(errno.EIO, "the scratch file is shorter than it was")
        return [data]


class _Overlaying:
    """Between the disk and a connection: a `ReplySink` that lays the scratch over what is read."""

    def __init__(self, scratch: ScratchExport, sink: ReplySink) -> None:
        self._scratch = scratch
        self._sink = sink
        self.reply = sink.reply
        self.reply_many = sink.reply_many
        self.pause_reading = sink.pause_reading
        self.resume_reading = sink.resume_reading

    @property
    def is_closed(self) -> bool:
        """As the connection."""
        return self._sink.is_closed

    def reply_read(
        self, cookie: int, offset: int, buffers: Sequence[Buffer], error: int = 0
    ) -> None:
        """Answer a READ."""
        if error:
            self._sink.reply(cookie, error)
            return
        try:
            found = self._scratch.overlay(offset, buffers)
        except OSError as failure:
            self._sink.reply(cookie, failure.errno or errno.EIO)
            return
        self._sink.reply_read(cookie, offset, found)

    def reply_reads(self, answers: Iterable[ReadAnswer]) -> None:
        """Answer READs."""
        for answer in answers:
            self.reply_read(*answer)


@dataclass(slots=True, eq=False)
class _User:
    """One connection, and what it is to the disk below."""

    below: object
    sink: _Overlaying


def _masks(first: int, count: int) -> Iterator[tuple[int, int]]:
    """(chunk, bits of its sectors) of a range of sectors."""
    end = first + count
    while first < end:
        chunk, start = divmod(first, _CHUNK_SECTORS)
        here = min(_CHUNK_SECTORS - start, end - first)
        yield chunk, ((1 << here) - 1) << start
        first += here


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """(first bit, how many) of each run of ones, ascending."""
    at = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        mask >>= zeros
        ones = (~mask & (mask + 1)).bit_length() - 1
        yield at + zeros, ones
        mask >>= ones
        at += zeros + ones
