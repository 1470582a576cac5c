"""Finding blocks that are all zero in a buffer, without touching most of its bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.store import Buffer

ZERO_BLOCK = bytes(BLOCK_BYTES)
"""The content of a block that reads as zeros."""
_WORDS = BLOCK_BYTES // 8


def zero_mask(data: Buffer) -> npt.NDArray[np.bool_]:
    """For each 4096-byte block of `data` whether it is all zero; a short last block counts too."""
    whole = len(data) // BLOCK_BYTES
    words = np.frombuffer(data, dtype=np.uint64, count=whole * _WORDS).reshape(whole, _WORDS)
    # One word decides nearly every block that holds data; only the rest is read whole.
    mask: npt.NDArray[np.bool_] = (words[:, 0] | words[:, -1]) == 0
    suspects = np.flatnonzero(mask)
    if len(suspects):
        mask[suspects] = ~words[suspects].any(axis=1)
    if len(data) % BLOCK_BYTES:
        tail = bytes(memoryview(data)[whole * BLOCK_BYTES :])
        mask = np.append(mask, tail.count(0) == len(tail))
    return mask


def with_holes(
    zero: npt.NDArray[np.bool_], are_holes: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.bool_]:
    """Which of some blocks are zeros, where only those outside of holes were looked at.

    :param zero: of each block that is no hole, whether it is all zero.
    :param are_holes: of each block, whether it is one; None: none is.
    """
    if are_holes is None or not are_holes.any():
        return zero
    found = are_holes.copy()
    found[~are_holes] = zero
    return found
