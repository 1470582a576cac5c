"""What a secondary keeps of what its primary said: the latest standing, beyond the primary's loss.

```
 Announce ─▶ latest, in memory ─┬─ another version ──▶ file, durable ─▶ AnnounceAcknowledge
                                └─ the same, 60 s later, or the link goes down ─▶ file
```
Invariant: a version is acknowledged only once it is durable here, and what is loaded at a start is
written again before it counts as durable. Deliberately not here: what it means (`cluster.verdict`).
"""

from __future__ import annotations

import contextlib

from geomirror.cluster.standing import Standing, decode_standing, encode_standing, is_sane
from geomirror.environment import SECOND
from geomirror.errors import RemoteProtocolError, StorageError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.slot_file import SlotFile, SlotJob
from geomirror.wan_protocol.decisions import Emit, RunJob, SendMessage
from geomirror.wan_protocol.epoch_intake import EpochIntake
from geomirror.wan_protocol.messages import Announce, AnnounceAcknowledge, Message

FILE_NAME = "standing"
KEEP_NS = 60 * SECOND
"""A standing that differs only in its time is written so often: four fdatasyncs each."""


class StandingKeeper(EpochIntake):
    """The part of the secondary that remembers what the primary said."""

    primary: str
    session: int
    is_open: bool

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self._file = SlotFile(engine.store, FILE_NAME)
        self.standing: Standing | None = None
        """The latest one, of whatever generation."""
        self.is_standing_heard = False
        """It was heard in this life: nothing that was received since is forgotten."""
        self.standing_version = 0
        """Of the current generation, durable here; 0: none."""
        self._kept: Standing | None = None
        self._kept_ns = 0
        with contextlib.suppress(StorageError):  # Less is known then, nothing wrong.
            self.standing = decode_standing(self._file.load() or b"")

    def _send(self, message: Message) -> None:
        self._send_to(self.primary, message)

    def _send_to(self, peer: str, message: Message) -> None:
        self._decide(SendMessage(peer, self.session, message))

    def take_standing(self, message: Announce) -> None:
        """Remember what the primary says now.

        :raises RemoteProtocolError: out of bounds, or of another history.
        """
        standing = message.standing
        if not is_sane(standing) or standing.generation != self.engine.generation.hex():
            raise RemoteProtocolError("a standing with impossible fields")
        before = self.standing
        if before is not None and before.order > standing.order:
            return
        self.standing, self.is_standing_heard = standing, True
        if before is None or before.token != standing.token:
            self.standing_version = 0
        if before is None or before.in_sync != standing.in_sync or before.acks != standing.acks:
            fields: dict[str, object] = {
                "in_sync": sorted(standing.in_sync),
                "out_of_sync": sorted(set(standing.acks) - set(standing.in_sync)),
                "epoch": standing.epoch,
            }
            self._decide(Emit("in_sync_changed", fields))

    def keep_standing_now(self) -> None:
        """The primary may never be heard again: what it said last is worth a write."""
        self._kept_ns = self.now_ns - KEEP_NS
        self._pump()

    def _pump_upkeep(self) -> None:
        self._pump_standing()
        super()._pump_upkeep()

    def _pump_standing(self) -> None:
        standing, kept = self.standing, self._kept
        if standing is None or standing == kept or self.is_running("standing"):
            return
        is_changed = kept is None or kept.change != standing.change
        if is_changed or self.now_ns >= self._kept_ns + KEEP_NS:
            self._kept_ns = self.now_ns
            self._kept = standing
            self._run("standing", self._file.write_job(encode_standing(standing)), self._kept_now)

    def _kept_now(self, job: SlotJob) -> None:
        kept = decode_standing(job.body)
        if kept is None or kept.generation != self.engine.generation.hex():
            return
        if kept.version > self.standing_version:
            self.standing_version = kept.version
        if self.is_open:
            self._send(AnnounceAcknowledge(self.session, self.standing_version))

    def _retry_job(self, run: RunJob) -> None:
        if run.kind == "standing":
            self._kept = None
        super()._retry_job(run)
