"""What the volume engine needs of a disk, as two small protocols.

Production implements them over system calls (`store_io`), the simulator in memory, where a crash
drops or tears writes that were not synced, bits flip and calls fail. All calls block; the shell
decides on which thread they run. Every failure is a `StorageError`, a full disk a `NoSpaceError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class File(Protocol):
    """One open file or block device."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def size(self) -> int:
        """Size in bytes now."""

    def pread(self, length: int, offset: int) -> bytes:
        """Exactly `length` bytes; what lies beyond the end reads as zeros."""

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`; what lies beyond the end reads as zeros."""

    def pread_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """`pread` of many (offset, length), at a fraction of its cost."""

    def try_read(self, length: int, offset: int) -> bytes | bytearray | None:
        """Like `pread` if that needs no waiting for a disk, else None."""

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        """A hint: reads from now on are (not) scattered, and what follows them is not wanted."""

    def expect_reads(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint: these (offset, length) are read next, so that a disk may fetch all at once."""

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers one after the other, completely. Not durable before `fdatasync`."""

    def pwritev_each(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """`pwritev` of many (offset, buffers), at a fraction of its cost."""

    def fdatasync(self) -> None:
        """Make everything written durable.

        A failure poisons the file: every later call raises, because the kernel may have dropped
        the dirty pages and a second fdatasync would lie (PostgreSQL's fsync finding of 2018).
        """

    def zero(self, length: int, offset: int, *, punch: bool) -> None:
        """Make a range read as zeros; with `punch`, free its space where that is possible."""

    def data_ranges(
        self, length: int, offset: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The (offset, length) parts of a range that may hold anything but zeros, ascending.

        With `count_max`, no more than that are looked for, and the rest counts as one more.
        """

    def truncate(self, size: int) -> None:
        """Grow or shrink; refused with `StorageError` for a block device of another size."""

    def close(self) -> None:
        """Release the file; nothing is synced."""


class Store(Protocol):
    """One directory that holds all files of a resource, with flat or one-level names."""

    def open(self, name: str) -> File:
        """Open an existing file for reading and writing."""

    def create(self, name: str, size: int, *, zeroed: bool = False) -> File:
        """Create a file of `size` bytes, sparse, or with its blocks written as zeros.

        Its directory entry is not durable before `sync_directory`.
        """

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""

    def rename(self, old: str, new: str) -> None:
        """Rename, replacing; durable after `sync_directory` only."""

    def unlink(self, name: str) -> None:
        """Remove a file if it is there; durable after `sync_directory` only."""

    def list(self, directory: str = "") -> list[str]:
        """Sorted names of the plain files in the directory (`""` is the top), relative to it."""

    def sync_directory(self, directory: str = "") -> None:
        """Make creations, renames and removals in the directory durable; none where it is not."""

    def free_bytes(self) -> int:
        """Space left for this process on the file system."""
