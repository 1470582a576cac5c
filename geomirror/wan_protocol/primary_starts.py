"""How a copy notices that its primary's disk was put back to an older state.

```
 at the primary   A @0 ──────── 60 ─ 61 ─ … ─ 100        start A seals and ships epochs 1…100
    put back      A @0 ─ … ─ 60 │ B @60 ─ 61' ─ 62' …    start B begins at 60: 61…100 are forgotten
 at the copy      heard A, holds 100: B began below what was received of A ─▶ refused
```
Each start of a primary is listed with the epoch that it began at, durably before it offers a
session; a copy remembers the list that it followed last, durably before it takes anything.
Invariant (I3): what was shipped is remembered by every later start. So a copy never holds an epoch
above the beginning of a start that it has not heard of, unless the primary has lost epochs; numbers
alone do not show it once the primary has sealed other ones in their place.
Deliberately not here: other generations (`cluster.history`), hashes of equal epochs (`session`).
"""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.volume.superblock import StartRecord, Superblock
from geomirror.wan_protocol.messages import StartEntry

STARTS_MAX = 32
"""Starts that are listed: 150 bytes each. A copy that was away for more is compared by hashes."""


def add_start(superblock: Superblock, incarnation: bytes, epoch: int, chain_hash: bytes) -> None:
    """Note that a primary starts here, with `epoch` as its last sealed one."""
    generation = superblock.chain[-1].identity
    if superblock.starts_of != generation:
        superblock.starts_of, superblock.starts = generation, []
    entry = StartRecord(incarnation.hex(), epoch, chain_hash.hex())
    superblock.starts = [*superblock.starts, entry][-STARTS_MAX:]


def start_entries(superblock: Superblock) -> list[StartEntry]:
    """As they are sent, oldest first."""
    return [
        StartEntry(bytes.fromhex(each.identity), each.epoch, bytes.fromhex(each.chain_hash))
        for each in superblock.starts
    ]


def follow_starts(superblock: Superblock, generation: str, starts: Sequence[StartEntry]) -> bool:
    """Remember the list of the primary that is followed now; whether that is a change."""
    found = [
        StartRecord(each.identity.hex(), each.epoch, each.chain_hash.hex())
        for each in starts[-STARTS_MAX:]
    ]
    if (superblock.starts_of, superblock.starts) == (generation, found):
        return False
    superblock.starts_of, superblock.starts = generation, found
    return True


def lost_epochs(
    superblock: Superblock,
    generation: str,
    starts: Sequence[StartEntry],
    epoch: int,
    chain_hash: bytes,
) -> str:
    """What a primary has lost of what is here, in words; "" when nothing shows that it has.

    :param generation: of the primary. :param epoch: the last one here, with its H.
    """
    if superblock.starts_of != generation or not superblock.starts or not starts:
        return ""  # Nothing of this generation was ever heard, or the other side does not know.
    known = {each.identity for each in superblock.starts}
    common = [at for at, each in enumerate(starts) if each.identity.hex() in known]
    if not common and len(starts) >= STARTS_MAX:
        return ""  # It was started so often that the list does not reach back.
    following = common[-1] + 1 if common else 0
    if following >= len(starts):
        return ""
    began = starts[following]
    if began.epoch < epoch:
        return f"it began at epoch {began.epoch}, and has lost {began.epoch + 1}-{epoch}"
    if began.epoch == epoch and began.chain_hash != chain_hash:
        return f"it began at another epoch {epoch} than the one here"
    return ""
