"""Flushes that wait for peers: the synchronous modes.

```
 FLUSH ─▶ seal at once ─▶ sealed here ─▶ every synchronous peer in sync has the epoch ─▶ answered
                                 └ not within `degrade_after`: that peer is out of sync, durably,
                                   ─▶ answered without it; back in at zero lag
```
Invariants: a flush is answered without a peer only after it is durable here that the peer is out
of sync, so whoever promotes it later knows that confirmed writes may be missing there. A peer that
is being copied to counts for nothing. Writes never wait, only FLUSH and FUA do.
Deliberately not here: what settings mean (`sync_policy`); telling the other members who is in sync.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from geomirror.environment import SECOND
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import Emit, FlushDone
from geomirror.wan_protocol.peer_modes import PeerModes
from geomirror.wan_protocol.sender import FOLD, STREAM, Sender
from geomirror.wan_protocol.sync_policy import APPLIED, ASYNCHRONOUS, RECEIVED, SyncPolicy


@dataclass(slots=True, eq=False)
class WaitingFlush:
    """A flush that waits until enough peers have `epoch`; `since_ns` is when it came."""

    token: object
    epoch: int
    since_ns: int


class PeerFlushes(PeerModes):
    """The part of the primary that answers flushes by what peers have."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.policy: SyncPolicy = ASYNCHRONOUS
        self._waiting: deque[WaitingFlush] = deque()
        records = engine.superblock.peers
        self._in_sync = {name for name, record in records.items() if record.in_sync}
        self._in_sync_saved = set(self._in_sync)
        """As the superblock on disk has it."""

    @property
    def target_epoch(self) -> int:
        """The epoch that will hold everything completed by now."""
        raise NotImplementedError

    def seal_now(self, now_ns: int) -> None:
        """Seal the open epoch without waiting for its age."""
        raise NotImplementedError

    def set_policy(self, policy: SyncPolicy, now_ns: int) -> None:
        """Take over changed settings; flushes that wait are judged by the new ones."""
        self.now_ns = max(self.now_ns, now_ns)
        self.policy = policy
        self._pump()

    def is_in_sync(self, peer: str) -> bool:
        """Whether no flush was answered without this synchronous peer since it was at zero lag."""
        return peer in self._in_sync

    @property
    def out_of_sync(self) -> list[str]:
        """Synchronous peers that flushes do not wait for now."""
        return sorted(set(self.policy.acks) - self._in_sync)

    def flush(self, token: object, now_ns: int) -> None:
        """Answer `token` once everything completed before now is durable here (I2), and held by
        the peers of the policy."""
        if self.fenced is not None or not self.policy.is_synchronous:
            super().flush(token, now_ns)
            return
        self.now_ns = max(self.now_ns, now_ns)
        target = self.target_epoch
        if not self._waiting and self._is_held(target):
            super().flush(token, now_ns)
            return
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

    def _reached(self, sender: Sender) -> int:
        """Epoch that a peer has at the level of the policy; -1 without a consistent image, as in
        a resync and until what follows it is applied."""
        is_streamed = sender.mode in (STREAM, FOLD) and sender.name not in self.bitmaps
        if not is_streamed or sender.data_state != "consistent":
            return -1
        match self.policy.level(sender.name):
            case level if level == RECEIVED:
                return sender.received_epoch
            case level if level == APPLIED:
                return sender.applied_epoch
            case _:
                return sender.durable_epoch

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
        return self.engine.sealed_epoch >= epoch and not self._missing(epoch)

    def _pump_flushes(self) -> None:
        """Answer what is held; give up on peers that take too long; take back who caught up."""
        self._rejoin()
        while self._waiting and self._is_held(self._waiting[0].epoch):
            self._decide(FlushDone(self._waiting.popleft().token))
        after_ns = self.policy.degrade_after_ns
        if not self._waiting or after_ns is None:
            return
        first = self._waiting[0]
        if self.engine.sealed_epoch < first.epoch or self.now_ns < first.since_ns + after_ns:
            return
        for name in self._missing(first.epoch):
            if name in self._in_sync:
                self._in_sync.discard(name)
                self._checkpoint_wanted = True
                fields = {"peer": name, "epoch": first.epoch, "after_seconds": after_ns / SECOND}
                self._decide(Emit("sync_degraded", fields))

    def _rejoin(self) -> None:
        for name in self.out_of_sync:
            sender = self.senders.get(name)
            if sender is None or not sender.is_open or sender.is_paused:
                continue
            if self._reached(sender) >= self.engine.sealed_epoch:
                self._in_sync.add(name)
                self._checkpoint_wanted = True
                self._decide(Emit("sync_restored", {"peer": name, "epoch": sender.durable_epoch}))

    def _flush_timer(self) -> int | None:
        """When a waiting flush gives up on a peer."""
        after_ns = self.policy.degrade_after_ns
        if not self._waiting or after_ns is None or not self._may_degrade():
            return None
        return self._waiting[0].since_ns + after_ns

    def _may_degrade(self) -> bool:
        """The oldest flush waits for peers, not for the disk here or a checkpoint."""
        epoch = self._waiting[0].epoch
        return self.engine.sealed_epoch >= epoch and any(
            name in self._in_sync for name in self._missing(epoch)
        )

    # Persistence.

    def _checkpoint_records(self) -> None:
        super()._checkpoint_records()
        for name, record in self.engine.superblock.peers.items():
            record.in_sync = name in self._in_sync

    def _checkpoint_done(self, job: Any) -> None:
        peers = job.superblock.peers
        self._in_sync_saved = {name for name, record in peers.items() if record.in_sync}
        super()._checkpoint_done(job)

    def remove_peer(self, name: str) -> None:
        """Forget the peer; no flush waits for it any more."""
        self._in_sync.discard(name)
        self._in_sync_saved.discard(name)
        super().remove_peer(name)

    def _release_everything(self, error: Any) -> None:
        for waiting in self._waiting:
            self._decide(FlushDone(waiting.token, error))
        self._waiting.clear()
