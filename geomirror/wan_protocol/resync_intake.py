"""The secondary's resyncs: from the first word of one to the moment that the copy is whole again.

```
 consistent at E0 ─▶ copied blocks, held at E0 ─▶ end epoch applied ─▶ undo closed ─▶ consistent
 blank ────────────▶ copied blocks, nothing to hold ─▶ end epoch applied ───────────▶ consistent
```
Whatever happens in between (the link, a crash, the next overflow), the copy stays held at E0.
Deliberately not here: frames and their order (`resync_receiver`), undo (`engine_held`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import DataState
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.growth import changes_to, growth_problem
from geomirror.wan_protocol.incoming import HASH_BYTES, Incoming
from geomirror.wan_protocol.messages import ResyncBegin
from geomirror.wan_protocol.resync_answer import DigestJob
from geomirror.wan_protocol.resync_receiver import ResyncReceiver
from geomirror.wan_protocol.standing_keeper import StandingKeeper

BLANK: DataState = "blank"
INCONSISTENT: DataState = "inconsistent"
CONSISTENT: DataState = "consistent"


class ResyncIntake(StandingKeeper):
    """The part of the secondary that is about resyncs."""

    def __init__(self, engine: Engine, limits: Limits, *, primary: str) -> None:
        super().__init__(engine, limits)
        self.primary = primary
        self.resync: ResyncReceiver | None = None
        self._applied_reported = engine.applied_epoch
        self._unreported_bytes = 0

    @property
    def data_state(self) -> str:
        """Of the image alone: `blank`, `inconsistent` or `consistent`."""
        return self.engine.superblock.data_state

    @property
    def is_whole(self) -> bool:
        """This copy has the state of one epoch: in its image, or held during a resync."""
        return self.engine.state_epoch is not None

    def _acknowledge(self, stuck: Incoming | None = None) -> None:
        """Say what is here; `stuck` lacks frames."""
        raise NotImplementedError

    def _refuse_session(self, error: GeomirrorError) -> None:
        """End the session and say why."""
        raise NotImplementedError

    def _resync_began(self, message: ResyncBegin) -> None:
        is_known = message.generation == self.engine.generation and message.epoch >= 0
        if not is_known or len(message.chain_hash) != HASH_BYTES:
            raise RemoteProtocolError(f'primary "{self.primary}" resyncs to another history')
        if not 0 <= message.key < 1 << 64:
            raise RemoteProtocolError(f"a resync with digests of key {message.key}")
        problem = growth_problem(self.engine, changes_to(message.volumes, self.engine.sizes.now))
        if problem:
            raise RemoteProtocolError(f'primary "{self.primary}" resyncs other volumes: {problem}')
        self.forget_incoming()
        self.resync = ResyncReceiver(self.engine, self.limits, message)
        self.taken_bytes = self._unreported_bytes = 0  # As at the primary; it waits for credit.
        self._acknowledge()
        self._decide(Emit("resync_began", {"epoch": message.epoch, "bytes": message.total_bytes}))

    def _pump_role(self) -> None:
        self.commit_complete()
        self.write_marks()
        self.pump_resync()

    def pump_resync(self) -> None:
        """Start whatever is due."""
        self._try_consistent()
        resync = self.resync
        if resync is None:
            return
        busy = {"apply", "grow", "resync", "digest", "checkpoint", "sync", "thin"}
        is_applied = self.engine.applied_epoch == self.engine.committed_epoch
        if not resync.is_begun and is_applied and not any(map(self.is_running, busy)):
            # What is durable here is not copied, so it is in the image before it is forgotten.
            begin = resync.begin
            changes = changes_to(begin.volumes, self.engine.sizes.now)
            grow = self.engine.grow_job_for(changes)
            if grow is not None:
                self._run("grow", grow, self._grow_done)
                return
            self.engine.begin_resync(begin.generation, begin.epoch, begin.chain_hash, changes)
            self._applied_reported, resync.is_begun = begin.epoch, True
        # One that runs already does not say it, so it must not count as the one asked for.
        if not self.is_running("checkpoint") and resync.needs_checkpoint():
            self._checkpoint_wanted = True
        if not self.is_running("resync"):
            job = resync.next_job()
            if job is not None:
                self._run("resync", job, partial(self._resync_written, resync))
        if not self.is_running("digest"):
            digests = resync.next_digests()
            if digests is not None:
                self._run("digest", digests, partial(self._digested, resync))

    def _digested(self, resync: ResyncReceiver, job: DigestJob) -> None:
        if self.resync is resync:  # Else nobody waits for it.
            self._send(resync.answers.done(job))

    def _resync_written(self, resync: ResyncReceiver, job: Any) -> None:
        # Numbers begin anew with each start of the primary, so they do not tell an old one apart.
        if self.resync is resync:
            self.taken_bytes -= resync.written(job)
            self._acknowledge()
            if job.hostile is not None:
                self._refuse_session(job.hostile)

    def _checkpoint_needless(self) -> None:
        # The same resync begins anew after a restart, or nothing else had changed at its end.
        if self.resync is not None and self.resync.is_begun:
            ResyncIntake._applied_moved(self)
            self.pump_resync()

    def _applied_moved(self) -> None:
        resync = self.resync
        if resync is None or not resync.is_begun:
            return
        resync.checkpointed()
        self._acknowledge()
        if resync.is_finished:
            self.resync = None

    def _try_consistent(self) -> None:
        """Consistent from the moment that the end epoch of the resync is applied."""
        superblock = self.engine.superblock
        is_caught_up = self.engine.applied_epoch >= superblock.consistent_from >= 0
        # The next one waits: it is to hold the state that this one has made, not that from before.
        is_copying = self.resync is not None and self.resync.is_begun
        if superblock.data_state != INCONSISTENT or is_copying or not is_caught_up:
            return
        if not self.engine.marks.is_settled:
            self._sync_wanted = True  # Who has the epoch knows its name.
            return
        if self.engine.open_pass is None:
            superblock.data_state = CONSISTENT
            self._became_consistent()
        elif not any(map(self.is_running, ("apply", "resync", "checkpoint"))):
            self._run("resync", self.engine.close_held_job(), self._closed)

    def _closed(self, job: Any) -> None:
        self.engine.complete_close_held(job)
        self._became_consistent()

    def _became_consistent(self) -> None:
        self.engine.marks.became_consistent(self.engine.applied_epoch)
        self._checkpoint_wanted = True
        self._decide(Emit("consistent", {"epoch": self.engine.applied_epoch}))
