"""What undo passes are of, as columns of numbers: asked of ten thousand at once, without a loop.

```
 passes   (0,4]  (4,6]  (6,9] …      a tuple, for what is wanted of one of them
 columns  FROM 0 4 6 … / TO 4 6 9 … / WALL …      one row each, for what is wanted of all
```
Never changed: `spliced` makes others, at the cost of copying 64 bytes a pass.
Deliberately not here: what the numbers mean together (`undo_history`, `undo_levels`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from geomirror.volume.undo_label import PassInfo

Columns = npt.NDArray[np.int64]
"""Shape (8, passes); the rows are those below."""
Numbers = npt.NDArray[np.int64]
FROM, TO, WALL, RAW, STORED, GAP, GENERATION_LOW, GENERATION_HIGH = range(8)
_ROWS = 8
_GENERATION = struct.Struct("<qq")
WALL_NS_MAX = (1 << 63) - 1
"""What a peer says beyond it counts as this."""


def columns_of(passes: Sequence[PassInfo]) -> Columns:
    """The columns of these passes; none of them is part of an open one."""
    rows = [
        (
            each.from_epoch,
            each.to_epoch,
            min(each.wall_ns, WALL_NS_MAX),
            each.raw_bytes,
            each.stored_bytes,
            int(each.is_gap),
            *_GENERATION.unpack(each.generation),
        )
        for each in passes
    ]
    found = np.array(rows, dtype=np.int64).reshape(len(rows), _ROWS)
    return np.ascontiguousarray(found.T)


def spliced(columns: Columns, at: int, count: int, added: Sequence[PassInfo]) -> Columns:
    """Others with `added` in the place of `count` passes from `at` on."""
    parts = [columns[:, :at], columns_of(added), columns[:, at + count :]]
    return np.concatenate(parts, axis=1)


def follows(columns: Columns) -> npt.NDArray[np.bool_]:
    """Of each pass but the first: whether it begins where the one before it, no gap, ends."""
    found: npt.NDArray[np.bool_] = columns[FROM, 1:] == columns[TO, :-1]
    found &= columns[GAP, :-1] == 0
    return found
