"""Which states the undo of a resource leads back to, at one moment.

```
 image at 40 ◀─undo (30,40]─ 30 ◀─undo (28,30]─ 28 ◀─gap (20,28]─ ✗
```
Deliberately not here: files (`undo`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from geomirror.errors import NotFoundError
from geomirror.volume.undo_faults import Stretch, unusable
from geomirror.volume.undo_label import PassInfo


@dataclass(frozen=True)
class History:
    """What undo is kept, at one moment. Never changed: another one takes its place."""

    passes: tuple[PassInfo, ...]
    """Oldest first; those of a pass that is open come last."""
    incarnation: int
    """One more each time that images were made anew: no state from before can be restored."""
    newest_epoch: int | None = None
    """While the images are rolled back: no state after this epoch can be restored."""
    floor: int = 0
    """No state before this epoch can be restored: the pass that led to it is lost."""
    damaged: tuple[str, ...] = ()
    """Files whose header does not even tell what they are of."""

    def reaching(self, epoch: int) -> History:
        """The same for images at `epoch`, as they were found: the newest file may be missing.

        What ends before `epoch` would be taken for the way back from a later state.
        """
        ends = [each.to_epoch for each in self.passes if not each.is_part]
        return self if ends and ends[-1] >= epoch else replace(self, floor=epoch)

    def since(self, epoch: int) -> tuple[PassInfo, ...]:
        """The passes that lead from `epoch` to the image, which has to be one's boundary.

        :raises NotFoundError: undo does not reach back to it, or it lies within a pass.
        """
        if self.newest_epoch is not None and epoch > self.newest_epoch:
            raise NotFoundError(f"the state at epoch {epoch} is being rolled back")
        if epoch < self.floor:
            raise self._not_kept(epoch)
        at = bisect_right(self.passes, epoch, key=lambda each: each.to_epoch)
        whole = tuple(each for each in self.passes[at:] if not each.is_part)
        parts = self.passes[at + len(whole) :]
        start = parts[0].from_epoch if parts else epoch
        if epoch > start:
            raise NotFoundError(
                f"the state at epoch {epoch} cannot be looked at while the volumes go back to "
                f"epoch {start}"
            )
        expected, reached = epoch, {epoch}
        for each in whole:
            if each.from_epoch != expected or each.is_gap:
                break
            expected = each.to_epoch
            reached.add(expected)
        if start not in reached or len(reached) <= len(whole):
            raise self._not_kept(epoch)
        # Of a block that several hold the first one counts: the pass that is open comes after
        # those before its epoch, and is worth as much as those after it.
        split = bisect_right(whole, start, key=lambda each: each.to_epoch)
        return (*whole[:split], *parts, *whole[split:])

    def unusable(self, state_epoch: int, state_wall_ns: int = 0) -> list[Stretch]:
        """Every stretch that undo does not lead back across, oldest first, and why."""
        return unusable(self.passes, self.damaged, state_epoch, state_wall_ns)

    def _not_kept(self, epoch: int) -> NotFoundError:
        # Those of a pass that is open come last, but may be of an epoch before others.
        ends = [each.from_epoch if each.is_part else each.to_epoch for each in self.passes]
        state = max([self.floor, *ends])
        across = [each for each in self.unusable(state) if each.to_epoch > epoch]
        why = ""
        if across:
            first = f"{across[-1].from_epoch}-" if across[-1].from_epoch is not None else "…-"
            why = f": epochs {first}{across[-1].to_epoch}: {across[-1].reason}"
        return NotFoundError(
            f"the state at epoch {epoch} is not kept{why}",
            hint='"geomirror timeline" shows what is kept',
        )

    def kept(self, applied_epoch: int) -> tuple[PassInfo, ...]:
        """The passes that lead to `applied_epoch` without a hole, oldest first.

        The state at the start of the first and at the end of each of them can be restored.
        """
        end = bisect_right(self.passes, applied_epoch, key=lambda each: each.to_epoch)
        start, expected = end, applied_epoch
        while start > 0:
            each = self.passes[start - 1]
            if each.to_epoch != expected or each.is_gap:
                break
            start, expected = start - 1, each.from_epoch
        return self.passes[start:end]

    def horizon(self, applied_epoch: int) -> int:
        """The oldest epoch whose state can be restored from an image at `applied_epoch`."""
        kept = self.kept(applied_epoch)
        return kept[0].from_epoch if kept else applied_epoch
