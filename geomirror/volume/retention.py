"""Who still needs which epochs, as pins on the journal.

```
 checkpoint ─▶ pin at the persisted scan position     (recovery starts there)
 peer a     ─▶ pin at the floor of its first needed epoch
 seal       ─▶ pin from a cut until its EPOCH record is appended
```
Invariant: an epoch in the directory is readable. It leaves the directory only when it is applied by
a durable checkpoint and no owner needs it; pins move in the same step, so trimming follows.
Deliberately not here: trimming itself (`Journal.trim_job`).
"""

from __future__ import annotations

from geomirror.volume.epoch_directory import EpochDirectory
from geomirror.volume.journal import Journal, Pin


class Retention:
    """The pins of one resource. For the event loop only."""

    def __init__(self, journal: Journal, directory: EpochDirectory, scan_lsn: int) -> None:
        self._journal = journal
        self._directory = directory
        self._owners: dict[str, tuple[int, Pin]] = {}
        self._checkpoint = journal.pin(scan_lsn, "checkpoint")
        self._checkpoint_epoch = 0
        self._seal: Pin | None = None

    @property
    def scan_lsn(self) -> int:
        """Nothing at or above it is trimmed: everything that is not applied lies there."""
        return self._checkpoint.lsn

    def owners(self) -> dict[str, int]:
        """The newest epoch that each owner does not need, by owner."""
        return {name: epoch for name, (epoch, _) in self._owners.items()}

    def retain(self, owner: str, epoch: int, start_lsn: int) -> None:
        """Keep every epoch > `epoch` for `owner`, as far as they are still there.

        :param start_lsn: below it nothing lies that a later epoch can need.
        """
        floor = self._directory.floor_after(epoch)
        lsn = start_lsn if floor is None else min(floor, start_lsn)
        held = self._owners.get(owner)
        if held is not None and held[1].lsn <= lsn:
            held[1].move(lsn)
            self._owners[owner] = (epoch, held[1])
        else:
            # A pin never goes back; what the directory still has is held by another pin until now.
            self._owners[owner] = (epoch, self._journal.pin(lsn, owner))
            if held is not None:
                held[1].release()
        self._drop()

    def release(self, owner: str) -> None:
        """`owner` needs nothing any more."""
        held = self._owners.pop(owner, None)
        if held is not None:
            held[1].release()
        self._drop()

    def checkpointed(self, epoch: int, scan_lsn: int) -> None:
        """A durable checkpoint says that `epoch` is applied and recovery starts at `scan_lsn`."""
        self._checkpoint_epoch = epoch
        self._checkpoint.move(scan_lsn)
        self._drop()

    def begin_seal(self) -> None:
        """Keep what a draft may read, until `end_seal`."""
        assert self._seal is None
        self._seal = self._journal.pin(self.scan_lsn, "seal")

    def end_seal(self) -> None:
        """The draft is sealed: its epoch is in the directory."""
        assert self._seal is not None
        self._seal.release()
        self._seal = None

    def _drop(self) -> None:
        epochs = [epoch for epoch, _ in self._owners.values()]
        self._directory.drop_through(min([self._checkpoint_epoch, *epochs]))
