"""Metadata contexts of a primary's exports: what backup tools and operators can ask it for.

| context | flag | a range has it when |
| --- | --- | --- |
| `qemu:dirty-bitmap:unsynced-PEER` | 1 | that peer may not hold its newest content durably |
| `x-geomirror:unsynced` | 1 | some peer may not hold it, or there is no peer |
|                        | 2 | no peer is known to hold it: it is only here |
| `x-geomirror:pending`  | 1 | the newest content is not in the backing device yet |

Flags are never missing, and may be there for too much (`wan_protocol.block_status`). A peer that is
no member any more counts as lacking everything: whoever negotiated its context copies too much, and
nothing is lost. Requests of all clients of a resource are answered one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomirror.errors import FencedError, GeomirrorError
from geomirror.limits import BLOCK_BYTES
from geomirror.nbd.contexts import Answer
from geomirror.volume.arrays import Indices
from geomirror.volume.block_runs import BlockRuns, overlaps
from geomirror.wan_protocol.block_status import BACKING, BlockStatus, StatusJob

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner
    from geomirror.wan_protocol.primary import Primary

PEER_CONTEXT = "qemu:dirty-bitmap:unsynced-"
UNSYNCED_CONTEXT = "x-geomirror:unsynced"
PENDING_CONTEXT = "x-geomirror:pending"
STATE_DIRTY = 1
"""Of `qemu:dirty-bitmap:`, as qemu defines it; and the first bit of our own contexts."""
STATE_ONLY_HERE = 2


@dataclass
class _Question:
    """One request of a client."""

    names: Sequence[str]
    volume: int
    offset: int
    length: int
    extents_max: int
    answer: Answer
    holders: list[str]
    peers: list[str]
    """Members when it was asked, for `x-geomirror:unsynced`."""


class AnswerJob:
    """A step towards the answer to a question; `extents` has it after `run`, or is None."""

    def __init__(self, question: _Question, step: StatusJob) -> None:
        self.extents: list[bytes] | None = None
        self._question = question
        self._step = step

    def run(self) -> None:
        """Blocking. :raises StorageError, IntegrityError: an epoch cannot be read."""
        self._step.run()
        lacking, asked = self._step.lacking, self._question
        if lacking is None:
            return
        end = asked.offset + asked.length
        blocks = asked.offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        self.extents = [
            encode_pieces(
                *_pieces(name, lacking, asked.peers, *blocks), asked.offset, end, asked.extents_max
            )
            for name in asked.names
        ]

    def release(self) -> None:
        """It has run."""
        self._step.release()


class StatusContexts:
    """Answers for all volumes of one primary; on the event loop."""

    def __init__(self, runner: ReplicaRunner, primary: Primary) -> None:
        self._runner = runner
        self._primary = primary
        self._status = BlockStatus(primary)
        self._waiting: deque[_Question] = deque()
        self._is_busy = False

    def names(self) -> list[str]:
        """What can be chosen now."""
        peers = [PEER_CONTEXT + peer for peer in self._status.peers]
        return [*peers, UNSYNCED_CONTEXT, PENDING_CONTEXT]

    def describe(
        self,
        volume: int,
        names: Sequence[str],
        offset: int,
        length: int,
        extents_max: int,
        answer: Answer,
    ) -> None:
        """See `nbd.contexts.ContextSource`."""
        question = _Question(names, volume, offset, length, extents_max, answer, [], [])
        self._waiting.append(question)
        self._pump()

    def _pump(self) -> None:
        while self._waiting and not self._is_busy:
            question = self._waiting[0]
            error = self._primary.fenced
            if self._runner.is_stopped:
                error = FencedError("the resource is stopping")
            if error is not None:
                self._waiting.popleft().answer([], error)
                continue
            question.peers = self._status.peers
            question.holders = _holders(question)
            step = self._status.next_job(
                question.holders, question.volume, question.offset, question.length
            )
            self._is_busy = True
            self._runner.run_read(AnswerJob(question, step), self._done)

    def _done(self, job: AnswerJob, error: GeomirrorError | None) -> None:
        self._is_busy = False
        if error is not None or job.extents is not None:
            self._waiting.popleft().answer(job.extents or [], error)
        self._pump()


def _holders(question: _Question) -> list[str]:
    """Whose lacking blocks a question needs."""
    holders = {name[len(PEER_CONTEXT) :] for name in question.names if name.startswith("qemu:")}
    if UNSYNCED_CONTEXT in question.names:
        holders.update(question.peers)
    if PENDING_CONTEXT in question.names:
        holders.add(BACKING)
    return sorted(holders)


def _pieces(
    name: str, lacking: dict[str, BlockRuns], peers: Sequence[str], first: int, end: int
) -> tuple[Indices, Indices]:
    """(first block, flags) of the pieces of [first, end) in one context."""
    if name == UNSYNCED_CONTEXT:
        starts, counts = overlaps([lacking[peer] for peer in peers], first, end)
        is_only_here = counts == len(peers)
        flags = (counts > 0) * STATE_DIRTY | is_only_here * (STATE_DIRTY | STATE_ONLY_HERE)
        return starts, flags.astype(np.int64)
    holder = BACKING if name == PENDING_CONTEXT else name[len(PEER_CONTEXT) :]
    return overlaps([lacking[holder]], first, end)


def encode_pieces(starts: Indices, flags: Indices, offset: int, end: int, count_max: int) -> bytes:
    """Extents of NBD for the bytes [offset, end): (length, flags), u32 big endian each.

    :param starts: first blocks of pieces that cover the range.
    """
    heads = np.concatenate([[True], flags[1:] != flags[:-1]])
    edges = np.maximum(starts[heads] * BLOCK_BYTES, offset)
    extents = np.empty((min(len(edges), count_max), 2), dtype=">u4")
    extents[:, 0] = np.diff(np.append(edges, end))[:count_max]
    extents[:, 1] = flags[heads][:count_max]
    return extents.tobytes()
