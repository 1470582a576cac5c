"""Which epochs the journal holds, and where: one packed row per committed epoch.

```
 numbers   [ 38 ][ 39 ][ 40 ][ 44 ][ 45 ]        44 is a fold of 41…44
 rows      EPOCH record, LSN range, floor, …
 floors    lowest floor of each epoch and all later ones (ascending), for pins
```
A row's floor is a position below which nothing of that epoch lies. Epochs are appended at the end
and dropped at the front. About 250 bytes each: a day without a peer, at four epochs a second, costs
90 MB. `info` of a number that ends an epoch may be asked for on any thread, all else on the loop.
Deliberately not here: tables (`Engine.load_epoch` reads them from the journal), who needs what.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from geomirror.errors import NotFoundError

_ROW = struct.Struct("<11QB32s?")


class EpochInfo(NamedTuple):
    """A committed epoch: its EPOCH record is appended. Positions without a note are local."""

    number: int
    first_number: int
    record_lsn: int
    """LSN of the EPOCH record."""
    first_lsn: int
    """The primary's LSN range is [first_lsn, end_lsn)."""
    end_lsn: int
    boundary_lsn: int
    """Its WRITE, ZERO and TRIM records lie below, those of later epochs at or above."""
    data_lsn_min: int
    """Nothing of this epoch lies below."""
    raw_bytes: int
    """Bytes of its data blocks, the short last block of a volume counted whole."""
    entries: int
    """Entries in its table."""
    wall_ns: int
    previous_lsn: int
    """LSN of the EPOCH record before, 0 for none."""
    cut: int
    """Low byte of its cut number."""
    chain_hash: bytes
    is_mark: bool = False
    """Cut by a mark: no pass and no fold goes on past it."""


class EpochDirectory:
    """The committed epochs in the journal, ascending."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._rows: dict[int, bytes] = {}
        self._floor_numbers: list[int] = []
        self._floors: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def append(self, info: EpochInfo) -> None:
        """Add the next epoch."""
        assert not self._numbers or info.first_number == self._numbers[-1] + 1
        self._numbers.append(info.number)
        self._rows[info.number] = _ROW.pack(*info)
        # Floors that a later epoch undercuts can never be the lowest again.
        while self._floors and self._floors[-1] >= info.data_lsn_min:
            self._floors.pop()
            self._floor_numbers.pop()
        self._floors.append(info.data_lsn_min)
        self._floor_numbers.append(info.number)

    def numbers(self) -> list[int]:
        """Numbers of all epochs, ascending; of a fold, its last one."""
        return list(self._numbers)

    def info(self, number: int) -> EpochInfo:
        """The epoch or the fold that covers `number`.

        :raises NotFoundError: it is not in the journal.
        """
        row = self._rows.get(number)
        if row is not None:
            return EpochInfo._make(_ROW.unpack(row))
        at = bisect_left(self._numbers, number)
        if at < len(self._numbers):
            found = self._at(at)
            if found.first_number <= number:
                return found
        raise NotFoundError(f"epoch {number} is not in the journal")

    def last(self) -> EpochInfo | None:
        """The newest epoch."""
        return self._at(-1) if self._numbers else None

    def after(self, number: int, count_max: int | None = None) -> list[EpochInfo]:
        """All epochs > `number`, ascending, or the first `count_max` of them."""
        at = bisect_right(self._numbers, number)
        end = len(self._numbers)
        if count_max is not None:
            end = min(end, at + count_max)
        return [self._at(i) for i in range(at, end)]

    def first_after(self, number: int) -> EpochInfo | None:
        """The oldest epoch > `number`."""
        at = bisect_right(self._numbers, number)
        return self._at(at) if at < len(self._numbers) else None

    def floor_after(self, number: int) -> int | None:
        """A position below which nothing of any epoch > `number` lies; None without such epochs."""
        if not self._numbers or self._numbers[-1] <= number:
            return None
        return self._floors[bisect_right(self._floor_numbers, number)]

    def drop_through(self, number: int) -> None:
        """Forget epochs <= `number`."""
        at = bisect_right(self._numbers, number)
        for gone in self._numbers[:at]:
            del self._rows[gone]
        del self._numbers[:at]
        at = bisect_right(self._floor_numbers, number)
        del self._floor_numbers[:at]
        del self._floors[:at]

    def drop_after(self, number: int) -> None:
        """Forget epochs > `number`."""
        kept = [self._at(at) for at in range(bisect_right(self._numbers, number))]
        self.clear()
        for info in kept:
            self.append(info)

    def clear(self) -> None:
        """Forget all epochs."""
        self.__init__()  # type: ignore[misc]

    def _at(self, position: int) -> EpochInfo:
        return EpochInfo._make(_ROW.unpack(self._rows[self._numbers[position]]))
