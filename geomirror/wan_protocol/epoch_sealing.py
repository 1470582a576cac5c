"""When the primary ends an epoch, and how that becomes a sealed one.

```
 open ──age, size, a mark, a flush, lack of room──▶ cut ─▶ seal (job) ─▶ records ─▶ sync ─▶ sealed
```
One epoch is sealed at a time; the next one is open meanwhile. Deliberately not here: tables and
records (`volume.seal`, `volume.engine`), who waits for what.
"""

from __future__ import annotations

from typing import Any

from geomirror.errors import NoSpaceError, StorageError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.mark_making import MarkMaking

LAG_SAMPLES_MAX = 65536
"""Epochs whose first write's time is remembered; older ones use the time of the cut."""


class EpochSealing(MarkMaking):
    """The part of the primary that cuts and seals."""

    _last_wall_ns: int

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.open_since_ns: int | None = None
        self._epoch_began_ns: dict[int, int] = {}
        self._seal_wanted = False
        self._sealing: Any = None

    def seal_now(self, now_ns: int) -> None:
        """Seal the open epoch without waiting for its age (orderly stop, `wait`, a flush that
        peers must have)."""
        self.now_ns = max(self.now_ns, now_ns)
        self._seal_wanted = self.open_since_ns is not None
        self._pump()

    @property
    def is_sealed(self) -> bool:
        """Everything completed is in a sealed epoch."""
        return (
            self.open_since_ns is None
            and not self._is_sealing
            and self.engine.committed_epoch == self.engine.sealed_epoch
        )

    @property
    def target_epoch(self) -> int:
        """The epoch that will hold everything completed by now."""
        is_sealing = self._sealing is not None or "seal" in self._running
        is_open = self.open_since_ns is not None
        return self.engine.committed_epoch + is_sealing + is_open

    @property
    def _is_sealing(self) -> bool:
        """An epoch is cut and not committed yet."""
        return self._sealing is not None or "seal" in self._running

    def _pump_seal(self) -> None:
        if self._sealing is not None:
            self._complete_seal()
        if self._is_sealing:
            return
        engine, request = self.engine, self._next_mark()
        if request is None and not self._is_seal_due():
            return
        self._seal_wanted = False
        began_ns = self.now_ns if self.open_since_ns is None else self.open_since_ns
        # An epoch ends with a write, so the time of the last write is the time of its cut.
        wall_ns = self._last_wall_ns if request is None else request.wall_ns
        draft = engine.cut(wall_ns, is_mark=request is not None)
        self.open_since_ns = None
        if draft is None:
            return
        if request is not None:
            self._mark_was_cut(request, draft)
        self._epoch_began_ns[draft.number] = began_ns
        while len(self._epoch_began_ns) > LAG_SAMPLES_MAX:
            del self._epoch_began_ns[next(iter(self._epoch_began_ns))]
        self._run("seal", engine.seal_job(draft), self._seal_done)

    def _is_seal_due(self) -> bool:
        engine, limits = self.engine, self.limits
        return self.open_since_ns is not None and (
            self.now_ns >= self.open_since_ns + limits.epoch_age_ns
            or engine.open_epoch_bytes >= limits.epoch_bytes_max
            or engine.open_epoch_entries >= limits.epoch_entries_max // 4
            or self._room_wanted
            or self._seal_wanted
        )

    def _seal_done(self, job: Any) -> None:
        self._sealing = job
        self._complete_seal()

    def _complete_seal(self) -> None:
        """Append the epoch's records; tried again later when the disk is full."""
        try:
            self.engine.complete_seal(self._sealing, self._mark_of(self._sealing.draft.number))
        except NoSpaceError as error:
            self._stall("seal", error)
            return
        except StorageError as error:
            self._fence(error)
            return
        self._sealing = None
        self._sync_wanted = True
