"""Small array operations that cost little on the ten-entry tables that most epochs have.

`np.append`, `np.diff`, `np.any` and joining structured arrays spend most of their time on their
arguments, and an epoch of a few writes needs dozens of them. The same work done directly takes a
fraction of it (`bench costs` has the joining).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def run_heads(breaks: npt.NDArray[np.bool_]) -> Indices:
    """Where runs begin among n + 1 items, given whether item i + 1 breaks off from item i."""
    inner = breaks.nonzero()[0]
    heads = np.empty(len(inner) + 1, dtype=np.int64)
    heads[0] = 0
    np.add(inner, 1, out=heads[1:])
    return heads


def run_lengths(heads: Indices, total: int) -> Indices:
    """Items in each run, of `total` items in all; there is at least one run."""
    lengths = np.empty(len(heads), dtype=np.int64)
    lengths[:-1] = heads[1:] - heads[:-1]
    lengths[-1] = total - int(heads[-1])
    return lengths


def run_tails(heads: Indices, total: int) -> Indices:
    """The last item of each run, of `total` items in all; there is at least one run."""
    tails = np.empty(len(heads), dtype=np.int64)
    tails[:-1] = heads[1:] - 1
    tails[-1] = total - 1
    return tails


def joined(arrays: Sequence[npt.NDArray[np.void]], dtype: np.dtype[Any]) -> npt.NDArray[np.void]:
    """A new array of all records; `arrays` are of `dtype` and may be none."""
    if not arrays:
        return np.empty(0, dtype=dtype)
    if len(arrays) == 1:
        return arrays[0].copy()
    # Compared and joined as plain bytes: NumPy looks at every field of every array otherwise.
    plain = np.dtype((np.void, dtype.itemsize))
    return np.concatenate([array.view(plain) for array in arrays]).view(dtype)
