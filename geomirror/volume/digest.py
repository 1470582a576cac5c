"""The 128-bit digest of block contents, for many blocks at a time.

Every digest in an epoch table is XXH3-128 as a 128-bit little-endian integer: `digest_low` holds
its low 64 bits, `digest_high` the high ones. The canonical form of XXH3 is big endian, so the
halves are swapped here, once, in numpy.
Deliberately not here: what an all-zero block means (`seal` enters it as ZERO).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.store import Buffer

Halves = npt.NDArray[np.uint64]


def digests_of(contents: Iterable[Buffer]) -> tuple[Halves, Halves]:
    """(low, high) halves of the digests of `contents`, in order (`bench costs`)."""
    joined = b"".join(map(xxhash.xxh3_128_digest, contents))
    pairs = np.frombuffer(joined, dtype=">u8").reshape(-1, 2)
    return pairs[:, 1].astype(np.uint64), pairs[:, 0].astype(np.uint64)


def digest_of(content: Buffer) -> tuple[int, int]:
    """(low, high) halves of the digest of one block."""
    value = int(xxhash.xxh3_128_intdigest(content))
    return value & 0xFFFF_FFFF_FFFF_FFFF, value >> 64


ZERO_DIGEST = digest_of(bytes(BLOCK_BYTES))
"""(low, high) of a whole block of zeros; a hint only: equal contents are compared really."""
