"""The starts of primaries as superblock and messages have them; `cluster.history` compares them.

```
 start ─▶ listed with its epoch ─▶ durable ─▶ SessionOpen ─▶ durable at the copy ─▶ SessionAccept
```
A copy keeps the list of the primary that it followed last: what it has is a part of that history,
up to its last epoch. So when a primary offers a session after its disk was put back to an older
state, the copy sees a start that began below what it holds.
Deliberately not here: what follows from it (`session`), who keeps the list durable (`offering`,
`session_intake`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from geomirror.cluster.history import STARTS_MAX, StartLink, StartPoint
from geomirror.errors import RemoteProtocolError
from geomirror.volume.superblock import StartRecord, Superblock
from geomirror.wan_protocol.messages import StartEntry

LISTED_MAX = 1024
"""Starts in a message: a later version may list more than this one keeps."""
EPOCH_MAX = 1 << 63


def add_start(superblock: Superblock, incarnation: bytes, epoch: int, chain_hash: bytes) -> None:
    """Note that a primary starts here, with `epoch` as its last sealed one. Starts of which nothing
    is here any more, or never was, are forgotten: an idle primary may be started for ever."""
    kept = [each for each in superblock.starts if each.epoch < epoch]
    kept.append(StartRecord(incarnation.hex(), epoch, chain_hash.hex()))
    superblock.starts = kept[-STARTS_MAX:]


def start_entries(records: Sequence[StartRecord]) -> list[StartEntry]:
    """As they are sent, oldest first."""
    return [
        StartEntry(bytes.fromhex(each.identity), each.epoch, bytes.fromhex(each.chain_hash))
        for each in records
    ]


def start_points(records: Sequence[StartRecord]) -> list[StartPoint]:
    """As they are compared."""
    return [
        StartPoint(bytes.fromhex(each.identity), each.epoch, bytes.fromhex(each.chain_hash))
        for each in records
    ]


def start_records(starts: Sequence[StartLink]) -> list[StartRecord]:
    """For the superblock: the newest ones."""
    return [
        StartRecord(each.identity.hex(), each.epoch, each.chain_hash.hex())
        for each in starts[-STARTS_MAX:]
    ]


def check_starts(starts: Sequence[StartLink]) -> None:
    """Believe no list that cannot be. :raises RemoteProtocolError: it cannot."""
    epochs = [each.epoch for each in starts]
    is_ascending = all(before < after for before, after in pairwise(epochs))
    is_bounded = len(starts) <= LISTED_MAX and all(0 <= epoch < EPOCH_MAX for epoch in epochs)
    is_whole = all((len(each.identity), len(each.chain_hash)) == (16, 32) for each in starts)
    if not (is_ascending and is_bounded and is_whole):
        raise RemoteProtocolError(f"{len(starts)} starts of a primary that cannot be")
