"""Flushes that wait for peers: the synchronous modes.

```
 FLUSH ─▶ seal at once ─▶ sealed here ─▶ every synchronous peer in sync has the epoch ─▶ answered
                                 └ not within `degrade_after`: that peer is left out, durably, and
                                   the others are told ─▶ answered without it; back in at zero lag
```
Invariants: a flush is answered without a peer only after it is durable here that the peer is left
out, and known to every member that can be told, so whoever promotes it later knows that confirmed
writes may be missing there. A peer that is being copied to counts for nothing. Writes never wait,
only FLUSH and FUA do.
Deliberately not here: what settings mean (`sync_policy`), who is in sync (`in_sync_set`) and how
the members are told (`peer_standings`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import FlushDone
from geomirror.wan_protocol.peer_standings import PeerStandings


@dataclass(slots=True, eq=False)
class WaitingFlush:
    """A flush that waits until enough peers have `epoch`; `since_ns` is when it came."""

    token: object
    epoch: int
    since_ns: int


class PeerFlushes(PeerStandings):
    """The part of the primary that answers flushes by what peers have."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self._waiting: deque[WaitingFlush] = deque()

    @property
    def target_epoch(self) -> int:
        """The epoch that will hold everything completed by now."""
        raise NotImplementedError

    def seal_now(self, now_ns: int) -> None:
        """Seal the open epoch without waiting for its age."""
        raise NotImplementedError

    def flush(self, token: object, now_ns: int) -> None:
        """Answer `token` once everything completed before now is durable here (I2), and held by
        the peers of the policy."""
        if self.fenced is not None:
            super().flush(token, now_ns)
            return
        target = self.target_epoch
        is_alone = not self.policy.is_synchronous
        if is_alone or (not self._waiting and self._is_held(target)):
            # Answered by the next sync, or now: it counts from here on.
            self.confirmed_epoch = max(self.confirmed_epoch, target)
            super().flush(token, now_ns)
            return
        self.now_ns = max(self.now_ns, now_ns)
        self._waiting.append(WaitingFlush(token, target, self.now_ns))
        if target > self.engine.committed_epoch:
            self.seal_now(self.now_ns)
        else:
            self._pump()

    def _required(self) -> set[str]:
        """Synchronous peers without which nothing may be answered."""
        acks = self.policy.acks
        if self.policy.degrade_after_ns is None:
            return set(acks)
        return {name for name in acks if name in self._in_sync or name in self._in_sync_saved}

    def _missing(self, epoch: int) -> list[str]:
        """Required peers that do not have an epoch, as far as copies of it are missing."""
        required = self._required()
        lacking = [
            name
            for name in sorted(required)
            if name not in self.senders or self._reached(self.senders[name]) < epoch
        ]
        held = len(required) - len(lacking)
        wanted = len(required) if self.policy.copies is None else self.policy.copies
        return lacking if held < min(wanted, len(required)) else []

    def _is_held(self, epoch: int) -> bool:
        return self.engine.sealed_epoch >= epoch and not self._missing(epoch) and self.is_told

    def _pump_flushes(self) -> None:
        """Answer what is held; give up on peers that take too long; take back who caught up."""
        self._rejoin()
        self._pump_rules()
        while self._waiting and self._is_held(self._waiting[0].epoch):
            answered = self._waiting.popleft()
            self.confirmed_epoch = max(self.confirmed_epoch, answered.epoch)
            self._decide(FlushDone(answered.token))
        self._degrade()
        self._pump_standings()

    def _degrade(self) -> None:
        after_ns = self.policy.degrade_after_ns
        if not self._waiting or after_ns is None:
            return
        first = self._waiting[0]
        if self.engine.sealed_epoch < first.epoch or self.now_ns < first.since_ns + after_ns:
            return
        for name in self._missing(first.epoch):
            if name in self._in_sync:
                self._leave_out(name, first.epoch)

    def _flush_timer(self) -> int | None:
        """When a waiting flush gives up on a peer, or on telling one."""
        if not self._waiting:
            return None
        epoch, after_ns = self._waiting[0].epoch, self.policy.degrade_after_ns
        if self.engine.sealed_epoch < epoch:
            return None
        missing = self._missing(epoch)
        if not missing:
            return self._told_until()
        may_degrade = after_ns is not None and any(name in self._in_sync for name in missing)
        return self._waiting[0].since_ns + (after_ns or 0) if may_degrade else None

    def _release_everything(self, error: Any) -> None:
        for waiting in self._waiting:
            self._decide(FlushDone(waiting.token, error))
        self._waiting.clear()
