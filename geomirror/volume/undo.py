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

from collections.abc import Callable, Sequence
from dataclasses import replace

from geomirror.errors import FencedError, IntegrityError, NoSpaceError, NotFoundError
from geomirror.limits import Limits
from geomirror.volume.store import File, Store
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoReader, UndoWriter, read_header
from geomirror.volume.undo_history import History, covers

DIRECTORY = "undo"
_TEMPORARY = f"{DIRECTORY}/pass.new"
_SUFFIX = ".und"
_JOINT = f"{DIRECTORY}/rollback.new"
"""The pass from a boundary to the epoch that a rollback goes back to, until that is done."""
OPEN_SUFFIX = ".open"
_MERGED = ".m"
"""Between the number of the newest of the merged passes and how often it was merged."""


class UndoOverflowError(Exception):
    """Raised by the source of before-images when the pass has become too large to keep."""


class StoppedError(Exception):
    """Raised within a job that was asked to stop: what it wrote so far does not count."""


class UndoStore:
    """All undo files of one resource.

    :param start_counter: lowest number for the next file (`undo_next` of the superblock).
    :param open_number: of the file of the pass that is open; any other open one is removed.
    :raises StorageError: the directory cannot be read.
    """

    def __init__(
        self, store: Store, limits: Limits, start_counter: int = 1, open_number: int | None = None
    ) -> None:
        self._store = store
        self._limits = limits
        self._next = start_counter
        self._history = History((), 0)
        self._pins: dict[str, int] = {}
        self.kept_after: int | None = None
        """Passes after this epoch tell what must not go back to it: none is dropped, nor is one
        left out for its size."""
        self.is_void = False
        """The images are being made anew; `drop_all` is due."""
        self._damaged: dict[str, IntegrityError] = {}
        self.left_over: list[str] = []
        """Files that mean nothing once the next superblock is durable."""
        self._load("" if open_number is None else f"{open_number:016x}")

    @property
    def next_counter(self) -> int:
        """Number of the next file; never reused while the superblock remembers it."""
        return self._next

    @property
    def history(self) -> History:
        """What is kept now; the same object until that changes. On any thread."""
        return self._history

    def passes(self) -> list[PassInfo]:
        """The passes kept, oldest first."""
        return list(self._passes)

    def image_is_at(self, epoch: int) -> None:
        """Where the images are when a resource is opened."""
        self._history = self._history.reaching(epoch)

    def pin(self, owner: str, epoch: int) -> None:
        """Keep what is needed to restore the state at `epoch`, for as long as there is room."""
        self._pins[owner] = epoch

    def unpin(self, owner: str) -> None:
        """`owner` needs nothing any more."""
        self._pins.pop(owner, None)

    def pinned_epochs(self) -> list[int]:
        """The epochs that owners of pins look at."""
        return sorted(set(self._pins.values()))

    def replace(
        self, passes: Sequence[PassInfo], label: PassLabel, fill: Callable[[UndoWriter], None]
    ) -> None:
        """Put one pass in the place of adjacent ones, durably; a crash leaves either.

        :raises StorageError: nothing changed.
        """
        base, _, merges = passes[-1].name.removesuffix(_SUFFIX).partition(_MERGED)
        name = f"{base}{_MERGED}{int(merges or '0') + 1}{_SUFFIX}"
        info = self._write_file(name, label, fill, is_gap=False)
        self._store.sync_directory(DIRECTORY)
        replaced = {each.name for each in passes}
        at = self._passes.index(passes[0])
        rest = self._passes[at + len(passes) :]
        assert {each.name for each in self._passes[at : at + len(passes)]} == replaced
        self._keep((*self._passes[:at], info, *rest))
        for gone in passes:
            self._store.unlink(gone.name)

    def check(self, info: PassInfo) -> None:
        """Read a pass through; one that is damaged counts as a gap from now on. Blocking."""
        try:
            reader = UndoReader(self._store.open(info.name), info.name)
            try:
                reader.verify()
            finally:
                reader.close()
        except IntegrityError:
            gap = replace(info, is_gap=True)
            self._keep([gap if each == info else each for each in self._passes])

    def drop_oldest(self, count: int) -> None:
        """Forget the oldest passes."""
        for each in self._passes[:count]:
            self._drop(each.name)

    def void(self) -> None:
        """The images are about to be made anew: no earlier state can be had from now on.

        Files stay until `drop_all`, since they may be what a crash has to repeat.
        """
        self._history = replace(self._history, incarnation=self._history.incarnation + 1)
        self.is_void = True

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
            if found.is_part:
                continue  # Of a resync: the image is none by itself, or is going back.
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
                free = self._droppable()
                if not free and self.kept_after is not None:
                    raise
                if not free:
                    break
                # The newest pass is worth more than old ones, which it would make unreachable.
                for each in free[: (len(free) + 1) // 2]:
                    self._drop(each.name)
        # What lies beyond a gap can never be restored again.
        self.drop_all()
        return self._write(label, lambda _: None, is_gap=True)

    def _droppable(self) -> list[PassInfo]:
        """Passes that may make room for others, oldest first."""
        whole = [each for each in self._passes if not each.is_part]
        kept = self.kept_after
        return whole if kept is None else [each for each in whole if each.to_epoch <= kept]

    # Rollback.

    def close_after(self, epoch: int) -> None:
        """States after `epoch` are about to be gone: nobody may look at one from now on."""
        self._history = replace(self._history, newest_epoch=epoch)

    def save_joint(self, label: PassLabel, fill: Callable[[UndoWriter], None]) -> None:
        """Write the pass that `roll_back` will put at the end, durably.

        :raises StorageError: nothing changed.
        """
        self._write_file(_JOINT, label, fill, is_gap=False)
        self._store.sync_directory(DIRECTORY)

    def roll_back(self, to_epoch: int) -> None:
        """Drop all passes that lead past `to_epoch`, and let a saved joint lead to it; durable.

        Repeating it after a crash in it does the rest.
        """
        for each in reversed(self._passes):
            if each.to_epoch > to_epoch:
                self._drop(each.name)
        for name in list(self._damaged):
            self._drop(name)
        # Before the joint has its name: a merged pass that is still there would seem to cover it.
        self._store.sync_directory(DIRECTORY)
        passes = self._passes
        if self._store.exists(_JOINT):
            name = f"{DIRECTORY}/{self._next:016x}{_SUFFIX}"
            self._store.rename(_JOINT, name)
            self._next += 1
            file = self._store.open(name)
            try:
                passes = (*passes, _inspect(file, name))
            finally:
                file.close()
        self._store.sync_directory(DIRECTORY)
        left = replace(self._history, passes=passes, newest_epoch=None, floor=0)
        self._history = left.reaching(to_epoch)

    def drop_joint(self) -> None:
        """Forget a joint whose rollback was never begun."""
        self._store.unlink(_JOINT)

    def reader(self, from_epoch: int, to_epoch: int) -> UndoReader:
        """The content of one pass; to be closed.

        :raises NotFoundError: no such pass is kept.
        """
        found = self.find(from_epoch, to_epoch)
        if found is None:
            raise NotFoundError(f"no undo of epochs ({from_epoch}, {to_epoch}]")
        return UndoReader(self._store.open(found.name), found.name)

    def drop_all(self) -> None:
        """Forget all undo, durably: before an image is overwritten without undo (resync)."""
        names = [each.name for each in self._passes] + sorted(self._damaged)
        for name in names:
            self._drop(name)
        if names:
            self._store.sync_directory(DIRECTORY)
        self.is_void = False

    def drop_due(self) -> None:
        """Forget what the superblock that is durable now has no use for. Blocking."""
        if self.is_void:
            self.drop_all()
        while self.left_over:
            self._store.unlink(self.left_over[-1])
            self.left_over.pop()

    # The pass that is open (`undo_open`).

    def reserve(self) -> int:
        """A number for a file; never given again while the superblock remembers it."""
        self._next += 1
        return self._next - 1

    def show_open(self, groups: Sequence[PassInfo], closed: PassInfo | None = None) -> None:
        """The open pass has these groups now; or it is closed, and this is what became of it."""
        whole = [each for each in self._passes if not each.is_part]
        self._keep([*whole, *groups] if closed is None else [*whole, closed])

    def _load(self, open_stem: str) -> None:
        self._store.unlink(_TEMPORARY)
        found: list[PassInfo] = []
        for name in self._store.list(DIRECTORY):
            if name.partition(".")[0] == open_stem:
                continue
            if name.endswith(OPEN_SUFFIX):
                self._store.unlink(f"{DIRECTORY}/{name}")  # Its pass never began, or was undone.
            if not name.endswith(_SUFFIX):
                continue
            self._next = max(self._next, int(name.partition(".")[0], 16) + 1)
            path = f"{DIRECTORY}/{name}"
            file = self._store.open(path)
            try:
                found.append(_inspect(file, path))
            except IntegrityError as error:
                self._damaged[path] = error
            finally:
                file.close()
        merged = [each for each in found if _MERGED in each.name and not each.is_gap]
        covered = {each.name for each in found if any(covers(big, each) for big in merged)}
        self._keep([each for each in found if each.name not in covered])
        for name in sorted(covered):
            self._store.unlink(name)

    def _keep(self, passes: Sequence[PassInfo]) -> None:
        # Replaced, never changed: views on other threads look at it without a lock.
        self._history = replace(self._history, passes=tuple(passes))

    @property
    def _passes(self) -> tuple[PassInfo, ...]:
        return self._history.passes

    def _newest_name(self) -> str:
        return max([each.name for each in self._passes] + list(self._damaged), default="")

    def _write(
        self, label: PassLabel, fill: Callable[[UndoWriter], None], *, is_gap: bool
    ) -> PassInfo:
        name = f"{DIRECTORY}/{self._next:016x}{_SUFFIX}"
        info = self._write_file(name, label, fill, is_gap=is_gap)
        self._next += 1
        self._enforce_budget(info.stored_bytes)
        self._store.sync_directory(DIRECTORY)
        parts = [each for each in self._passes if each.is_part]
        self._keep((*self._passes[: len(self._passes) - len(parts)], info, *parts))
        return info

    def _write_file(
        self, name: str, label: PassLabel, fill: Callable[[UndoWriter], None], *, is_gap: bool
    ) -> PassInfo:
        """Write a file and give it its name, which is not durable yet."""
        self._store.unlink(_TEMPORARY)
        file = self._store.create(_TEMPORARY, 0)
        try:
            writer = UndoWriter(file)
            fill(writer)
            stored_bytes = writer.finish(label, is_gap=is_gap)
        finally:
            file.close()
        self._store.rename(_TEMPORARY, name)
        return PassInfo(
            **vars(label),
            name=name,
            is_gap=is_gap,
            raw_bytes=writer.raw_bytes,
            stored_bytes=stored_bytes,
        )

    def _enforce_budget(self, added_bytes: int) -> None:
        """Drop the oldest passes so that one more of `added_bytes` fits; it itself always does."""
        for name in list(self._damaged):
            self._drop(name)
        bytes_max, passes_max = self._limits.undo_bytes_max, self._limits.undo_passes_max
        whole = [each for each in self._passes if not each.is_part]
        count = len(whole)
        stored = sum(each.stored_bytes for each in whole) + added_bytes
        pinned = min(self._pins.values(), default=None)
        for oldest in self._droppable():
            # What a view looks at may take as much again, so that neither ends the other soon.
            factor = 1 if pinned is None or oldest.to_epoch <= pinned else 2
            if stored <= factor * bytes_max and count < factor * passes_max:
                break
            stored, count = stored - oldest.stored_bytes, count - 1
            self._drop(oldest.name)

    def _drop(self, name: str) -> None:
        self._keep([each for each in self._passes if each.name != name])
        self._damaged.pop(name, None)
        self._store.unlink(name)


def _inspect(file: File, name: str) -> PassInfo:
    """What the file is; one that is damaged behind its header is a gap."""
    info = read_header(file, name)
    try:
        return UndoReader(file, name).info
    except IntegrityError:
        return replace(info, is_gap=True)
