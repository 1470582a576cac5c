"""The undo of a resource: one file per apply pass, newest last, within a budget.

```
 image at 40 ◀─undo (30,40]─ 30 ◀─undo (28,30]─ 28 ◀─gap (20,28]─ ✗
```
State at epoch e of a block = the pass with the smallest `to` > e that holds it, else the image.
Invariant I6: a pass is durable before an image block changes, and never made anew from a
half-applied image. So a file damaged beyond its header counts as a gap, never as absent; one whose
header is damaged, as the newest, is an error that stops the resource.
Not thread-safe: one job at a time uses a store.
Deliberately not here: the format of a file (`undo_file`) and reading the old contents (`apply`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from geomirror.errors import FencedError, IntegrityError, NoSpaceError, NotFoundError
from geomirror.limits import Limits
from geomirror.volume.store import File, Store
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoReader, UndoWriter, read_header

DIRECTORY = "undo"
_TEMPORARY = f"{DIRECTORY}/pass.new"
_READERS_MAX = 16
"""Tables kept in memory by `block_at` (24 bytes a run each)."""


class UndoOverflowError(Exception):
    """Raised by the source of before-images when the pass has become too large to keep."""


class UndoStore:
    """All undo files of one resource.

    :param start_counter: lowest number for the next file (`undo_next` of the superblock).
    :raises StorageError: the directory cannot be read.
    """

    def __init__(self, store: Store, limits: Limits, start_counter: int = 1) -> None:
        self._store = store
        self._limits = limits
        self._next = start_counter
        self._passes: list[PassInfo] = []
        self._damaged: dict[str, IntegrityError] = {}
        self._readers: dict[str, UndoReader] = {}
        self._load()

    @property
    def next_counter(self) -> int:
        """Number of the next file; never reused while the superblock remembers it."""
        return self._next

    def passes(self) -> list[PassInfo]:
        """The passes kept, oldest first."""
        return list(self._passes)

    def stored_bytes(self) -> int:
        """Bytes of all files."""
        return sum(each.stored_bytes for each in self._passes)

    def pending_pass(self, applied_epoch: int) -> tuple[int, int] | None:
        """The (from, to] that a crash may have left half applied, if there is one.

        An image at `applied_epoch` may hold some blocks of `to`: exactly that pass has to be
        done again before the image is read.

        :raises FencedError: the newest undo file is damaged, so that this cannot be known.
        """
        newest = self._newest_name() if self._damaged else ""
        if newest in self._damaged:
            raise FencedError(
                f"the image may be half applied and {self._damaged[newest].message}",
                hint='keep the data directory; make this copy anew with "geomirror resync"',
            )
        # Passes follow each other: asked at every turn, this looks at the last one only.
        for found in reversed(self._passes):
            if found.from_epoch <= applied_epoch:
                is_it = found.from_epoch == applied_epoch
                return (found.from_epoch, found.to_epoch) if is_it else None
        return None

    def find(
        self, from_epoch: int, to_epoch: int, generation: bytes | None = None
    ) -> PassInfo | None:
        """The file of exactly this pass, if it was made durable before.

        :param generation: of `to_epoch`; None for any.
        """
        for each in reversed(self._passes):
            if (each.from_epoch, each.to_epoch) == (from_epoch, to_epoch):
                return each if generation in (None, each.generation) else None
        return None

    def horizon(self, applied_epoch: int) -> int:
        """The oldest epoch whose state can be restored from an image at `applied_epoch`."""
        oldest = applied_epoch
        for each in reversed(self._passes):
            if each.to_epoch > applied_epoch:
                continue
            if each.to_epoch != oldest or each.is_gap:
                break
            oldest = each.from_epoch
        return oldest

    def write(self, label: PassLabel, fill: Callable[[UndoWriter], None]) -> PassInfo:
        """Write the undo of one pass; when this returns it is durable, file and name.

        On a full disk older passes make room, the oldest first. When that is not enough, or `fill`
        raises `UndoOverflowError`, a gap is written: the pass can be done again after a crash, but
        no older state can be restored.

        :param fill: adds the before-images to the writer, ascending.
        :raises StorageError: writing failed; the image must not be changed.
        """
        assert self.find(label.from_epoch, label.to_epoch, label.generation) is None
        while True:
            try:
                return self._write(label, fill, is_gap=False)
            except UndoOverflowError:
                break
            except NoSpaceError:
                if not self._passes:
                    break
                # The newest pass is worth more than old ones, which it would make unreachable.
                for each in self._passes[: (len(self._passes) + 1) // 2]:
                    self._drop(each.name)
        # What lies beyond a gap can never be restored again.
        self.drop_all()
        return self._write(label, lambda _: None, is_gap=True)

    def block_at(self, volume: int, block: int, epoch: int) -> bytes | None:
        """What a block held at `epoch`, 4096 bytes (a short last block padded), or None.

        None: it is unchanged since, the image has it. An epoch inside a pass gives the state at
        the start of that pass.

        :raises NotFoundError: undo does not reach back to `epoch`.
        :raises IntegrityError: a file is damaged.
        """
        newer = [each for each in self._passes if each.to_epoch > epoch]
        if newer and (newer[0].from_epoch > epoch or any(each.is_gap for each in newer)):
            raise NotFoundError(
                f"the state at epoch {epoch} is not kept any more",
                hint='"geomirror timeline" shows what is kept',
            )
        for each in newer:
            content = self._reader(each.name).read_block(volume, block)
            if content is not None:
                return content
        return None

    def reader(self, from_epoch: int, to_epoch: int) -> UndoReader:
        """The content of one pass.

        :raises NotFoundError: no such pass is kept.
        """
        found = self.find(from_epoch, to_epoch)
        if found is None:
            raise NotFoundError(f"no undo of epochs ({from_epoch}, {to_epoch}]")
        return self._reader(found.name)

    def drop_all(self) -> None:
        """Forget all undo, durably: before an image is overwritten without undo (resync)."""
        names = [each.name for each in self._passes] + sorted(self._damaged)
        for name in names:
            self._drop(name)
        if names:
            self._store.sync_directory(DIRECTORY)

    def close(self) -> None:
        """Close the files held open by readers."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _load(self) -> None:
        self._store.unlink(_TEMPORARY)
        for name in self._store.list(DIRECTORY):
            if not name.endswith(".und"):
                continue
            self._next = max(self._next, int(name.removesuffix(".und"), 16) + 1)
            path = f"{DIRECTORY}/{name}"
            file = self._store.open(path)
            try:
                self._passes.append(_inspect(file, path))
            except IntegrityError as error:
                self._damaged[path] = error
            finally:
                file.close()

    def _newest_name(self) -> str:
        return max([each.name for each in self._passes] + list(self._damaged), default="")

    def _write(
        self, label: PassLabel, fill: Callable[[UndoWriter], None], *, is_gap: bool
    ) -> PassInfo:
        self._store.unlink(_TEMPORARY)
        file = self._store.create(_TEMPORARY, 0)
        try:
            writer = UndoWriter(file)
            fill(writer)
            stored_bytes = writer.finish(label, is_gap=is_gap)
        finally:
            file.close()
        name = f"{DIRECTORY}/{self._next:016x}.und"
        self._store.rename(_TEMPORARY, name)
        self._next += 1
        self._enforce_budget(stored_bytes)
        self._store.sync_directory(DIRECTORY)
        info = PassInfo(
            **asdict(label),
            name=name,
            is_gap=is_gap,
            raw_bytes=writer.raw_bytes,
            stored_bytes=stored_bytes,
        )
        # Replaced, never changed: views on other threads look at it without a lock.
        self._passes = [*self._passes, info]
        return info

    def _enforce_budget(self, added_bytes: int) -> None:
        """Drop the oldest passes so that one more of `added_bytes` fits; it itself always does."""
        for name in list(self._damaged):
            self._drop(name)
        bytes_max, passes_max = self._limits.undo_bytes_max, self._limits.undo_passes_max
        stored = self.stored_bytes() + added_bytes
        while self._passes and (stored > bytes_max or len(self._passes) >= passes_max):
            stored -= self._passes[0].stored_bytes
            self._drop(self._passes[0].name)

    def _drop(self, name: str) -> None:
        reader = self._readers.pop(name, None)
        if reader is not None:
            reader.close()
        self._store.unlink(name)
        self._passes = [each for each in self._passes if each.name != name]
        self._damaged.pop(name, None)

    def _reader(self, name: str) -> UndoReader:
        reader = self._readers.get(name)
        if reader is None:
            if len(self._readers) >= _READERS_MAX:
                self._readers.pop(next(iter(self._readers))).close()
            reader = self._readers[name] = UndoReader(self._store.open(name), name)
        return reader


def _inspect(file: File, name: str) -> PassInfo:
    """What the file is; one that is damaged behind its header is a gap."""
    info = read_header(file, name)
    try:
        return UndoReader(file, name).info
    except IntegrityError:
        return replace(info, is_gap=True)
