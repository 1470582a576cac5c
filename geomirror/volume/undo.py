"""The undo of a resource: one file per apply pass, newest last, within a budget.

```
 image at 40 ◀─undo (30,40]─ 30 ◀─undo (28,30]─ 28 ◀─gap (20,28]─ ✗
```
State at epoch e of a block = the pass with the smallest `to` > e that holds it, else the image.
Invariant I6: a pass is durable before an image block changes, and never made anew from a
half-applied image. So a file damaged beyond its header counts as a gap, never as absent; one whose
header is damaged, as the newest, is an error that stops the resource, unless a checkpoint knows
that its pass is in the image. What is given up for want of room is noted (`take_losses`).
Not thread-safe but for `suspect`: one job at a time uses a store.
Deliberately not here: the format of a file (`undo_file`), the budget (`undo_kept`), reading the old
contents (`apply`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from geomirror.errors import FencedError, NoSpaceError, NotFoundError
from geomirror.limits import Limits
from geomirror.volume.store import Store
from geomirror.volume.undo_faults import NO_SPACE, TOO_LARGE
from geomirror.volume.undo_file import UndoReader, UndoWriter
from geomirror.volume.undo_kept import TEMPORARY, KeptUndo
from geomirror.volume.undo_label import PassInfo, PassLabel
from geomirror.volume.undo_load import (
    DIRECTORY,
    MERGED,
    OPEN_SUFFIX,
    SUFFIX,
    find_undo,
    inspect,
    number_of,
)

__all__ = ["DIRECTORY", "OPEN_SUFFIX"]  # And everything below.

_JOINT = f"{DIRECTORY}/rollback.new"
"""The pass from a boundary to the epoch that a rollback goes back to, until that is done."""


class UndoOverflowError(Exception):
    """Raised by the source of before-images when the pass has become too large to keep."""


class StoppedError(Exception):
    """Raised within a job that was asked to stop: what it wrote so far does not count."""


class UndoStore(KeptUndo):
    """All undo files of one resource.

    :param start_counter: lowest number for the next file (`undo_next` of the superblock).
    :param open_number: of the file of the pass that is open; any other open one is removed.
    :raises StorageError: the directory cannot be read.
    """

    def __init__(
        self, store: Store, limits: Limits, start_counter: int = 1, open_number: int | None = None
    ) -> None:
        super().__init__(store, limits)
        self._next = start_counter
        self.is_void = False
        """The images are being made anew; `drop_all` is due."""
        self.left_over: list[str] = []
        """Files that mean nothing once the next superblock is durable."""
        self.settled_number = 0
        """Passes of files with lower numbers are in the images, as a whole."""
        self._load("" if open_number is None else f"{open_number:016x}")

    @property
    def next_counter(self) -> int:
        """Number of the next file; never reused while the superblock remembers it."""
        return self._next

    def replace(
        self, passes: Sequence[PassInfo], label: PassLabel, fill: Callable[[UndoWriter], None]
    ) -> None:
        """Put one pass in the place of adjacent ones, durably; a crash leaves either.

        :raises StorageError: nothing changed.
        """
        base, _, merges = passes[-1].name.removesuffix(SUFFIX).partition(MERGED)
        name = f"{base}{MERGED}{int(merges or '0') + 1}{SUFFIX}"
        is_resync = any(each.is_resync for each in passes)
        info = self._write_file(name, label, fill, is_resync=is_resync)
        self._store.sync_directory(DIRECTORY)
        at = self._history.position_of(passes[0])
        assert at is not None
        assert self._history.whole[at : at + len(passes)] == tuple(passes)
        self._history = self._history.spliced(at, len(passes), [info])
        for gone in passes:
            self._store.unlink(gone.name)

    def drop_oldest(self, count: int) -> None:
        """Forget the oldest passes."""
        self._drop([each.name for each in self._history.whole[:count]])
        self._drop_damaged()

    def found(self, state_epoch: int | None, settled_number: int) -> None:
        """At a start: what the superblock knows of the images.

        :param state_epoch: that they hold, or that they held before the resync that is under way;
            None while they are rolled back, which sets it in the end.
        :param settled_number: passes of files with lower numbers are in the images, as a whole.
        """
        self.settled_number = settled_number
        if state_epoch is not None:
            self.image_is_at(state_epoch)

    def image_is_at(self, epoch: int) -> None:
        """Where the images are when a resource is opened."""
        self._history = self._history.reaching(epoch)

    def void(self) -> None:
        """The images are about to be made anew: no earlier state can be had from now on.

        Files stay until `drop_all`, since they may be what a crash has to repeat.
        """
        # A floor is of the images that were: other ones may be at a lower epoch.
        self._history = replace(self._history, incarnation=self._history.incarnation + 1, floor=0)
        self.is_void = True

    def pending_pass(self, applied_epoch: int) -> tuple[int, int] | None:
        """The (from, to] that a crash may have left half applied, if there is one.

        An image at `applied_epoch` may hold some blocks of `to`: exactly that pass has to be
        done again before the image is read.

        :raises FencedError: the newest undo file is damaged, so that this cannot be known.
        """
        newest = self._newest_name() if self._damaged else ""
        if newest in self._damaged and number_of(newest) >= self.settled_number:
            raise FencedError(
                f"the image may be half applied and {self._damaged[newest].message}",
                hint='keep the data directory; make this copy anew with "geomirror resync"',
            )
        # Parts are of a resync: the image is none by itself, or is going back.
        whole = self._history.whole
        at = bisect_right(whole, applied_epoch, key=lambda each: each.from_epoch) - 1
        if at < 0 or whole[at].from_epoch != applied_epoch:
            return None
        return applied_epoch, whole[at].to_epoch

    def find(
        self, from_epoch: int, to_epoch: int, generation: bytes | None = None
    ) -> PassInfo | None:
        """The file of exactly this pass, if it was made durable before.

        :param generation: of `to_epoch`; None for any.
        """
        found = self._history.find(from_epoch, to_epoch)
        is_it = found is not None and generation in (None, found.generation)
        return found if is_it else None

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
                return self._write(label, fill)
            except UndoOverflowError:
                fault = TOO_LARGE
                break
            except NoSpaceError:
                fault = NO_SPACE
                free = self._droppable()
                if not free and self.kept_after is not None:
                    raise
                if not free:
                    break
                # The newest pass is worth more than old ones, which it would make unreachable.
                self._give_up((len(free) + 1) // 2, NO_SPACE)
        # What lies beyond a gap can never be restored again.
        self._lost(fault, label.to_epoch, label.from_epoch)
        self.drop_all()
        return self._write(label, lambda _: None, fault)

    # Rollback.

    def close_after(self, epoch: int) -> None:
        """States after `epoch` are about to be gone: nobody may look at one from now on."""
        self._history = replace(self._history, newest_epoch=epoch)

    def save_joint(self, label: PassLabel, fill: Callable[[UndoWriter], None]) -> None:
        """Write the pass that `roll_back` will put at the end, durably.

        :raises StorageError: nothing changed.
        """
        self._write_file(_JOINT, label, fill)
        self._store.sync_directory(DIRECTORY)

    def roll_back(self, to_epoch: int) -> None:
        """Drop all passes that lead past `to_epoch`, and let a saved joint lead to it; durable.

        Repeating it after a crash in it does the rest.
        """
        gone = [each.name for each in reversed(self._passes) if each.to_epoch > to_epoch]
        self._drop([*dict.fromkeys(gone), *self._damaged])
        # Before the joint has its name: a merged pass that is still there would seem to cover it.
        self._store.sync_directory(DIRECTORY)
        passes = self._passes
        if self._store.exists(_JOINT):
            name = f"{DIRECTORY}/{self._next:016x}{SUFFIX}"
            self._store.rename(_JOINT, name)
            self._next += 1
            file = self._store.open(name)
            try:
                passes = (*passes, inspect(file, name))
            finally:
                file.close()
        self._store.sync_directory(DIRECTORY)
        left = replace(
            self._history,
            passes=tuple(passes),
            newest_epoch=None,
            floor=0,
            damaged=tuple(self._damaged),
        )
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
        self._drop(list(dict.fromkeys(names)))
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
        history = self._history.with_parts(groups)
        if closed is not None:
            history = history.with_parts(()).spliced(len(history.whole), 0, [closed])
        self._history = history

    def _load(self, open_stem: str) -> None:
        self._store.unlink(TEMPORARY)
        found = find_undo(self._store, open_stem, self._limits.undo_inspected_max)
        self._next = max(self._next, found.next_number)
        self._damaged = found.damaged
        self._unseen = found.unseen
        self._keep(found.passes)

    def _newest_name(self) -> str:
        # Of what is whole, and of a resync: names grow with time.
        ends = (*self._history.whole[-1:], *self._history.parts[-1:])
        return max([*(each.name for each in ends), *self._damaged], default="")

    def _write(
        self, label: PassLabel, fill: Callable[[UndoWriter], None], fault: str = ""
    ) -> PassInfo:
        name = f"{DIRECTORY}/{self._next:016x}{SUFFIX}"
        info = self._write_file(name, label, fill, fault)
        self._next += 1
        self._enforce_budget(info.stored_bytes)
        self._store.sync_directory(DIRECTORY)
        self._history = self._history.spliced(len(self._history.whole), 0, [info])
        return info
