"""How far back the journal is kept, so that a rollback can end within an apply pass.

```
 undo boundaries   b0 ───── b1 ───── b2 ───── applied
 journal                    ├ way back ┤ …        a rollback to any epoch from b1 on is possible
```
A primary needs the newest boundary that every streaming peer has durable: none of them can make it
go back further but by choice. What a secondary may have to go back to is not known here: it keeps
what the bounds allow.
Deliberately not here: what peers need for themselves (`retention`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from geomirror.limits import Limits
from geomirror.volume.epoch_directory import EpochDirectory
from geomirror.volume.superblock import Superblock
from geomirror.volume.undo_history import History

WAY_BACK = "way back"
"""Owner of the pin. Peers are called like nodes, which have no spaces in their names."""


def way_back_floor(history: History, superblock: Superblock, limits: Limits) -> int:
    """The boundary after which the epochs are wanted, before looking at the journal."""
    boundaries = _boundaries(history, superblock, limits)
    if superblock.role == "primary":
        through = _through(superblock)
        return boundaries[max(bisect_right(boundaries, through) - 1, 0)]
    return boundaries[0]


def way_back(
    history: History, superblock: Superblock, directory: EpochDirectory, limits: Limits
) -> int:
    """The boundary from which on every epoch is to be kept in the journal."""
    applied = superblock.applied_epoch
    last = directory.last()
    if superblock.data_state != "consistent" or last is None:
        return applied
    pending = superblock.rollback
    first = directory.first_after(-1)
    assert first is not None
    floor = way_back_floor(history, superblock, limits)
    boundaries = _boundaries(history, superblock, limits)
    bytes_max = limits.way_back_bytes(superblock.journal_bytes)

    def is_near(boundary: int) -> bool:
        lsn = directory.floor_after(boundary)
        return lsn is None or last.record_lsn - lsn <= bytes_max

    # Floors grow with epochs: what is near stays near.
    start = bisect_left(boundaries, max(floor, first.first_number - 1))
    at = bisect_left(boundaries, True, lo=start, key=is_near)
    found = boundaries[at] if at < len(boundaries) else applied
    return found if pending is None else min(found, pending.boundary_epoch)


def _boundaries(history: History, superblock: Superblock, limits: Limits) -> Sequence[int]:
    """The states that undo leads to and that are not too many epochs ago, ascending."""
    applied = superblock.applied_epoch
    found = history.boundaries(applied, applied - limits.way_back_epochs_max)
    if superblock.rollback is not None:
        found.insert(0, min(found[0], superblock.rollback.boundary_epoch))
    return found


def _through(superblock: Superblock) -> int:
    """The newest epoch that every peer has durable that is sent the stream."""
    streaming = [
        record.durable_epoch for record in superblock.peers.values() if record.mode != "Bitmap"
    ]
    return min([superblock.applied_epoch, *streaming])
