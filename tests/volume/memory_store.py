"""A disk in memory that implements Store, for tests that need no crashes."""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.errors import NoSpaceError, NotFoundError
from geomirror.volume.store import Buffer


class MemoryFile:
    """A sparse file; pages that were written count as data."""

    PAGE = 65536

    def __init__(self, store: MemoryStore, name: str, size: int) -> None:
        self.store = store
        self.name = name
        self.data = bytearray(size)
        self.pages: set[int] = set()
        self.syncs = 0

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        self.store.operations.append(("pread", self.name, offset, length))
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.pread(len(buffer), offset)

    def pread_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.pread(length, offset) for offset, length in ranges]

    def expect_scattered_reads(self, is_scattered: bool) -> None:
        self.store.operations.append(("scattered", self.name, int(is_scattered), 0))

    def expect_reads(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Another one."""

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        content = b"".join(buffers)
        self.store.operations.append(("pwritev", self.name, offset, len(content)))
        if len(content) + self.store.used_bytes() > self.store.capacity:
            raise NoSpaceError(f"write {self.name}: no space")
        end = offset + len(content)
        if end > len(self.data):
            self.data += bytes(end - len(self.data))
        self.data[offset:end] = content
        self.pages.update(range(offset // self.PAGE, -(-end // self.PAGE)))

    def pwritev_each(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> None:
        for offset, buffers in runs:
            self.pwritev(buffers, offset)

    def fdatasync(self) -> None:
        self.store.operations.append(("fdatasync", self.name, 0, 0))

    def zero(self, length: int, offset: int, *, punch: bool) -> None:
        name = "punch" if punch else "zero"
        self.store.operations.append((name, self.name, offset, length))
        self.data[offset : offset + length] = bytes(length)

    def data_ranges(
        self, length: int, offset: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        self.store.operations.append(("data_ranges", self.name, offset, length))
        found: list[tuple[int, int]] = []
        for page in range(offset // self.PAGE, -(-(offset + length) // self.PAGE)):
            if page in self.pages:
                low = max(page * self.PAGE, offset)
                if len(found) == count_max:
                    return [*found, (low, offset + length - low)]
                found.append((low, min((page + 1) * self.PAGE, offset + length) - low))
        return found

    def truncate(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")

    def close(self) -> None:
        pass


class MemoryStore:
    """Files by name; `operations` is the log of what was done to them."""

    def __init__(self, capacity: int = 1 << 40) -> None:
        self.files: dict[str, MemoryFile] = {}
        self.operations: list[tuple[str, str, int, int]] = []
        self.capacity = capacity

    def used_bytes(self) -> int:
        return sum(len(file.data) for name, file in self.files.items() if "undo" in name)

    def open(self, name: str) -> MemoryFile:
        if name not in self.files:
            raise NotFoundError(name)
        return self.files[name]

    def create(self, name: str, size: int, *, zeroed: bool = False) -> MemoryFile:
        self.operations.append(("create", name, 0, size))
        self.files[name] = MemoryFile(self, name, size)
        return self.files[name]

    def exists(self, name: str) -> bool:
        return name in self.files

    def rename(self, old: str, new: str) -> None:
        self.operations.append(("rename", new, 0, 0))
        self.files[new] = self.files.pop(old)
        self.files[new].name = new

    def unlink(self, name: str) -> None:
        if self.files.pop(name, None) is not None:
            self.operations.append(("unlink", name, 0, 0))

    def list(self, directory: str = "") -> list[str]:
        prefix = f"{directory}/" if directory else ""
        names = (name.removeprefix(prefix) for name in self.files if name.startswith(prefix))
        return sorted(name for name in names if "/" not in name)

    def sync_directory(self, directory: str = "") -> None:
        self.operations.append(("sync_directory", directory, 0, 0))

    def free_bytes(self) -> int:
        return self.capacity - self.used_bytes()
