"""Marks at the primary: an epoch cut at once, named, and told to every peer.

```
 mark ─▶ waiting ─▶ cut (the instant) ─▶ EPOCH with its name ─▶ sync ─▶ durable: answered
                                                                   └──▶ Marks to every open session
```
Invariants: a request is answered when name and epoch are durable here, never before; a peer is told
of a mark before it is sent the commit of its epoch, so that it has both durable together.
Deliberately not here: quiescing applications (the command line does that), who holds which mark.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from geomirror.errors import GeomirrorError, LimitExceededError, RefusedError, WaitTimeoutError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.marks import Mark, check_mark_name
from geomirror.volume.open_epoch import EpochDraft
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.peer_flushes import PeerFlushes


@dataclass(eq=False)
class MarkRequest:
    """A mark that is being made; `is_done` once it is durable, or has failed with `error`."""

    name: str
    wall_ns: int
    mark: Mark | None = None
    """From the cut on."""
    is_done: bool = False
    error: GeomirrorError | None = None


class MarkMaking(PeerFlushes):
    """The part of the primary that makes and removes marks."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self._marks_waiting: deque[MarkRequest] = deque()
        self._marks_cut: deque[MarkRequest] = deque()

    def mark(self, name: str, now_ns: int, wall_ns: int) -> MarkRequest:
        """Name the state of this instant; it is cut now, or as soon as the epoch before is sealed.

        :raises UsageError: the name is not allowed. :raises RefusedError: it is taken.
        :raises LimitExceededError: there are `marks_max` of them.
        """
        check_mark_name(name)
        if self.fenced is not None:
            raise self.fenced
        known = self.engine.marks.latest()
        waiting = {request.name for request in self._marks_waiting}
        waiting |= {request.name for request in self._marks_cut}
        resource = self.engine.superblock.name
        if name in known or name in waiting:
            where = f" at epoch {known[name].epoch}" if name in known else ""
            raise RefusedError(
                f'resource "{resource}" has a mark "{name}" already{where}',
                hint=f'take another name, or run "geomirror mark {resource} {name} --delete"',
            )
        if len(waiting | known.keys()) >= self.limits.marks_max:
            raise LimitExceededError(
                f'resource "{resource}" has {self.limits.marks_max} marks, which is the most',
                hint=f'see "geomirror mark {resource} --list" and delete some',
            )
        request = MarkRequest(name, wall_ns)
        self._marks_waiting.append(request)
        self.now_ns = max(self.now_ns, now_ns)
        self._pump()
        return request

    def withdraw_mark(self, request: MarkRequest) -> bool:
        """Give a request up; False: it is cut already, and comes into being."""
        if request not in self._marks_waiting:
            return request.is_done and request.error is not None
        self._marks_waiting.remove(request)
        name = self.engine.superblock.name
        request.error = WaitTimeoutError(
            f'mark "{request.name}" was not made: resource "{name}" could not seal in time',
            hint=f'see "geomirror status {name}"',
        )
        request.is_done = True
        return True

    def confirm_mark(self, mark: Mark, now_ns: int) -> int:
        """Note that the application was quiet when the mark was cut; durable as `delete_mark`."""
        known = self._settled_mark(mark.name)
        if known[:3] != mark[:3]:
            raise RefusedError(f'mark "{mark.name}" is another one now, at epoch {known.epoch}')
        return self._changed(self.engine.marks.put(known._replace(is_quiesced=True)), now_ns)

    def delete_mark(self, name: str, now_ns: int) -> tuple[Mark, int]:
        """Take a mark back; durable once the journal is durable up to the returned position.

        :raises NotFoundError: there is none.
        """
        mark = self._settled_mark(name)
        return mark, self._changed(self.engine.marks.remove(mark), now_ns)

    def _settled_mark(self, name: str) -> Mark:
        """The mark of this name, if nothing about it is on its way to the disk."""
        mark = self.engine.marks.table.get(name)
        if self.engine.marks.latest().get(name) != mark:
            raise RefusedError(
                f'mark "{name}" is being changed by another command', hint="try again in a moment"
            )
        return mark

    def _changed(self, end_lsn: int, now_ns: int) -> int:
        self.now_ns = max(self.now_ns, now_ns)
        self._sync_wanted = True
        self._pump()
        return end_lsn

    @property
    def _waits_for_sync(self) -> bool:
        return not self.engine.marks.is_settled

    # Called where the primary cuts and seals.

    def _next_mark(self) -> MarkRequest | None:
        """The mark to cut an epoch for now. One that finds the journal full waits as a write."""
        if not self._marks_waiting:
            return None
        if not self.engine.has_room(0):
            self._room_wanted = True
            return None
        return self._marks_waiting[0]

    def _mark_was_cut(self, request: MarkRequest, draft: EpochDraft) -> None:
        self._marks_waiting.remove(request)
        self._marks_cut.append(request)
        generation = self.engine.generation
        request.mark = Mark(request.name, generation, draft.number, draft.wall_ns)

    def _mark_of(self, number: int) -> Mark | None:
        """The name of an epoch that is being sealed."""
        marks = [request.mark for request in self._marks_cut if request.mark is not None]
        return next((mark for mark in marks if mark.epoch == number), None)

    def _sealed_moved(self) -> None:
        super()._sealed_moved()
        sealed = self.engine.sealed_epoch
        while self._marks_cut:
            request = self._marks_cut[0]
            assert request.mark is not None
            if request.mark.epoch > sealed:
                break
            self._marks_cut.popleft().is_done = True
            fields: dict[str, object] = {"mark": request.name, "epoch": request.mark.epoch}
            self._decide(Emit("mark_created", fields))

    def _release_everything(self, error: Any) -> None:
        super()._release_everything(error)
        for request in [*self._marks_waiting, *self._marks_cut]:
            request.error, request.is_done = error, True
        self._marks_waiting.clear()
        self._marks_cut.clear()
