"""The secondary's part in a plain resync: from its begin to the epoch that makes it consistent.

Deliberately not here: the state of one resync (`resync_receiver`), sessions (`secondary`).
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
from geomirror.wan_protocol.resync_receiver import ResyncReceiver
from geomirror.wan_protocol.standing_keeper import StandingKeeper

BLANK: DataState = "blank"
INCONSISTENT: DataState = "inconsistent"
CONSISTENT: DataState = "consistent"
UNKNOWN_EPOCH = -1
"""`consistent_from` while a resync has not told its end."""


class ResyncIntake(StandingKeeper):
    """The part of `Secondary` that is about being made anew."""

    def __init__(self, engine: Engine, limits: Limits, *, primary: str) -> None:
        super().__init__(engine, limits)
        self.primary = primary
        self.resync: ResyncReceiver | None = None
        self._unreported_bytes = 0
        self._applied_reported = engine.applied_epoch

    @property
    def data_state(self) -> str:
        """`blank`, `inconsistent` or `consistent`."""
        return self.engine.superblock.data_state

    def _acknowledge(self, stuck: Incoming | None = None) -> None:
        """Say what is here; `stuck` lacks frames."""
        raise NotImplementedError

    def _refuse_session(self, error: GeomirrorError) -> None:
        """End the session and say why."""
        raise NotImplementedError

    def _apply_done(self, job: Any) -> None:
        super()._apply_done(job)
        self._try_consistent()

    def _resync_began(self, message: ResyncBegin) -> None:
        is_known = message.generation == self.engine.generation and message.epoch >= 0
        if not is_known or len(message.chain_hash) != HASH_BYTES:
            raise RemoteProtocolError(f'primary "{self.primary}" resyncs to another history')
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
        resync = self.resync
        if resync is None:
            return
        busy = {"apply", "grow", "resync", "checkpoint", "sync", "thin"}
        is_applied = self.engine.applied_epoch == self.engine.committed_epoch
        if not resync.is_begun and is_applied and not any(map(self.is_running, busy)):
            # What is durable here is not copied, so it is in the image before it is forgotten.
            begin = resync.begin
            changes = changes_to(begin.volumes, self.engine.sizes.now)
            grow = self.engine.grow_job_for(changes)
            if grow is not None:
                self._run("grow", grow, self._grow_done)
                return
            self.engine.reset_position(
                begin.generation,
                begin.epoch,
                begin.chain_hash,
                data_state=INCONSISTENT,
                changes=changes,
            )
            self.engine.superblock.consistent_from = UNKNOWN_EPOCH
            self._applied_reported, resync.is_begun = begin.epoch, True
        if resync.needs_checkpoint():
            self._checkpoint_wanted = True
        if not self.is_running("resync"):
            job = resync.next_job()
            if job is not None:
                self._run("resync", job, partial(self._resync_written, resync))

    def _resync_written(self, resync: ResyncReceiver, job: Any) -> None:
        # Numbers begin anew with each start of the primary, so they do not tell an old one apart.
        if self.resync is resync:
            self.taken_bytes -= resync.written(job)
            self._acknowledge()
            if job.hostile is not None:
                self._refuse_session(job.hostile)

    def _resync_checkpointed(self, resync: ResyncReceiver) -> None:
        resync.checkpointed()
        self._acknowledge()
        if resync.is_finished:
            self.resync = None
            self._try_consistent()

    def _try_consistent(self) -> None:
        """Consistent from the moment that the end epoch of the resync is applied."""
        superblock = self.engine.superblock
        is_caught_up = self.engine.applied_epoch >= superblock.consistent_from >= 0
        if superblock.data_state == INCONSISTENT and self.resync is None and is_caught_up:
            superblock.data_state = CONSISTENT
            self.engine.marks.became_consistent(self.engine.applied_epoch)
            self._checkpoint_wanted = True
            self._decide(Emit("consistent", {"epoch": self.engine.applied_epoch}))
