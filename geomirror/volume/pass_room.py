"""How much the before-images of one apply pass may take, asked for as they are written.

```
 stored    at most undo_bytes_max ¹       all that history may hold ─┐
 blocks    at most rollback_entries_max   a rollback reads no more   ├─▶ too large: a gap
 runs      at most view_entries_max       they are in memory        ─┘
 the disk  undo_free_bytes_min stays free ─▶ older history makes room; no more of it: a gap
```
¹ but an ordinary pass (`apply_pass_bytes_max`) is kept, however small the budget.
Memory: 24 bytes a run until the file is finished, about 100 while that is done; contents are 1 MiB.
Deliberately not here: what a gap costs (`undo`), what is dropped for a new pass (`undo_kept`).
"""

from __future__ import annotations

from collections.abc import Callable

from geomirror.errors import NoSpaceError
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.undo import UndoOverflowError
from geomirror.volume.undo_file import UndoWriter

_LOOKS = 64
"""How often the free space is looked at while as much is written as has to stay free."""


class PassRoom:
    """Of one attempt to write the undo of a pass.

    :param free_bytes: left of the disk that the undo lies on.
    """

    def __init__(self, limits: Limits, free_bytes: Callable[[], int]) -> None:
        self._limits = limits
        self._free_bytes = free_bytes
        self._looked_at = 0

    def check(self, writer: UndoWriter) -> None:
        """Call every MiB or so.

        :raises UndoOverflowError: it can never be kept, or never be read.
        :raises NoSpaceError: it would take what journal and images need of the disk.
        """
        limits = self._limits
        if (
            writer.stored_bytes > max(limits.undo_bytes_max, limits.apply_pass_bytes_max)
            or writer.raw_bytes > limits.rollback_entries_max * BLOCK_BYTES
            or writer.entry_count > limits.view_entries_max
        ):
            raise UndoOverflowError
        # Small passes are not asked: what they take comes back with the next old one.
        if writer.stored_bytes - self._looked_at < limits.undo_free_bytes_min // _LOOKS:
            return
        self._looked_at = writer.stored_bytes
        if self._free_bytes() < limits.undo_free_bytes_min:
            raise NoSpaceError(
                f"undo: less than {limits.undo_free_bytes_min} bytes would be left of the disk"
            )
