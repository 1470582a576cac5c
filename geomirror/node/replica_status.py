"""What a resource says of itself: the resource object of `status --json`.

Enumerations (documented in `docs/cli.md`): `role` primary, secondary · `state` ok, degraded,
inconsistent, storage_full, fenced, superseded, diverged · a peer's `state` Disconnected, Refused,
Paused, Stream, Fold, Bitmap, Resync, InitialSync · `disk_state` UpToDate, Consistent, Inconsistent,
Unknown.
"""

from __future__ import annotations

from typing import Any

from geomirror.environment import SECOND
from geomirror.errors import NoSpaceError
from geomirror.node.peer_pace import UNKNOWN, Pace
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.resync_intake import BLANK, CONSISTENT
from geomirror.wan_protocol.resync_sender import ResyncSender
from geomirror.wan_protocol.secondary import Secondary
from geomirror.wan_protocol.sender import BITMAP, FOLD, RESYNC, STREAM, Sender

RATE_WINDOW_NS = 10 * SECOND
"""Rates are means over about this long."""


class RateMeter:
    """Mean rate of a growing total, weighted towards the last `RATE_WINDOW_NS`."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._total = 0
        self._at_ns = 0

    def sample(self, total: int, now_ns: int) -> float:
        """Take a reading; returns the rate in units per second."""
        elapsed = now_ns - self._at_ns
        if self._at_ns == 0:
            self._total, self._at_ns = total, now_ns
        elif elapsed >= SECOND // 4:
            rate = (total - self._total) * SECOND / elapsed
            weight = min(1.0, elapsed / RATE_WINDOW_NS)
            self.per_second += (rate - self.per_second) * max(weight, 0.1)
            self._total, self._at_ns = total, now_ns
        return self.per_second


def peer_state(sender: Sender, *, is_initial: bool) -> str:
    """The peer's state as operators know it."""
    if not sender.is_open:
        return "Refused" if sender.refusal else "Disconnected"
    if sender.is_paused:
        return "Paused"
    if sender.mode in (BITMAP, RESYNC) and is_initial:
        return "InitialSync"
    return sender.mode


def peer_disk_state(sender: Sender, sealed_epoch: int) -> str:
    """`UpToDate` only when everything sealed is applied there."""
    if sender.data_state != CONSISTENT and sender.held_epoch >= 0:
        return "Consistent"  # At that epoch, whatever is being copied over it.
    if sender.mode in (BITMAP, RESYNC) and sender.data_state != CONSISTENT:
        return "Inconsistent"
    if sender.data_state == "unknown":
        return "Unknown"
    if sender.data_state != CONSISTENT:
        return "Inconsistent"
    is_current = sender.is_open and sender.applied_epoch >= sealed_epoch
    return "UpToDate" if is_current and sender.mode in (STREAM, FOLD) else "Consistent"


def _position(sender: Sender) -> dict[str, int]:
    """What a promotion of the peer would have."""
    if sender.data_state != CONSISTENT and sender.held_epoch >= 0:
        return {"epoch": sender.held_epoch, "applied_epoch": sender.held_epoch}
    return {"epoch": sender.durable_epoch, "applied_epoch": sender.applied_epoch}


def _gone_back(sender: Sender) -> str:
    if not sender.gone_back_from:
        return ""
    return (
        f"it had epoch {sender.gone_back_from} durable and came back with less: was its disk put "
        "back to an older state? It is brought up to date"
    )


