"""One volume's image: its backing file seen as canonical 4 KiB blocks.

```
 ┌──────┬──────┬──────┬───┐
 │  0   │  1   │  2   │ 3 │   size_bytes is a multiple of 512, so the last block may be short:
 └──────┴──────┴──────┴───┘   its content is the bytes that exist
```
Invariant: only apply writes here, and only from sealed epochs (I14).
Deliberately not here: which block goes where and when (`apply`), what overrides it (`dirty_index`).
"""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.volume.store import Buffer, File

WRITE_RUN_BYTES_MAX = 4 * MIB
"""Adjacent blocks that go out in one system call (1024 buffers, the kernel's IOV_MAX)."""


class Image:
    """The backing file of one volume. Every call blocks; failures are `StorageError`."""

    def __init__(self, index: int, name: str, size_bytes: int, file: File) -> None:
        self.index = index
        self.name = name
        self.size_bytes = size_bytes
        self.file = file
        self.block_count = -(-size_bytes // BLOCK_BYTES)

    @property
    def physical(self) -> Image:
        """What lies in the file; an image that is read through a layer is another one."""
        return self

    def block_bytes(self, block: int) -> int:
        """Bytes that exist of a block: 4096, or fewer for the last one."""
        assert 0 <= block < self.block_count
        return min(BLOCK_BYTES, self.size_bytes - block * BLOCK_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; the range lies in the volume."""
        assert 0 <= offset <= offset + length <= self.size_bytes
        return self.file.pread(length, offset)

    def try_read(self, offset: int, length: int) -> bytes | bytearray | None:
        """Like `read` if that needs no waiting for a disk, else None."""
        assert 0 <= offset <= offset + length <= self.size_bytes
        return self.file.try_read(length, offset)

    def read_block(self, block: int) -> bytes:
        """The content of one block."""
        return self.file.pread(self.block_bytes(block), block * BLOCK_BYTES)

    def read_existing(self, block: int) -> bytes:
        """What the image has of a block; nothing where the volume has grown beyond the image."""
        length = min(BLOCK_BYTES, self.size_bytes - block * BLOCK_BYTES)
        return self.file.pread(length, block * BLOCK_BYTES) if length > 0 else b""

    def grown(self, size_bytes: int) -> Image:
        """The same volume with another size, over the same file, which has it already."""
        return Image(self.index, self.name, size_bytes, self.file)

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of many (offset, length), ascending and within the volume."""
        assert not ranges or sum(ranges[-1]) <= self.size_bytes
        return self.file.pread_each(ranges)

    def data_ranges(
        self, offset: int, length: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The (offset, length) parts of a range that may hold anything but zeros, ascending.

        With `count_max`, no more than that are looked for, and the rest counts as one more.
        """
        assert 0 <= offset <= offset + length <= self.size_bytes
        return self.file.data_ranges(length, offset, count_max)

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        """A hint: reads from now on are (not) of scattered blocks."""
        self.file.expect_scattered_reads(is_scattered)

    def expect_reads(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint: these (offset, length) are read next."""
        self.file.expect_reads(ranges)

    def write_blocks(self, blocks: Sequence[tuple[int, Buffer]]) -> None:
        """Write (first block, contents of one or more whole blocks), ascending. Not durable yet.

        Adjacent ones go out in one call.
        """
        runs: list[tuple[int, list[Buffer]]] = []
        following = run_bytes = 0
        for block, content in blocks:
            assert block >= following, "blocks are not ascending"
            if not runs or block != following or run_bytes >= WRITE_RUN_BYTES_MAX:
                runs.append((block * BLOCK_BYTES, []))
                run_bytes = 0
            runs[-1][1].append(content)
            run_bytes += len(content)
            following = block + -(-len(content) // BLOCK_BYTES)
            assert len(content) % BLOCK_BYTES == 0 or self._ends_at(block, content)
        self.write_runs(runs)

    def write_runs(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        """Write (offset, contents that follow each other), ascending. Not durable yet.

        Whole blocks, but for the volume's last one. One call each: adjacent contents belong into
        one run.
        """
        if not runs:
            return
        offset, contents = runs[-1]
        assert offset + sum(map(len, contents)) <= self.size_bytes
        self.file.pwritev_each(runs)

    def _ends_at(self, block: int, content: Buffer) -> bool:
        return block * BLOCK_BYTES + len(content) == self.size_bytes

    def zero(self, first_block: int, count: int, *, punch: bool) -> None:
        """Make `count` blocks read as zeros, freeing their space with `punch`. Not durable yet."""
        assert 0 <= first_block < first_block + count <= self.block_count
        offset = first_block * BLOCK_BYTES
        length = min(count * BLOCK_BYTES, self.size_bytes - offset)
        self.file.zero(length, offset, punch=punch)

    def fdatasync(self) -> None:
        """Make everything written durable."""
        self.file.fdatasync()

    def close(self) -> None:
        """Release the backing file; nothing is synced."""
        self.file.close()
