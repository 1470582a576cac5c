"""How large each volume was at each epoch that the journal still holds.

```
 known at the start ──change in 41──change in 57──▶ now      at(e): now, without changes after e
```
`now` is after the open epoch on a primary, after the committed one on a secondary; an image has the
size of the applied epoch (`Image.size_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from geomirror.volume.volume_change import VolumeChange, merge_changes


class VolumeSizes:
    """Sizes in bytes by volume index. For the event loop only.

    :param volumes: (index, name, size) before the changes that are added.
    """

    def __init__(self, volumes: Iterable[tuple[int, str, int]]) -> None:
        self.now: dict[int, int] = {}
        """After all changes; changed in place, so that it may be looked at for ever."""
        self.names: dict[int, str] = {}
        self._changes: list[tuple[int, VolumeChange]] = []
        self.reset(volumes)

    def reset(self, volumes: Iterable[tuple[int, str, int]]) -> None:
        """Forget all changes: these are the volumes."""
        self.now.clear()
        self.names.clear()
        self._changes.clear()
        for index, name, size_bytes in volumes:
            if size_bytes:
                self.now[index] = size_bytes
                self.names[index] = name

    def add(self, epoch: int, changes: Iterable[VolumeChange]) -> None:
        """Take changes of an epoch, not below that of the last one."""
        for change in changes:
            assert not self._changes or self._changes[-1][0] <= epoch
            assert self.now.get(change.index, 0) == change.old_size_bytes
            self._changes.append((epoch, change))
            self.now[change.index] = change.size_bytes
            self.names[change.index] = change.name

    def note_past(self, epoch: int, changes: Iterable[VolumeChange]) -> None:
        """Take changes that are in `now` already, of an epoch below all that were added."""
        self._changes[:0] = [(epoch, change) for change in changes]

    def cut(self, epoch: int, sizes: Mapping[int, int]) -> None:
        """Forget changes after an epoch, at which the volumes had these sizes."""
        self._changes = [each for each in self._changes if each[0] <= epoch]
        for index in [each for each in self.now if not sizes.get(each)]:
            del self.now[index], self.names[index]
        self.now.update({index: sizes[index] for index in self.now})

    @property
    def newest_change(self) -> int:
        """Epoch of the newest change that the journal still has; -1 when it has none."""
        return self._changes[-1][0] if self._changes else -1

    def at(self, epoch: int) -> dict[int, int]:
        """Sizes after an epoch."""
        sizes = dict(self.now)
        for number, change in reversed(self._changes):
            if number <= epoch:
                break
            if change.is_addition:
                del sizes[change.index]
            else:
                sizes[change.index] = change.old_size_bytes
        return sizes

    def between(self, epoch: int, through: int) -> tuple[VolumeChange, ...]:
        """What changed in (epoch, through], one change per volume."""
        return merge_changes(each for number, each in self._changes if epoch < number <= through)