class PrimaryStatus:
    """Builds the status of a primary; keeps the meters that rates need."""

    def __init__(self, core: Primary) -> None:
        self._core = core
        self._churn = RateMeter()
        self._rates: dict[str, RateMeter] = {}
        self._resyncs: dict[str, tuple[ResyncSender, RateMeter]] = {}

    def sample(self, now_ns: int) -> None:
        """Take readings; called about once a second."""
        self._churn.sample(self._core.engine.completed_lsn, now_ns)
        for name, sender in self._core.senders.items():
            meter = self._rates.setdefault(name, RateMeter())
            meter.sample(sender.counters.wire_bytes, now_ns)
        for name, resync in self._core.resyncs.items():
            self._compared(name, resync).sample(resync.compared_bytes, now_ns)

    def _compared(self, name: str, resync: ResyncSender) -> RateMeter:
        """How fast a resync goes through what was dirty; each begins anew."""
        known = self._resyncs.get(name)
        if known is None or known[0] is not resync:
            known = self._resyncs[name] = resync, RateMeter()
        return known[1]

    def covers_seconds(self) -> float | None:
        """How long an outage the rest of the journal covers at the present churn."""
        journal = self._core.engine.journal
        if self._churn.per_second < 1:
            return None
        return round(
            max(0.0, self._bitmap_bound() - journal.bytes_used) / self._churn.per_second, 1
        )

    def state(self) -> str:
        """The resource's own state in one word."""
        core = self._core
        if core.superseded_by:
            return "superseded"
        if core.fenced is not None:
            return "fenced"
        if core.stalled is not None:
            return "storage_full"
        good = all(s.is_open and s.mode == STREAM for s in core.senders.values())
        return "ok" if good and not core.out_of_sync else "degraded"

    def choice(self) -> str:
        """What an operator has to choose, "" for nothing: copies have epochs that the disk here has
        lost."""
        return next((s.refusal for s in self._core.senders.values() if s.has_what_was_lost), "")

    def peers(self, now_ns: int) -> list[dict[str, Any]]:
        """One object a peer."""
        return [self._peer(s, now_ns) for s in self._core.senders.values()]

    def _peer(self, sender: Sender, now_ns: int) -> dict[str, Any]:
        core, engine = self._core, self._core.engine
        kept = core.bitmaps.get(sender.name)
        lag_bytes = engine.bytes_recorded(sender.durable_epoch) + engine.open_epoch_bytes
        if kept is not None:
            lag_bytes = kept.bitmap.count() * 65536 + engine.bytes_recorded(kept.through_epoch)
        lag_seconds = core.lag_seconds(sender, now_ns)
        rate = self._rates.setdefault(sender.name, RateMeter()).per_second
        resync = core.resyncs.get(sender.name)
        pace = self._stream_pace(sender, lag_bytes, rate)
        if resync is not None:
            pace = self._resync_pace(sender, resync)
        return {
            "node": sender.name,
            "state": peer_state(sender, is_initial=kept is not None and kept.is_initial),
            "disk_state": peer_disk_state(sender, engine.sealed_epoch),
            "ack": core.policy.level(sender.name),
            "in_sync": core.is_in_sync(sender.name) if sender.name in core.policy.acks else None,
            "position": _position(sender),
            "lag": {
                "epochs": max(0, engine.sealed_epoch - sender.durable_epoch),
                "bytes": 0 if lag_seconds == 0 else lag_bytes,
                "seconds": round(lag_seconds, 3),
            },
            "rpo_seconds": round(lag_seconds, 3),
            "rate_bytes_per_second": round(rate),
            "logical_bytes": sender.counters.logical_bytes,
            "wire_bytes": sender.counters.wire_bytes,
            "resyncs": sender.counters.resyncs,
            **pace.describe(),
            "resync": None if resync is None else self._described(sender, resync, pace),
            "reason": sender.refusal or _gone_back(sender),
        }

    def _described(self, sender: Sender, resync: ResyncSender, pace: Pace) -> dict[str, Any]:
        """How far a resync is: most of its time may go into comparing what is equal."""
        return {
            "total_bytes": resync.total_bytes,
            "compared_bytes": min(resync.compared_bytes, resync.total_bytes),
            "copied_bytes": resync.copied_bytes,
            "sent_bytes": resync.sent_bytes,
            "compared_bytes_per_second": round(pace.outgoing or 0),
            "eta_seconds": pace.eta_seconds,
            "held_epoch": None if sender.held_epoch < 0 else sender.held_epoch,
        }

    def _resync_pace(self, sender: Sender, resync: ResyncSender) -> Pace:
        engine = self._core.engine
        rate = self._compared(sender.name, resync).per_second
        left = max(0, resync.total_bytes - resync.compared_bytes)
        room = self._bitmap_bound() - engine.bytes_backlog(resync.base_epoch)
        return Pace(left, self._churn.per_second, rate, max(0.0, room))

    def _stream_pace(self, sender: Sender, lag_bytes: int, rate: float) -> Pace:
        counters = sender.counters
        outgoing: float | None = None
        if counters.wire_bytes and sender.mode in (STREAM, FOLD) and sender.is_open:
            outgoing = rate * max(1.0, counters.logical_bytes / counters.wire_bytes)
        return Pace(lag_bytes, self._churn.per_second, outgoing)

    def _bitmap_bound(self) -> float:
        """Bytes of a backlog at which a peer goes to its bitmap."""
        fraction = self._core.limits.bitmap_backlog_fraction
        return self._core.engine.journal.bytes_total * fraction


def behind_object(engine: Engine) -> dict[str, Any] | None:
    """What a promotion left to be done behind the writers; None when that is nothing."""
    if engine.is_returning:
        left, through = engine.bytes_to_return, engine.applied_epoch
        return {"kind": "return", "epoch": through, "bytes_left": left}
    promoted = engine.unapplied_promotion
    if promoted is None:
        return None
    rows = [row for row in engine.unapplied_epochs() if row.number <= promoted]
    left = sum(row.raw_bytes for row in rows)
    return {"kind": "apply", "epoch": promoted, "bytes_left": left}


class SecondaryStatus:
    """Builds the status of a secondary."""

    def __init__(self, core: Secondary) -> None:
        self._core = core
        self._rate = RateMeter()

    def sample(self, now_ns: int) -> None:
        """Take readings."""
        self._rate.sample(self._core.received_total, now_ns)

    def state(self) -> str:
        """The resource's own state in one word."""
        core = self._core
        if core.fenced is not None:
            return "fenced"
        if core.is_outranked:
            return "diverged"
        if isinstance(core.stalled, NoSpaceError):
            return "storage_full"
        if core.stalled is not None:
            return "degraded"
        if not core.is_whole:
            return "inconsistent"
        return "ok" if core.is_open and core.data_state == CONSISTENT else "degraded"

    def disk_state(self) -> str:
        """Of the image here."""
        core = self._core
        if not core.is_whole:
            return "Inconsistent"
        if core.data_state != CONSISTENT:
            return "Consistent"
        is_current = core.is_open and core.engine.applied_epoch >= core.primary_epoch
        return "UpToDate" if is_current else "Consistent"

    def _resync(self) -> dict[str, Any] | None:
        """The one that is under way, whether or not there is a link now."""
        held = self._core.engine.held
        if held is None:
            return None
        resync = self._core.resync
        # The primary knows how far it is; here only what was announced is known.
        return {
            "total_bytes": None if resync is None else resync.begin.total_bytes,
            "compared_bytes": None,
            "copied_bytes": None,
            "sent_bytes": None,
            "compared_bytes_per_second": None,
            "eta_seconds": None,
            "held_epoch": held.epoch,
        }

    def peers(self) -> list[dict[str, Any]]:
        """The primary, as seen from here."""
        core, engine = self._core, self._core.engine
        state = "Stream" if core.is_open else "Refused" if core.refusal else "Disconnected"
        if core.is_open and core.data_state != CONSISTENT:
            is_first = core.data_state == BLANK or not core.is_whole
            state = "InitialSync" if is_first else "Resync"
        return [
            {
                "node": core.primary,
                "state": state,
                "disk_state": "UpToDate" if core.is_open else "Unknown",
                "ack": None,
                "in_sync": None,
                "position": {"epoch": core.primary_epoch},
                "lag": {
                    "epochs": max(0, core.primary_epoch - engine.applied_epoch),
                    "bytes": None,
                    "seconds": None,
                },
                "rpo_seconds": None,
                "rate_bytes_per_second": round(self._rate.per_second),
                "logical_bytes": None,
                "wire_bytes": core.received_total,
                "resyncs": None,
                **UNKNOWN,
                "resync": self._resync(),
                "verify": None,
                "reason": core.refusal,
            }
        ]
